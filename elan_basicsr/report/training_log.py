"""Training curves from the logs that BasicSR and this package write."""
from __future__ import annotations

import os
import re
from pathlib import Path

from elan_basicsr.errors import UserError

_ITERATION = re.compile(r'\[epoch: *\d+, iter: *([\d,]+), ')
_LOSS = re.compile(r'\b(l_\w+): ([-+.\deE]+|nan|inf)')
_VALIDATION = re.compile(r'INFO: Validation (.+?)\s*$')
_METRIC = re.compile(r'^\s+# (\S+?): ([-+.\deE]+)(?:\s+Best: \S+ @ (\d+) iter)?')

Curves = dict[str, dict[int, float]]


def read_run(path: str | os.PathLike) -> Curves:
    """The curves of one run: losses as `l_pix`, metrics as `Set5 psnr`, each with its values by iteration, in order.

    A run that was resumed has several logs in its folder; where they tell of the same iteration the later one counts.
    The logs do not say at which iteration a validation was made: it is that of the last line before it, or of the best
    value it reports when that is later.

    Args:
        path: A log file, or the folder of a run with `train_*.log` files.

    Raises:
        UserError: There is no such log, or nothing in it is a training's.
    """
    path = Path(path)
    files = sorted(path.glob('train_*.log')) if path.is_dir() else [path]  # the names end in the time of the start
    if not files:
        raise UserError(f'{path}: holds no train_*.log, expected the folder of a training run or a log file')
    curves: Curves = {}
    for file in files:
        try:
            text = file.read_text(encoding='utf-8', errors='replace')
        except OSError as error:
            raise UserError(f'{file}: cannot be read ({error.strerror}); expected the log of a training') from None
        _read(text, curves)
    if not curves:
        raise UserError(f'{path}: tells of no iteration, expected the log of a training')
    return {quantity: dict(sorted(curve.items())) for quantity, curve in curves.items()}


def _read(text: str, curves: Curves) -> None:
    iteration, dataset = 0, ''
    for line in text.splitlines():
        if found := _ITERATION.search(line):
            iteration = int(found.group(1).replace(',', ''))
            for name, value in _LOSS.findall(line[found.end():]):
                curves.setdefault(name, {})[iteration] = float(value)
        elif found := _VALIDATION.search(line):
            dataset = found.group(1)
        elif dataset and (found := _METRIC.match(line)):
            metric, value, best = found.groups()
            at = max(iteration, int(best or 0))
            curves.setdefault(f'{dataset} {metric}', {})[at] = float(value)
