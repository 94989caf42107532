"""From pixels to more pixels: tiles of a size the memory allows, straight into an integer array."""
from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from elan_basicsr import inference
from elan_basicsr.archs.elan_arch import ELAN
from elan_basicsr.data.pictures import Picture
from elan_basicsr.data.resize import imresize
from elan_basicsr.errors import RunLost, UserError
from elan_basicsr.interop.networks import Network
from elan_basicsr.interop.onnx import OnnxNetwork
from elan_basicsr.upscale.replay import Replayed

OVERLAP = 16
"""Input pixels that a tile sees beyond its edges; 32 or 48 bring tiles no nearer to the whole image."""
CPU_BUDGET = 512 * 2**20
"""Bytes for a network's activations on a CPU: larger tiles gain little, and an 8192x8192 result stays under 2 GB."""
LEAST_SCALE = 0.01
_INTEGERS: dict[type, torch.dtype] = {np.uint8: torch.uint8, np.uint16: torch.uint16}
DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}


class Enlarger:
    """A network, and how it is run on images.

    The tile of an image rests on its size and on what memory was free when the object was made. Pieces that turn out
    too large are not tried again, nor are larger ones: an image that comes later is cut as it would have been first.

    Args:
        network: As `load_network` gives it: `net` maps (B, `channels`, h, w) in 0..1 to `scale` times the size.
        device: Where it runs.
        dtype: Precision of the network, a name in `DTYPES`; half precisions through autocast.
        tile, overlap: In input pixels, rounded up to the network's windows; chosen by the memory there is when None.
            A `tile` of 0 takes the image whole.
        self_ensemble: Average over eight flips and rotations of each tile, for eight times the time.
        scale: Enlargement of the result, at most the network's; what is too much is taken back by MATLAB's bicubic.

    Attributes:
        say: Called with a line when tiles become smaller.
    """

    def __init__(self, network: Network, *, device: torch.device, dtype: str = 'float32', tile: int | None = None,
                 overlap: int | None = None, self_ensemble: bool = False, scale: float | None = None):
        if network.channels not in ((1, 1), (3, 3)):
            raise UserError(f'{network.name}: makes {network.channels[1]} channels from {network.channels[0]}; '
                            'expected a network for RGB or for grey')
        if isinstance(network.net, OnnxNetwork) and dtype != 'float32':
            raise UserError(f'--dtype {dtype}: an ONNX file has the precision it was exported with; leave it out')
        self.network, self.device, self.dtype = network, device, DTYPES[dtype]
        self.replayed = Replayed(network.net) if device.type == 'cuda' and isinstance(network.net, ELAN) else None
        self.grey = network.channels == (1, 1)
        self.self_ensemble = self_ensemble
        if scale is not None and not LEAST_SCALE <= scale <= network.scale:  # false for NaN, too
            raise UserError(f'--scale {scale}: the network enlarges by {network.scale}; expected that or less')
        self.scale = Fraction(network.scale if scale is None else scale).limit_denominator(1000)
        self.window = math.lcm(network.window, inference.WINDOW)
        self.tile = tile if tile is None else _round_up(tile, self.window)
        self.overlap = _round_up(OVERLAP if overlap is None else overlap, self.window)
        self.pixels_at_once = _budget(device) // _bytes_per_pixel(network)
        self.too_many_pixels = math.inf
        self.say: Callable[[str], None] = warnings.warn

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
        return replace(picture, colour=self.pixels(colour, dtype, advance), alpha=alpha)

    def pixels(self, pixels: np.ndarray, dtype: type, advance: Callable[[int], None] = lambda pixels: None
               ) -> np.ndarray:
        """Enlarge (H, W, 1 or 3), uint8 or uint16, to (H', W', same), `dtype`; see `picture`.

        Raises:
            UserError: Memory does not suffice for the smallest tile, or the network fails.
            RunLost: The device is of no use to this process any more.
        """
        h, w, channels = pixels.shape
        scale = self.network.scale
        out = np.empty((h * scale, w * scale, channels), dtype)
        tiles = self._tiles_to_try(h, w, channels)
        for tile in tiles:
            if tile != tiles[0]:
                self.say(f'{w}x{h} pixels are too many for {self.device} at once; tiles of {tile} pixels from here on')
            with inference.unless_too_large():
                self._in_tiles(pixels, out, tile, advance)
                break
            self.too_many_pixels = min(self.too_many_pixels, self._most_at_once(h, w, channels, tile))
        else:
            raise UserError(f'{self.network.name}: a tile of {tiles[-1] or max(h, w)} pixels does not fit into the '
                            f'memory of {self.device}; close other programs, or use --device cpu')
        return out if self.scale == scale else imresize(out, self.scale / scale)

    def _tiles_to_try(self, h: int, w: int, channels: int) -> list[int]:
        first = self.tile if self.tile is not None else self._fitting_tile(h, w, channels)
        tiles = inference.tiles_to_try(first, h, w, self.window)
        return [tile for tile in tiles
                if self._most_at_once(h, w, channels, tile) < self.too_many_pixels] or tiles[-1:]

    def _most_at_once(self, h: int, w: int, channels: int, tile: int) -> int:
        """Pixels of the largest piece that the network sees."""
        parts = inference.cut_tiles(h, w, tile, self.overlap)
        return self._planes(channels) * max((part.seen_rows[1] - part.seen_rows[0])
                                            * (part.seen_columns[1] - part.seen_columns[0]) for part in parts)

    def _planes(self, channels: int) -> int:
        return channels if self.grey else 1  # a network for grey takes colours as a batch

    def _fitting_tile(self, h: int, w: int, channels: int) -> int:
        """0 where the whole image fits into the memory, else the largest tile that does."""
        pixels = self.pixels_at_once // self._planes(channels)
        if h * w <= pixels:
            return 0
        # Four windows, 64 pixels for ELAN: of smaller tiles the seams can be seen in the figures, below 55 dB.
        return max((math.isqrt(pixels) - 2 * self.overlap) // self.window, 4) * self.window

    def _in_tiles(self, pixels: np.ndarray, out: np.ndarray, tile: int, advance: Callable[[int], None]) -> None:
        h, w = pixels.shape[:2]
        scale = self.network.scale
        done = 0
        try:
            for part in inference.cut_tiles(h, w, tile, self.overlap):
                out[part.place(scale)] = self._run(pixels[part.seen], part.inner(scale), out.dtype.type)
                count = (part.rows[1] - part.rows[0]) * (part.columns[1] - part.columns[0])
                done += count
                advance(count)
        except Exception:
            advance(-done)
            raise

    def _run(self, pixels: np.ndarray, inner: tuple[slice, slice], dtype: type) -> np.ndarray:
        """The network's run on one tile: (h, w, C) integers to the `inner` part of (h', w', C) integers."""
        half = self.dtype != torch.float32
        try:
            with (torch.inference_mode(),
                  torch.autocast(self.device.type, self.dtype) if half else contextlib.nullcontext()):
                y = self._forward(pixels)[:, inner[0], inner[1]]
                finite = torch.isfinite(y).all()
                result = _to_integers(y.float(), pixels.shape[2], dtype).cpu().numpy()
        except RuntimeError as error:
            if inference.too_large(error):
                raise
            words = ' '.join(str(error).split())[:120]
            if _is_lost(self.device):
                raise RunLost(f'{self.device}: is lost to this process ({words}); give the command again, it leaves '
                              'alone what is done') from None
            raise UserError(f'{self.network.name}: the network fails on {pixels.shape[1]}x{pixels.shape[0]} pixels '
                            f'({words})') from None
        if not finite:  # asked when the result is there, so that the device does not stand still for it
            words = 'try --dtype float32' if half else 'its weights are finite, so this picture is not for it'
            raise UserError(f'{self.network.name}: the network gives values that are not finite; {words}')
        return result

    def _forward(self, pixels: np.ndarray) -> Tensor:
        """(h, w, C) integers to what the network makes of them, (C', h', w')."""
        # A copy, as torch takes neither what is read-only nor a view with negative strides.
        x = torch.from_numpy(pixels.copy()).to(self.device).permute(2, 0, 1).contiguous()
        x = x.float() / np.iinfo(pixels.dtype).max
        x = x[:, None] if self.grey else x.expand(3, -1, -1)[None].contiguous()
        net: Callable[[Tensor], Tensor] = self.replayed or self.network.net
        y = inference.average_of_turns(net, x) if self.self_ensemble else net(x)
        return y[:, 0] if self.grey else y[0]


def _to_integers(y: Tensor, channels: int, dtype: type) -> Tensor:
    """(C', h, w) to (h, w, `channels`), clamped and rounded, on the same device: a quarter of the bytes to transfer."""
    y = y.clamp(0, 1)
    if channels < y.shape[0]:
        y = y.mean(dim=0, keepdim=True)  # of a grey image, which went in as three equal channels
    return y.mul_(np.iinfo(dtype).max).round_().to(_INTEGERS[dtype]).permute(1, 2, 0).contiguous()


def _is_lost(device: torch.device) -> bool:
    """Whether a GPU answers every call of this process with an error, as after an access out of bounds."""
    if device.type == 'cuda':
        try:
            torch.cuda.synchronize(device)
        except RuntimeError:
            return True
    return False


def _cover_hidden(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    hidden = alpha == 0
    if not hidden.any():
        return colour
    rows, columns = distance_transform_edt(hidden, return_distances=False, return_indices=True)
    return colour[rows, columns]


def _budget(device: torch.device) -> int:
    """Bytes for a network's activations: half of what is free, which what torch holds in reserve is as well."""
    if device.type == 'cuda':
        reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return (torch.cuda.mem_get_info(device)[0] + reserve) // 2
    return min(CPU_BUDGET, available_memory() // 2)


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
