"""Blocks of ELAN for training: the function of `elan_arch`, with backward passes that save less and move less.

Maps are (B, H, W, C) here, so that a 1x1 convolution is a matrix product, a shift moves runs of memory and windows are
cut in runs. What a function saves for its backward pass is what cannot be made again for a copy or a small product;
everything else is written to memory that all blocks use. On a CPU attention maps are not kept (`elan_grad_attention`),
on other devices attention is torch's fused kernel.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from elan_basicsr.archs.elan_grad_attention import Attend, SharedAttention, scratch

NUM_SHIFT_GROUPS = 5


def serves(body: nn.ModuleList, x: Tensor, plain_types: set[type]) -> bool:
    """Whether `run_block` may stand in for the blocks: gradients of unmodified modules, nothing watching."""
    if (not torch.is_grad_enabled() or type(x) is not Tensor or torch.compiler.is_compiling() or torch.jit.is_tracing()
            or torch.onnx.is_in_onnx_export() or torch._C._functorch.maybe_current_level() is not None):
        return False
    return all((type(module) in plain_types or isinstance(module, nn.modules.batchnorm._BatchNorm))
               and not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
                        or module._backward_pre_hooks) for module in body.modules())


def run_block(block: nn.Module, x: Tensor, cut: Callable, paste: Callable) -> Tensor:
    """An ELAB on a padded map. (B, C, H, W) -> the same."""
    x = x.permute(0, 2, 3, 1).contiguous()
    first = block.gmsa[0]
    shared = SharedAttention(first.window_sizes, first.shifted)
    for lfe, gmsa in zip(block.lfe, block.gmsa, strict=True):
        x = _LFE.apply(x, lfe.conv0.weight, lfe.conv0.bias, lfe.conv1.weight, lfe.conv1.bias)
        # The logits are unscaled and reach hundreds: half-precision queries would be wrong by whole units.
        with torch.autocast(x.device.type, enabled=False):
            projected = _project_in(gmsa, x.to(gmsa.project_in.weight.dtype))
            if x.device.type == 'cpu':
                attended = Attend.apply(projected, shared)
            else:
                attended = _attend_fused(projected, shared, cut, paste)
        x = _AddLinear.apply(x, attended, gmsa.project_out.weight, gmsa.project_out.bias)
    shared.queries = []
    return x.permute(0, 3, 1, 2)


def _project_in(gmsa: nn.Module, x: Tensor) -> Tensor:
    """The projection into attention with its normalisation. (B, H, W, C) -> (B, H, W, D)."""
    conv, norm = gmsa.project_in, gmsa.norm
    plain = type(norm) is nn.BatchNorm2d and norm.training and norm.affine and norm.track_running_stats
    if plain and x.device.type == 'cpu':
        return _LinearNorm.apply(x, conv.weight, conv.bias, norm.weight, norm.bias, norm)
    return norm(conv(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)


def _attend_fused(x: Tensor, shared: SharedAttention, cut: Callable, paste: Callable) -> Tensor:
    """softmax(q qᵀ) v by torch's kernels, for devices that have them."""
    x = x.permute(0, 3, 1, 2)
    first, attended = not shared.queries, []
    for i, (v, window) in enumerate(zip(x.chunk(len(shared.window_sizes), dim=1), shared.window_sizes, strict=True)):
        if first:
            q, v = v.chunk(2, dim=1)
            shared.queries.append(cut(q, window, shared.shifted)[:, None])
        q, v = shared.queries[i], cut(v, window, shared.shifted)[:, None]
        result = F.scaled_dot_product_attention(q, q, v, scale=1.0)[:, 0]
        attended.append(paste(result, x.shape[2:], window, shared.shifted))
    return torch.cat(attended, dim=1).permute(0, 2, 3, 1)


def _low_precision(x: Tensor) -> torch.dtype:
    """What autocast asks products to be computed in."""
    device = x.device.type
    low = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if low else x.dtype


def _of_weight(grad: Tensor, x: Tensor, conv_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias of a 1x1 convolution from (P, D) of its output and its (P, C) input."""
    of_weight = torch.mm(x.t(), grad).t().contiguous()  # faster in this order than gradᵀ x
    return of_weight.view_as(conv_weight).to(conv_weight.dtype), grad.sum(0).to(conv_weight.dtype)


class _LFE(torch.autograd.Function):
    """Local feature extraction, added to its input. (B, H, W, C) -> the same."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight0: Tensor, bias0: Tensor, weight1: Tensor, bias1: Tensor
                ) -> Tensor:
        low, pixels, wide = _low_precision(x), x.shape[:3], weight0.shape[0]
        near = _shift(x, scratch('near', x.shape, x, low))
        hidden = scratch('wide', (*pixels, wide), x, low)
        torch.addmm(bias0.to(low), near.flatten(0, 2), weight0.flatten(1).t().to(low), out=hidden.flatten(0, 2))
        far = _shift(hidden, torch.empty_like(hidden), relu=True)
        out = x + bias1
        _add_product(out, far, weight1.flatten(1).t().to(low))
        ctx.save_for_backward(x, far, weight0, weight1)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, far, weight0, weight1 = ctx.saved_tensors
        low = far.dtype
        grad = grad.contiguous()
        of_out = grad.flatten(0, 2).to(low)
        of_weight1, of_bias1 = _of_weight(of_out, far.flatten(0, 2), weight1)
        of_far = scratch('wide', far.shape, far)
        torch.mm(of_out, weight1.flatten(1).to(low), out=of_far.flatten(0, 2))
        of_hidden = _shift(of_far, scratch('of_hidden', far.shape, far), back=True, passed=far).flatten(0, 2)
        near = _shift(x, scratch('near', x.shape, x, low))
        of_weight0, of_bias0 = _of_weight(of_hidden, near.flatten(0, 2), weight0)
        torch.mm(of_hidden, weight0.flatten(1).to(low), out=near.flatten(0, 2))
        of_x = _shift(near, torch.empty_like(x), back=True).add_(grad)
        return of_x, of_weight0, of_bias0, of_weight1, of_bias1


