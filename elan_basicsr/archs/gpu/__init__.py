"""The blocks of ELAN on NVIDIA GPUs, by kernels in Triton, which PyTorch brings along on Linux."""
from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache
from types import ModuleType

import torch
from torch import Tensor, nn

from elan_basicsr.archs.stand_in import are_as_made, setting

MEASURED = ((9, 0),)
"""Compute capabilities of the GPUs on which kernels were measured to be faster than the modules: H100 and H200."""
MOST_CHANNELS = 64  # of a group: beyond, what a program works on has no room in its registers
WINDOWS = (2, 4, 8, 16, 32)


def stand_in(body: nn.ModuleList, x: Tensor, window_sizes: Sequence[int], plain_types: set[type]) -> ModuleType | None:
    """What computes the blocks `body` of a padded map x (B, C, H, W) in place of the modules themselves.

    Args:
        body: The blocks.
        x: What they are to be given.
        window_sizes: Those of the network.
        plain_types: The classes whose function is known.

    Returns:
        `blocks`, or None where only the modules will do.
    """
    if (not are_as_made(body, x, [*plain_types, nn.SyncBatchNorm]) or x.device.type != 'cuda' or not usable(x.device)
            or any(w not in WINDOWS for w in window_sizes) or x.shape[1] > MOST_CHANNELS * len(window_sizes)):
        return None
    from elan_basicsr.archs.gpu import blocks
    return blocks


def usable(device: torch.device) -> bool:
    """Whether kernels are used on a GPU: on those of `MEASURED`.

    With `ELAN_KERNELS=triton` they are on every one from compute capability 8.0 on, with `ELAN_KERNELS=0` on none.
    """
    least = torch.cuda.get_device_capability(device)
    return _has_triton() and setting() != '0' and (least in MEASURED or setting() == 'triton' and least >= (8, 0))


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec('triton') is not None
