"""`basicsr export`: an ELAN as an ONNX file, through torch's exporter, checked in ONNX Runtime."""
from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from elan_basicsr.archs.elan_arch import ELAN
from elan_basicsr.errors import UserError
from elan_basicsr.interop.networks import load_network
from elan_basicsr.interop.onnx import OnnxNetwork
from elan_basicsr.version import __version__

# (batch, height, width) that a dynamic file is checked with: smaller than a window, whole windows, odd, several images.
CHECKED_SIZES = ((1, 1, 1), (1, 7, 40), (1, 32, 48), (2, 33, 47), (1, 64, 17), (3, 25, 16))
OLDEST_TORCH = '2.11'  # torch's own version compares as a version, not as a text
EXAMPLE_SIZE = (2, 20, 35)
TOLERANCE = {'float32': 1e-4, 'float16': 1e-2}


class _Half(nn.Module):
    """Computes in float16, for an image in float32 and back."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net.half()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.half()).float()


def export(source: str | os.PathLike, target: str | os.PathLike, *, opset: int | None = None, dynamic: bool = False,
           size: tuple[int, int] = (128, 128), fp16: bool = False, check: bool = False) -> list[tuple[str, float]]:
    """Write the ELAN in `source` as ONNX: an `input` (batch, channels, height, width) in 0..1 to an `output`.

    Args:
        source: A checkpoint of any form that `load_elan` reads, or a name of the known weights.
        target: The new file, which must not exist and ends in `.onnx`.
        opset: Version of ONNX's operators; the exporter's own by default.
        dynamic: Whether batch, height and width are free; else the file is for one image of `size`.
        size: Height and width of a file that is not dynamic.
        fp16: Weights and computation in float16; input and output stay float32.
        check: Run the file in ONNX Runtime and compare with PyTorch, on six sizes where it is dynamic.

    Returns:
        Of each check the size in words and the largest difference.

    Raises:
        UserError: The source is no ELAN, the target cannot be written, `opset` is none that the exporter knows, or
            results differ by more than TOLERANCE.
    """
    target = Path(target)
    _check(target)
    if min(size) < 1:
        raise UserError(f'--size {size[0]} {size[1]}: expected a height and a width from 1')
    network = load_network(source)
    if not isinstance(network.net, ELAN):
        raise UserError(f'{source}: is a network of the type {network.name}; only ELAN is exported')
    net = network.net
    batch, h, w = EXAMPLE_SIZE if dynamic else (1, *size)
    program = _export(_Half(copy.deepcopy(net)) if fp16 else net, torch.rand(batch, network.channels[0], h, w),
                      opset, dynamic)
    for node in program.model.graph:  # the exporter notes the lines of code, with this machine's paths
        node.metadata_props.clear()
    program.model.metadata_props.update(_metadata(network, source))
    temporary = target.with_name(f'.{target.name}.tmp')
    try:
        program.save(temporary, external_data=False)
        checks = []
        if check:
            sizes = CHECKED_SIZES if dynamic else ((1, *size),)
            checks = _compare(net, temporary, sizes)
            worst = max(difference for _, difference in checks)
            if not worst <= TOLERANCE['float16' if fp16 else 'float32']:
                raise UserError(f'{target}: ONNX Runtime is off by {worst:.1e}, so it was not written: '
                                f'{", ".join(f"{words} {difference:.1e}" for words, difference in checks)}')
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return checks


def _check(target: Path) -> None:
    if target.suffix.lower() != '.onnx':
        raise UserError(f'{target}: expected a name that ends in .onnx')
    if target.exists():
        raise UserError(f'{target}: is there already and is not overwritten; remove it or choose another name')
    if not target.parent.is_dir():
        raise UserError(f'{target}: the folder {target.parent} does not exist')
    if torch.__version__ < OLDEST_TORCH:  # the exporters before give up on a network of any size
        raise UserError(f'export needs torch {OLDEST_TORCH} or later, this is {torch.__version__}')
    try:
        import onnxscript  # noqa: F401, what torch.onnx needs
    except ImportError:
        raise UserError('export needs packages that are missing: pip install onnx onnxscript onnxruntime') from None


def _export(net: nn.Module, x: Tensor, opset: int | None, dynamic: bool):
    from onnxscript import optimizer
    shapes = ({0: 'batch', 2: 'height', 3: 'width'},) if dynamic else None
    with torch.no_grad(), _quiet():
        try:
            program = torch.onnx.export(net, (x,), dynamo=True, dynamic_shapes=shapes, opset_version=opset,
                                        input_names=['input'], output_names=['output'], verbose=False, optimize=False)
        except Exception as error:
            raise UserError(f'torch.onnx could not export it: {" ".join(str(error).split())[:200]}') from error
        assert program is not None  # it is with dynamo=True
        # Of the exporter's own optimizer all but its rewriting by patterns, which takes most of the time and changes
        # nothing that a runtime does not. Without folding OpenVINO cannot read the file.
        optimizer.inline(program.model)
        optimizer.fold_constants(program.model)
        optimizer.remove_unused_nodes(program.model)
    written = program.model.opset_imports['']
    if opset not in (None, written):  # the exporter keeps its own where it cannot convert, and only warns
        raise UserError(f'--opset {opset}: torch.onnx cannot write it; expected one from 18, such as {written}')
    return program


def _metadata(network, source) -> dict[str, str]:
    return {
        'architecture': network.name,
        'scale': str(network.scale),
        'window': str(network.window),
        'colour': 'RGB' if network.channels[0] == 3 else f'{network.channels[0]} channels',
        'range': '0..1',
        'layout': 'NCHW',
        'licence': 'Apache-2.0 for the network; for the weights, what their authors say',
        'source': Path(source).name,
        'producer': f'elan-basicsr {__version__}',
    }


def _compare(net: ELAN, path: Path, sizes) -> list[tuple[str, float]]:
    """Of each size in words the largest difference between ONNX Runtime and PyTorch."""
    written = OnnxNetwork(path)
    generator = torch.Generator().manual_seed(0)
    checks = []
    for batch, h, w in sizes:
        # Smooth, as pictures are: on noise, which none was trained on, a network may amplify what is rounded.
        coarse = torch.rand(batch, net.head.in_channels, -(-h // 4), -(-w // 4), generator=generator)
        x = F.interpolate(coarse, (h, w), mode='bilinear')
        with torch.no_grad():
            checks.append((f'{batch}x{h}x{w}', (written(x) - net(x)).abs().max().item()))
    return checks


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's progress and its advice about its own parts."""
    logger = logging.getLogger('torch.onnx')
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter('ignore')
            yield
    finally:
        logger.setLevel(level)
