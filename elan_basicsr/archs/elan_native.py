"""The body of ELAN for inference on a CPU in float32, on kernels compiled for it (`kernels/`).

They are compiled when the package is installed, where there is a C++ compiler; without them `elan_fast` does the work.
Maps are (H, C, pitch): a row of the image is a block of lines, one for each channel, so that a shift is another address
and a 1x1 convolution multiplies runs of pixels by single weights.
"""
from __future__ import annotations

import ctypes
import hashlib
import math
import os
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elan_basicsr.archs import elan_fast

OUTPUTS = 5  # of a tile, as in kernels/tiles.h
PIXELS = 64  # of a tile, at most
LINE = 16  # numbers that lines are multiples of
BAND_NUMBERS = 2**20  # of a map, at most where windows allow: 4 MB


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they are not installed, not for this processor, or `ELAN_KERNELS` is 0.

    `ELAN_KERNELS=avx2` has a processor with AVX-512 take the kernels for AVX2.
    """
    if os.environ.get('ELAN_KERNELS') == '0':
        return None
    path = Path(__file__).with_name('_kernels.abi3.so')
    try:
        found = ctypes.CDLL(str(path))
    except OSError:  # there is none, or it is one of another machine, in a folder that both see
        return None
    if not _are_of_these_sources(found):
        warnings.warn(f'{path} is not compiled from the sources beside it and left aside, so that the network is '
                      'slower; install the package again as its README says', stacklevel=2)
        return None
    return found if found.elan_lanes() else None


def _are_of_these_sources(kernels: ctypes.CDLL) -> bool:
    """An editable installation keeps the kernels of its day, whose functions may take other arguments."""
    sources = Path(__file__).with_name('kernels')
    if not sources.is_dir():  # in a wheel they come together
        return True
    files = [sources / 'kernels.cpp', *sorted(sources.glob('*.h'))]
    digest = hashlib.sha256(b''.join(file.read_bytes() for file in files)).hexdigest()
    try:
        kernels.elan_sources.restype = ctypes.c_char_p
        return kernels.elan_sources().decode() == digest
    except AttributeError:
        return False


def call(name: str, *arguments: Tensor | int | bool | None) -> None:
    """Call a kernel: tensors as addresses of float32, numbers as integers."""
    getattr(library(), name)(*(ctypes.c_void_p(a.data_ptr() if a is not None else None)
                               if a is None or isinstance(a, Tensor) else ctypes.c_long(a) for a in arguments))


def serves(body: nn.ModuleList, x: Tensor, window_sizes: Sequence[int], plain_types: set[type]) -> bool:
    """Whether `run_body` may stand in for the modules: where `elan_fast` may, in float32, with windows of 4, 8, ...

    Under autocast as well: these kernels take half the time of products in bfloat16, and round nothing.
    """
    return (x.dtype == torch.float32 and all(w % 4 == 0 for w in window_sizes)
            and elan_fast.serves(body, x, window_sizes, plain_types) and library() is not None)


def run_body(body: nn.ModuleList, x: Tensor, window_sizes: Sequence[int]) -> Tensor:
    """Run all blocks on a padded map. (B, C, H, W) -> the same, a new tensor."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    with torch.no_grad(), torch.autocast('cpu', enabled=False):
        for image, result in zip(x, out, strict=True):
            result.copy_(_Runner(body, image, window_sizes).run())
    return out


