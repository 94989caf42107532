"""The kernels' threads (`kernels/threads.h`) leave the cores to other programs when they have nothing to do."""
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from elan_basicsr.archs.cpu import library

from ..conftest import with_checkout

pytestmark = pytest.mark.skipif(library.library() is None, reason='no kernels were compiled for this processor')
SLOTS, EDGE = 8, 1024  # of numbers that more than one thread adds


def _add(threads: int, parts: torch.Tensor | None = None) -> torch.Tensor:
    parts = torch.ones(SLOTS, EDGE, EDGE) if parts is None else parts
    total = torch.empty(EDGE, EDGE)
    library.call('elan_add_slots', parts, total, SLOTS, EDGE, EDGE, EDGE, False, threads)
    return total


@pytest.mark.parametrize('threads', [1, 2, 5, 3])
def test_any_number_of_them_does_all_of_the_work(threads):
    assert (_add(threads) == SLOTS).all()


def test_they_sleep_between_calls():
    """OpenMP's turn in a loop for milliseconds, and use up the time of a core that another program waits for."""
    spent, parts = [], torch.ones(SLOTS, EDGE, EDGE)
    time.sleep(0.5)  # PyTorch's are OpenMP's
    for _ in range(10):
        _add(2, parts)
        begin = time.process_time()
        time.sleep(0.05)
        spent.append(time.process_time() - begin)
    assert sorted(spent)[5] < 1e-3


WHERE = """
import os, torch
from tests.archs.test_cpu_threads import _add
torch.rand(1000, 1000) @ torch.rand(1000, 1000)
before = set(os.listdir('/proc/self/task'))
_add(2)
print({frozenset(os.sched_getaffinity(int(task))) for task in set(os.listdir('/proc/self/task')) - before})
"""


@pytest.mark.skipif(sys.platform != 'linux' or len(os.sched_getaffinity(0)) < 2, reason='needs Linux and two cores')
def test_they_are_where_openmp_would_have_them():
    """With OMP_PROC_BIND the caller is bound to the first core, which they would share with it otherwise."""
    done = subprocess.run([sys.executable, '-c', WHERE], capture_output=True, text=True, check=True, env={
        **os.environ, 'PYTHONPATH': with_checkout(), 'OMP_PROC_BIND': 'true', 'OMP_NUM_THREADS': '2'})
    first, second = sorted(os.sched_getaffinity(0))[:2]
    assert done.stdout.strip() == str({frozenset({second})}), (first, done.stdout)


def _small_call(threads: int):
    """The convolution of a small map, a call of many threads that takes next to no time."""
    h, c, w = 4, 5, 16
    maps, weights, sums = torch.ones(2, 1, h, c, w), torch.ones(c, c), torch.empty(h, c)
    return lambda: library.call('elan_project_squares', maps[0], maps[1], 1, h, w, c, c, weights, weights[0], sums,
                                h, h, threads)


def test_a_fork_in_the_midst_of_calls_can_call():
    """It has the lock as it was, and not the thread that would give it back."""
    over, alone = threading.Event(), _small_call(1)

    def call_on_and_on():
        call = _small_call(3)
        while not over.is_set():
            call()

    others = [threading.Thread(target=call_on_and_on) for _ in range(4)]
    for other in others:
        other.start()
    try:
        for _ in range(80):
            child = os.fork()
            if not child:
                alone()
                os._exit(0)
            end = time.monotonic() + 20
            while not (ended := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < end:
                time.sleep(0.005)
            if not ended[0]:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            assert ended == (child, 0)
    finally:
        over.set()
        for other in others:
            other.join()
