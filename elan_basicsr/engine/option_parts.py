"""Trying out what an option file names: networks, losses, optimizers, schedulers and metrics, without data or memory.

Each is built as the toolbox would build it (networks without storage, on the meta device), so the constructor's own
complaint is what the user reads, with the line of the file, before anything starts.
"""
from __future__ import annotations

import contextlib
import inspect
import io
import warnings
from collections.abc import Iterable, Iterator
from os import path as osp

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from elan_basicsr.engine.option_keys import is_int
from elan_basicsr.engine.option_reader import Source, nearest
from elan_basicsr.safe_read import bounded_building

from basicsr.models import lr_scheduler
from basicsr.utils import registry

SCHEDULERS = ('MultiStepLR', 'MultiStepRestartLR', 'CosineAnnealingRestartLR')
# LBFGS evaluates the loss several times a step, SparseAdam takes sparse gradients: no training loop here does either.
UNUSABLE_OPTIMIZERS = ('Optimizer', 'LBFGS', 'SparseAdam')
LARGEST_ARGUMENT = 1 << 17
MAX_TENSORS = 10_000
MAX_PARAMETERS = 10**10


def find(entries: registry.Registry, name: str):
    """What is registered under `name`; the toolbox files some of its own with the suffix `_basicsr`."""
    entries = dict(iter(entries))
    return entries.get(name) or entries.get(f'{name}_basicsr')


def check_registered(name: str, entries: registry.Registry, what: str, source: Source, key):
    """What is registered under `name`, or an error with the nearest names."""
    check_choice(name, {entry.removesuffix('_basicsr') for entry in entries.keys()} | {*entries.keys()}, what, source,
                 key)
    return find(entries, name)


def check_choice(name: str, names: Iterable[str], what: str, source: Source, key) -> None:
    names = set(names)
    if name not in names:
        near = nearest(name, sorted(names), count=2, cutoff=0.5)
        some = ', '.join(sorted(names)[:12])
        raise source.error(key, f'there is no {what} {name[:60]!r}; '
                                f'{f"did you mean {near}?" if near else f"expected one of {some}"}')


def check_arguments(section: dict, target, key: tuple[str, ...], source: Source, given_by_caller: tuple = ()) -> dict:
    """The arguments in `section` (all but `type`), after comparing them with the signature of `target`."""
    parameters = inspect.signature(target).parameters
    names = [name for name, parameter in parameters.items()
             if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL) and name not in given_by_caller]
    takes_any = any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values())
    given = {name: value for name, value in section.items() if name != 'type'}
    for name in given:
        near = nearest(name, [n for n in names if n not in given], cutoff=0.8 if takes_any else 0.6)
        if name not in names and (near or not takes_any):
            expected = f'did you mean {near}?' if near else f'expected {", ".join(names)}'
            raise source.error((*key, name), f'{section["type"]} has no such argument; {expected}')
    for name in names:
        if parameters[name].default is inspect.Parameter.empty and name not in given:
            raise source.error(key, f'{name} is missing, which {section["type"]} needs')
    return given


def _words(error: BaseException) -> str:
    return str(error) or type(error).__name__


# ------------------------------------------------------------------------------------------------- networks

def check_network(opt: dict, section: str, source: Source) -> None:
    """Compare `network_*` with the architecture's signature, then build it on the meta device."""
    options, key = opt[section], (section,)
    if 'type' not in options:
        raise source.error(key, 'type is missing, expected the name of an architecture such as ELAN')
    arch = check_registered(options['type'], registry.ARCH_REGISTRY, 'architecture', source, (section, 'type'))
    given = check_arguments(options, arch, key, source)
    for name, value in given.items():
        if any(abs(number) > LARGEST_ARGUMENT for number in _integers(value)):
            raise source.error((section, name), f'expected integers up to {LARGEST_ARGUMENT}')
        if name.endswith('_path') and isinstance(value, str) and not osp.isfile(value):
            raise source.error((section, name), f'{value}: no such file, expected weights')
    if not arch.__module__.startswith(('basicsr.', 'elan_basicsr.')):
        return  # somebody's extension, whose constructor may do anything
    weightless = {name: value for name, value in given.items() if not name.endswith('_path')}
    try:
        with _dry_building():
            arch(**weightless)
    except Exception as error:  # constructors fail in every way: assertions, indices, divisions
        if not _is_about_meta(error):
            raise _building_error(section, given, arch, error, source) from None


