"""`basicsr explain`: which pixels a network uses, by local attribution maps and effective receptive fields."""
from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tqdm import tqdm

from elan_basicsr.archs.elan_arch import ELAN
from elan_basicsr.data.images import eight_bit, read_bgr
from elan_basicsr.engine.run import on_terminal
from elan_basicsr.errors import UserError
from elan_basicsr.interop.networks import Network
from elan_basicsr.report.compare import load_contenders
from elan_basicsr.report.figures import attribution_figure, check_name

Box = tuple[int, int, int]
"""Left, top and edge of a square in pixels."""
CONTEXT = 128
"""Edge of what is looked at around the patch, in input pixels; memory grows with its square."""
CHUNK_PIXELS = 4096
"""Input pixels that are differentiated at once: one point of the path of 64x64 or more, more of smaller images."""
SIGMA = 1.2
STEPS = 25  # the map then adds up to 0.2 % on trained networks
JITTER = 8
DETECTED = 16
"""Output pixels along the edge of the patch, unless it is given."""


@dataclass
class Attribution:
    """A local attribution map.

    Attributes:
        values: (C, H, W), what each value of the input adds to the detector's.
        difference: The detector's value at the input less that at the path's beginning: the sum of `values`, but for
            the error of the integration.
    """
    values: Tensor
    difference: float

    @property
    def strength(self) -> Tensor:
        """|attribution| of each pixel, (H, W): the colours' values are added first, as its authors do."""
        return self.values.sum(dim=0).abs()


# -------------------------------------------------------------------------------------------- local attribution

def detect_edges(patch: Tensor) -> Tensor:
    """The gradient detector: the sum of gradient magnitudes in a patch, (B, C, h, w) -> (B,), from 2x2 pixels on."""
    dx = patch[..., :-1, 1:] - patch[..., :-1, :-1]
    dy = patch[..., 1:, :-1] - patch[..., :-1, :-1]
    # The square root has no derivative at zero; 1e-10 is far below one grey level squared, 1.5e-5.
    return (dx**2 + dy**2 + 1e-10).sqrt().flatten(1).sum(dim=1)


def local_attribution(net: nn.Module, image: Tensor, box: Box, scale: int, *, steps: int = STEPS, sigma: float = SIGMA,
                      detector: Callable[[Tensor], Tensor] = detect_edges, chunk: int | None = None) -> Attribution:
    """Local attribution map (LAM; Gu and Dong, CVPR 2021): integrated gradients along a path of ever less blur.

    The path begins at the image blurred by a Gaussian of `sigma` pixels, which has lost its edges, and ends at the
    image. The integral of each value's gradient along it is what that value adds to the detector's response.

    Args:
        net: Maps (B, C, H, W) in 0..1 to (B, C', H * scale, W * scale), differentiably.
        image: (1, C, H, W) in 0..1.
        box: The patch, in pixels of the image.
        scale: Enlargement of the network.
        steps: Straight pieces of the path; the gradient is taken in the middle of each.
        sigma: Of the blur at the path's beginning.
        detector: Maps a patch of the output, (B, C', h, w), to (B,).
        chunk: How many pieces are differentiated at once; as many as hold `CHUNK_PIXELS` if not given.
    """
    left, top, edge = (scale * value for value in box)

    def response(x: Tensor) -> Tensor:
        return detector(net(x)[..., top:top + edge, left:left + edge])

    sigmas = torch.linspace(sigma, 0, steps + 1).tolist()
    values = torch.zeros_like(image)
    for first in _chunks(steps, image, chunk):
        points = torch.cat([blur(image, sigmas[k]) for k in [*first, first[-1] + 1]])
        middles = ((points[1:] + points[:-1]) / 2).requires_grad_()
        gradient, = torch.autograd.grad(response(middles).sum(), middles)
        values += (gradient * (points[1:] - points[:-1])).sum(dim=0, keepdim=True)
    with torch.no_grad():
        difference = response(image) - response(blur(image, sigma))
    return Attribution(values[0], float(difference))


