"""How much of a GPU's memory training takes, computed without one: the tensors of two steps are counted, not made.

Usage: `python tools/predict_memory.py`, which prints the table of docs/gpu.md in some minutes. What a GPU's kernels and
the allocator's blocks take beside the tensors is not in it.
"""
from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from elan_basicsr.archs.elan_arch import ELAN
from elan_basicsr.report.timing import training_step
from elan_basicsr.selfcheck.network import SIZES

SCALE = 4
BATCHES = (('ELAN-light', 64, 64), ('ELAN-light', 16, 64), ('ELAN', 32, 48))  # network, batch, edge of the LR patches


class LiveBytes(TorchDispatchMode):
    """Counts the storages that live at a time; `peak` is the most there were."""

    def __init__(self, *present: Tensor):
        super().__init__()
        self.live = self.peak = 0
        self.known = WeakIdKeyDictionary()
        for tensor in present:
            self._count(tensor)

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self.known:
            size = self.known[storage] = storage.nbytes()
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, size)

    def _forget(self, size: int) -> None:
        self.live -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for tensor in (leaf for leaf in tree_leaves(results) if isinstance(leaf, Tensor)):
            self._count(tensor)
        return results


def peak(network: str, batch: int, edge: int, **arguments) -> float:
    """GiB of a training step with Adam, by when its moments are there."""
    with FakeTensorMode():
        net: nn.Module = ELAN(upscale=SCALE, **SIZES[network], **arguments)
        x = torch.empty(batch, 3, edge, edge)
        y = torch.empty(batch, 3, SCALE * edge, SCALE * edge)
        with LiveBytes(*net.parameters(), *net.buffers(), x, y) as counted:
            step = training_step(net, x, y)
            step()
            step()
    return counted.peak / 2**30


if __name__ == '__main__':
    for network, batch, edge in BATCHES:
        whole, recomputed = (peak(network, batch, edge, use_checkpoint=choice) for choice in (False, True))
        print(f'| {network} | {batch} x {edge}x{edge} | {whole:.1f} | {recomputed:.1f} |', flush=True)
