"""Blocks of ELAN for training: the function of `elan_arch`, with backward passes that save less and move less.

A shift is one pass forward and one backward, its ReLU included, instead of slices, fills and concatenations. On a CPU
attention maps live as long as the modules of a block that share them need them, forward and backward: in between they
are dropped and made again from the queries, in memory that all blocks use. On other devices attention is torch's fused
kernel. Maps have the channels last in memory, so that windows are cut in runs.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Variable
from torch.autograd.function import FunctionCtx, once_differentiable

NUM_SHIFT_GROUPS = 5


def serves(body: nn.ModuleList, x: Tensor, plain_types: set[type]) -> bool:
    """Whether `run_block` may stand in for the blocks: gradients of unmodified modules, nothing watching."""
    if (not torch.is_grad_enabled() or type(x) is not Tensor or torch.compiler.is_compiling() or torch.jit.is_tracing()
            or torch.onnx.is_in_onnx_export() or torch._C._functorch.maybe_current_level() is not None):
        return False
    return all((type(module) in plain_types or isinstance(module, nn.modules.batchnorm._BatchNorm))
               and not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
                        or module._backward_pre_hooks) for module in body.modules())


def run_block(block: nn.Module, x: Tensor, memory: dict, cut: Callable, paste: Callable) -> Tensor:
    """An ELAB on a padded map. (B, C, H, W) -> the same. `memory`, empty at first, is one pass's for all blocks."""
    x = x.contiguous(memory_format=torch.channels_last)
    shared: list[_SharedMap] = []
    for i, (lfe, gmsa) in enumerate(zip(block.lfe, block.gmsa, strict=True)):
        hidden = F.conv2d(_Shift.apply(x, False), lfe.conv0.weight, lfe.conv0.bias)
        x = F.conv2d(_Shift.apply(hidden, True), lfe.conv1.weight, lfe.conv1.bias) + x
        if not gmsa.shares:
            shared = [_SharedMap(x.device, memory.setdefault(group, {})) for group in range(len(gmsa.window_sizes))]
        x = _gmsa(gmsa, x, shared, i + 1 == len(block.gmsa), cut, paste) + x
    return x


def _gmsa(gmsa: nn.Module, x: Tensor, shared: list[_SharedMap], last: bool, cut: Callable,
          paste: Callable) -> Tensor:
    size = x.shape[2:]
    # The logits are unscaled and reach hundreds: half-precision queries would be wrong by whole units.
    with torch.autocast(x.device.type, enabled=False):
        if x.dtype in (torch.bfloat16, torch.float16) and gmsa.project_in.weight.dtype == torch.float32:
            x = x.float()
        groups = gmsa.norm(gmsa.project_in(x)).chunk(len(gmsa.window_sizes), dim=1)
        attended = []
        for group, window, attention in zip(groups, gmsa.window_sizes, shared, strict=True):
            windows = cut(group, window, gmsa.shifted)
            result = attention.attend(windows, first=not gmsa.shares, last=last)
            attended.append(paste(result, size, window, gmsa.shifted))
    return gmsa.project_out(torch.cat(attended, dim=1))


def _groups(channels: int) -> Iterator[tuple[slice, int, int]]:
    """Channels of each group of a shift with the dimension it moves along and the step to the neighbour it reads."""
    group = channels // NUM_SHIFT_GROUPS
    for i, (dim, step) in enumerate(((3, 1), (3, -1), (2, 1), (2, -1))):
        yield slice(i * group, (i + 1) * group), dim, step
    yield slice(4 * group, channels), 3, 0


