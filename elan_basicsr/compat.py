"""Repairs that make basicsr 1.4.2 import and work on today's torch, torchvision, scipy and numpy.

Nothing installed is edited. Each repair is one function that looks whether upstream is broken, mends it in memory if
so, and otherwise does nothing. `apply()` runs them in order and remembers what was done for `basicsr doctor`. This file
imports nothing of ours, so that it can be run before everything else.
"""
from __future__ import annotations

import importlib
import importlib.util
import sys
import types


def functional_tensor() -> bool:
    """`basicsr.data.degradations` imports `torchvision.transforms.functional_tensor`, removed in torchvision 0.17.

    Upstream: https://github.com/XPixelGroup/BasicSR/issues/663. The one function it needs lives in `functional`.
    """
    name = 'torchvision.transforms.functional_tensor'
    if name in sys.modules or importlib.util.find_spec(name) is not None:
        return False
    from torchvision.transforms import functional
    alias = types.ModuleType(name, 'Stand-in for the module removed in torchvision 0.17.')
    alias.rgb_to_grayscale = functional.rgb_to_grayscale
    sys.modules[name] = alias
    return True


REPAIRS = (functional_tensor,)
applied: dict[str, bool] = {}


def apply() -> None:
    """Run every repair once; safe to call again."""
    for repair in REPAIRS:
        if repair.__name__ not in applied:
            applied[repair.__name__] = repair()
