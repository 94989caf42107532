"""What the tests of training paths compare."""
import torch
from torch import nn


def step(net: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output, gradients and statistics of a step on x, by name."""
    net.zero_grad()
    x = x.clone().requires_grad_()
    y = net(x)
    (y * weights_like(y)).sum().backward()
    gradients = {name: p.grad.clone() for name, p in net.named_parameters()}
    return {'y': y.detach(), 'x': x.grad, **gradients, **{name: b.clone() for name, b in net.named_buffers()}}


def weights_like(y: torch.Tensor) -> torch.Tensor:
    """By which `step` sums up an output: every pixel has a gradient of its own."""
    return torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view_as(y)