class _AddLinear(torch.autograd.Function):
    """A map plus a 1x1 convolution of another. Both (B, H, W, C) -> the same."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.low = low = _low_precision(x)
        ctx.save_for_backward(y, weight)
        out = x + bias
        _add_product(out, y.to(low), weight.flatten(1).t().to(low))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, ...]:
        y, weight = ctx.saved_tensors
        of_out = grad.flatten(0, 2).to(ctx.low)
        of_y = torch.mm(of_out, weight.flatten(1).to(ctx.low)).to(y.dtype).view_as(y)
        return grad, of_y, *_of_weight(of_out, y.flatten(0, 2).to(ctx.low), weight)


def _add_product(out: Tensor, tokens: Tensor, weight: Tensor) -> None:
    """out += tokens @ weight, which may be of lower precision."""
    if tokens.dtype == out.dtype:
        out.flatten(0, 2).addmm_(tokens.flatten(0, 2), weight)
    else:
        out.flatten(0, 2).add_(torch.mm(tokens.flatten(0, 2), weight))


class _LinearNorm(torch.autograd.Function):
    """A 1x1 convolution and BatchNorm in training. (B, H, W, C) -> (B, H, W, D).

    What is normalised, z = x Wᵀ + b, is linear in x: with centred x, sums of it over pixels are products of W and sums
    over x, and so is its part in the gradient. Only x is saved, and no pass over z is needed.
    """

    @staticmethod
    @torch.amp.custom_fwd(device_type='cpu')
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, offset: Tensor,
                norm: nn.BatchNorm2d) -> Tensor:
        norm.num_batches_tracked.add_(1)
        momentum = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
        z = scratch('projected', (*x.shape[:3], len(bias)), x)  # attention makes its own copy
        torch.addmm(bias, x.flatten(0, 2), weight.flatten(1).t(), out=z.flatten(0, 2))
        z = z.permute(0, 3, 1, 2)
        mean, rstd = torch.empty_like(scale), torch.empty_like(scale)
        torch.native_batch_norm(z, scale, offset, norm.running_mean, norm.running_var, True, momentum, norm.eps,
                                out=(z, mean, rstd))
        ctx.save_for_backward(x, weight, scale, rstd)
        return z.permute(0, 2, 3, 1)

    @staticmethod
    @once_differentiable
    @torch.amp.custom_bwd(device_type='cpu')
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, conv_weight, scale, rstd = ctx.saved_tensors
        grad, tokens, weight = grad.contiguous().flatten(0, 2), x.flatten(0, 2), conv_weight.flatten(1)
        count, of_offset = len(tokens), grad.sum(0)
        # Centred first: differences of sums over maps with large means would lose their digits.
        centred = torch.sub(tokens, tokens.mean(0), out=scratch('centred', tokens.shape, tokens))
        products = torch.mm(centred.t(), grad).t()
        of_scale = (weight * products).sum(1) * rstd
        # The gradient of z is g * grad - g * of_offset / count + of_z * (z - its mean).
        g = scale * rstd
        of_z = -g * rstd * of_scale / count
        covariance = torch.mm(centred.t(), centred)
        of_weight = g[:, None] * products + of_z[:, None] * torch.mm(weight, covariance)
        through = weight.t() @ (of_z[:, None] * weight)
        of_x = torch.addmm(-(g * of_offset / count) @ weight, centred, through)
        of_x.addmm_(grad, g[:, None] * weight)
        return of_x.view_as(x), of_weight.view_as(conv_weight), torch.zeros_like(rstd), of_scale, of_offset, None


def _shift(x: Tensor, out: Tensor, back: bool = False, relu: bool = False, passed: Tensor | None = None) -> Tensor:
    """Shift the groups of channels, zero outside the map, into `out`. (B, H, W, C) -> the same.

    Args:
        x: The map.
        out: Where the result goes.
        back: The other way, as gradients go.
        relu: Through a ReLU.
        passed: What came out of a ReLU and a shift, when `x` is its gradient, to go back through both.
    """
    for channels, dim, step in _groups(x.shape[3]):
        step = -step if back else step
        to, of = _overlap(out[..., channels], x[..., channels], dim, step)
        if relu:
            torch.clamp_min(of, 0, out=to)
        elif passed is not None:
            mask = _overlap(out[..., channels], passed[..., channels], dim, step)[1]
            torch.ops.aten.threshold_backward.grad_input(of, mask, 0, grad_input=to)
        else:
            to.copy_(of)
    return out


def _groups(channels: int) -> Iterator[tuple[slice, int, int]]:
    """Channels of each group of a shift with the dimension it moves along and the step to the neighbour it reads."""
    group = channels // NUM_SHIFT_GROUPS
    for i, (dim, step) in enumerate(((2, 1), (2, -1), (1, 1), (1, -1))):
        yield slice(i * group, (i + 1) * group), dim, step
    yield slice(4 * group, channels), 2, 0


def _overlap(out: Tensor, x: Tensor, dim: int, step: int) -> tuple[Tensor, Tensor]:
    """The parts of both in which `out` reads its neighbour `step` further on in `x`; the rest of `out` becomes zero."""
    size = out.shape[dim]
    if step == 0:
        return out, x
    out.select(dim, size - 1 if step > 0 else 0).zero_()
    start = 0 if step > 0 else 1
    return out.narrow(dim, start, size - 1), x.narrow(dim, 1 - start, size - 1)
