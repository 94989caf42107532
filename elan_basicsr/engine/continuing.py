"""What a run that goes on takes from its option file, and what from its training state.

A state notes the options that the course of a training depends on. Where the file says otherwise, the file is right
wherever that is well defined, and each difference is told in a line; weights, moments, the place in the stream of
samples, a seed that nobody chose and best values are the state's. States without the note, of the toolbox for one, show
in their optimizers and schedulers what those were.
"""
from __future__ import annotations

import inspect
import json
import logging
import math
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch

from elan_basicsr.config.parts import ARCHITECTURE, LOSS, METRIC, OPTIMIZER, SCHEDULER, arguments
from elan_basicsr.config.reader import shown
from elan_basicsr.config.schema import KEYS
from elan_basicsr.errors import UserError
from elan_basicsr.models.state_checks import check_training_state

_BESIDE = ('name', 'path', 'logger', 'dist_params', 'num_gpu', 'compile', 'cuda_graphs', 'find_unused_parameters',
           'deterministic', 'is_train', 'auto_resume', 'root_path', 'notices', 'dist', 'rank', 'world_size',
           'seed_is_drawn')
"""What a training's course does not depend on: it holds from one start to the next, without a word."""
_LOADING = ('name', 'phase', 'scale', 'io_backend', 'num_worker_per_gpu', 'batch_size_per_gpu', 'prefetch_mode',
            'pin_memory', 'persistent_workers', 'num_prefetch_queue', 'use_shuffle')
"""The same of `datasets.train`; the batch counts together with the processes, as the step's size."""
_SCHEDULE = ('train.scheduler.*', 'train.warmup_iter', 'train.optim_*.lr')
_RESTART = 'train.restart_scheduler'
_SHAPING = ('network_*', 'model_type', 'scale', 'train.optim_*.*')
"""Where a change may leave a state that fits no longer."""
_CONSEQUENCES = {
    'manual_seed': 'the samples are other ones than they would have been',
    'val.metrics.*': 'its best value begins anew',
}


def note(opt: dict) -> str:
    """The options that the course of a training depends on, as a training state keeps them: JSON."""
    kept = {key: value for key, value in opt.items() if key not in _BESIDE}
    kept['datasets'] = {'train': {key: value for key, value in opt['datasets']['train'].items() if key not in _LOADING}}
    kept['val'] = {'metrics': (opt.get('val') or {}).get('metrics')}
    return json.dumps(kept, default=str)  # YAML has dates


def noted(state: dict) -> dict[str, object] | None:
    """The options that a state notes, by their full keys; None where it notes none."""
    try:
        found = _flat(json.loads(state['options']))
        return {key: value for key, value in found.items() if key.isprintable() and len(key) <= 200}  # they are logged
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return None


def _flat(section: dict, above: str = '') -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in section.items():
        flat.update(_flat(value, f'{above}{key}.') if isinstance(value, dict) else {f'{above}{key}': value})
    return flat


def keep_seed(opt: dict, state: dict) -> None:
    """A seed that the file leaves open is drawn once for a run, or its stream of samples would break off here."""
    if not opt.get('seed_is_drawn'):
        return
    seed = (noted(state) or {}).get('manual_seed')
    if isinstance(seed, int) and 0 <= seed < 1 << 32:
        opt['manual_seed'] = seed
        opt['notices'].append(f'manual_seed: the file gives none; {seed}, drawn when the run began, stays')
    else:
        opt['notices'].append('manual_seed: the file gives none and the training state does not tell which one was '
                              'drawn: the samples are other ones than they would have been')


@contextmanager
def changes_named(state: dict | None, options: str) -> Iterator[None]:
    """Around the building of what a state is to go on with: an error tells what is another since it was saved."""
    before = noted(state or {})
    try:
        yield
    except UserError as error:
        if before is None:
            raise
        raise UserError(f'{error}{_blamed(_changes(before, _flat(json.loads(options))))}') from error


def _blamed(changes: dict[str, tuple]) -> str:
    """The end of a message that a state does not fit: what was changed that may be why."""
    told = ', '.join(f'{key} ({shown(old)} so far, {shown(new)} here)' for key, (old, new) in changes.items()
                     if _is_one_of(key, _SHAPING) and not _is_one_of(key, _SCHEDULE))
    return f'; changed since the state was saved: {told}' if told else ''


