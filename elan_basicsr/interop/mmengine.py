"""ELAN in mmengine's registry of models, from which MMagic's and everybody's config files build.

In a config file: `custom_imports = dict(imports=['elan_basicsr'])`, then `dict(type='ELAN', upscale=4)`.
"""
from __future__ import annotations

from mmengine.registry import MODELS

from elan_basicsr.archs.elan_arch import ELAN


def install() -> None:
    """Register ELAN; nothing happens where a model of that name is registered already."""
    if 'ELAN' not in MODELS.module_dict:
        MODELS.register_module(name='ELAN', module=ELAN)
