"""Attention within as many windows as large images have, which fused kernels do not all take at once."""
from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from elan_basicsr.archs.elan_arch import MOST_WINDOWS, attend
from elan_basicsr.selfcheck.checks import Check, Machine, Outcome, within

TOKENS = 16  # of a window of 4x4, of which an image has most
SAMPLE = 64  # windows that are compared, at the beginning, at the limit and at the end
MARGIN = 4


def checks(machine: Machine) -> Iterator[Check]:
    """Up to the limit, one beyond, and almost twice as many, in both widths of a head that ELAN has."""
    for width in (20,) if machine.quick else (20, 60):
        for windows in (MOST_WINDOWS, MOST_WINDOWS + 1, 2 * MOST_WINDOWS - 510):
            yield Check('attention', f'{windows:,} windows, {width} channels',
                        partial(compare, windows, width, machine.device))


def compare(windows: int, width: int, device: torch.device) -> Outcome:
    """The largest relative deviation of output and gradients from float64 on the CPU, in three samples of windows."""
    generator = torch.Generator().manual_seed(0)
    q, v, weight = torch.randn(3, windows, TOKENS, width, generator=generator).unbind()
    q = q * width**-0.25  # or every token would attend to itself alone, and the gradient be rounding
    found = _forward_and_backward(*(each.to(device) for each in (q, v, weight)))
    worst = allowed = 0.
    for start in (0, min(MOST_WINDOWS, windows - SAMPLE) - SAMPLE // 2, windows - SAMPLE):
        part = slice(start, start + SAMPLE)
        exact = _forward_and_backward(*(each[part].double() for each in (q, v, weight)))
        rounded = _forward_and_backward(*(each[part] for each in (q, v, weight)))
        for whole, near, right in zip(found, rounded, exact, strict=True):
            worst = max(worst, _deviation(whole[part].cpu(), right))
            allowed = max(allowed, _deviation(near, right))
    return within(worst, MARGIN * allowed)


def _forward_and_backward(q: Tensor, v: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """The output, and the gradients of q and v when each value of the output counts by its weight."""
    q, v = q.detach().requires_grad_(), v.detach().requires_grad_()
    output = attend(q, v)
    output.backward(weight)
    assert q.grad is not None and v.grad is not None
    return output.detach(), q.grad, v.grad


def _deviation(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())
