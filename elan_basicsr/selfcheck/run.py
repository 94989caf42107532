"""`basicsr doctor --check`: whether everything is right on this machine's device, and how fast."""
from __future__ import annotations

import tempfile
import time
from dataclasses import asdict
from itertools import chain
from pathlib import Path

import torch
from rich.console import Console

from elan_basicsr.report.benchmark import check_files, check_machine, write_json
from elan_basicsr.selfcheck import attention, network, processes, speed, training, upscaling
from elan_basicsr.selfcheck.checks import Machine, notes, run, speed_table, verdict_table

SECONDS = 300
"""After which no more is timed; what is right or wrong is always looked at to the end."""


def check(device: str | None = None, quick: bool = False, json_file: str | None = None) -> int:
    """Run all checks and print their table.

    Args:
        device: Such as `cuda` or `cpu`; the GPU if there is one when None.
        quick: Smaller networks, and nothing compiled.
        json_file: Where versions, device, verdicts and figures go.

    Returns:
        The exit code: 0, or 1 if something is wrong.

    Raises:
        UserError: There is no such device, or the file could not be written.
    """
    device = device or ('cuda' if torch.cuda.is_available() else 'cpu')
    check_machine([device])
    check_files(json_file)
    console = Console(highlight=False)
    parts = (network, attention, training, processes, upscaling)
    with tempfile.TemporaryDirectory() as folder:
        machine = Machine(torch.device(device), quick, Path(folder), time.monotonic() + SECONDS)
        rows = list(run(chain.from_iterable(part.checks(machine) for part in parts), console))
        console.print(verdict_table(rows))
        timed = list(run(speed.checks(machine), console))
        console.print(speed_table(timed))
    for note in notes([*rows, *timed]):
        console.print(note, soft_wrap=True)
    if json_file:
        write_json({'device': describe(machine.device), 'quick': quick, 'checks': [asdict(row) for row in rows],
                    'speed': [asdict(row) for row in timed]}, json_file)
    wrong = sum(row.outcome.ok is False for row in [*rows, *timed])
    print(f'{wrong} of {len(rows)} checks found something wrong' if wrong else f'{len(rows)} checks, all is right')
    return 1 if wrong else 0


def describe(device: torch.device) -> dict:
    """What a report needs to know of a device, beside `report.benchmark.machine`."""
    if device.type != 'cuda':
        return {'name': str(device), 'threads': torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(device)
    return {'name': properties.name, 'memory': properties.total_memory, 'count': torch.cuda.device_count(),
            'capability': f'{properties.major}.{properties.minor}', 'cuda': torch.version.cuda,
            'cudnn': torch.backends.cudnn.version()}
