"""What a check is, and how checks are run and shown: `basicsr doctor --check`.

A check is a name and a call that gives an Outcome; what it raises is an outcome too. The modules beside this one each
have a function `checks(machine)`, which lists theirs.
"""
from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

WORDS = {True: '[green]ok[/]', False: '[bold red]WRONG[/]', None: '[dim]left out[/]'}


@dataclass(frozen=True)
class Machine:
    """What is checked, and with what.

    Attributes:
        device: Where the networks run.
        quick: Smaller networks, and nothing compiled.
        folder: An empty one, for files that go afterwards.
        deadline: Of `time.monotonic`, after which nothing more is timed.
    """
    device: torch.device
    quick: bool
    folder: Path
    deadline: float = math.inf

    @property
    def on_gpu(self) -> bool:
        return self.device.type == 'cuda'


@dataclass(frozen=True)
class Outcome:
    """What a check found.

    Attributes:
        ok: The verdict; None where something that is not needed is not there.
        found, allowed: Figures to show.
        note: What is wrong, or why it was left out.
    """
    ok: bool | None
    found: str = ''
    allowed: str = ''
    note: str = ''


@dataclass(frozen=True)
class Check:
    """A row of the table."""
    group: str
    name: str
    call: Callable[[], Outcome]


@dataclass(frozen=True)
class Row:
    """A check that was run."""
    group: str
    name: str
    outcome: Outcome
    seconds: float


def within(value: float, limit: float, note: str = '') -> Outcome:
    """The verdict on a deviation; `note` says of what, if it is too large."""
    ok = value <= limit
    return Outcome(ok, f'{value:.1e}', f'{limit:.1e}', '' if ok else note)


def run(checks: Iterable[Check], console: Console) -> Iterator[Row]:
    """Run checks one by one, with a live line of what is being done on a terminal."""
    with console.status('') as status:
        for check in checks:
            status.update(f'{check.group}: {check.name}')
            start = time.perf_counter()
            try:
                outcome = check.call()
            except Exception as error:  # whatever it is, it is the finding
                lines = str(error).strip().splitlines() or ['']
                outcome = Outcome(False, note=f'{type(error).__name__}: {" ".join(lines[:2])}')
            yield Row(check.group, check.name, outcome, time.perf_counter() - start)


def verdict_table(rows: Sequence[Row]) -> Table:
    """One verdict a row, for a terminal of 80 columns."""
    shown = _table('check', 'verdict', 'found', 'at most')
    for group, members in groupby(rows, key=lambda row: row.group):
        shown.add_row(f'[bold]{group}[/]')
        for row in members:
            shown.add_row(f'  {row.name}', WORDS[row.outcome.ok], row.outcome.found, row.outcome.allowed)
    return shown


def speed_table(rows: Sequence[Row]) -> Table:
    """Time and memory of what was timed."""
    shown = _table('at x4', 'time', 'peak memory')
    for group, members in groupby(rows, key=lambda row: row.group):
        shown.add_row(f'[bold]{group}[/]')
        for row in members:
            shown.add_row(f'  {row.name}', row.outcome.found or '–', row.outcome.allowed or '–')
    return shown


def notes(rows: Iterable[Row]) -> Iterator[str]:
    """What is wrong, and why something was left out, a line each."""
    for row in rows:
        if not row.outcome.ok:
            yield f'{WORDS[row.outcome.ok]} {row.group}, {row.name}: {escape(row.outcome.note)}'


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for number, column in enumerate(columns):
        table.add_column(column, justify='right' if number else 'left', no_wrap=number > 0)
    return table


@contextmanager
def tf32(convolutions: bool) -> Iterator[None]:
    """Whether cuDNN's convolutions may round to TF32, which torch allows by default; matrix products may not."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = convolutions, False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
