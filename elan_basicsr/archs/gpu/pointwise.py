"""1x1 convolutions of maps (B, H, W, C) in Triton, with the shift, ReLU and residual around them, and their gradients.

A shift is another address: the group of channels reads, or in a backward pass writes, the neighbouring pixel.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from elan_basicsr.archs.elan_arch import NUM_SHIFT_GROUPS
from elan_basicsr.archs.gpu.products import Precision, product

PIXELS = 64  # of a program, or of each step of one that sums over them
INPUTS = 64  # channels that are multiplied at a time
PROGRAMS = 264  # that share the sums of a weight's gradient, about: each has a matrix of its own, added afterwards

_SHIFTED_GROUPS = tl.constexpr(NUM_SHIFT_GROUPS)


class Norm(NamedTuple):
    """BatchNorm with what it has learned, each (D): it scales by `weight` / sqrt(`variance`), adds `bias`."""
    mean: Tensor
    variance: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float


@triton.jit
def _neighbours(pixels, channels, height, width, C: tl.constexpr):
    """Where shifted channels read: columns and rows (pixels, channels), not all of which are inside the map."""
    group = channels[None, :] // (C // _SHIFTED_GROUPS)
    column = (pixels % width)[:, None] + tl.where(group == 0, 1, tl.where(group == 1, -1, 0))
    row = (pixels // width % height)[:, None] + tl.where(group == 2, 1, tl.where(group == 3, -1, 0))
    return column, row


@triton.jit
def _shifted(pixels, channels, height, width, C: tl.constexpr):
    """Pixels that shifted channels read, and whether they are inside the map. (pixels, channels) each."""
    column, row = _neighbours(pixels, channels, height, width, C)
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    return (pixels // (width * height))[:, None] * (width * height) + row * width + column, inside


@triton.jit
def _convolve_kernel(x, weight, bias, mean, variance, scale, offset, eps, residual, gate, out, number, height, width,
                     C: tl.constexpr, D: tl.constexpr, WEIGHT_C: tl.constexpr, WEIGHT_D: tl.constexpr,
                     SHIFT_INPUT: tl.constexpr, SHIFT_OUTPUT: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr,
                     AFFINE: tl.constexpr, RELU: tl.constexpr, RESIDUAL: tl.constexpr, GATE: tl.constexpr,
                     PRECISION: tl.constexpr, PIXELS: tl.constexpr, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr):
    pixels = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    outputs = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    here = (pixels < number)[:, None]
    sums = tl.zeros((PIXELS, OUTPUTS), tl.float32)
    for start in range(0, C, INPUTS):
        inputs = start + tl.arange(0, INPUTS)
        there, inside = pixels[:, None], here & (inputs < C)[None, :]
        if SHIFT_INPUT:
            there, within = _shifted(pixels, inputs, height, width, C)
            inside = inside & within
        factors = tl.load(x + there.to(tl.int64) * C + inputs[None, :], mask=inside, other=0.)
        weights = tl.load(weight + inputs[:, None] * WEIGHT_C + outputs[None, :] * WEIGHT_D,
                          mask=(inputs < C)[:, None] & (outputs < D)[None, :], other=0.)
        sums = product(factors, weights, sums, PRECISION)
    if BIAS:
        sums += tl.load(bias + outputs, mask=outputs < D, other=0.)[None, :]
    if NORM:
        by = 1 / tl.sqrt(tl.load(variance + outputs, mask=outputs < D, other=1.) + eps)
        sums -= tl.load(mean + outputs, mask=outputs < D, other=0.)[None, :]
        if AFFINE:
            sums = sums * (by * tl.load(scale + outputs, mask=outputs < D, other=0.))[None, :]
            sums += tl.load(offset + outputs, mask=outputs < D, other=0.)[None, :]
        else:
            sums = sums * by[None, :]
    if RELU:
        sums = tl.where(sums < 0, 0., sums)  # keeps what is not a number
    there = pixels[:, None]
    if SHIFT_OUTPUT:  # what would leave the map at one side is the zero at the other
        column, row = _neighbours(pixels, outputs, height, width, D)
        sums = tl.where((column >= 0) & (column < width) & (row >= 0) & (row < height), sums, 0.)
        column, row = (column + width) % width, (row + height) % height
        there = (pixels // (width * height))[:, None] * (width * height) + row * width + column
    keep = here & (outputs < D)[None, :]
    place = there.to(tl.int64) * D + outputs[None, :]
    if GATE:
        sums = tl.where(tl.load(gate + place, mask=keep, other=0.).to(tl.float32) > 0, sums, 0.)
    if RESIDUAL:
        sums += tl.load(residual + place, mask=keep, other=0.)
    tl.store(out + place, sums.to(out.dtype.element_ty), mask=keep)


@triton.jit
def _weight_gradient_kernel(x, grad, of_weight, of_bias, number, height, width, steps, C: tl.constexpr,
                            D: tl.constexpr, SHIFT: tl.constexpr, PRECISION: tl.constexpr, PIXELS: tl.constexpr,
                            INPUTS: tl.constexpr, OUTPUTS: tl.constexpr):
    part = tl.program_id(0)
    outputs = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    inputs = tl.program_id(2) * INPUTS + tl.arange(0, INPUTS)
    sums = tl.zeros((OUTPUTS, INPUTS), tl.float32)
    total = tl.zeros((OUTPUTS,), tl.float32)
    for step in range(steps):
        pixels = (part * steps + step) * PIXELS + tl.arange(0, PIXELS)
        here = (pixels < number)[:, None]
        there, inside = pixels[:, None], here & (inputs < C)[None, :]
        if SHIFT:
            there, within = _shifted(pixels, inputs, height, width, C)
            inside = inside & within
        factors = tl.load(x + there.to(tl.int64) * C + inputs[None, :], mask=inside, other=0.)
        slopes = tl.load(grad + pixels.to(tl.int64)[:, None] * D + outputs[None, :],
                         mask=here & (outputs < D)[None, :], other=0.)
        sums = product(tl.trans(slopes), factors, sums, PRECISION)
        total += tl.sum(slopes.to(tl.float32), 0)
    keep = (outputs < D)[:, None] & (inputs < C)[None, :]
    tl.store(of_weight + (part * D + outputs)[:, None] * C + inputs[None, :], sums, mask=keep)
    if tl.program_id(2) == 0:
        tl.store(of_bias + part * D + outputs, total, mask=outputs < D)


def convolve(x: Tensor, weight: Tensor, bias: Tensor, precision: Precision, *, shift: bool = False,
             relu: bool = False, norm: Norm | None = None, residual: Tensor | None = None,
             dtype: torch.dtype = torch.float32) -> Tensor:
    """A 1x1 convolution, of shifted channels where `shift`. (B, H, W, C) -> (B, H, W, D) of `dtype`.

    Args:
        x: The map.
        weight, bias: (D, C) and (D), float32.
        precision: Of the products.
        relu: Whether negative results are to be 0.
        norm: What the convolution is followed by.
        residual: A map (B, H, W, D) that is added.
    """
    return _run(x, weight, weight.stride(), bias, precision, len(weight), shift_input=shift, relu=relu,
                norm=norm, residual=residual, dtype=dtype)


def gradient(grad: Tensor, weight: Tensor, precision: Precision, *, shift: bool = False, gate: Tensor | None = None,
             residual: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """The gradient of what `convolve` was given, from that of what it gave. (B, H, W, D) -> (B, H, W, C).

    Args:
        gate: What a ReLU gave that was the convolution's input: where it is 0, the gradient is.
        residual: A map (B, H, W, C) that is added.
    """
    return _run(grad, weight, weight.stride()[::-1], None, precision, weight.shape[1], shift_output=shift, gate=gate,
                residual=residual, dtype=dtype)


def _run(x: Tensor, weight: Tensor, weight_strides: tuple[int, ...], bias: Tensor | None, precision: Precision, d: int,
         *, dtype: torch.dtype, shift_input: bool = False, shift_output: bool = False, relu: bool = False,
         norm: Norm | None = None, gate: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    b, h, w, c = x.shape
    out = x.new_empty(b, h, w, d, dtype=dtype)
    outputs = _block(d)
    of_d, of_c = weight_strides
    _convolve_kernel[(triton.cdiv(b * h * w, PIXELS), triton.cdiv(d, outputs))](
        x, weight, bias, *(norm or (None, None, None, None, 0.)), residual, gate, out, b * h * w, h, w, C=c, D=d,
        WEIGHT_C=of_c, WEIGHT_D=of_d, SHIFT_INPUT=shift_input and c >= NUM_SHIFT_GROUPS,
        SHIFT_OUTPUT=shift_output and d >= NUM_SHIFT_GROUPS, BIAS=bias is not None, NORM=norm is not None,
        AFFINE=norm is not None and norm.weight is not None, RELU=relu, RESIDUAL=residual is not None,
        GATE=gate is not None, PRECISION=precision.value, PIXELS=PIXELS, INPUTS=INPUTS, OUTPUTS=outputs, num_warps=4,
        num_stages=2)
    return out


def weight_gradient(x: Tensor, grad: Tensor, precision: Precision, *, shift: bool = False) -> tuple[Tensor, Tensor]:
    """The gradients (D, C) and (D) of weight and bias of `convolve`, from its map and that of what it gave."""
    b, h, w, c = x.shape
    d = grad.shape[3]
    outputs = _block(d)
    blocks = triton.cdiv(d, outputs), triton.cdiv(c, INPUTS)
    steps = max(4, triton.cdiv(b * h * w, PIXELS * max(1, PROGRAMS // (blocks[0] * blocks[1]))))
    parts = triton.cdiv(b * h * w, PIXELS * steps)
    of_weight, of_bias = x.new_empty(parts, d, c, dtype=torch.float32), x.new_empty(parts, d, dtype=torch.float32)
    grid = parts, *blocks
    _weight_gradient_kernel[grid](
        x, grad, of_weight, of_bias, b * h * w, h, w, steps, C=c, D=d, SHIFT=shift and c >= NUM_SHIFT_GROUPS,
        PRECISION=precision.value, PIXELS=PIXELS, INPUTS=INPUTS, OUTPUTS=outputs, num_warps=4, num_stages=2)
    return of_weight.sum(0), of_bias.sum(0)


def _block(channels: int) -> int:
    """How many channels a program computes: the more, the less often its input is read, but not for nothing."""
    return 128 if triton.cdiv(channels, 128) * 2 == triton.cdiv(channels, 64) else 64
