"""A network's forward and backward pass in training as CUDA graphs: a launch each, in place of two thousand."""
from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch import Tensor, nn

from elan_basicsr.errors import UserError

from basicsr.utils import get_root_logger


def record(net: nn.Module, shape: tuple[int, ...], dtype: torch.dtype | None, accumulates: bool) -> None:
    """Let a network replay its passes on batches of one shape; its weights and statistics stay as they are.

    On other shapes, in eval mode and without gradients it runs as before. What it gives for a batch, and its gradients,
    lie where those for the next one will.

    Args:
        net: On its device, before anything wraps it. Its weights may change in place only.
        shape: Of a batch, (B, C, h, w).
        dtype: Of autocast, or None for float32.
        accumulates: Whether gradients of several batches are added up.

    Raises:
        UserError: The network cannot be recorded.
        torch.OutOfMemoryError: As a step without it would have.
    """
    eager, x = net.forward, torch.zeros(shape, device=next(net.parameters()).device)
    statistics = [(buffer, buffer.clone()) for buffer in net.buffers()]
    gc.collect()  # graphs of an earlier network, which is part of a cycle, are not to be freed in between
    if dtype is not None:  # around the forward pass alone, as in training; casts that were cached would not be recorded
        net.forward = torch.autocast(x.device.type, dtype, cache_enabled=False)(eager)
    _expect_another_stream()
    try:
        torch.cuda.make_graphed_callables(net.train(), (x,))
    except (RuntimeError, AssertionError) as error:
        first = error.__context__ or error  # the end of a recording that has failed is an error of its own
        if isinstance(first, torch.OutOfMemoryError):
            raise first from None
        reason = str(first).strip().partition('\n')[0][:200]
        raise UserError(f'cuda_graphs: the passes of {type(net).__name__} cannot be recorded ({reason}); leave the key '
                        'out') from error
    for buffer, before in statistics:
        buffer.copy_(before)
    net.forward = _Forward(net, eager, net.forward, shape)
    if accumulates:  # a first gradient is kept where it lies, and the next replay would overwrite it
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.register_hook(torch.clone)


def _expect_another_stream() -> None:
    """Keep PyTorch from warning that gradients are received on the stream of the recording, which it waits for."""
    warn = getattr(torch.autograd.graph, 'set_warn_on_accumulate_grad_stream_mismatch', None)  # from 2.10 on
    if warn is not None:
        warn(False)


class _Forward:
    """The `forward` of a network that was recorded."""

    def __init__(self, net: nn.Module, eager: Callable[..., Tensor], replayed: Callable[..., Tensor],
                 shape: tuple[int, ...]):
        self.net, self.eager, self.replayed, self.shape = net, eager, replayed, shape
        self.told = False

    def __call__(self, x: Tensor) -> Tensor:
        if not self.net.training or not torch.is_grad_enabled():
            return self.eager(x)
        if x.shape == self.shape:
            return self.replayed(x)
        if not self.told:
            self.told = True
            get_root_logger().warning(f'cuda_graphs: a batch is {tuple(x.shape)} and not {self.shape}, as the options '
                                      'say; such batches are trained on without a graph')
        return self.eager(x)
