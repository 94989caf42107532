"""From a dataset to batches on the network's device: `PatchLoader`.

Batches of 8-bit patches travel as bytes through memory that main process and loader workers share from the start. What
a worker sends is the number of a slot; floats are made where they are used. Sending tensors instead costs a handshake
and fresh pages for each batch, which is several times the work of cutting the patches.
"""
from __future__ import annotations

import gc
import random
import re
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from elan_basicsr.data.sampling import SeededDataset, StreamSampler, ToolboxDataset
from elan_basicsr.errors import RunLost

PREFETCH = 3  # batches that a worker makes ahead
SLOTS = PREFETCH + 1  # and one for the batch that the main process is turning into floats
GRACE = 300  # seconds that a worker goes on after SIGTERM, for the main process to finish its iteration and save


class PatchLoader:
    """The endless batches of a training run, an iterable of dicts as torch's DataLoader makes them.

    Images of 8 bits may come as uint8 of 0..255; `to_float` makes them the floats of 0..1 that the toolbox's datasets
    give. It must have been called on a batch before the next one is taken, since the memory of bytes is used again.

    Args:
        dataset: Any training dataset of the toolbox's.
        sampler: Which sample comes when; its `batch_size` is the batch's.
        workers: Loader processes; 0 loads in this one.
        pin_memory: Batches of floats lie in memory that a GPU reads directly; `to_float` does so for bytes.
        context: How workers start, such as `spawn`; by default `fork` on Linux, which Python 3.14 does not choose by
            itself, for workers that load torch anew take seconds and 300 MB each.
    """

    def __init__(self, dataset: ToolboxDataset, sampler: StreamSampler, workers: int = 0, pin_memory: bool = False,
                 context: str | None = None):
        context = context or ('fork' if sys.platform == 'linux' else None)
        self._bytes = None
        if shapes := getattr(dataset, 'batch_shapes', None):
            self._bytes = _ByteBatches(dataset, shapes, sampler.batch_size, workers)
        self._loader = DataLoader(
            SeededDataset(dataset) if self._bytes is None else self._bytes, batch_size=sampler.batch_size,
            sampler=sampler, num_workers=workers, pin_memory=pin_memory and self._bytes is None,
            collate_fn=None if self._bytes is None else _as_it_is, prefetch_factor=PREFETCH if workers else None,
            multiprocessing_context=context if workers else None, worker_init_fn=_start_worker)
        self._batches: Iterator | None = None

    def __iter__(self) -> Iterator[dict]:
        self._batches = batches = iter(self._loader)
        return batches if self._bytes is None else map(self._bytes.from_slot, batches)

    def close(self) -> None:
        """End the workers of the latest iteration.

        An error holds on to it, and a program that ends terminates its workers, which wait for GRACE seconds then. So
        would one that is still at a sample after the seconds that torch gives it, and it is of no use any more.
        """
        if isinstance(self._batches, _MultiProcessingDataLoaderIter):
            self._batches._shutdown_workers()
            for worker in self._batches._workers:
                worker.kill()


@contextmanager
def dead_workers_named() -> Iterator[None]:
    """Around a training: torch reports a loader worker's death as a RuntimeError wherever the program is.

    Raises:
        RunLost: A loader worker died.
    """
    try:
        yield
    except RuntimeError as error:
        if not re.match(r'DataLoader worker \(pid', str(error)):
            raise
        raise RunLost(f'{str(error).splitlines()[0].rstrip(". ")}; out of memory? Fewer '
                      'datasets.train.num_worker_per_gpu need less; resume with --auto_resume') from error


def to_float(batch: dict, device: torch.device | str = 'cpu', pin_memory: bool = False) -> dict:
    """A batch as the toolbox's datasets give it, on `device`: images that came as bytes become floats of 0..1 there.

    With `pin_memory` it is copied to memory that a GPU reads directly, so that nobody waits until the GPU has read it.
    Either way the memory of the bytes has been read by the return.
    """
    def bring(value: Tensor) -> Tensor:
        value = (value.pin_memory() if pin_memory else value).to(device, non_blocking=True)
        return value.float().div_(255) if value.dtype == torch.uint8 else value

    return {name: bring(value) if isinstance(value, Tensor) else value for name, value in batch.items()}


def prefetched(batches: Iterable[dict], device: torch.device, pin_memory: bool = False) -> Iterator[dict]:
    """What `to_float` makes of each batch, on its way to the GPU `device` while the one before is worked on.

    The toolbox's CUDAPrefetcher leaves the memory of a batch to the next one while the GPU may still be reading it.
    """
    beside, arriving = torch.cuda.Stream(device), None
    for batch in batches:
        arrived = arriving and _handed_over(arriving, beside)
        with torch.cuda.stream(beside):
            arriving = to_float(batch, device, pin_memory)
        if arrived:
            yield arrived
    if arriving:
        yield _handed_over(arriving, beside)


def _handed_over(batch: dict, stream: torch.cuda.Stream) -> dict:
    """A batch from another stream, as one of the current stream: it is waited for, and not overwritten too early."""
    current = torch.cuda.current_stream(stream.device)
    current.wait_stream(stream)
    for value in batch.values():
        if isinstance(value, Tensor):
            value.record_stream(current)
    return batch


def _start_worker(worker: int) -> None:
    gc.freeze()  # what the parent has imported is for ever; searching it for garbage takes a tenth of a worker's time
    # Schedulers and torchrun signal whole process groups. When to stop is for the main process to say, and a worker
    # ends with it anyway.
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))


def _as_it_is(batch):
    return batch


class _ByteBatches(Dataset):
    """Batches of (index, seed) pairs, written as bytes into slots of memory that all processes of the loader share."""

    def __init__(self, dataset, shapes: tuple, batch_size: int, workers: int):
        self.dataset = dataset
        self.turn = 0
        slots = SLOTS * workers or 1
        self.slots = {name: torch.empty((slots, batch_size, *shape), dtype=torch.uint8)
                      for name, shape in zip(('lq', 'gt'), shapes, strict=True)}
        if workers:
            for memory in self.slots.values():
                memory.share_memory_()

    def __getitems__(self, keys: list[tuple[int, int]]) -> dict:
        """Fill the next slot of this process; return its number and the paths."""
        worker = get_worker_info()
        slot = worker.id * SLOTS + self.turn % SLOTS if worker else 0
        self.turn += 1
        lq, gt = (memory[slot].numpy() for memory in self.slots.values())
        state = random.getstate()
        rows = []
        for i, (index, seed) in enumerate(keys):
            random.seed(seed)
            rows.append(self.dataset.fill(index, lq[i], gt[i]))
        random.setstate(state)
        return {'slot': slot} | {name: [row[name] for row in rows] for name in rows[0]}

    def from_slot(self, batch: dict) -> dict:
        """The batch that a process has written."""
        slot = batch.pop('slot')
        return {name: memory[slot] for name, memory in self.slots.items()} | batch

    def __len__(self) -> int:
        return len(self.dataset)