def _chunks(count: int, image: Tensor, chunk: int | None) -> Iterator[list[int]]:
    """0..count-1 in runs whose images together have no more than `CHUNK_PIXELS` pixels."""
    size = chunk or max(1, CHUNK_PIXELS // (image.shape[-2] * image.shape[-1]))
    for start in range(0, count, size):
        yield list(range(start, min(start + size, count)))


def blur(image: Tensor, sigma: float) -> Tensor:
    """A Gaussian blur of (B, C, H, W); the image's edge pixels go on beyond it."""
    if sigma == 0:
        return image.clone()
    radius = int(np.ceil(4 * sigma))
    taps = torch.arange(-radius, radius + 1, dtype=torch.float64)
    kernel = torch.exp(-taps**2 / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).to(image)
    channels = image.shape[1]
    x = F.pad(image, (radius,) * 4, mode='replicate')
    x = F.conv2d(x, kernel.view(1, 1, 1, -1).expand(channels, -1, -1, -1), groups=channels)
    return F.conv2d(x, kernel.view(1, 1, -1, 1).expand(channels, -1, -1, -1), groups=channels)


def gini(values: Tensor) -> float:
    """The Gini coefficient of values that are not negative: 0 when all are equal, near 1 when one holds everything."""
    ordered = values.flatten().double().sort().values
    n = ordered.numel()
    if not ordered.sum() > 0:
        return 0.
    ranks = torch.arange(1, n + 1, dtype=torch.float64, device=ordered.device)
    return float((2 * ranks - n - 1) @ ordered / (n * ordered.sum()))


def diffusion_index(attribution: Attribution) -> float:
    """DI = (1 - Gini) * 100 of the strengths (Gu and Dong, eq. 8): larger when more pixels take part.

    It depends on the size of the image, so compare only figures of one image.
    """
    return 100 * (1 - gini(attribution.strength))


# ------------------------------------------------------------------------------------------------ receptive field

def receptive_field(net: nn.Module, image: Tensor, scale: int, *, chunk: int | None = None) -> Tensor:
    """The effective receptive field (Luo et al., NeurIPS 2016): mean |gradient| of an output pixel by its inputs.

    The mean is over 16 output pixels in the middle of the image, spread over 16x16 input pixels since a network with
    windows treats the places in a window differently, each seen from its own place.

    Args:
        net, image, scale, chunk: As in `local_attribution`.

    Returns:
        (K, K) with K odd, the pixel itself in the middle, summed over colours.
    """
    h, w = image.shape[-2:]
    jitter = min(JITTER, min(h, w) // 8)
    step = max(jitter // 2, 1)
    offsets = range(-jitter, jitter, step) if jitter else (0,)
    places = [(h // 2 + dy + (dx + jitter) % step, w // 2 + dx + (dy + jitter) % step)
              for dy in offsets for dx in offsets]
    radius = min(min(y, x, h - 1 - y, w - 1 - x) for y, x in places)
    total = torch.zeros(2 * radius + 1, 2 * radius + 1, device=image.device, dtype=image.dtype)
    for part in _chunks(len(places), image, chunk):
        x = image.repeat(len(part), 1, 1, 1).requires_grad_()
        y = net(x)
        at = [places[k] for k in part]
        seen = [y[i, :, row * scale + scale // 2, column * scale + scale // 2] for i, (row, column) in enumerate(at)]
        gradient, = torch.autograd.grad(torch.stack(seen).sum(), x)
        for one, (row, column) in zip(gradient.abs().sum(dim=1), at, strict=True):
            total += one[row - radius:row + radius + 1, column - radius:column + radius + 1]
    return total / len(places)


def reach(field: Tensor, share: float) -> int:
    """The edge of the smallest central square that holds a share of a receptive field's sum."""
    middle = field.shape[0] // 2
    needed = share * (1 - 1e-9) * field.double().sum()  # parts add up with another rounding than the whole
    for radius in range(middle + 1):
        square = slice(middle - radius, middle + radius + 1)
        if field[square, square].double().sum() >= needed:
            return 2 * radius + 1
    return field.shape[0]


# -------------------------------------------------------------------------------------------------------- explain

def explain(image: str | os.PathLike, weights: Sequence[str], *, out: str | os.PathLike, patch: Box | None = None,
            device: str | None = None, overwrite: bool = False) -> int:
    """Draw attribution maps and receptive fields of networks side by side, and print their figures.

    Args:
        image: The networks' input. Of a large one the surroundings of the patch, 128x128 pixels, are looked at.
        weights: Checkpoints and option files; `NAME=FILE` gives one a name.
        out: The figure, `.png`, `.pdf` or `.svg`.
        patch: Left, top and edge in pixels of the image; 16 output pixels of the most detailed place if not given.
        device: `cpu` or `cuda`; a GPU if there is one when not given.
        overwrite: Whether a file at `out` may be replaced.

    Raises:
        UserError: A file is wrong, the patch is not inside the image, or `out` is there already.
    """
    out = Path(out)
    if out.exists() and not overwrite:
        raise UserError(f'{out}: is there already, and nothing is overwritten unasked; choose another with -o, or give '
                        '--overwrite')
    check_name(out)
    device = device or ('cuda' if torch.cuda.is_available() else 'cpu')
    rgb = eight_bit(read_bgr(image))[..., ::-1].astype(np.float32) / 255
    contenders = load_contenders(weights, device)
    networks = {contender.name: contender.network for contender in contenders if contender.network is not None}
    if len(networks) < len(contenders):
        raise UserError('explain: bicubic has no weights to explain; expected checkpoints or option files')
    edge = max(2, DETECTED // max(network.scale for network in networks.values()))
    box = _checked(patch, rgb, image) if patch else most_detailed(rgb, edge, image)
    rgb, box = _surroundings(rgb, box)
    bar = tqdm(networks.items(), unit='network', disable=not on_terminal(), leave=False)
    columns = [_column(name, network, rgb, box, device) for name, network in bar]
    attribution_figure(rgb, box, columns, out)
    _print(columns, out)
    return 0


def _checked(patch: Box, rgb: np.ndarray, image) -> Box:
    left, top, edge = patch
    height, width = rgb.shape[:2]
    if min(left, top) < 0 or edge < 2 or left + edge > width or top + edge > height or edge > CONTEXT:
        raise UserError(f'--patch {left} {top} {edge}: is not inside {image}, which has {width}x{height} pixels; '
                        f'expected left, top and edge of a square of 2 to {CONTEXT} pixels')
    return patch


def most_detailed(rgb: np.ndarray, edge: int, name: str | os.PathLike = 'the image') -> Box:
    """The square with the most detail (summed |Laplacian|), no nearer to the image's edge than its own edge."""
    height, width = rgb.shape[:2]
    if min(height, width) < edge:
        raise UserError(f'{name}: has {width}x{height} pixels, expected {edge}x{edge} or more; take a larger image')
    detail = cv2.integral(np.abs(cv2.Laplacian(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY), cv2.CV_32F)).astype(np.float64))
    sums = detail[edge:, edge:] - detail[:-edge, edge:] - detail[edge:, :-edge] + detail[:-edge, :-edge]
    margin = edge if min(sums.shape) > 2 * edge else 0
    inner = sums[margin:sums.shape[0] - margin, margin:sums.shape[1] - margin]
    top, left = np.unravel_index(inner.argmax(), inner.shape)
    return int(left) + margin, int(top) + margin, edge


def _surroundings(rgb: np.ndarray, box: Box) -> tuple[np.ndarray, Box]:
    """At most `CONTEXT` pixels each way around the patch, and the patch within them."""
    left, top, edge = box
    starts = [min(max(at + edge // 2 - CONTEXT // 2, 0), max(size - CONTEXT, 0))
              for at, size in ((top, rgb.shape[0]), (left, rgb.shape[1]))]
    part = rgb[starts[0]:starts[0] + CONTEXT, starts[1]:starts[1] + CONTEXT]
    return np.ascontiguousarray(part), (left - starts[1], top - starts[0], edge)


def _column(name: str, network: Network, rgb: np.ndarray, box: Box, device: str) -> dict:
    """What the figure shows of one network."""
    scale = network.scale
    network.net.requires_grad_(False)  # only the input's gradient is wanted
    if isinstance(network.net, ELAN) and rgb.shape[0] * rgb.shape[1] > CHUNK_PIXELS:
        network.net.use_checkpoint = True  # a block's maps are made again rather than kept: a fraction of the memory
    x = torch.from_numpy(rgb.transpose(2, 0, 1)[None].copy()).to(device)
    attribution = local_attribution(network.net, x, box, scale)
    field = receptive_field(network.net, x, scale)
    left, top, edge = (scale * value for value in box)
    with torch.no_grad():
        patch = network.net(x)[0, :, top:top + edge, left:left + edge]
    return {'name': name, 'patch': patch.permute(1, 2, 0).cpu().numpy(),
            'attribution': attribution.strength.cpu().numpy(), 'diffusion_index': diffusion_index(attribution),
            'receptive_field': field.cpu().numpy(), 'half': reach(field, 0.5), 'reach': reach(field, 0.95)}


def _print(columns: Sequence[dict], out: Path) -> None:
    table = Table('network', 'diffusion index', '50 % of the receptive field', '95 % of it')
    for column in columns:
        table.add_row(column['name'], f'{column["diffusion_index"]:.2f}', f'{column["half"]}x{column["half"]} pixels',
                      f'{column["reach"]}x{column["reach"]} pixels')
    console = Console()
    console.print(table)
    console.print(f'Figure: {out}', highlight=False, soft_wrap=True)
