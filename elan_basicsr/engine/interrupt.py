"""Stopping between two iterations when a scheduler or a person asks for it."""
from __future__ import annotations

import signal
import threading

import torch
import torch.distributed as dist

from basicsr.utils.dist_util import get_dist_info

EXIT_STOPPED = 75
"""Exit code of a run that was stopped by a signal after saving: EX_TEMPFAIL of sysexits.h, "try again later"."""

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Within it, SIGTERM, SIGINT and SIGUSR1 ask for a stop after the iteration; a second one leaves at once."""

    def __init__(self):
        self.cause: str | None = None
        self._previous: dict = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python handles signals there only
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *exc_info) -> None:
        self._restore()

    def _note(self, number: int, frame) -> None:
        self.cause = signal.Signals(number).name
        self._restore()  # so that the next signal does what it does by default

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def requested(self) -> bool:
        """Whether any process of the run was asked to stop: all of them answer the same."""
        if get_dist_info()[1] > 1:
            asked = torch.tensor(int(self.cause is not None), device='cuda' if dist.get_backend() == 'nccl' else 'cpu')
            dist.all_reduce(asked, op=dist.ReduceOp.MAX)
            if asked.item() and self.cause is None:
                self.cause = 'a signal to another process'
        return self.cause is not None