def _building_error(section: str, given: dict, arch: type, error: Exception, source: Source):
    """The error of a failed constructor, at the argument it is about where that can be told."""
    message = _words(error)
    blamed = next((name for name in given if message.startswith((f'ELAN: {name} ', f'{name} '))), None)
    if blamed is None:
        parameters = inspect.signature(arch).parameters
        for name, value in given.items():
            default = parameters[name].default if name in parameters else None
            is_number = isinstance(default, (int, float)) and not isinstance(default, bool) or name.startswith('num_')
            if is_number and isinstance(value, (str, bool)):
                return source.error((section, name), f'is {value!r}, expected a number')
    return source.error((section, blamed) if blamed else section, f'{arch.__name__} cannot be built: {message}')


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
        yield


def _is_about_meta(error: Exception) -> bool:
    """Whether building failed only because there is no storage (ECBSR fills tensors of a fixed device, for one)."""
    return isinstance(error, NotImplementedError) or 'meta' in str(error) or 'TensorOptions' in str(error)


# ------------------------------------------------------------------------------------------------- losses and metrics

def check_loss(section: dict, key: tuple[str, ...], source: Source) -> None:
    if 'type' not in section:
        raise source.error(key, 'type is missing, expected the name of a loss such as L1Loss')
    loss = check_registered(section['type'], registry.LOSS_REGISTRY, 'loss', source, (*key, 'type'))
    given = check_arguments(section, loss, key, source)
    if section['type'] == 'PerceptualLoss' or not loss.__module__.startswith('basicsr.'):
        return  # it would fetch a trained network, or is somebody's extension
    try:
        with _dry_building():
            loss(**given)
    except Exception as error:
        if not _is_about_meta(error):
            raise source.error(key, f'{section["type"]} cannot be built: {_words(error)}') from None
    if given.get('reduction') == 'none':
        raise source.error((*key, 'reduction'), 'none leaves an image instead of a loss; expected mean or sum')


def check_metric(section: dict, key: tuple[str, ...], source: Source) -> bool:
    """Check one metric; tell whether it compares with a ground truth."""
    if 'type' not in section:
        raise source.error(key, 'type is missing, expected the name of a metric such as calculate_psnr')
    metric = check_registered(section['type'], registry.METRIC_REGISTRY, 'metric', source, (*key, 'type'))
    check_arguments(section, metric, key, source, given_by_caller=('img', 'img2'))
    if section.get('input_order', 'HWC') != 'HWC':
        raise source.error((*key, 'input_order'), 'the images of a validation are HWC; remove the key')
    return 'img2' in inspect.signature(metric).parameters


# ------------------------------------------------------------------------------------------------- optimizers

def check_optimizer(section: dict, key: tuple[str, ...], source: Source) -> torch.optim.Optimizer:
    """Build the optimizer for one convolution's weights."""
    for name, words in (('type', 'the name of an optimizer such as Adam'), ('lr', 'the learning rate')):
        if name not in section:
            raise source.error(key, f'{name} is missing, expected {words}')
    classes = {name: value for name, value in vars(torch.optim).items()
               if isinstance(value, type) and issubclass(value, torch.optim.Optimizer)
               and name not in UNUSABLE_OPTIMIZERS}
    check_choice(section['type'], classes, 'optimizer to train with in torch.optim', source, (*key, 'type'))
    optimizer = classes[section['type']]
    given = check_arguments(section, optimizer, key, source, given_by_caller=('params',))
    try:
        return optimizer([nn.Parameter(torch.zeros(1, 1, 1, 1))], **given)
    except Exception as error:
        raise source.error(key, f'{section["type"]} cannot be built: {_words(error)}') from None


def check_scheduler(section: dict, optimizer: torch.optim.Optimizer, total_iter: float, source: Source) -> None:
    key = ('train', 'scheduler')
    check_choice(section['type'], SCHEDULERS, 'scheduler', source, (*key, 'type'))
    cosine = section['type'] == 'CosineAnnealingRestartLR'
    scheduler = lr_scheduler.CosineAnnealingRestartLR if cosine else lr_scheduler.MultiStepRestartLR
    given = check_arguments(section, scheduler, key, source, given_by_caller=('optimizer',))
    if cosine and sum(given['periods']) < total_iter:
        raise source.error((*key, 'periods'), f'they add up to {sum(given["periods"])}, expected at least '
                                              f'train.total_iter, {int(total_iter)}')
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            scheduler(optimizer, **given)
    except Exception as error:
        raise source.error(key, f'{section["type"]} cannot be built: {_words(error)}') from None
