"""From pixels to more pixels: tiles of a size the memory allows, straight into an integer array."""
from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from elan_basicsr import inference
from elan_basicsr.archs.elan_arch import ELAN
from elan_basicsr.data.resize import imresize
from elan_basicsr.errors import UserError
from elan_basicsr.interop.networks import Network
from elan_basicsr.interop.onnx import OnnxNetwork
from elan_basicsr.upscale.image_files import Picture

OVERLAP = 16
"""Input pixels that a tile sees beyond its edges; 32 or 48 bring tiles no nearer to the whole image."""
CPU_BUDGET = 512 * 2**20
"""Bytes for a network's activations on a CPU: larger tiles gain little, and an 8192x8192 result stays under 2 GB."""
DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}


class Enlarger:
    """A network, and how it is run on images.

    Args:
        network: As `load_network` gives it: `net` maps (B, `channels`, h, w) in 0..1 to `scale` times the size.
        device: Where it runs.
        dtype: Precision of the network, a name in `DTYPES`; half precisions through autocast.
        tile, overlap: In input pixels, rounded up to the network's windows; chosen by the memory there is when None.
            A `tile` of 0 takes the image whole.
        self_ensemble: Average over eight flips and rotations of each tile, for eight times the time.
        scale: Enlargement of the result, at most the network's; what is too much is taken back by MATLAB's bicubic.
    """

    def __init__(self, network: Network, *, device: torch.device, dtype: str = 'float32', tile: int | None = None,
                 overlap: int | None = None, self_ensemble: bool = False, scale: float | None = None):
        if network.channels not in ((1, 1), (3, 3)):
            raise UserError(f'{network.name}: makes {network.channels[1]} channels from {network.channels[0]}; '
                            'expected a network for RGB or for grey')
        if isinstance(network.net, OnnxNetwork) and dtype != 'float32':
            raise UserError(f'--dtype {dtype}: an ONNX file has the precision it was exported with; leave it out')
        self.network, self.device, self.dtype = network, device, DTYPES[dtype]
        self.grey = network.channels == (1, 1)
        self.self_ensemble = self_ensemble
        if scale is not None and not 0.01 <= scale <= network.scale:  # false for NaN, too
            raise UserError(f'--scale {scale}: the network enlarges by {network.scale}; expected that or less')
        self.scale = Fraction(network.scale if scale is None else scale).limit_denominator(1000)
        self.window = math.lcm(network.window, inference.WINDOW)
        self.tile = tile if tile is None else _round_up(tile, self.window)
        self.overlap = _round_up(OVERLAP if overlap is None else overlap, self.window)

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of the result."""
        return math.ceil(width * self.scale), math.ceil(height * self.scale)

    def picture(self, picture: Picture, dtype: type, advance: Callable[[int], None] = lambda pixels: None) -> Picture:
        """Enlarge colour and alpha, each by the network: alpha as a grey image of its own.

        Where nothing shows, the colour is replaced by the nearest that does, so that it does not bleed into edges.

        Args:
            picture: The image.
            dtype: Of the result: np.uint8 or np.uint16.
            advance: Called with the number of input pixels done since the last call.
        """
        colour, alpha = picture.colour, picture.alpha
        if alpha is not None:
            if (alpha == alpha.flat[0]).all():
                share = np.iinfo(alpha.dtype).max
                value = round(int(alpha.flat[0]) / share * np.iinfo(dtype).max)
                alpha = np.full(self.size(*alpha.shape[::-1])[::-1], value, dtype)
            else:
                colour = _cover_hidden(colour, alpha)
                alpha = self.pixels(alpha[..., None], dtype)[..., 0]
        return Picture(self.pixels(colour, dtype, advance), alpha, picture.icc, picture.exif, picture.dpi)

    def pixels(self, pixels: np.ndarray, dtype: type, advance: Callable[[int], None] = lambda pixels: None
               ) -> np.ndarray:
        """Enlarge (H, W, 1 or 3), uint8 or uint16, to (H', W', same), `dtype`; see `picture`.

        Raises:
            UserError: Memory does not suffice for the smallest tile.
        """
        h, w = pixels.shape[:2]
        tile = self.tile if self.tile is not None else self._fitting_tile(h, w)
        while True:
            try:
                out = self._in_tiles(pixels, dtype, tile, advance)
                break
            except torch.OutOfMemoryError:
                tile = self.tile = self._smaller(tile or max(h, w))
        return out if self.scale == self.network.scale else imresize(out, self.scale / self.network.scale)

    def _in_tiles(self, pixels: np.ndarray, dtype: type, tile: int, advance: Callable[[int], None]) -> np.ndarray:
        h, w, channels = pixels.shape
        scale = self.network.scale
        out = np.empty((h * scale, w * scale, channels), dtype)
        done = 0
        try:
            for part in inference.cut_tiles(h, w, tile, self.overlap):
                out[part.place(scale)] = self._run(pixels[part.seen], dtype)[part.inner(scale)]
                count = (part.rows[1] - part.rows[0]) * (part.columns[1] - part.columns[0])
                done += count
                advance(count)
        except torch.OutOfMemoryError:
            advance(-done)
            raise
        return out

    def _run(self, pixels: np.ndarray, dtype: type) -> np.ndarray:
        """A network's run on one tile: (h, w, C) integers to (h', w', C) integers, clamped and rounded."""
        planes = pixels.transpose(2, 0, 1).astype(np.float32)
        x = torch.from_numpy(planes).contiguous().to(self.device) / np.iinfo(pixels.dtype).max
        x = x[:, None] if self.grey else x.expand(3, -1, -1)[None].contiguous()
        half = self.dtype != torch.float32
        with torch.inference_mode(), torch.autocast(self.device.type, self.dtype) if half else contextlib.nullcontext():
            y = self._forward(x)
        y = y[:, 0] if self.grey else y[0]
        if not bool(torch.isfinite(y).all()):
            raise UserError(f'{self.network.name}: the network gives values that are not finite; try --dtype float32')
        return _to_integers(y.float(), pixels.shape[2], dtype)

    def _forward(self, x: Tensor) -> Tensor:
        try:
            return inference.forward(self.network.net, x, scale=self.network.scale, self_ensemble=self.self_ensemble)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if 'alloc' in str(error).lower():  # main memory has no exception of its own
                raise torch.OutOfMemoryError(str(error)) from None
            raise UserError(f'{self.network.name}: the network fails on an input of {tuple(x.shape)} '
                            f'({" ".join(str(error).split())[:120]})') from None

    def _fitting_tile(self, h: int, w: int) -> int:
        """0 where the whole image fits into the memory, else the largest tile that does."""
        pixels = self._budget() // _bytes_per_pixel(self.network)
        if h * w <= pixels:
            return 0
        # Four windows, 64 pixels for ELAN: of smaller tiles the seams can be seen in the figures, below 55 dB.
        return max((math.isqrt(pixels) - 2 * self.overlap) // self.window, 4) * self.window

    def _budget(self) -> int:
        if self.device.type == 'cuda':
            return torch.cuda.mem_get_info(self.device)[0] // 2
        return min(CPU_BUDGET, available_memory() // 2)

    def _smaller(self, tile: int) -> int:
        if self.device.type == 'cuda':
            torch.cuda.empty_cache()
        if tile <= self.window:
            raise UserError(f'{self.network.name}: a tile of {tile} pixels does not fit into the memory of '
                            f'{self.device}; close other programs, or use --device cpu')
        return _round_up(tile // 2, self.window)


def _to_integers(y: Tensor, channels: int, dtype: type) -> np.ndarray:
    y = y.clamp(0, 1)
    if channels < y.shape[0]:
        y = y.mean(dim=0, keepdim=True)  # of a grey image, which went in as three equal channels
    y = y.mul(np.iinfo(dtype).max).round()
    return y.permute(1, 2, 0).cpu().numpy().astype(dtype)


def _cover_hidden(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    hidden = alpha == 0
    if not hidden.any():
        return colour
    rows, columns = distance_transform_edt(hidden, return_distances=False, return_indices=True)
    return colour[rows, columns]


def _bytes_per_pixel(network: Network) -> int:
    """A generous estimate of the activations per input pixel, from the widths of the layers.

    ELAN holds about six maps as wide as its widest layer at a time. Other networks may also run wide layers on the
    enlarged image: three maps of 64 channels there.
    """
    widths = [size for weight in network.net.parameters() if weight.ndim > 1 for size in weight.shape[:2]]
    inside = 8 * max(widths, default=256) * 4
    return inside if isinstance(network.net, ELAN) else inside + 3 * 64 * 4 * network.scale**2


def available_memory() -> int:
    """Bytes of main memory that can still be taken, the limit of a container included; 2 GiB where nothing tells."""
    found = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path('/proc/meminfo').read_text().splitlines()
        found.append(int(next(line for line in lines if line.startswith('MemAvailable')).split()[1]) * 1024)
    with contextlib.suppress(OSError, ValueError):
        group = Path('/sys/fs/cgroup')
        found.append(int((group / 'memory.max').read_text()) - int((group / 'memory.current').read_text()))
    return max(min(found, default=2 * 2**30), 0)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
