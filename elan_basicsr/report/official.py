"""The authors' network, from a checkout of their repository that the user has; nothing of it is in this package."""
from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from elan_basicsr.errors import UserError

MODULE = 'models.elan_network'
VALUE_RANGE = 255.


def build_official(checkout: str, *, upscale: int, num_feat: int, num_block: int, num_share: int) -> nn.Module:
    """The authors' network with random weights. RGB in 0..255: (B, 3, h, w) -> (B, 3, h * upscale, w * upscale).

    Args:
        checkout: Folder of the authors' repository; it is only read.
        upscale, num_feat, num_block, num_share: As for `ELAN`.

    Raises:
        UserError: The folder is not that repository, or a package that its network uses is not installed.
    """
    file = Path(checkout, *MODULE.split('.')).with_suffix('.py')
    if not file.is_file():
        raise UserError(f'--official {checkout}: has no {file.relative_to(checkout)}; expected a checkout of the '
                        "authors' repository, github.com/xindongzhang/ELAN")
    with _importable(Path(checkout)):
        try:
            network = importlib.import_module(MODULE).ELAN
        except ImportError as error:
            raise UserError(f"--official {checkout}: the authors' network cannot be imported ({error}); "
                            f'pip install {error.name or "what is missing"}') from None
    return network(types.SimpleNamespace(
        scale=upscale, colors=3, window_sizes=[4, 8, 16], m_elan=num_block, c_elan=num_feat, n_share=num_share,
        r_expand=2, rgb_range=VALUE_RANGE))


@contextmanager
def _importable(checkout: Path) -> Iterator[None]:
    """Let the checkout's packages be imported; afterwards theirs are gone and others of the same name are back."""
    before, writes = dict(sys.modules), sys.dont_write_bytecode
    top = MODULE.split('.')[0]
    for name in [name for name in sys.modules if name == top or name.startswith(f'{top}.')]:
        del sys.modules[name]
    sys.modules.update(_stand_ins())
    sys.path.insert(0, str(checkout.resolve()))
    sys.dont_write_bytecode = True
    try:
        yield
    finally:
        sys.dont_write_bytecode = writes
        sys.path.remove(str(checkout.resolve()))
        for name in set(sys.modules) - set(before):
            if name.split('.')[0] in (top, 'timm'):
                del sys.modules[name]
        sys.modules.update({name: module for name, module in before.items() if name.split('.')[0] in (top, 'timm')})


def _stand_ins() -> dict[str, types.ModuleType]:
    """Modules in timm's place where it is missing: the network imports names from it that it does not use."""
    try:
        import timm.models.layers  # noqa: F401
        return {}
    except ImportError:
        layers = types.ModuleType('timm.models.layers')
        vars(layers).update(DropPath=None, to_2tuple=None, trunc_normal_=None)
        return {'timm': types.ModuleType('timm'), 'timm.models': types.ModuleType('timm.models'),
                'timm.models.layers': layers}
