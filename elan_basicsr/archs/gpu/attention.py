"""Attention within windows straight on maps (B, H, W, C) in Triton: nothing is cut, rolled or pasted.

A program has ROWS tokens in a row, counted through all windows: several small windows, or a part of a large one, whose
other tokens it goes through as flash attention does (Dao et al., arXiv 2205.14135). Keys equal queries, so that a
program has all that goes into the gradients of its own tokens, and nothing is added up between programs.

As in that work, attention maps are not kept: the logarithms of softmax's denominators are enough to make them again.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from elan_basicsr.archs.gpu.products import Precision, product

ROWS = 64
OTHERS = 32  # tokens that are gone through at a time
_LOGITS = tl.constexpr('tf32x3')  # they reach hundreds: in fewer bits they would be wrong by whole units


class Group(NamedTuple):
    """Channels that attend within windows of a size.

    Attributes:
        window: Its edge, a power of 2.
        width: Number of channels.
        query, value, out: The first channel of each in its map.
    """
    window: int
    width: int
    query: int
    value: int
    out: int


@triton.jit
def _places(tokens, height, width, offset, WINDOW: tl.constexpr):
    """Pixels of tokens that are counted through the windows of all maps, which begin `offset` further on."""
    across, down = width // WINDOW, height // WINDOW
    window, inside = tokens // (WINDOW * WINDOW), tokens % (WINDOW * WINDOW)
    row = (window // across % down * WINDOW + inside // WINDOW + offset) % height
    column = (window % across * WINDOW + inside % WINDOW + offset) % width
    return (window // (across * down) * height + row) * width + column


@triton.jit
def _load(x, places, inside, STEP: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    channels = tl.arange(0, PADDED)
    return tl.load(x + places.to(tl.int64)[:, None] * STEP + FIRST + channels[None, :],
                   mask=inside[:, None] & (channels < WIDTH)[None, :], other=0.)


@triton.jit
def _store(x, places, inside, values, STEP: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr,
           PADDED: tl.constexpr):
    channels = tl.arange(0, PADDED)
    tl.store(x + places.to(tl.int64)[:, None] * STEP + FIRST + channels[None, :], values.to(x.dtype.element_ty),
             mask=inside[:, None] & (channels < WIDTH)[None, :])


@triton.jit
def _attend_kernel(query, value, out, logarithms, number, height, width, offset, Q: tl.constexpr, Q_STEP: tl.constexpr,
                   V: tl.constexpr, V_STEP: tl.constexpr, OUT: tl.constexpr, OUT_STEP: tl.constexpr,
                   WIDTH: tl.constexpr, PADDED: tl.constexpr, WINDOW: tl.constexpr, KEEP: tl.constexpr,
                   PRECISION: tl.constexpr, ROWS: tl.constexpr, OTHERS: tl.constexpr):
    TOKENS: tl.constexpr = WINDOW * WINDOW
    tokens = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = tokens < number
    places = _places(tokens, height, width, offset, WINDOW)
    q = _load(query, places, inside, Q_STEP, Q, WIDTH, PADDED)
    if TOKENS <= ROWS:
        v = _load(value, places, inside, V_STEP, V, WIDTH, PADDED)
        logits = tl.dot(q, tl.trans(q), input_precision=_LOGITS)
        if TOKENS < ROWS:
            logits = tl.where((tokens // TOKENS)[:, None] == (tokens // TOKENS)[None, :], logits, float('-inf'))
        most = tl.max(logits, 1)
        p = tl.exp(logits - most[:, None])
        total = tl.sum(p, 1)
        sums = product(p, v, tl.zeros((ROWS, PADDED), tl.float32), PRECISION)
    else:
        most = tl.full((ROWS,), float('-inf'), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        sums = tl.zeros((ROWS, PADDED), tl.float32)
        first = tl.program_id(0) * ROWS // TOKENS * TOKENS
        for start in range(0, TOKENS, OTHERS):
            others = first + start + tl.arange(0, OTHERS)
            places_of_others = _places(others, height, width, offset, WINDOW)
            k = _load(query, places_of_others, others < number, Q_STEP, Q, WIDTH, PADDED)
            v = _load(value, places_of_others, others < number, V_STEP, V, WIDTH, PADDED)
            logits = tl.dot(q, tl.trans(k), input_precision=_LOGITS)
            larger = tl.maximum(most, tl.max(logits, 1))
            shrink = tl.exp(most - larger)
            p = tl.exp(logits - larger[:, None])
            total = total * shrink + tl.sum(p, 1)
            sums = product(p, v, sums * shrink[:, None], PRECISION)
            most = larger
    _store(out, places, inside, sums / total[:, None], OUT_STEP, OUT, WIDTH, PADDED)
    if KEEP:
        tl.store(logarithms + tokens, most + tl.log(total), mask=inside)


@triton.jit
def _attend_back_kernel(query, value, out, grad, logarithms, more, of_query, of_value, number, height, width, offset,
                        Q: tl.constexpr, Q_STEP: tl.constexpr, V: tl.constexpr, V_STEP: tl.constexpr,
                        OUT: tl.constexpr, OUT_STEP: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
                        WINDOW: tl.constexpr, MORE: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr,
                        OTHERS: tl.constexpr):
    TOKENS: tl.constexpr = WINDOW * WINDOW
    tokens = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = tokens < number
    places = _places(tokens, height, width, offset, WINDOW)
    q = _load(query, places, inside, Q_STEP, Q, WIDTH, PADDED)
    v = _load(value, places, inside, V_STEP, V, WIDTH, PADDED)
    g = _load(grad, places, inside, OUT_STEP, OUT, WIDTH, PADDED)
    dots = tl.sum(g * _load(out, places, inside, OUT_STEP, OUT, WIDTH, PADDED), 1)
    logarithm = tl.load(logarithms + tokens, mask=inside, other=0.)
    of_q = tl.zeros((ROWS, PADDED), tl.float32)
    of_v = tl.zeros((ROWS, PADDED), tl.float32)
    if TOKENS <= ROWS:
        logits = tl.dot(q, tl.trans(q), input_precision=_LOGITS)
        if TOKENS < ROWS:
            logits = tl.where((tokens // TOKENS)[:, None] == (tokens // TOKENS)[None, :], logits, float('-inf'))
        p = tl.exp(logits - logarithm[:, None])
        slopes = product(g, tl.trans(v), tl.zeros((ROWS, ROWS), tl.float32), PRECISION)
        slopes = p * (slopes - dots[:, None])
        of_v = product(tl.trans(p), g, of_v, PRECISION)
        of_q = product(slopes + tl.trans(slopes), q, of_q, PRECISION)
    else:
        first = tl.program_id(0) * ROWS // TOKENS * TOKENS
        nothing = tl.zeros((ROWS, OTHERS), tl.float32)
        for start in range(0, TOKENS, OTHERS):
            others = first + start + tl.arange(0, OTHERS)
            there = others < number
            places_of_others = _places(others, height, width, offset, WINDOW)
            k = _load(query, places_of_others, there, Q_STEP, Q, WIDTH, PADDED)
            their_v = _load(value, places_of_others, there, V_STEP, V, WIDTH, PADDED)
            their_g = _load(grad, places_of_others, there, OUT_STEP, OUT, WIDTH, PADDED)
            their_dots = tl.sum(their_g * _load(out, places_of_others, there, OUT_STEP, OUT, WIDTH, PADDED), 1)
            their_logarithm = tl.load(logarithms + others, mask=there, other=0.)
            logits = tl.dot(q, tl.trans(k), input_precision=_LOGITS)
            p = tl.exp(logits - logarithm[:, None])  # how much these tokens take from the others
            slopes = p * (product(g, tl.trans(their_v), nothing, PRECISION) - dots[:, None])
            p = tl.exp(logits - their_logarithm[None, :])  # how much the others take from these
            slopes += p * (product(v, tl.trans(their_g), nothing, PRECISION) - their_dots[None, :])
            of_v = product(p, their_g, of_v, PRECISION)
            of_q = product(slopes, k, of_q, PRECISION)
    if MORE:
        of_q += _load(more, places, inside, OUT_STEP, OUT, WIDTH, PADDED)
    _store(of_query, places, inside, of_q, Q_STEP, Q, WIDTH, PADDED)
    _store(of_value, places, inside, of_v, V_STEP, V, WIDTH, PADDED)


def attend(query: Tensor, value: Tensor, groups: list[Group], shifted: bool, precision: Precision,
           keep: bool) -> tuple[Tensor, Tensor | None]:
    """softmax(q qᵀ) v within windows, by groups of channels.

    Args:
        query, value: Maps (B, H, W, ...) in which the groups have their channels; they may be the same. float32.
        groups: What is computed.
        shifted: Whether windows begin half a window further to the right and below, on a torus.
        precision: Of what follows the logits.
        keep: Whether a backward pass will follow.

    Returns:
        The map (B, H, W, C), and what `attend_back` needs of it, or None.
    """
    b, h, w, _ = value.shape
    out = value.new_empty(b, h, w, sum(group.width for group in groups))
    logarithms = value.new_empty(len(groups), b * h * w) if keep else None
    for i, group in enumerate(groups):
        _attend_kernel[(triton.cdiv(b * h * w, ROWS),)](
            query, value, out, logarithms[i] if logarithms is not None else None, b * h * w, h, w,
            group.window // 2 * shifted, **_constants(query, value, out, group, precision), KEEP=keep, num_warps=4,
            num_stages=1)
    return out, logarithms


def attend_back(query: Tensor, value: Tensor, out: Tensor, logarithms: Tensor, grad: Tensor, more: Tensor | None,
                groups: list[Group], shifted: bool, precision: Precision) -> tuple[Tensor, Tensor]:
    """Gradients of query and value from that of `out`, in maps of their kinds; one map if they were one.

    Args:
        query, value, out, logarithms: What `attend` was given and gave.
        grad: (B, H, W, C).
        more: A gradient of the queries alone, (B, H, W, C), to be added.
    """
    b, h, w, _ = value.shape
    of_value = torch.empty_like(value)
    of_query = of_value if query is value else torch.empty_like(query)
    for i, group in enumerate(groups):
        _attend_back_kernel[(triton.cdiv(b * h * w, ROWS),)](
            query, value, out, grad, logarithms[i], more, of_query, of_value, b * h * w, h, w,
            group.window // 2 * shifted, **_constants(query, value, out, group, precision), MORE=more is not None,
            num_warps=4, num_stages=1)
    return of_query, of_value


def _constants(query: Tensor, value: Tensor, out: Tensor, group: Group, precision: Precision) -> dict:
    return {'Q': group.query, 'Q_STEP': query.shape[3], 'V': group.value, 'V_STEP': value.shape[3], 'OUT': group.out,
            'OUT_STEP': out.shape[3], 'WIDTH': group.width, 'PADDED': max(16, triton.next_power_of_2(group.width)),
            'WINDOW': group.window, 'PRECISION': precision.value, 'ROWS': ROWS, 'OTHERS': OTHERS}
