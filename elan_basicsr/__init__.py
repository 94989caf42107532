"""ELAN, the Efficient Long-Range Attention Network, as a plugin for BasicSR.

`import elan_basicsr` repairs `basicsr` 1.4.2 for the installed versions of its dependencies and registers everything
this package adds with BasicSR's registries: arch `ELAN`, models `ELANModel`, `RealELANNetModel` and
`RealELANGANModel`, dataset `PairedRawLmdbDataset`, metric `calculate_pyiqa`. ELAN is registered with mmengine too, and
with spandrel as soon as a program imports that. Where OpenCV, torch, torchvision or basicsr cannot be loaded it raises
an ImportError whose message says what to type.
"""
from elan_basicsr import dependencies
from elan_basicsr.version import __version__

with dependencies.explained():
    from elan_basicsr import compat
    compat.apply()  # before the first import of basicsr, which does not import without it

    from elan_basicsr.archs import elan_arch
    from elan_basicsr.data import images as _images
    from elan_basicsr.data import raw_lmdb_dataset as _raw_lmdb_dataset  # noqa: F401
    from elan_basicsr.interop import on_import as _on_import
    from elan_basicsr.interop import pyiqa as _pyiqa  # noqa: F401
    from elan_basicsr.models import elan_model as _elan_model  # noqa: F401
    from elan_basicsr.models import real_elan_model as _real_elan_model  # noqa: F401

ELAN = elan_arch.ELAN
_images.serve_toolbox()
_on_import.register()

__all__ = ['ELAN', '__version__']
