"""The body of ELAN for inference on a CPU, on compiled kernels (`kernels/body.h`).

Maps are (H, C, pitch): a row of the image is a block of lines, one for each channel, so that a shift is another address
and a 1x1 convolution multiplies runs of pixels by single weights.

Under autocast to bfloat16, where the processor multiplies it, local features, values, the weighted sums of attention
and the projection behind it take their factors in bfloat16. Sums, queries, logits, softmax and all maps are float32.

BatchNorm is folded into the projection at every call. A cached fold would have to notice changed weights, and updates
through `.data`, as the toolbox's moving average makes them, leave no trace in a tensor's version.
"""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from elan_basicsr.archs.cpu.library import LINE, PIXELS, addresses, call, has_bf16, packed, split, windows_together

CHANNELS_IN_PAIRS = 10  # or a multiple: the two of a pair are shifted alike, in one of five groups
NUMBERS_AT_ONCE = 2**24  # of maps that a call computes, which cannot be interrupted; a module at least


def run_body(body: Iterable[Any], x: Tensor, window_sizes: Sequence[int]) -> Tensor:
    """Run all blocks on a padded map. (B, C, H, W) -> the same, a new tensor."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    bf16 = torch.is_autocast_enabled('cpu') and torch.get_autocast_dtype('cpu') == torch.bfloat16 and has_bf16()
    with torch.no_grad(), torch.autocast('cpu', enabled=False):
        for image, result in zip(x, out, strict=True):
            result.copy_(_Runner(body, image, window_sizes, bf16).run())
    return out


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
    """Two maps that change places, the queries that modules share, and room for the kernels."""

    def __init__(self, body: Iterable[Any], image: Tensor, window_sizes: Sequence[int], bf16: bool):
        self.modules = [pair for block in body for pair in zip(block.lfe, block.gmsa, strict=True)]
        self.shared = any(len(block.gmsa) > 1 for block in body)
        self.window_sizes = window_sizes
        self.c, self.h, self.w = image.shape
        self.width = self.c // len(window_sizes)  # of a group of channels
        self.pitch = line_length(self.w)
        self.x, self.other = image.new_zeros(2, self.h, self.c, self.pitch)
        self.x[..., :self.w] = image.transpose(0, 1)
        self.hidden = self.modules[0][0].conv0.out_channels
        self.bf16 = bf16 and self.c % CHANNELS_IN_PAIRS == self.hidden % CHANNELS_IN_PAIRS == 0
        tokens = max(windows_together(w) * w**2 for w in window_sizes)
        self.room = max(self.hidden * (3 * self.pitch + PIXELS),
                        (self.c + 3 * self.width + self.c // 2) * tokens + max(window_sizes)**2 * 2 * LINE)
        self.split = split(self.h, window_sizes=window_sizes)
        *_, threads = self.split
        self.scratch = image.new_empty(threads * self.room)

    def run(self) -> Tensor:
        """All blocks; the result (C, H, W) is a view of a map."""
        weights = [self._weights(lfe, gmsa) for lfe, gmsa in self.modules]
        table = torch.stack([torch.cat([addresses(both), torch.tensor([gmsa.shares, gmsa.shifted])])
                             for (both, _), (_, gmsa) in zip(weights, self.modules, strict=True)])
        groups = torch.stack([addresses(parts) for _, parts in weights])
        queries = [self._room_for_queries(window) if self.shared else None for window in self.window_sizes]
        common = (self.h, self.w, self.pitch, self.c, self.hidden, len(self.window_sizes),
                  torch.tensor(self.window_sizes), addresses(queries))
        at_once = max(NUMBERS_AT_ONCE // self.x.numel(), 1)
        for first in range(0, len(self.modules), at_once):
            count = min(at_once, len(self.modules) - first)
            call('elan_body', self.x, self.other, *common, table[first:], groups[first:], count, self.bf16,
                 self.scratch, self.room, *self.split)
            if count % 2:
                self.x, self.other = self.other, self.x
        return self.x[..., :self.w].transpose(0, 1)

    def _room_for_queries(self, window: int) -> Tensor:
        together = windows_together(window)
        tasks = self.h // window * -(-(self.w // window) // together)
        return self.x.new_empty(tasks, self.width, together * window**2)

    def _weights(self, lfe: Any, gmsa: Any) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Of the convolutions of local features and out of attention, and of the projection into each group."""
        count = len(self.window_sizes)
        convolutions = [part for conv in (lfe.conv0, lfe.conv1, gmsa.project_out)
                        for part in packed(conv.weight.flatten(1), conv.bias, self.bf16)]
        projections: list[Tensor | None] = []
        for weight, bias in zip(*(part.chunk(count) for part in folded(gmsa.project_in, gmsa.norm)), strict=True):
            queries = len(weight) - self.width
            projections += packed(weight[:queries], bias[:queries]) if queries else (None, None)
            projections += packed(weight[queries:], bias[queries:], self.bf16)
        return convolutions, projections
