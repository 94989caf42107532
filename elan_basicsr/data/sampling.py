"""Which sample comes when, and with which random numbers.

Training reads one endless stream of samples. The n-th sample of the stream is fixed by the seed alone: pass `n // size`
over the dataset has a permutation of its own, and each sample's crop and augmentation are drawn from a seed made of
(seed, pass, position). So the samples do not depend on the number of loader workers, on restarts, or on how many
processes share a step (MosaicML's Streaming calls that elastic determinism).
"""
from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler, get_worker_info


def mix_seed(*numbers: int) -> int:
    """One well-mixed seed in 0..2^63-1 from several integers."""
    digest = hashlib.blake2b(struct.pack(f'<{len(numbers)}q', *numbers), digest_size=8).digest()
    return int.from_bytes(digest, 'little') >> 1


def seed_all(seed: int) -> None:
    """Seed the generators that datasets, degradations and networks draw from: random, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


@contextmanager
def generators_kept() -> Iterator[None]:
    """Seed and draw at will inside; in the main process the generators then go on as if nothing had happened."""
    if get_worker_info() is not None:  # a loader worker draws for nobody but its samples
        yield
        return
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class ToolboxDataset(Dataset[dict]):
    """A dataset of the toolbox's, as annotations see it: upstream has no class for what all of them have."""
    opt: dict

    def __len__(self) -> int:
        raise NotImplementedError


class SeededDataset(ToolboxDataset):
    """A dataset indexed by (index, seed): the sample `dataset[index]`, drawn with that seed."""

    def __init__(self, dataset: ToolboxDataset):
        self.dataset = dataset
        self.opt = dataset.opt

    def __getitem__(self, key: tuple[int, int]):
        index, seed = key
        with generators_kept():
            seed_all(seed)
            return self.dataset[index]

    def __len__(self) -> int:
        return len(self.dataset)


class StreamSampler(Sampler):
    """One process's share of the endless stream, as (index, seed) pairs.

    A step takes `batch_size * world_size` consecutive samples of the stream; rank r takes the r-th run of them.

    Args:
        size: Number of samples in the dataset.
        batch_size: Samples of a step on this process.
        seed: The run's seed.
        rank, world_size: This process and how many there are.
        start: How many samples of the stream, counted over all processes, have been used before.
    """

    def __init__(self, size: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, start: int = 0):
        self.size = size
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.start = start

    def __iter__(self) -> Iterator[tuple[int, int]]:
        first = self.start + self.rank * self.batch_size
        current_pass = first // self.size
        order = self._order(current_pass)
        while True:
            for n in range(first, first + self.batch_size):
                number, position = divmod(n, self.size)
                if number != current_pass:
                    current_pass, order = number, self._order(number)
                yield int(order[position]), mix_seed(self.seed, number, position)
            first += self.batch_size * self.world_size

    def _order(self, number: int) -> np.ndarray:
        return np.random.Generator(np.random.PCG64(mix_seed(self.seed, number))).permutation(self.size)