def packed(weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Weight (D, C) and bias (D) of a 1x1 convolution as kernels read them: (blocks, C, OUTPUTS), (blocks OUTPUTS)."""
    rest = -len(weight) % OUTPUTS
    if rest:
        weight = F.pad(weight, (0, 0, 0, rest))
        bias = F.pad(bias, (0, rest)) if bias is not None else None
    return (weight.unflatten(0, (-1, OUTPUTS)).transpose(1, 2).contiguous(),
            bias.contiguous() if bias is not None else None)


def packed_conv(conv: nn.Conv2d) -> tuple[Tensor, Tensor]:
    """A 1x1 convolution as the kernels read it."""
    return packed(conv.weight.flatten(1), conv.bias)


def line_length(width: int) -> int:
    """Numbers in memory for a line of pixels."""
    length = -(-width // LINE) * LINE
    # Lines that are large powers of two apart would meet in the same few sets of the cache.
    return length + LINE if length % 128 == 0 and length >= 256 else length


def windows_together(window: int) -> int:
    """How many windows a kernel works on at a time."""
    return max(PIXELS // window**2, 1)


class _Runner:
    """Two maps that change places, the queries that modules share, and room for the kernels.

    A module goes down the map in bands of rows, with its local features, its attention and the projection out of it, so
    that what one of them writes is in the cache for the next.
    """

    def __init__(self, body: nn.ModuleList, image: Tensor, window_sizes: Sequence[int]):
        self.body, self.window_sizes = body, window_sizes
        self.c, self.h, self.w = image.shape
        self.width = self.c // len(window_sizes)  # of a group of channels
        self.pitch = line_length(self.w)
        self.size = self.h, self.w, self.pitch, self.c
        self.threads = torch.get_num_threads()
        self.x, self.other = image.new_zeros(2, self.h, self.c, self.pitch)
        self.x[..., :self.w] = image.transpose(0, 1)
        step = math.lcm(*window_sizes)
        self.band = max(BAND_NUMBERS // (self.c * self.pitch * step), 1) * step
        # Attended rows wait for those of the largest windows; the first ones, for shifted windows that wrap around.
        self.kept = min(self.band, self.h) + max(window_sizes), max(window_sizes) // 2
        self.attended = image.new_empty(sum(self.kept), self.c, self.pitch)
        hidden = max(lfe.conv0.out_channels for block in body for lfe in block.lfe)
        self.room_for_features = hidden * (3 * self.pitch + PIXELS)
        tokens = max(windows_together(w) * w**2 for w in window_sizes)
        self.room_for_attention = (self.c + 3 * self.width) * tokens + max(window_sizes)**2 * 2 * LINE
        self.scratch = image.new_empty(self.threads * max(self.room_for_features, self.room_for_attention))
        self.queries = [self._room_for_queries(w) for w in window_sizes]

    def _room_for_queries(self, window: int) -> Tensor | None:
        if all(len(block.gmsa) == 1 for block in self.body):
            return None
        together = windows_together(window)
        tasks = self.h // window * -(-(self.w // window) // together)
        return self.x.new_empty(tasks, self.width, together * window**2)

    def run(self) -> Tensor:
        """All blocks; the result (C, H, W) is a view of a map."""
        for block in self.body:
            for lfe, gmsa in zip(block.lfe, block.gmsa, strict=True):
                self._module(lfe, gmsa)
        return self.x[..., :self.w].transpose(0, 1)

    def _module(self, lfe: nn.Module, gmsa: nn.Module) -> None:
        """Add local features, then attention, to the map.

        Windows are attended to once the rows they lie on have their local features, and rows are projected once all
        windows that they lie in are done. Where windows are shifted, the first rows of the map belong to the last ones.
        """
        features = lfe.conv0.out_channels, *packed_conv(lfe.conv0), *packed_conv(lfe.conv1)
        groups, project_out = self._groups(gmsa), packed_conv(gmsa.project_out)
        attended = [0] * len(groups)  # rows of windows
        projected = top = max(shift for _, shift, _ in groups)
        for start in range(0, self.h, self.band):
            end = min(start + self.band, self.h)
            call('elan_features', self.x, self.other, *self.size, start, end, *features, self.scratch,
                 self.room_for_features, self.threads)
            ready = []
            for i, (window, shift, weights) in enumerate(groups):
                first, last = attended[i], (end - (0 if end == self.h else shift)) // window
                call('elan_attend', self.other, self.attended[:, i * self.width:], *self.kept, self.queries[i],
                     gmsa.shares, *self.size, window, shift, first, last, self.width, *weights, self.scratch,
                     self.room_for_attention, self.threads)
                attended[i] = last
                ready.append(last * window + shift)
            until = self.h + top if end == self.h else min(ready)
            call('elan_add_product', self.attended, *self.kept, self.other, *self.size, projected, until,
                 *project_out, self.threads)
            projected = until
        self.x, self.other = self.other, self.x

    def _groups(self, gmsa: nn.Module) -> list[tuple[int, int, tuple[Tensor, Tensor]]]:
        """Window, shift and projection of each group. BatchNorm is folded anew at every call, as in `elan_fast`."""
        weight, bias = elan_fast.folded(gmsa.project_in, gmsa.norm)
        count = len(self.window_sizes)
        return [(window, window // 2 if gmsa.shifted else 0, packed(of_group, bias_of_group)) for
                window, of_group, bias_of_group in zip(self.window_sizes, weight.t().chunk(count), bias.chunk(count),
                                                       strict=True)]
