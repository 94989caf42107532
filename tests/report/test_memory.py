import functools
import os
import signal

import pytest
import torch
from torch import nn

from elan_basicsr.report.memory import peak_memory

MIB = 1 << 20


class Hungry(nn.Module):
    """Takes a known number of MiB while it runs, after more have come and gone in the parent."""

    def __init__(self, mib):
        super().__init__()
        self.mib = mib
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x * self.scale + torch.ones(self.mib * MIB // 4).sum() * 0


class Killed(nn.Module):
    def forward(self, x):
        os.kill(os.getpid(), signal.SIGKILL)


def test_the_peak_is_what_the_network_takes():
    parent = torch.ones(200 * MIB // 4)
    peak = peak_memory(functools.partial(Hungry, 96), (1, 3, 4, 4), threads=1)
    assert 96 * MIB <= peak < 116 * MIB
    del parent


def test_a_process_that_is_killed_has_no_peak():
    assert peak_memory(Killed, (1, 3, 4, 4), threads=1) is None


@pytest.mark.gpu
def test_on_a_gpu_it_is_what_torch_allocates():
    """Input and output are counted, and in training more."""
    class_, shape = functools.partial(nn.Conv2d, 3, 3, 1), (1, 3, 1024, 1024)
    assert 24 * MIB <= peak_memory(class_, shape, device='cuda') < 60 * MIB
    assert peak_memory(class_, shape, scale=1, device='cuda') > peak_memory(class_, shape, device='cuda')
