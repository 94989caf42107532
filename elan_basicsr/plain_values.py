"""What the numbers, texts and lists beside the weights of a file may be, before anything is done with them."""
from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

from elan_basicsr.errors import UserError

LARGEST_MULTIPLE = 1024
"""Of pixels that an image is extended to, when a file's note and not the user asks for it."""

Check = tuple[str, Callable[[Any], bool]]
"""What is expected, in words and as a test."""


def is_number(value) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300  # which nan and inf are not


def is_count(value) -> bool:
    return type(value) is int and 0 <= value < 1 << 53


def are_numbers(value) -> bool:
    return isinstance(value, (list, tuple)) and all(map(is_number, value))


def _is_list_of_dicts(value) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _are_windows(value) -> bool:
    return (isinstance(value, (list, tuple)) and 0 < len(value) <= 16
            and all(type(size) is int and size >= 1 for size in value) and math.lcm(*value) <= LARGEST_MULTIPLE)


def _are_best_values(value) -> bool:
    """As the toolbox keeps them: by data set and metric, a value, when it was, and which way is better."""
    records = [record for metrics in value.values() for record in _values(metrics)] if isinstance(value, dict) else [0]
    return all(isinstance(record, dict) and set(record) == {'better', 'val', 'iter'} and type(record['iter']) is int
               and type(record['val']) in (int, float) and isinstance(record['better'], str)
               and record['better'] in ('higher', 'lower')
               for record in records)


def _values(section) -> list:
    return list(section.values()) if isinstance(section, dict) else [section]


# What our files note beside the weights of an ELAN.
NOTE_KINDS: dict[str, Check] = {
    'window_sizes': (f'some integers with a common multiple up to {LARGEST_MULTIPLE}', _are_windows),
    'img_range': ('a number above 0', lambda value: is_number(value) and value > 0),
    'rgb_mean': ('up to 16 numbers', lambda value: are_numbers(value) and len(value) <= 16),
}
# Of a training state.
STATE_KINDS: dict[str, Check] = {
    'iter': ('an integer from 0', is_count),
    'epoch': ('an integer', lambda value: type(value) is int and -1 <= value < 1 << 53),
    'optimizers': ('a list of sections', _is_list_of_dicts), 'schedulers': ('a list of sections', _is_list_of_dicts),
    'samples': ('an integer from 0', is_count), 'schedule_start': ('an integer from 0', is_count),
    'validation_due': ('true or false', lambda v: isinstance(v, bool)),
    'files': ('a section', lambda value: isinstance(value, dict)),
    'pool': ('a section', lambda value: isinstance(value, dict)),
    'loss_scaler': ('a section of numbers', lambda v: isinstance(v, dict) and all(map(is_number, v.values()))),
    'best_metric_results': ('the best values of each metric', _are_best_values),
}


def check_values(values: dict, kinds: dict[str, Check], where: str | os.PathLike) -> None:
    """Raise UserError for the first of `values` that is not what `kinds` says; others than those are passed over."""
    for key, (words, fits) in kinds.items():
        if key in values and not fits(values[key]):
            raise UserError(f'{where}: {key} is {shown(values[key])}, expected {words}')


def shown(value) -> str:
    """A number, a short list of numbers, or the name of a type."""
    if isinstance(value, int) and abs(value) >= 1 << 64:
        return f'an integer of {value.bit_length()} bits'
    if isinstance(value, (list, tuple)) and len(value) <= 16 and all(type(item) in (int, float) for item in value):
        return f'[{", ".join(map(shown, value))}]'
    return str(value) if isinstance(value, (bool, int, float)) else type(value).__name__
