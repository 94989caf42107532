"""Whether a training state fits the model it is to continue, before anything of it is put in place.

torch's own loading takes tensors of any shape, which fail in the first step, and schedulers take over whatever
attributes a state names.
"""
from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor, nn

from elan_basicsr.errors import UserError
from elan_basicsr.plain_values import are_numbers, is_count, is_number, shown

FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}  # those that torch computes with


def check_training_state(model, state: dict, path: str | os.PathLike) -> None:
    """Raise UserError, with the key, unless the optimizers and schedulers in `state` are those of `model`.

    `model` is a model of the toolbox, and `state` what `read_training_state` has read from `path`.
    """
    for kind in ('optimizers', 'schedulers'):
        own, saved = getattr(model, kind), state[kind]
        if len(own) != len(saved):
            raise _misfit(path, kind, f'are {len(saved)}, expected {len(own)}')
    for i, (optimizer, saved) in enumerate(zip(model.optimizers, state['optimizers'], strict=True)):
        _check_optimizer(optimizer, saved, f'optimizers.{i}', path)
    for i, (scheduler, saved) in enumerate(zip(model.schedulers, state['schedulers'], strict=True)):
        _check_scheduler(scheduler, saved, f'schedulers.{i}', path)


def _misfit(path, key: str, message: str) -> UserError:
    return UserError(f'{path}: {key} {message}; the state does not fit this run: resume with the options it was saved '
                     'with, or start anew')


def _check_optimizer(optimizer: torch.optim.Optimizer, saved: dict, key: str, path) -> None:
    own = optimizer.state_dict()['param_groups']
    groups, state = saved.get('param_groups'), saved.get('state')
    if not isinstance(groups, list) or not isinstance(state, dict) or len(groups) != len(own):
        raise _misfit(path, key, f'has no state or not the {len(own)} groups of parameters expected')
    for i, (group, expected) in enumerate(zip(groups, own, strict=True)):
        if not isinstance(group, dict) or not are_numbers(group.get('params')) or group['params'] != expected['params']:
            raise _misfit(path, f'{key}.param_groups.{i}', f'has other parameters than the {len(expected["params"])} '
                                                           'of the network')
        absent = [name for name, value in expected.items() if name not in group and not _is_switch(value)]
        if absent:  # switches are added by newer versions of torch, which fill them in
            raise _misfit(path, f'{key}.param_groups.{i}', f'lacks {", ".join(absent)}')
        for name in expected.keys() & group.keys() - {'params'}:
            if not _alike(group[name], expected[name]):
                raise _misfit(path, f'{key}.param_groups.{i}.{name}', f'is {shown(group[name])}, expected something '
                                                                      f'like {shown(expected[name])}')
    parameters = dict(enumerate(p for group in optimizer.param_groups for p in group['params']))
    for number, values in state.items():
        if number not in parameters or not isinstance(values, dict):
            raise _misfit(path, f'{key}.state.{number}', f'is of none of the {len(parameters)} parameters')
    for number, values in state.items():
        expected = _state_after_a_step(optimizer, parameters[number])
        _check_parameter_state(values, expected, f'{key}.state.{number}', path)


def _state_after_a_step(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict:
    """What an optimizer of this kind keeps for a parameter of this shape."""
    twin = nn.Parameter(torch.zeros(parameter.shape, dtype=parameter.dtype))
    twin.grad = torch.zeros_like(twin)
    kind: Callable[..., torch.optim.Optimizer] = type(optimizer)  # whose own constructors need no defaults
    other = kind([twin])
    other.param_groups[0].update({**optimizer.defaults, 'foreach': None, 'fused': None, 'capturable': False})
    other.step()
    return other.state[twin]


def _check_parameter_state(values: dict, expected: dict, key: str, path) -> None:
    if values and values.keys() != expected.keys():
        raise _misfit(path, key, f'has the values {", ".join(map(str, values))[:80]}, expected {", ".join(expected)}')
    for name, value in values.items():
        like = expected[name]
        if isinstance(value, Tensor) and isinstance(like, Tensor):
            if value.shape != like.shape or value.dtype not in FLOATS or not torch.isfinite(value).all():
                raise _misfit(path, f'{key}.{name}', f'is of {tuple(value.shape)} or not finite, expected finite '
                                                     f'numbers of {tuple(like.shape)}')
        elif not (is_number(value) and (is_number(like) or (isinstance(like, Tensor) and like.numel() == 1))
                  or value is None and like is None):
            raise _misfit(path, f'{key}.{name}', f'is {shown(value)}, expected a {type(like).__name__}')


def _check_scheduler(scheduler, saved: dict, key: str, path) -> None:
    """A scheduler's state becomes its attributes: nothing else than what it has itself, and of the same kind."""
    own = scheduler.state_dict()
    for name, value in saved.items():
        if not isinstance(name, str) or (name not in own and hasattr(scheduler, name)):
            raise _misfit(path, f'{key}.{str(name)[:40]}', 'is nothing that a scheduler saves')
        if name in own and not _alike(value, own[name]):
            raise _misfit(path, f'{key}.{name}', f'is {shown(value)}, expected something like {shown(own[name])}')
    for name, fits in (('last_epoch', is_count), ('_step_count', is_count), ('base_lrs', are_numbers)):
        if name in own and not fits(saved.get(name)):
            raise _misfit(path, f'{key}.{name}', f'is {shown(saved.get(name))}, expected what a scheduler saves')
    groups = len(scheduler.optimizer.param_groups)
    for name in ('base_lrs', '_last_lr'):
        if name in saved and len(saved[name]) != groups:
            raise _misfit(path, f'{key}.{name}', f'has {len(saved[name])} rates, expected {groups}')


def _is_switch(value) -> bool:
    return value is None or isinstance(value, bool)


def _alike(value, own) -> bool:
    """Whether a value can stand where `own` stands: switches, numbers, the same text, lists and tables."""
    if _is_switch(own):
        return value is None or isinstance(value, bool)
    if isinstance(own, (int, float)):
        return is_number(value)
    if isinstance(own, (list, tuple)) and are_numbers(own):
        return are_numbers(value) and (len(value) == len(own) or isinstance(own, list))
    if isinstance(own, dict) and are_numbers([*own, *own.values()]):
        return isinstance(value, dict) and are_numbers([*value, *value.values()])
    if isinstance(own, dict):
        return isinstance(value, dict) and value.keys() == own.keys() and all(
            _alike(value[key], own[key]) for key in own)
    if isinstance(own, (list, tuple)):
        return isinstance(value, list) and len(value) == len(own) and all(map(_alike, value, own))
    return isinstance(value, str) and value == own if isinstance(own, str) else isinstance(value, type(own))
