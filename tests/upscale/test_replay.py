"""Which pieces are recorded, which recordings are kept, and what happens when memory is short. The graphs themselves:
test_gpu.py."""
import pytest
import torch

from elan_basicsr.upscale import replay
from elan_basicsr.upscale.replay import Replayed
from tests.upscale.test_run import enlarger


class Played:
    """What stands in for a recording."""

    def __init__(self, x):
        self.shape, self.number = x.shape, 0

    def replay(self, x):
        assert x.shape == self.shape
        self.number += 1
        return x + 1


@pytest.fixture
def replayed(monkeypatch):
    """A network that adds 1, with recordings as a CPU can have them."""
    monkeypatch.setattr(Replayed, '_try_to_record', lambda self, x: Played(x))
    return Replayed(lambda x: x + 1)


def run(replayed, *sizes):
    """Pieces of these sizes; gives the sizes whose recordings are kept, and how often they were played."""
    for height, width in sizes:
        x = torch.rand(1, 1, height, width)
        assert torch.equal(replayed(x), x + 1)
    return {tuple(shape[2:]): recording.number for shape, recording in replayed.recordings.items()}


def test_a_shape_is_recorded_when_it_comes_again(replayed):
    assert run(replayed, (3, 4)) == {}
    assert run(replayed, (3, 4)) == {(3, 4): 1}
    assert run(replayed, (3, 4), (4, 3), (3, 4)) == {(3, 4): 3}
    assert run(replayed, (4, 3), (4, 3)) == {(3, 4): 3, (4, 3): 2}


def test_those_used_last_are_kept(replayed):
    assert run(replayed, *[(3, 4), (4, 3)] * 2, (3, 4), *[(5, 5)] * 2) == {(3, 4): 2, (5, 5): 1}
    assert run(replayed, (4, 3)) == {(5, 5): 1, (4, 3): 1}


def test_large_pieces_are_not_recorded(replayed, monkeypatch):
    monkeypatch.setattr(replay, 'MOST_PIXELS', 12)
    assert run(replayed, *[(3, 5)] * 3, *[(3, 4)] * 2) == {(3, 4): 1}


def test_a_recording_that_fails_is_the_last_that_is_tried(monkeypatch):
    tried = []

    def fail(self, x):
        tried.append(x.shape)
        raise torch.OutOfMemoryError('out of memory')

    monkeypatch.setattr(Replayed, '_record', fail)
    monkeypatch.setattr(torch.cuda, 'device', lambda device: torch.no_grad())
    assert run(Replayed(lambda x: x + 1), *[(3, 4)] * 3, *[(4, 3)] * 3) == {} and len(tried) == 1


def test_a_piece_that_lacks_memory_takes_that_of_the_recordings(replayed):
    def net(x):
        if replayed.recordings:
            raise torch.OutOfMemoryError('out of memory')
        return x + 1

    run(replayed, *[(3, 4)] * 2)
    replayed.net = net
    assert run(replayed, (9, 9)) == {}
    assert run(replayed, *[(3, 4)] * 3) == {}


def test_a_cpu_has_no_recordings():
    assert enlarger().replayed is None