class _Shift(torch.autograd.Function):
    """Shift the groups of channels, zero outside the map, through a ReLU if asked. (B, C, H, W) -> the same."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, relu: bool) -> Tensor:
        out = torch.empty_like(x)
        for channels, dim, step in _groups(x.shape[1]):
            to, of = _overlap(out[:, channels], x[:, channels], dim, step)
            if relu:
                torch.clamp_min(of, 0, out=to)
            else:
                to.copy_(of)
        if relu:
            ctx.save_for_backward(out)  # the convolution behind it saves the same tensor
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        saved = ctx.saved_tensors
        out = saved[0] if saved else None
        result = torch.empty_like(grad)
        for channels, dim, step in _groups(grad.shape[1]):
            to, of = _overlap(result[:, channels], grad[:, channels], dim, -step)
            if out is None:
                to.copy_(of)
            else:
                passed = _overlap(result[:, channels], out[:, channels], dim, -step)[1]
                torch.ops.aten.threshold_backward.grad_input(of, passed, 0, grad_input=to)
        return result, None


def _overlap(out: Tensor, x: Tensor, dim: int, step: int) -> tuple[Tensor, Tensor]:
    """The parts of both in which `out` reads its neighbour `step` further on in `x`; the rest of `out` becomes zero."""
    size = out.shape[dim]
    if step == 0:
        return out, x
    out.select(dim, size - 1 if step > 0 else 0).zero_()
    start = 0 if step > 0 else 1
    return out.narrow(dim, start, size - 1), x.narrow(dim, 1 - start, size - 1)


class _SharedMap:
    """The attention softmax(q qᵀ) of one group of windows, for the modules of a block that share it."""

    def __init__(self, device: torch.device, memory: dict[str, Tensor]):
        self.fused = device.type != 'cpu'
        self.memory = memory
        self.q: Tensor | None = None  # while the block's forward pass runs
        self.attention: Tensor | None = None
        self.grad: Tensor | None = None  # of the attention map, summed over the modules that a backward pass has met

    def attend(self, windows: Tensor, first: bool, last: bool) -> Tensor:
        """The first module gives queries and values, (N, window², 2C), later ones values; -> (N, window², C)."""
        if first:
            self.q = windows[..., :windows.shape[-1] // 2]
        if self.fused:
            q, v = self.q[:, None], windows[:, None, :, -self.q.shape[-1]:]
            return F.scaled_dot_product_attention(q, q, v, scale=1.0)[:, 0]
        result = _AttendFirst.apply(windows, self) if first else _AttendAgain.apply(windows, self.q.detach(), self)
        if last:
            self.forget()
            self.q = None
        return result

    def map(self, q: Tensor) -> Tensor:
        """The attention map (N, window², window²), made if it is not there."""
        if self.attention is None:
            logits = torch.bmm(q, q.transpose(1, 2), out=self._room('attention', q))
            self.attention = torch.softmax(logits, dim=-1, out=logits)
        return self.attention

    def forget(self) -> None:
        self.attention = self.grad = None

    def add_grad(self, grad: Tensor, v: Tensor) -> None:
        if self.grad is None:
            # A backward pass that ends before it reaches the first module must leave nothing for the next one.
            Variable._execution_engine.queue_callback(self.forget)
            self.grad = torch.bmm(grad, v.transpose(1, 2), out=self._room('grad', grad))
        else:
            self.grad.baddbmm_(grad, v.transpose(1, 2))

    def _room(self, name: str, tokens: Tensor) -> Tensor:
        """Memory for a map of (N, window², C) tokens; only one block at a time needs it."""
        if name not in self.memory:
            self.memory[name] = tokens.new_empty(tokens.shape[0], tokens.shape[1], tokens.shape[1])
        return self.memory[name]


class _AttendFirst(torch.autograd.Function):
    """softmax(q qᵀ) v of queries and values side by side."""

    @staticmethod
    def forward(ctx: FunctionCtx, windows: Tensor, shared: _SharedMap) -> Tensor:
        ctx.shared = shared
        ctx.save_for_backward(windows)
        q, v = windows.chunk(2, dim=-1)
        return torch.bmm(shared.map(q), v)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        shared = ctx.shared
        q, v = ctx.saved_tensors[0].chunk(2, dim=-1)
        attention = shared.map(q)
        shared.add_grad(grad, v)
        logits = torch._softmax_backward_data(shared.grad, attention, -1, attention.dtype, grad_input=shared.grad)
        of_q = torch.bmm(logits, q).baddbmm_(logits.transpose(1, 2), q)
        result = torch.cat([of_q, torch.bmm(attention.transpose(1, 2), grad)], dim=-1)
        shared.forget()
        return result, None


class _AttendAgain(torch.autograd.Function):
    """The same attention on other values; the gradient of the queries waits for the first module's."""

    @staticmethod
    def forward(ctx: FunctionCtx, v: Tensor, q: Tensor, shared: _SharedMap) -> Tensor:
        ctx.shared = shared
        ctx.save_for_backward(v, q)
        return torch.bmm(shared.map(q), v)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        v, q = ctx.saved_tensors
        of_v = torch.bmm(ctx.shared.map(q).transpose(1, 2), grad)
        ctx.shared.add_grad(grad, v)
        return of_v, None, None
