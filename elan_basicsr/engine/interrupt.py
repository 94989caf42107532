"""Stopping between two iterations when a scheduler or a person asks for it."""
from __future__ import annotations

import os
import signal
import threading
import time

import torch
import torch.distributed as dist

from basicsr.utils.dist_util import get_dist_info

EXIT_STOPPED = 75
"""Exit code of a run that was stopped by a signal after saving: EX_TEMPFAIL of sysexits.h, "try again later"."""

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)

SAME_REQUEST = 5
"""Seconds within which a process of several takes signals for one request: a launcher passes on to each process what a
terminal or a scheduler has sent to all of them already."""


class StopRequest:
    """Within it, a signal of SIGNALS asks for a stop after the iteration; a second one leaves at once."""

    def __init__(self, several: bool = False):
        """`several`: whether this process is one of several, see SAME_REQUEST."""
        self.cause: str | None = None
        self._grace = SAME_REQUEST if several else 0
        self._first = 0.
        self._previous: dict = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python handles signals there only
            # nohup has SIGHUP ignored, which stays so.
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS
                              if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN}
        return self

    def __exit__(self, *exc_info) -> None:
        # One of several processes may be this far before a signal that was sent to all arrives again, which would
        # end it otherwise, though all was saved.
        if not (self._grace and self.cause):
            self._restore()

    def _note(self, number: int, frame) -> None:
        if not self._first:  # it may know already that another process was asked
            self.cause, self._first = self.cause or signal.Signals(number).name, time.monotonic()
            if not self._grace:
                self._restore()  # so that the next signal does what it does by default
        elif time.monotonic() - self._first > self._grace:
            self._restore()
            os.kill(os.getpid(), number)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def requested(self) -> bool:
        """Whether any process of the run was asked to stop: all of them answer the same."""
        asked = self.cause is not None
        if get_dist_info()[1] > 1:
            shared = torch.tensor(int(asked), device='cuda' if dist.get_backend() == 'nccl' else 'cpu')
            dist.all_reduce(shared, op=dist.ReduceOp.MAX)
            asked = bool(shared.item())  # not what has come in the meantime: the others do not know of it
            if asked and self.cause is None:
                self.cause = 'a signal to another process'
        return asked
