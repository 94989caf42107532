"""The blocks of ELAN on NVIDIA GPUs, by kernels in Triton, which PyTorch brings along on Linux."""
from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from types import ModuleType

import torch
from torch import Tensor, nn

from elan_basicsr.archs.stand_in import are_as_made, setting

MEASURED = {((9, 0), '3.6')}
"""Compute capability and Triton with which the kernels were found right and faster than the modules: an H100's."""
MOST_CHANNELS = 64  # of a group: beyond, what a program works on has no room in its registers
WINDOWS = (4, 8, 16)  # those that ran on a GPU; the kernels are written for powers of 2


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
    capability = torch.cuda.get_device_capability(device)
    wanted = capability >= (8, 0) if setting() == 'triton' else (capability, triton_version()) in MEASURED
    return wanted and setting() != '0' and _compiles(device)


@cache
def triton_version() -> str:
    """Such as `3.6`, of which each makes other code of the kernels; empty where there is none."""
    try:
        return '.'.join(metadata.version('triton').split('.')[:2])
    except metadata.PackageNotFoundError:
        return ''


@cache
def _compiles(device: torch.device) -> bool:
    """Whether there is Triton, and what it needs when a kernel is first called: a C compiler and Python's headers."""
    try:
        from elan_basicsr.archs.gpu import products
        products.try_a_kernel(device)
    except Exception as error:  # whatever it is, the modules do without
        reason = ' '.join(str(error).split())[:120]
        warnings.warn(f'Triton cannot compile kernels here ({type(error).__name__}: {reason}), so that ELAN takes two '
                      'to five times the time; it needs gcc and the headers of Python (apt install gcc python3-dev)',
                      stacklevel=2)
        return False
    return True
