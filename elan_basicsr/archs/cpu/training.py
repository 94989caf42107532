"""Blocks of ELAN for training on a CPU in float32, on kernels compiled for it (`kernels/gradients.h`).

Maps are (B, H, C, W), with a row's channels as lines. A backward pass has no more from its forward pass than the maps
between modules, the widened map, queries and values before BatchNorm scales them, and what attention gave: attention
maps are made again, window by window, in the cache.
"""
from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from elan_basicsr.archs.cpu.library import LINE, PIXELS, addresses, call, packed, split, vector_lanes, windows_together
from elan_basicsr.archs.stand_in import differentiable_again

ROWS = 16  # at a time, at most, as in kernels/gradients.h

_without_autocast = torch.amp.custom_fwd(device_type='cpu', cast_inputs=torch.float32)
_backward_without_autocast = torch.amp.custom_bwd(device_type='cpu')
_kept = threading.local()


def run_block(block: Any, x: Tensor) -> Tensor:
    """An ELAB on a padded map. (B, C, H, W) -> the same."""
    y = x.transpose(1, 2).contiguous()
    first = block.gmsa[0]
    shared = _Shared(first.window_sizes, first.shifted, len(block.gmsa))
    for i, (lfe, gmsa) in enumerate(zip(block.lfe, block.gmsa, strict=True)):
        y, mean = _Features.apply(y, lfe.conv0.weight, lfe.conv0.bias, lfe.conv1.weight, lfe.conv1.bias)
        y = _Attention.apply(y, mean, gmsa.project_in.weight, gmsa.project_in.bias, gmsa.norm.weight, gmsa.norm.bias,
                             gmsa.project_out.weight, gmsa.project_out.bias, gmsa.norm, shared, i)
    shared.queries = ()
    return differentiable_again(y.transpose(1, 2), block, x)


def _scratch(name: str, shape: Sequence[int], like: Tensor) -> Tensor:
    """Memory for a temporary: a tensor with undefined content, valid until the thread asks for the same name again.

    It is kept, as large as was ever needed: given back, the C library would leave holes of it between tensors that are
    saved, and have the system clear pages anew at every step.
    """
    size, kept = math.prod(shape), vars(_kept)
    if name not in kept or len(kept[name]) < size:
        kept[name] = like.new_empty(size)
    return kept[name][:size].view(shape)


def _room(x: Tensor, each: int, window_sizes: Sequence[int] = (1,)) -> tuple[Tensor | int, ...]:
    """The last arguments of most kernels: memory for the threads, numbers of each, and how threads divide the rows."""
    return _scratch('kernels', (torch.get_num_threads() * each,), x), each, *_split(x, window_sizes)


def _split(x: Tensor, window_sizes: Sequence[int] = (1,)) -> tuple[int, int, int]:
    return split(x.shape[1], len(x), window_sizes)


def _size(x: Tensor) -> tuple[int, int, int, int]:
    b, h, c, w = x.shape
    return b, h, w, c


