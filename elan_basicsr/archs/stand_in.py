"""What kernels that stand in for blocks of ELAN have in common, on whatever device they run."""
from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules import module as of_all
from torch.utils._python_dispatch import _get_current_dispatch_mode


def setting() -> str:
    """`ELAN_KERNELS`: 0 for the modules alone; what else it may be, each device's `stand_in` says."""
    return os.environ.get('ELAN_KERNELS', '')


def are_as_made(body: nn.ModuleList, x: Tensor, plain_types: Iterable[type]) -> bool:
    """Whether the modules are what they were made as, in float32, on the map's device, and nobody watches them."""
    if _watched():  # first, since compilers follow what comes after
        return False
    known = set(plain_types)
    return (type(x) is Tensor and all(_is_plain(module, known) for module in body.modules())
            and all(t.dtype == torch.float32 and t.device == x.device and type(t) in (Tensor, nn.Parameter)
                    for t in (x, *body.parameters())))


def _watched() -> bool:
    """Whether somebody sees single operations or modules: compilers, exporters, functorch, counters, hooks on all."""
    return (torch.compiler.is_compiling() or torch.jit.is_tracing() or _get_current_dispatch_mode() is not None
            or torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0
            or any((of_all._global_forward_hooks, of_all._global_forward_pre_hooks, of_all._global_backward_hooks,
                    of_all._global_backward_pre_hooks)))


def _is_plain(module: nn.Module, known: set[type]) -> bool:
    """Whether a module is as it was made: of a class that is known, called as that is, without hooks."""
    return (type(module) in known and 'forward' not in vars(module) and module._compiled_call_impl is None
            and not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
                     or module._backward_pre_hooks))


def differentiable_again(y: Tensor, block: nn.Module, x: Tensor) -> Tensor:
    """What kernels made of x, y: a gradient of which another is to be taken goes through the block's modules."""
    return _Block.apply(y, block, x, *block.parameters())


class _Block(torch.autograd.Function):

    @staticmethod
    def forward(ctx: Any, y: Tensor, block: nn.Module, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.block = block
        # Kernels for CPUs compute in float32 under autocast.
        ctx.autocast = (torch.get_autocast_dtype(x.device.type),
                        x.device.type != 'cpu' and torch.is_autocast_enabled(x.device.type))
        ctx.save_for_backward(x)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs = *ctx.saved_tensors, *ctx.block.parameters()
        if not torch.is_grad_enabled():
            return grad, None, *(None for _ in inputs)
        statistics = {name: buffer.clone() for name, buffer in ctx.block.named_buffers()}  # which have had this batch
        dtype, enabled = ctx.autocast
        with torch.autocast(grad.device.type, dtype, enabled), sdpa_kernel(SDPBackend.MATH):
            y = functional_call(ctx.block, statistics, inputs[0])  # fused attention has no second derivative
        gradients = iter(torch.autograd.grad(y, [t for t in inputs if t.requires_grad], grad, create_graph=True))
        return None, None, *(next(gradients) if t.requires_grad else None for t in inputs)
