"""Blocks of ELAN on an NVIDIA GPU, on Triton kernels (`pointwise.py`, `attention.py`), in training and inference.

Maps are (B, H, W, C). The maps between modules, queries, values and attention are float32 in every precision; under
autocast the products of local features and of the last projection take their factors in its type, and the widened map
is kept in it.
"""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from elan_basicsr.archs.gpu.attention import Group, attend, attend_back
from elan_basicsr.archs.gpu.pointwise import Norm, convolve, gradient, weight_gradient
from elan_basicsr.archs.gpu.products import Precision
from elan_basicsr.archs.stand_in import differentiable_again


def run_block(block: Any, x: Tensor) -> Tensor:
    """An ELAB on a padded map. (B, C, H, W) -> the same."""
    with torch.cuda.device_of(x):  # Triton takes the current device, whatever it is given
        return differentiable_again(_run(block, x), block, x)


def _run(block: Any, x: Tensor) -> Tensor:
    precision = Precision.TF32 if torch.backends.cudnn.allow_tf32 else Precision.EXACT
    mixed = Precision.of(torch.get_autocast_dtype('cuda')) if torch.is_autocast_enabled('cuda') else precision
    y, queries = x.permute(0, 2, 3, 1).contiguous(), None
    for lfe, gmsa in zip(block.lfe, block.gmsa, strict=True):
        y = _Features.apply(y, lfe.conv0.weight, lfe.conv0.bias, lfe.conv1.weight, lfe.conv1.bias, mixed)
        attended, kept = _Attention.apply(queries, _project(gmsa, y, precision), gmsa.window_sizes, gmsa.shifted,
                                          queries is None and len(block.gmsa) > 1, precision)
        queries = kept if queries is None else queries
        y = _Projection.apply(attended, gmsa.project_out.weight, gmsa.project_out.bias, y, mixed)
    return y.permute(0, 3, 1, 2)


def _project(gmsa: Any, x: Tensor, precision: Precision) -> Tensor:
    """Queries and values, or values alone, (B, H, W, D)."""
    conv, norm = gmsa.project_in, gmsa.norm
    if not torch.is_grad_enabled() and not norm.training and norm.running_mean is not None:
        return convolve(x, conv.weight.flatten(1), conv.bias, precision,
                        norm=Norm(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps))
    y = _Projection.apply(x, conv.weight, conv.bias, None, precision)
    with torch.autocast('cuda', enabled=False):
        return norm(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).contiguous()


class _Features(torch.autograd.Function):
    """Local feature extraction, added to its input. (B, H, W, C) -> the same."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight0: Tensor, bias0: Tensor, weight1: Tensor, bias1: Tensor,
                precision: Precision) -> Tensor:
        hidden = convolve(x, weight0.flatten(1), bias0, precision, shift=True, relu=True, dtype=precision.dtype)
        ctx.precision = precision
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, hidden, weight0, weight1)
        return convolve(hidden, weight1.flatten(1), bias1, precision, shift=True, residual=x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 6
        x, hidden, weight0, weight1 = ctx.saved_tensors
        grad, precision = grad.contiguous(), ctx.precision
        of_hidden = gradient(grad, weight1.flatten(1), precision, shift=True, gate=hidden, dtype=hidden.dtype)
        of_weight1, of_bias1 = weight_gradient(hidden, grad, precision, shift=True)
        of_weight0, of_bias0 = weight_gradient(x, of_hidden, precision, shift=True)
        of_x = gradient(of_hidden, weight0.flatten(1), precision, shift=True, residual=grad)
        return of_x, of_weight0.view_as(weight0), of_bias0, of_weight1.view_as(weight1), of_bias1, None


class _Projection(torch.autograd.Function):
    """A 1x1 convolution, added to `residual` if there is one. (B, H, W, C) -> (B, H, W, D)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None,
                precision: Precision) -> Tensor:
        ctx.precision, ctx.has_residual = precision, residual is not None
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight)
        return convolve(x, weight.flatten(1), bias, precision, residual=residual)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 5
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        of_weight, of_bias = weight_gradient(x, grad, ctx.precision)
        of_x = gradient(grad, weight.flatten(1), ctx.precision)
        return of_x, of_weight.view_as(weight), of_bias, grad if ctx.has_residual else None, None


class _Attention(torch.autograd.Function):
    """Group-wise multi-scale self-attention, (B, H, W, C), and the queries for the modules that share them.

    Without queries of another module the map has each group's queries and values, in turn; with them, its values.
    """

    @staticmethod
    def forward(ctx: Any, queries: Tensor | None, y: Tensor, window_sizes: tuple[int, ...], shifted: bool,
                shared: bool, precision: Precision) -> tuple[Tensor, Tensor | None]:
        own = queries is None
        width = y.shape[3] // len(window_sizes) // (1 + own)
        groups = [Group(window, width, 2 * i * width if own else i * width, (2 * i + 1) * width if own else i * width,
                        i * width) for i, window in enumerate(window_sizes)]
        query = y if queries is None else queries
        out, logarithms = attend(query, y, groups, shifted, precision, any(ctx.needs_input_grad))
        ctx.groups, ctx.shifted, ctx.precision = groups, shifted, precision
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(queries, y, out, logarithms)
        return out, torch.cat(y.chunk(2 * len(window_sizes), 3)[::2], 3) if shared else None

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, of_shared: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 6
        queries, y, out, logarithms = ctx.saved_tensors
        of_query, of_y = attend_back(y if queries is None else queries, y, out, logarithms, grad.contiguous(),
                                     None if of_shared is None else of_shared.contiguous(), ctx.groups, ctx.shifted,
                                     ctx.precision)
        return None if queries is None else of_query, of_y, None, None, None, None
