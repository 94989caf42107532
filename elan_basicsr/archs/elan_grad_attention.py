"""Attention of a training step on a CPU: cut, attend and paste in one autograd function that keeps no maps.

Attention maps are made for a few windows at a time, small enough for the cache, in the forward pass and again in the
backward pass. Maps of pixels are (B, H, W, C), so that windows are cut in runs of channels; the cyclic shift is part of
cutting and pasting.
"""
from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.autograd.function import FunctionCtx, once_differentiable

# Numbers of the attention maps that are made at a time: 2 MB of float32.
NUMBERS_AT_A_TIME = 2**19


_local = threading.local()


def scratch(name: str, shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Memory for a temporary: a tensor with undefined content, valid until the thread asks for the same name again.

    A CPU's is kept, as large as was ever needed: given back, the C library would leave holes of it between tensors that
    are saved, and have the system clear pages anew at every step. Other devices' allocators keep memory themselves.
    """
    dtype = dtype or like.dtype
    if like.device.type != 'cpu':
        return like.new_empty(shape, dtype=dtype)
    kept = vars(_local)
    size, key = math.prod(shape), f'{name} {dtype}'
    if key not in kept or len(kept[key]) < size:
        kept[key] = like.new_empty(size, dtype=dtype)
    return kept[key][:size].view(shape)


class SharedAttention:
    """What the modules of a block that share their attention pass on to each other."""

    def __init__(self, window_sizes: Sequence[int], shifted: bool):
        self.window_sizes = window_sizes
        self.shifted = shifted
        self.queries: list[Tensor] = []  # while the block's forward pass runs
        self.later: list[list[tuple[Tensor, Tensor]]] = []  # gradients and values of later modules, by group of windows
        self.forget()

    def forget(self) -> None:
        """Drop what later modules left for the first one's backward pass."""
        self.later = [[] for _ in self.window_sizes]


class Attend(torch.autograd.Function):
    """softmax(q qᵀ) v in windows of each group of channels.

    The first module of a block gives queries and values, (B, H, W, 2C), later ones values, (B, H, W, C); the result is
    (B, H, W, C). The gradient of the queries is computed in the first module's backward pass, for all modules at once.
    """

    @staticmethod
    @torch.amp.custom_fwd(device_type='cpu')
    def forward(ctx: FunctionCtx, x: Tensor, shared: SharedAttention) -> Tensor:
        ctx.shared, ctx.first = shared, not shared.queries
        sizes, count = shared.window_sizes, len(shared.window_sizes)
        values = []
        for group, window in zip(x.chunk(count, dim=3), sizes, strict=True):
            if ctx.first:
                q, group = group.chunk(2, dim=3)
                shared.queries.append(_cut(q, window, shared.shifted * ((window + 1) // 2)))
            values.append(_cut(group, window, shared.shifted * ((window + 1) // 2)))
        out = x.new_empty(*x.shape[:3], values[0].shape[-1] * count)
        for q, v, window, place in zip(shared.queries, values, sizes, out.chunk(count, dim=3), strict=True):
            result = scratch('result', v.shape, v)
            for part in _parts(q):
                torch.bmm(_attention(q[part]), v[part], out=result[part])
            _paste(result, place, window, shared.shifted * (window // 2))
        ctx.save_for_backward(*shared.queries, *values)
        return out

    @staticmethod
    @once_differentiable
    @torch.amp.custom_bwd(device_type='cpu')
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        saved, shared = ctx.saved_tensors, ctx.shared
        count = len(saved) // 2
        result = grad.new_empty(*grad.shape[:3], grad.shape[3] * (2 if ctx.first else 1))
        groups = zip(saved[:count], saved[count:], grad.chunk(count, dim=3), result.chunk(count, dim=3),
                     shared.window_sizes, strict=True)
        for i, (q, v, of_out, of_in, window) in enumerate(groups):
            of_out = _cut(of_out, window, shared.shifted * (window // 2))
            of_v = scratch('of_v', v.shape, v)
            shift = shared.shifted * ((window + 1) // 2)
            if ctx.first:
                of_q = scratch('of_q', q.shape, q)
                _backward_of_first(q, [(of_out, v), *shared.later[i]], of_q, of_v)
                place_q, of_in = of_in.chunk(2, dim=3)
                _paste(of_q, place_q, window, shift)
            else:
                for part in _parts(q):
                    torch.bmm(_attention(q[part]).transpose(1, 2), of_out[part], out=of_v[part])
                if not shared.later[i]:
                    # A backward pass that ends before it reaches the first module must leave nothing for the next one.
                    Variable._execution_engine.queue_callback(shared.forget)
                shared.later[i].append((of_out, v))
            _paste(of_v, of_in, window, shift)
        if ctx.first:
            shared.forget()
        return result, None


def _backward_of_first(q: Tensor, pairs: list[tuple[Tensor, Tensor]], of_q: Tensor, of_v: Tensor) -> None:
    """Gradients of queries and of the first module's values, from (gradient of the result, values) of each module."""
    for part in _parts(q):
        attention = _attention(q[part])
        torch.bmm(attention.transpose(1, 2), pairs[0][0][part], out=of_v[part])
        of_map = scratch('of_map', attention.shape, attention)
        for i, (of_out, v) in enumerate(pairs):
            torch.baddbmm(of_map, of_out[part], v[part].transpose(1, 2), beta=min(i, 1), out=of_map)
        of_logits = torch._softmax_backward_data(of_map, attention, -1, attention.dtype, grad_input=of_map)
        # Queries are keys as well.
        torch.bmm(of_logits, q[part], out=of_q[part])
        of_q[part].baddbmm_(of_logits.transpose(1, 2), q[part])


def _parts(tokens: Tensor) -> Iterator[slice]:
    """Windows whose maps are made together."""
    number, size = tokens.shape[:2]
    step = max(NUMBERS_AT_A_TIME // size**2, 1)
    return (slice(start, min(start + step, number)) for start in range(0, number, step))


def _attention(q: Tensor) -> Tensor:
    """softmax(q qᵀ) of (N, window², C)."""
    logits = torch.bmm(q, q.transpose(1, 2), out=scratch('map', (*q.shape[:2], q.shape[1]), q))
    return torch.softmax(logits, dim=-1, out=logits)


def _cut(image: Tensor, window: int, shift: int) -> Tensor:
    """Windows of a map, `shift` further to the right and below on the torus: (B, H, W, C) -> (N, window², C)."""
    b, h, w, c = image.shape
    windows = image.new_empty(b, h // window, w // window, window, window, c)
    for of_map, of_windows in _pieces(image, windows, shift):
        of_windows.copy_(of_map)
    return windows.view(-1, window**2, c)


def _paste(tokens: Tensor, image: Tensor, window: int, shift: int) -> None:
    """Write windows (N, window², C) to where `_cut` takes them from."""
    b, h, w, c = image.shape
    for of_map, of_windows in _pieces(image, tokens.view(b, h // window, w // window, window, window, c), shift):
        of_map.copy_(of_windows)


def _pieces(image: Tensor, windows: Tensor, shift: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Parts of the map and of its windows that belong to each other, both (B, rows of windows, columns, y, x, C)."""
    window = windows.shape[3]
    for rows, down, y in _spans(image.shape[1], window, shift):
        for columns, across, x in _spans(image.shape[2], window, shift):
            part = image[:, rows, columns]
            part = part.unflatten(2, (across.stop - across.start, -1)).unflatten(1, (down.stop - down.start, -1))
            yield part.transpose(2, 3), windows[:, down, across, y, x]


def _spans(size: int, window: int, shift: int) -> list[tuple[slice, slice, slice]]:
    """Along one edge: pixels, the windows they belong to, their places in these windows. The last window wraps."""
    number, edge = size // window, size - window + shift
    if not shift:
        return [(slice(0, size), slice(0, number), slice(0, window))]
    spans = [(slice(edge, size), slice(number - 1, number), slice(0, window - shift)),
             (slice(0, shift), slice(number - 1, number), slice(window - shift, window))]
    if number > 1:
        spans.append((slice(shift, edge), slice(0, number - 1), slice(0, window)))
    return [span for span in spans if span[0].start < span[0].stop]