class _Sums:
    """Memory for what each slot of a kernel on map x sums up, and totals. Rows of matrices are filled up to vectors.

    PyTorch would make zeros and add them with all threads, and wait for one that lost its core: more than they save.
    """

    def __init__(self, x: Tensor, *shapes: tuple[int, ...], window_sizes: Sequence[int] = (1,)):
        rows, pieces, _ = _split(x, window_sizes)
        self.shapes, slots = shapes, len(x) * -(-x.shape[1] // rows) * pieces
        lanes = vector_lanes()
        self.parts = [x.new_empty(slots, *shape[:-1], -(-shape[-1] // lanes) * lanes if len(shape) > 1 else shape[0])
                      for shape in shapes]

    def totals(self, transposed: bool = False) -> list[Tensor]:
        totals = []
        for part, shape in zip(self.parts, self.shapes, strict=True):
            total = part.new_empty(shape[::-1] if transposed else shape)
            rows = shape[0] if len(shape) > 1 else 1
            call('elan_add_slots', part, total, len(part), rows, shape[-1], part.shape[-1], transposed,
                 torch.get_num_threads())
            totals.append(total)
        return totals


class _Features(torch.autograd.Function):
    """Local feature extraction, added to its input. (B, H, C, W) -> the same, and its mean (C)."""

    @staticmethod
    @_without_autocast
    def forward(ctx: Any, x: Tensor, weight0: Tensor, bias0: Tensor, weight1: Tensor,
                bias1: Tensor) -> tuple[Tensor, Tensor]:
        (b, h, _, w), wide = x.shape, len(bias0)
        hidden, out, sums = x.new_empty(b, h, wide, w), torch.empty_like(x), _Sums(x, bias1.shape)
        call('elan_features_forward', x, hidden, out, *_size(x), wide, *packed(weight0.flatten(1), bias0),
             *packed(weight1.flatten(1), bias1), *sums.parts, *_room(x, wide * PIXELS))
        mean = sums.totals()[0] / (b * h * w)
        ctx.mark_non_differentiable(mean)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, hidden, weight0, weight1)
        return out, mean

    @staticmethod
    @_backward_without_autocast
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor, ...]:
        if grad is None:  # `_Block` did the work
            return (None,) * 5
        x, hidden, weight0, weight1 = ctx.saved_tensors
        grad = grad.contiguous()
        c, wide = x.shape[2], hidden.shape[2]
        of_far, of_near = _scratch('of_far', hidden.shape, x), _scratch('of_near', x.shape, x)
        of_x = torch.empty_like(x)
        sums0, sums1 = _Sums(x, (wide, c), (wide,)), _Sums(x, (wide, c), (c,))
        call('elan_features_back', x, hidden, grad, of_far, of_near, of_x, *_size(x), wide,
             packed(weight0.flatten(1).t())[0], packed(weight1.flatten(1).t())[0], *sums0.parts, *sums1.parts,
             *_room(x, ROWS * (wide + 2 * c + LINE) * x.shape[3]))
        (of_weight0, of_bias0), (of_weight1, of_bias1) = sums0.totals(), sums1.totals(transposed=True)
        return of_x, of_weight0.reshape(weight0.shape), of_bias0, of_weight1.reshape(weight1.shape), of_bias1


class _Shared:
    """What the modules of a block pass on to each other: queries, and on the way back what the first needs of all."""

    def __init__(self, window_sizes: Sequence[int], shifted: bool, modules: int):
        self.window_sizes, self.shifted, self.modules = window_sizes, shifted, modules
        self.queries: tuple[Tensor, ...] = ()  # map, scale and offset of the first module, while the forward pass runs
        self.later: list[tuple[Tensor, Tensor, Tensor]] | None = None  # gradients, values, dots for each window size

    def tasks(self, x: Tensor, window: int) -> tuple[int, int]:
        """Over how many tasks a kernel spreads the windows of a map, and tokens of each."""
        b, h, _, w = x.shape
        together = windows_together(window)
        return b * (h // window) * -(-(w // window) // together), together * window**2

    def room(self, x: Tensor) -> tuple[Tensor | int, ...]:
        c, tokens = x.shape[2], max(windows_together(w) * w**2 for w in self.window_sizes)
        attention = (c + 3 * c // len(self.window_sizes)) * tokens + max(self.window_sizes)**2 * 4 * LINE
        return _room(x, max(attention, ROWS * (c + LINE) * x.shape[3]), self.window_sizes)

    def groups(self, x: Tensor, sums: Sequence[Tensor]) -> tuple[Tensor | int, ...]:
        """Map, windows and sums of softmax as kernels take them."""
        return *_size(x), len(self.window_sizes), torch.tensor(self.window_sizes), self.shifted, addresses(sums)

    def begin_back(self, x: Tensor) -> None:
        """Memory for the way back, which blocks hand on to each other: one that stopped half-way keeps its own."""
        if self.later is None:
            d = x.shape[2] // len(self.window_sizes)
            key = (*x.shape, *self.window_sizes, self.modules)
            kept = vars(_kept).pop('later', None)
            if kept is None or kept[0] != key:
                maps: list[tuple[Tensor, Tensor, Tensor]] = []
                kept = key, maps
                for window in self.window_sizes:
                    tasks, tokens = self.tasks(x, window)
                    shape = tasks, self.modules * d, tokens
                    maps.append((x.new_empty(shape), x.new_empty(shape), x.new_empty(tasks, tokens)))
            self.key, self.later = kept

    def end_back(self) -> None:
        _kept.later, self.later = (self.key, self.later), None


class _Attention(torch.autograd.Function):
    """Group-wise multi-scale self-attention in training, added to its input. (B, H, C, W) -> the same."""

    @staticmethod
    @_without_autocast
    def forward(ctx: Any, x: Tensor, mean: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, offset: Tensor,
                out_weight: Tensor, out_bias: Tensor, norm: nn.BatchNorm2d, shared: _Shared, module: int) -> Tensor:
        z, rstd = _project(x, mean, weight.flatten(1), bias, norm)
        values = z, scale * rstd, offset.clone()
        if module == 0:
            shared.queries = values
        attended, out = torch.empty_like(x), torch.empty_like(x)
        sums = [x.new_empty(shared.tasks(x, window)) for window in shared.window_sizes]
        call('elan_attention_forward', *_normalised(shared.queries), *_normalised(values), *shared.groups(x, sums),
             attended, x, out, *packed(out_weight.flatten(1), out_bias), *shared.room(x))
        ctx.shared, ctx.module = shared, module
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, attended, mean, rstd, weight, out_weight, *values, *shared.queries, *sums)
        return out

    @staticmethod
    @_backward_without_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 11
        x, attended, mean, rstd, weight, out_weight, *rest = ctx.saved_tensors
        values, queries, logarithms = rest[:3], rest[3:6], rest[6:]
        shared, module = ctx.shared, ctx.module
        grad = grad.contiguous()
        of_normalised = _scratch('of_normalised', values[0].shape, x)
        shared.begin_back(x)
        out_weights = [packed(part)[0] for part in out_weight.flatten(1).t().chunk(len(shared.window_sizes))]
        n, c = values[0].shape[2], x.shape[2]
        sums = _Sums(x, (c, c), (c,), (n,), (n,), window_sizes=shared.window_sizes)
        later = torch.stack([torch.cat([addresses(each), torch.tensor([shared.modules])]) for each in shared.later])
        call('elan_attention_back', *_normalised(queries), *_normalised(values), *shared.groups(x, logarithms), grad,
             attended, of_normalised, later, module, addresses(out_weights), *sums.parts, *shared.room(x))
        if module == 0:
            shared.end_back()
        of_out_weight, of_out_bias, of_scale, of_offset = sums.totals()
        of_scale = of_scale * rstd
        of_x, of_weight = _norm_back(of_normalised, values[0], values[1], of_scale, of_offset, grad, x, mean, rstd,
                                     weight)
        return (of_x, None, of_weight, torch.zeros_like(rstd), of_scale, of_offset,
                of_out_weight.reshape(out_weight.shape), of_out_bias, None, None, None)


def _normalised(values: Sequence[Tensor]) -> tuple[Tensor | int, ...]:
    """A map before BatchNorm as kernels take it: lines, how many there are, their scale and offset."""
    z, scale, offset = values
    return z, z.shape[2], scale, offset


def _project(x: Tensor, mean: Tensor, matrix: Tensor, bias: Tensor, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """What BatchNorm normalises less its mean, and 1 / standard deviation; updates the statistics. mean: that of x.

    W (x - mean), as W x less W times the mean: the convolution's bias makes no difference.
    """
    count = x.numel() // x.shape[2]
    centre = matrix @ mean
    z = x.new_empty(*x.shape[:2], len(matrix), x.shape[3])
    sums = _Sums(x, (len(matrix),))
    call('elan_project_squares', x, z, *_size(x), len(matrix), *packed(matrix, -centre), *sums.parts, *_split(x))
    var = sums.totals()[0] / count
    batches, running_mean, running_var = norm.num_batches_tracked, norm.running_mean, norm.running_var
    assert batches is not None and running_mean is not None and running_var is not None  # `stand_in` saw to it
    batches.add_(1)
    momentum = 1 / float(batches) if norm.momentum is None else norm.momentum
    running_mean.lerp_(centre + bias, momentum)
    running_var.lerp_(var * (count / max(count - 1, 1)), momentum)
    return z, (var + norm.eps).rsqrt()


def _norm_back(grad: Tensor, z: Tensor, g: Tensor, of_scale: Tensor, of_offset: Tensor, residual: Tensor, x: Tensor,
               mean: Tensor, rstd: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x, with `residual` added, and of weight, from those of what BatchNorm gives, scales by and adds."""
    n, c = len(weight), x.shape[2]
    count = x.numel() // c
    of_x, sums = torch.empty_like(x), _Sums(x, (n, c))
    call('elan_norm_back', grad, z, g, -g * rstd * of_scale / count, -g * of_offset / count, x, mean, residual, of_x,
         *_size(x), n, packed(weight.flatten(1).t())[0], *sums.parts, *_room(x, ROWS * (n + 2 * c + LINE) * x.shape[3]))
    return of_x, sums.totals()[0].reshape(weight.shape)