def go_on(model, state: dict, opt: dict, options: str, logger: logging.Logger) -> int:
    """Put a training state into a model that was just built, and tell what is another than it was.

    Args:
        model: A model of the toolbox.
        state: What `find_resume_state` gave; it is completed.
        opt: The options of the run.
        options: What `note` made of them before anything was built.
        logger: Where the differences are told, a line each.

    Returns:
        The iteration at which the schedule of the learning rate began.

    Raises:
        UserError: The state does not fit.
    """
    now = _flat(json.loads(options))
    before = noted(state) or _guessed(now, model, state)
    changes = _changes(before, now)
    start, iteration = state.get('schedule_start', 0), state['iter']
    other_schedule = any(_is_one_of(key, _SCHEDULE) for key in changes)
    begins_anew = bool(now.get(_RESTART)) and (other_schedule or not before.get(_RESTART))
    start = iteration if begins_anew else min(start, iteration)
    replayed = begins_anew or other_schedule
    if replayed:
        _replay(model, iteration - start, opt['train'].get('warmup_iter', -1))
    before_rate = _rate(state)
    _take_over(model, state, replayed)
    try:
        check_training_state(model, state, opt['path']['resume_state'])
    except UserError as error:
        raise UserError(f'{error}{_blamed(changes)}') from error
    _keep_best_values(state, changes, (opt.get('val') or {}).get('metrics') or {})
    model.resume_training(state)
    for line in _lines(changes, opt, iteration):
        logger.info(line)
    for line in _schedule_lines(model, bool(now.get(_RESTART)), begins_anew, other_schedule, before_rate, start):
        logger.info(line)
    return start


# ------------------------------------------------------------------------------------------------- comparing

def _changes(before: dict[str, object], now: dict[str, object]) -> dict[str, tuple]:
    """What was and what is, of every option that is another; what is left out is its default."""
    changes = {}
    for key in [*now, *(key for key in before if key not in now)]:
        old, new = (options[key] if key in options else _default(options, key) for options in (before, now))
        if old != new and not (old in (None, False) and new in (None, False)) and key != _RESTART:
            changes[key] = old, new
    return changes


def _is_one_of(key: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(key, pattern) for pattern in patterns)


def _default(options: dict[str, object], key: str) -> object:
    section, _, name = key.rpartition('.')
    for part in (OPTIMIZER, SCHEDULER, LOSS, ARCHITECTURE, METRIC):
        kind = options.get(f'{section}.type')
        if fnmatch(section, part.key) and kind in part.registered():
            known = arguments(part, str(kind))['properties'].get(name)
            return known.get('default') if isinstance(known, dict) else None
    return next(iter(KEYS.get(key, ())[2:]), None)


def _guessed(now: dict[str, object], model, state: dict) -> dict[str, object]:
    """What the options were by a state that does not note them: as they are, but for what the state shows."""
    before = {**now, _RESTART: False}
    sections = sorted({key.split('.')[1] for key in now if fnmatch(key, 'train.optim_*.*')}, reverse=True)  # g, then d
    for section, optimizer, saved in zip(sections, model.optimizers, state['optimizers'], strict=False):
        groups = saved.get('param_groups')
        group = groups[0] if isinstance(groups, list) and groups and isinstance(groups[0], dict) else {}
        own = optimizer.param_groups[0]
        for name in (optimizer.defaults.keys() | {'initial_lr'}) - {'lr'}:
            if None not in (group.get(name), own.get(name)) and _plain(group[name]) != _plain(own[name]):
                before[f'train.{section}.{"lr" if name == "initial_lr" else name}'] = _plain(group[name])
    for scheduler, saved in zip(model.schedulers, state['schedulers'], strict=False):
        for name, value in _arguments_of(scheduler).items():
            if name not in saved:
                before['train.scheduler.type'] = 'another'
            elif _plain(saved[name]) != _plain(value):
                before[f'train.scheduler.{name}'] = _plain(saved[name])
    return before


