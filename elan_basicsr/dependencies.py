"""Why this package cannot be loaded here, as one line that says what to type.

Looked into only after an import has failed, so that a working environment pays nothing for it. Imports nothing that
could be what is missing.
"""
from __future__ import annotations

import contextlib
import importlib
import importlib.util
import re
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata

from elan_basicsr.bootstrap import BASICSR, OPENCV, version
from elan_basicsr.errors import UserError

# In the order in which they stand on each other; what is not named differently installs under its own name.
MODULES = ('numpy', 'torch', 'torchvision', 'cv2', 'scipy', 'lmdb', 'yaml', 'PIL', 'mmengine', 'basicsr')
DISTRIBUTIONS = {'cv2': 'opencv-python', 'yaml': 'pyyaml', 'PIL': 'pillow', 'distutils': '"setuptools<82"',
                 'pkg_resources': '"setuptools<82"', 'skimage': 'scikit-image', 'google.protobuf': 'protobuf'}
# What opencv-python loads of the system, by package manager.
OPENCV_LIBRARIES = {'apt-get': 'apt install libgl1 libglib2.0-0 libxcb1',
                    'dnf': 'dnf install libglvnd-glx glib2 libxcb'}


class CannotLoad(UserError, ImportError):
    """Something that this package stands on is missing or broken; the message says what to type."""


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Turn the failure of an import inside into `CannotLoad`, where it comes from what this package stands on."""
    try:
        yield
    except Exception as error:
        reason = _reason(error)
        if reason is None:
            raise
        if getattr(sys, 'orig_argv', [])[1:3] == ['-m', 'elan_basicsr']:
            # `python -m elan_basicsr` comes here before its command line, which would print the line alone.
            sys.stderr.write(f'basicsr: error: {reason}\n')
            sys.exit(2)
        raise CannotLoad(reason) from None


def _reason(error: Exception) -> str | None:
    for module in MODULES:
        if importlib.util.find_spec(module) is None:
            return _absent(module)
        if module == 'basicsr' and (version('basicsr') or BASICSR).partition('+')[0] != BASICSR:
            return f'basicsr {version("basicsr")} is installed, {BASICSR} was expected; type: basicsr setup'
        if module != 'basicsr':  # which does not load by itself
            try:
                loaded = importlib.import_module(module)
                if module == 'cv2' and not hasattr(loaded, 'imread'):
                    raise ImportError('its folder holds no library, as after one of two OpenCVs was uninstalled')
            except Exception as broken:
                return _broken(module, broken)
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith(('elan_basicsr', 'basicsr')):
        return _absent(error.name)
    return None


def _absent(module: str) -> str:
    if module == 'basicsr':
        return f'BasicSR is not installed for {sys.executable}; type: basicsr setup'
    return f'{module} is not installed for {sys.executable}; type: pip install {DISTRIBUTIONS.get(module, module)}'


def _broken(module: str, error: Exception) -> str:
    text = ' '.join(str(error).split()) or type(error).__name__
    if isinstance(error, ModuleNotFoundError) and error.name and error.name.partition('.')[0] != module:
        return f'{module} needs {error.name}: {_absent(error.name)}'
    if module == 'cv2' and 'cannot open shared object file' in text:
        type_ = next((line for manager, line in OPENCV_LIBRARIES.items() if shutil.which(manager)), None)
        return (f'OpenCV cannot be loaded: {text}; type: ' + (f'{type_}, or without root: ' if type_ else '')
                + 'basicsr setup, for an OpenCV without windows')
    if module == 'cv2':
        return f'OpenCV cannot be loaded: {text}; type: pip install --force-reinstall ' + (
            next((name for name in OPENCV if version(name)), OPENCV[0]))
    if module == 'torchvision' and (built_for := _torch_of_torchvision()):
        return (f'torchvision {version("torchvision")} cannot be loaded beside torch {version("torch")}: {text}; it '
                f'was built for torch {built_for}; type: pip install torch=={built_for}')
    name = DISTRIBUTIONS.get(module, module)
    return f'{module} {version(name)} cannot be loaded: {text}; type: pip install --force-reinstall {name}'


def _torch_of_torchvision() -> str | None:
    """The one release of torch that a torchvision works with, when it is not the one installed."""
    for requirement in metadata.requires('torchvision') or ():
        match = re.match(r'torch\s*==\s*([\d.]+)', requirement.replace('(', ' '))
        if match and (version('torch') or '').partition('+')[0] != match[1]:
            return match[1]
    return None
