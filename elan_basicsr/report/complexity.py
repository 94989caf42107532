"""What a network costs on paper: parameters, and multiply-adds (MACs) by two conventions."""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from elan_basicsr.archs.elan_arch import ELAN


@dataclass(frozen=True)
class Complexity:
    """Parameters that are trained, and MACs of one image; None where a convention does not apply.

    `macs` are products as torch counts them in the network's modules, padding included. `paper_macs` are those of the
    ELAN paper, which give its 168.4, 75.7 and 43.2 G for ELAN-light x2, x3 and x4 at an output of 1280x720.
    """

    parameters: int
    macs: int | None
    paper_macs: int | None


def count(net: nn.Module, channels: int, height: int, width: int) -> Complexity:
    """Count a network's parameters and its MACs for an input of (1, channels, height, width).

    Nothing is computed and no memory is taken, whatever the size.
    """
    parameters = sum(p.numel() for p in net.parameters() if p.requires_grad)
    return Complexity(parameters, count_macs(net, channels, height, width), count_paper_macs(net, height, width))


def count_macs(net: nn.Module, channels: int, height: int, width: int) -> int | None:
    """Half the floating-point operations that torch counts; None for a network that needs its values to go on.

    For ELAN those of the modules as they are written, where each module that shares attention makes the map again.
    """
    modes = [(module, module.training) for module in net.modules()]
    net.eval()  # BatchNorm would count this as a batch
    try:
        # Fused attention is counted by some versions of torch only; the plain form is two products in all of them.
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), \
                FlopCounterMode(display=False) as counter:
            device = next((p.device for p in net.parameters()), torch.device('cpu'))
            net(torch.empty(1, channels, height, width, device=device))
    except (RuntimeError, NotImplementedError, TypeError):
        return None
    finally:
        for module, mode in modes:
            module.training = mode
    return counter.get_total_flops() // 2


def count_paper_macs(net: nn.Module, height: int, width: int) -> int | None:
    """MACs as the ELAN paper counts them: convolutions at every pixel of the unpadded input, and attention.

    Shifts cost nothing there. Of the modules that share attention, one is charged for it: a product of queries and one
    with values, `2 * window² * channels` of a group at each pixel, which is 13,440 for a block of ELAN-light. None for
    a network other than ELAN.
    """
    if not isinstance(net, ELAN):
        return None
    convolutions = sum(conv.weight.numel() for conv in net.modules() if isinstance(conv, nn.Conv2d))
    width_of_group = net.head.out_channels // len(net.window_sizes)
    attention = len(net.body) * sum(2 * window**2 * width_of_group for window in net.window_sizes)
    return (convolutions + attention) * height * width
