"""Which sample comes when is fixed by the seed alone."""
import itertools
import random

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from elan_basicsr.data.sampling import SeededDataset, StreamSampler, generators_kept, mix_seed, seed_all


class Numbers(Dataset):
    """Each sample: its index, and a draw from every generator."""
    opt = {}

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return torch.tensor([index, random.random(), np.random.rand(), torch.rand(()).item()])


def stream(workers=0, batch=4, rank=0, world_size=1, start=0, steps=7):
    sampler = StreamSampler(10, batch, seed=3, rank=rank, world_size=world_size, start=start)
    loader = DataLoader(SeededDataset(Numbers()), batch_size=batch, sampler=sampler, num_workers=workers)
    return torch.stack(list(itertools.islice(loader, steps)))


def test_samples_depend_neither_on_workers_nor_on_restarts():
    whole = stream()
    assert torch.equal(stream(workers=2), whole)
    assert torch.equal(stream(start=12, steps=4), whole[3:])
    assert torch.equal(stream(workers=2, start=12, steps=4), whole[3:])


def test_samples_do_not_depend_on_the_number_of_processes():
    whole = stream()
    for world_size in (2, 4):
        shares = [stream(batch=4 // world_size, rank=rank, world_size=world_size) for rank in range(world_size)]
        assert torch.equal(torch.cat(shares, dim=1), whole)


def test_each_pass_takes_every_image_once_and_draws_anew():
    samples = stream(steps=5).reshape(2, 10, 4)  # twenty samples are two passes over ten images
    assert all(sorted(part[:, 0].tolist()) == list(range(10)) for part in samples)
    first, second = (part[part[:, 0].argsort()] for part in samples)
    assert not (first[:, 1:] == second[:, 1:]).any()


def test_the_main_process_draws_on_as_if_nothing_had_happened():
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    first = torch.rand(1)
    with generators_kept():
        seed_all(7)
        torch.rand(5), random.random(), np.random.rand()
    assert torch.equal(torch.cat([first, torch.rand(1)]), expected)


@given(st.lists(st.integers(-2**63, 2**63 - 1), min_size=1, max_size=4))
def test_mixed_seeds_fit_every_generator(numbers):
    assert 0 <= mix_seed(*numbers) < 2**63
    assert mix_seed(*numbers) == mix_seed(*numbers)
