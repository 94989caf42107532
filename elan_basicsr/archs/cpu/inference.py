"""The body of ELAN for inference on a CPU in float32, on compiled kernels (`kernels/features.h`, `attention.h`).

Maps are (H, C, pitch): a row of the image is a block of lines, one for each channel, so that a shift is another address
and a 1x1 convolution multiplies runs of pixels by single weights.

BatchNorm is folded into the projection at every call. A cached fold would have to notice changed weights, and updates
through `.data`, as the toolbox's moving average makes them, leave no trace in a tensor's version.
"""
from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from elan_basicsr.archs.cpu.library import LINE, PIXELS, call, packed, windows_together

BAND_NUMBERS = 2**20  # of a map, at most where windows allow: 4 MB


def run_body(body: Iterable[Any], x: Tensor, window_sizes: Sequence[int]) -> Tensor:
    """Run all blocks on a padded map. (B, C, H, W) -> the same, a new tensor."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    with torch.no_grad(), torch.autocast('cpu', enabled=False):
        for image, result in zip(x, out, strict=True):
            result.copy_(_Runner(body, image, window_sizes).run())
    return out


def packed_conv(conv: nn.Conv2d) -> tuple[Tensor, Tensor | None]:
    """A 1x1 convolution as the kernels read it."""
    return packed(conv.weight.flatten(1), conv.bias)


def line_length(width: int) -> int:
    """Numbers in memory for a line of pixels."""
    length = -(-width // LINE) * LINE
    # Lines that are large powers of two apart would meet in the same few sets of the cache.
    return length + LINE if length % 128 == 0 and length >= 256 else length


def folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight (D, C) and bias (D) of a 1x1 convolution followed by BatchNorm on its running statistics."""
    assert norm.running_mean is not None and norm.running_var is not None and conv.bias is not None  # `stand_in` saw
    scale = (norm.running_var + norm.eps).rsqrt()
    scale = scale * norm.weight if norm.affine else scale
    bias = (conv.bias - norm.running_mean) * scale
    return conv.weight.flatten(1) * scale[:, None], bias + norm.bias if norm.affine else bias


class _Runner:
    """Two maps that change places, the queries that modules share, and room for the kernels.

    A module goes down the map in bands of rows, with its local features, its attention and the projection out of it, so
    that what one of them writes is in the cache for the next.
    """

    def __init__(self, body: Iterable[Any], image: Tensor, window_sizes: Sequence[int]):
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

    def _module(self, lfe: Any, gmsa: Any) -> None:
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

    def _groups(self, gmsa: Any) -> list[tuple[int, int, tuple[Tensor, Tensor | None]]]:
        """Window, shift and projection of each group."""
        count = len(self.window_sizes)
        parts = zip(*(part.chunk(count) for part in folded(gmsa.project_in, gmsa.norm)), strict=True)
        return [(window, window // 2 if gmsa.shifted else 0, packed(*part))
                for window, part in zip(self.window_sizes, parts, strict=True)]
