"""How long networks take, beside each other: interleaved runs of inference and of training steps."""
from __future__ import annotations

import math
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WARM_UPS = {'cuda': 3}
"""Runs before the first that counts; one on other devices."""
GEMM_EDGE = 2048
LEARNING_RATE = 2e-4

Key = TypeVar('Key', bound=Hashable)


@dataclass(frozen=True)
class Timing:
    """Seconds of each run, in order."""
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def min(self) -> float:
        return min(self.seconds)

    @property
    def max(self) -> float:
        return max(self.seconds)


def time_interleaved(calls: Mapping[Key, Callable[[], object]], runs: int, device: str = 'cpu', *,
                     longest: float = math.inf) -> dict[Key, Timing]:
    """Time calls beside each other: every round runs each once, every other round in reverse, so that drift cancels.

    Args:
        calls: What is to be timed.
        runs: Rounds that count, after warming up.
        device: Where the calls work; their work is waited for.
        longest: Seconds after which no further round is begun; the first always is.
    """
    def timed(call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        synchronise(device)
        return time.perf_counter() - start

    begin = time.perf_counter()
    for call in calls.values():
        for _ in range(WARM_UPS.get(torch.device(device).type, 1)):
            timed(call)
    seconds: dict[Key, list[float]] = {key: [] for key in calls}
    for number in range(runs):
        if number and time.perf_counter() - begin > longest:
            break
        for key in list(calls)[::-1 if number % 2 else 1]:
            seconds[key].append(timed(calls[key]))
    return {key: Timing(tuple(values)) for key, values in seconds.items()}


class BusyLoops:
    """Programs that keep a core each busy, while a call of `beside` runs."""

    def __init__(self, number: int):
        self.number = number
        self.loops: list[subprocess.Popen] = []

    def __enter__(self) -> BusyLoops:
        self.loops = [subprocess.Popen([sys.executable, '-c', 'while True: pass']) for _ in range(self.number)]
        self._signal(signal.SIGSTOP)
        return self

    def __exit__(self, *exc_info) -> None:
        for loop in self.loops:
            loop.kill()
            loop.wait()

    def _signal(self, number: signal.Signals) -> None:
        for loop in self.loops:
            loop.send_signal(number)

    def beside(self, call: Callable[[], object]) -> Callable[[], object]:
        """The call with the loops running."""
        def disturbed() -> object:
            self._signal(signal.SIGCONT)
            try:
                return call()
            finally:
                self._signal(signal.SIGSTOP)

        return disturbed


def synchronise(device: str) -> None:
    """Wait for what a device was asked to do."""
    if torch.device(device).type == 'cuda':
        torch.cuda.synchronize(device)


def precision(device: str, dtype: torch.dtype) -> torch.autocast:
    """float32, with what `takes_tf32` says, or mixed precision by autocast."""
    return torch.autocast(torch.device(device).type, dtype=dtype if dtype != torch.float32 else torch.bfloat16,
                          enabled=dtype != torch.float32)


def inference_call(net: nn.Module, x: Tensor, dtype: torch.dtype = torch.float32) -> Callable[[], Tensor]:
    """What is timed of a network that restores images `x`; it is set to eval mode."""
    net.eval()

    def call() -> Tensor:
        with torch.inference_mode(), precision(x.device.type, dtype):
            return net(x)

    return call


def training_step(net: nn.Module, x: Tensor, y: Tensor, dtype: torch.dtype = torch.float32) -> Callable[[], None]:
    """What is timed of a network that learns `y` from `x`: forward, L1, backward, Adam. It is set to train mode.

    Adam is that of the option files.
    """
    net.train()
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=LEARNING_RATE, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        with precision(x.device.type, dtype):
            loss = F.l1_loss(net(x), y)
        loss.backward()
        optimizer.step()

    return step


def takes_tf32(device: str) -> bool:
    """Whether float32 convolutions round their factors to the 11 binary digits of TF32 there.

    NVIDIA's GPUs from Ampere on can, and torch lets cuDNN do so by default; in products of matrices it does not.
    """
    return (torch.device(device).type == 'cuda' and torch.backends.cudnn.allow_tf32
            and torch.cuda.get_device_capability(device) >= (8, 0))


def gemm_call(device: str = 'cpu') -> tuple[Callable[[], Tensor], int]:
    """The yardstick: a float32 product of two square matrices, in TF32 where convolutions are, and its MACs."""
    a, b = torch.rand(2, GEMM_EDGE, GEMM_EDGE, device=device)
    out = torch.empty_like(a)
    matmul, tf32 = torch.backends.cuda.matmul, takes_tf32(device)

    def product() -> Tensor:
        before = matmul.allow_tf32
        matmul.allow_tf32 = tf32
        try:
            return torch.mm(a, b, out=out)
        finally:
            matmul.allow_tf32 = before

    return product, GEMM_EDGE**3