def _arguments_of(scheduler) -> dict[str, object]:
    """The arguments of a scheduler that it keeps under their names."""
    names = inspect.signature(type(scheduler)).parameters.keys() - {'optimizer', 'last_epoch'}
    return {name: value for name, value in scheduler.state_dict().items() if name in names}


def _plain(value) -> object:
    """A value as an option file would give it."""
    if isinstance(value, Counter):
        value = [*value.elements()] if all(isinstance(n, int) and n < 1000 for n in value.values()) else '?'
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError):
        return str(value)[:60]


# ------------------------------------------------------------------------------------------------- taking over

def _replay(model, steps: int, warmup: int) -> None:
    """Bring the schedules of a model that was just built to where so many iterations would have brought them."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # torch looks for an optimizer's step between those of a schedule
        for step in range(1, steps + 1):
            model.update_learning_rate(step, warmup_iter=warmup)


def _take_over(model, state: dict, replayed: bool) -> None:
    """Let the file's arguments of optimizers and schedulers stand in the state, and with `replayed` all of a schedule.

    What is no change stays as it is to the last bit, for then the state has the same.
    """
    for optimizer, saved in zip(model.optimizers, state['optimizers'], strict=False):
        groups = saved.get('param_groups')
        if isinstance(groups, list) and len(groups) == len(optimizer.param_groups):
            saved['param_groups'] = [
                {**group, **{name: own[name] for name in _ours(optimizer, own, replayed)}}
                if isinstance(group, dict) else group
                for group, own in zip(groups, optimizer.param_groups, strict=True)]
    if replayed:
        state['schedulers'] = [scheduler.state_dict() for scheduler in model.schedulers]
    else:
        for scheduler, saved in zip(model.schedulers, state['schedulers'], strict=False):
            saved.update(_arguments_of(scheduler))


def _ours(optimizer, group: dict, replayed: bool) -> set[str]:
    if replayed:
        return group.keys() - {'params'}
    # Schedules with cycles move momentum as well as the rate.
    moving = {'lr', *(('betas', 'momentum') if 'max_momentum' in group else ())}
    return (optimizer.defaults.keys() & group.keys()) - moving


def _keep_best_values(state: dict, changes: dict[str, tuple], metrics: dict) -> None:
    """Leave the best values of the metrics that are measured as they were, and begin those of the others."""
    for records in (state.get('best_metric_results') or {}).values():
        for name, section in metrics.items():
            better = section.get('better', 'higher')
            changed = any(key.startswith(f'val.metrics.{name}.') for key in changes)
            if name not in records or changed or records[name]['better'] != better:
                records[name] = {'better': better, 'val': -math.inf if better == 'higher' else math.inf, 'iter': -1}


# ------------------------------------------------------------------------------------------------- telling

def _lines(changes: dict[str, tuple], opt: dict, iteration: int) -> Iterator[str]:
    for key, (old, new) in changes.items():
        what = next((words for pattern, words in _CONSEQUENCES.items() if fnmatch(key, pattern)), '')
        if key == 'train.ema_decay' and not (old and new):
            what = 'the average begins with the weights as they are' if new else 'the average of the weights ends'
        yield f'{key}: {shown(old)} so far, {shown(new)} from here on{what and "; "}{what}'
    if opt['train']['total_iter'] <= iteration:
        yield f'train.total_iter is {opt["train"]["total_iter"]} and the run is at iteration {iteration}: nothing is ' \
              'left to train'


def _schedule_lines(model, wanted: bool, begins_anew: bool, other: bool, rate: float, start: int) -> Iterator[str]:
    now = f'{model.get_current_learning_rate()[0]:.3e}'
    if begins_anew:
        yield f'{_RESTART}: the schedule begins anew behind iteration {start}; the learning rate was {rate:.3e}'
    elif other:
        yield (f'the learning rate goes on from {now} ({rate:.3e} so far), as if the schedule had been this one from '
               f'iteration {start} on; {_RESTART}: true would begin it here')
    elif wanted and start:
        yield f'{_RESTART}: the schedule began anew behind iteration {start} and goes on; the learning rate is {now}'


def _rate(state: dict) -> float:
    try:
        return float(state['optimizers'][0]['param_groups'][0]['lr'])
    except (LookupError, TypeError, ValueError):
        return math.nan  # which the check of the state refuses
