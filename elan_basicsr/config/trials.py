"""Trying out what an option file names: networks, losses, optimizers, schedulers and metrics, without data or memory.

Each is built as the toolbox would build it (networks without storage, on the meta device), so the constructor's own
complaint is what the user reads, with the line of the file, before anything starts.
"""
from __future__ import annotations

import contextlib
import inspect
import io
import warnings
from collections.abc import Callable, Iterator
from os import path as osp

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from elan_basicsr.config.parts import ARCHITECTURE, LOSS, METRIC, OPTIMIZER, SCHEDULER, Part, arguments, find_type
from elan_basicsr.config.reader import Path_, Source
from elan_basicsr.config.schema import is_int, mistakes
from elan_basicsr.errors import UserError
from elan_basicsr.interop import pyiqa
from elan_basicsr.safe_read import bounded_building

LARGEST_ARGUMENT = 1 << 17
MAX_TENSORS = 10_000
MAX_PARAMETERS = 10**10


def try_network(section: dict, key: Path_, source: Source) -> None:
    """Compare a section `network_*` with the architecture's signature, then build it on the meta device."""
    arch, given = _look_up(section, ARCHITECTURE, key, source)
    for name, value in given.items():
        if any(abs(number) > LARGEST_ARGUMENT for number in _integers(value)):
            raise source.error((*key, name), f'expected integers up to {LARGEST_ARGUMENT}')
        if name.endswith('_path') and isinstance(value, str) and not osp.isfile(value):
            raise source.error((*key, name), f'{value}: no such file, expected weights')
    if _is_known(arch):
        weightless = {name: value for name, value in given.items() if not name.endswith('_path')}
        with _failure_told(section, ARCHITECTURE, key, source), _dry_building():
            arch(**weightless)


def try_loss(section: dict, key: Path_, source: Source) -> None:
    loss, given = _look_up(section, LOSS, key, source)
    if section['type'] != 'PerceptualLoss' and _is_known(loss):  # that one would fetch a trained network
        with _failure_told(section, LOSS, key, source), _dry_building():
            loss(**given)
    if given.get('reduction') == 'none':
        raise source.error((*key, 'reduction'), 'none leaves an image instead of a loss; expected mean or sum')


def try_optimizer(section: dict, key: Path_, source: Source) -> torch.optim.Optimizer:
    """Build the optimizer for one convolution's weights."""
    optimizer, given = _look_up(section, OPTIMIZER, key, source)
    with _failure_told(section, OPTIMIZER, key, source):
        return optimizer([nn.Parameter(torch.zeros(1, 1, 1, 1))], **given)


def try_scheduler(section: dict, key: Path_, source: Source, optimizer: torch.optim.Optimizer, total: float) -> None:
    """Build the scheduler; the cycles of a cosine must last for `total` iterations."""
    scheduler, given = _look_up(section, SCHEDULER, key, source)
    if 'periods' in given and sum(given['periods']) < total:
        raise source.error((*key, 'periods'), f'they add up to {sum(given["periods"])}, expected at least '
                                              f'train.total_iter, {int(total)}')
    with _failure_told(section, SCHEDULER, key, source), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        built = scheduler(optimizer, **given)
    if (steps := getattr(built, 'total_steps', total)) < total:
        raise source.error(key, f'{section["type"]} is over after {steps} iterations, expected at least '
                                f'train.total_iter, {int(total)}')


def try_metric(section: dict, key: Path_, source: Source) -> bool:
    """Check one metric; tell whether it compares with a ground truth. Which values are better is filled in if known."""
    metric, _ = _look_up(section, METRIC, key, source)
    if section.get('input_order', 'HWC') != 'HWC':
        raise source.error((*key, 'input_order'), 'the images of a validation are HWC; remove the key')
    if metric is pyiqa.calculate_pyiqa:
        return _try_pyiqa(section, key, source)
    return 'img2' in inspect.signature(metric).parameters


def _try_pyiqa(section: dict, key: Path_, source: Source) -> bool:
    try:
        model = pyiqa.load(section['metric'])
    except UserError as error:
        raise source.error((*key, 'metric'), str(error)) from None
    better = 'lower' if model.lower_better else 'higher'
    if section.setdefault('better', better) != better:
        raise source.error((*key, 'better'), f'{better} values of {section["metric"]} are better; remove the key')
    return model.metric_mode == 'FR'


def _look_up(section: dict, part: Part, key: Path_, source: Source) -> tuple[Callable, dict]:
    """What `type` names and its arguments, all of which it knows and none of which is missing."""
    target = find_type(section, part, source, key)
    for keyword, where, words in mistakes(section, arguments(part, section['type']), source, key):
        if keyword in ('required', 'additionalProperties'):
            raise source.error(where, words)
    return target, {name: value for name, value in section.items() if name != 'type'}


def _is_known(target: Callable) -> bool:
    """Whether it is the toolbox's or ours; the constructor of somebody's extension may do anything."""
    return target.__module__.startswith(('basicsr.', 'elan_basicsr.'))


@contextlib.contextmanager
def _failure_told(section: dict, part: Part, key: Path_, source: Source) -> Iterator[None]:
    """Tell why something cannot be built, at the argument it is about, where that can be told."""
    try:
        yield
    except Exception as error:  # constructors fail in every way: assertions, indices, divisions
        name, words = section['type'], str(error) or type(error).__name__
        blamed = [argument for argument in section if words.startswith(f'{name}: {argument} ')]
        found = mistakes(section, arguments(part, name), source, key)
        if found and not blamed:
            raise source.error(*found[0][1:]) from None
        raise source.error((*key, *blamed[:1]), f'{name} cannot be built: {words}') from None


def _integers(value) -> Iterator[int]:
    if is_int(value):
        yield value
    elif isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _integers(item)


class _ComputedValues(TorchFunctionMode):
    """Keeps `linspace` off the meta device: architectures read numbers out of it, such as rates of stochastic depth."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **{'device': 'cpu', **(kwargs or {})} if func is torch.linspace else kwargs or {})


@contextlib.contextmanager
def _dry_building():
    """Build modules without storage, without words, and not beyond any size that could be trained."""
    with (bounded_building(MAX_TENSORS, MAX_PARAMETERS), torch.device('meta'), _ComputedValues(),
          warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO())):
        warnings.simplefilter('ignore')
        try:
            yield
        except Exception as error:
            # Without storage some fail that would not with it: ECBSR fills tensors of a fixed device, for one.
            if not (isinstance(error, NotImplementedError) or 'meta' in str(error) or 'TensorOptions' in str(error)):
                raise
