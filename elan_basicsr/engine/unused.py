"""What an option file gives that a run will not use: told once, at the start, since most slips show nowhere else."""
from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator

from elan_basicsr.config.parts import DATASET, MODEL
from elan_basicsr.config.schema import KEYS

_BY_RUN = {
    '': tuple(key for key in KEYS if '.' not in key and not key.startswith('network_')) + (
        'is_train', 'auto_resume', 'root_path', 'notices', 'dist', 'rank', 'world_size', 'seed_is_drawn'),
    'train': ('total_iter', 'warmup_iter', 'scheduler', 'restart_scheduler'),
    'val': ('val_freq', 'save_img', 'pbar', 'suffix', 'metrics'),
    'logger': ('print_freq', 'save_checkpoint_freq', 'use_tb_logger', 'keep_last', 'wandb'),
    'path': ('resume_state', 'ignore_resume_networks', 'experiments_root', 'results_root', 'models', 'training_states',
             'log', 'visualization'),
}
"""What the run reads itself; the rest of a section is for the model."""
_BY_LOADER = ('name', 'type', 'phase', 'scale', 'io_backend', 'num_worker_per_gpu', 'batch_size_per_gpu', 'pin_memory',
              'dataset_enlarge_ratio', 'prefetch_mode', 'persistent_workers', 'num_prefetch_queue', 'use_shuffle',
              'gt_size')
"""The same of a data set."""


def unused(opt: dict) -> list[str]:
    """What is given and not used in the options of a training or a test, a line each."""
    if not opt['is_train']:
        return [*_unmeasured(opt)]
    return [*_not_validated(opt), *_not_read(opt), *_not_done(opt)]


def _unmeasured(opt: dict) -> Iterator[str]:
    val = opt.get('val') or {}
    if not val.get('metrics') and not val.get('save_img'):
        yield 'val: neither val.metrics nor val.save_img is given: nothing is measured and nothing saved'


def _not_validated(opt: dict) -> Iterator[str]:
    """What is missing, or in the wrong place, so that a training goes on without figures."""
    sets = [phase for phase in opt['datasets'] if phase.partition('_')[0] == 'val']
    if opt.get('val') and sets:
        yield from _unmeasured(opt)
        return
    missing = [what for what, there in (('a section val at the top of the file', opt.get('val')),
                                        ('a set datasets.val', sets)) if not there]
    given = f'datasets.{sets[0]} is given, but ' if sets else 'val is given, but ' if opt.get('val') else ''
    yield f'{given}there is no validation, which needs {" and ".join(missing)}'


def _not_read(opt: dict) -> Iterator[str]:
    """Keys that the source of the model or the dataset does not name, if that is the toolbox's or ours."""
    source = _source(MODEL.registered()[opt['model_type']])
    for section, by_run in _BY_RUN.items():
        for name, value in ((opt.get(section) or {}) if section else opt).items():
            if value not in (None, False) and name not in by_run and not _names(source, section, name):
                yield _told(f'{section}.{name}'.lstrip('.'), opt['model_type'])
    for phase, dataset in opt['datasets'].items():
        source = _source(DATASET.registered()[dataset['type']]) if phase.partition('_')[0] != 'test' else None
        for name, value in dataset.items():
            if value not in (None, False) and name not in _BY_LOADER and not _names(source, phase, name):
                yield _told(f'datasets.{phase}.{name}', dataset['type'])


def _source(kind: type) -> str | None:
    """The source of a class and of what it is made from; None for that of another package, which may read anything."""
    if not kind.__module__.startswith(('basicsr.', 'elan_basicsr.')):
        return None
    modules = {each.__module__ for each in kind.__mro__ if each.__module__.startswith(('basicsr.', 'elan_basicsr.'))}
    return '\n'.join(inspect.getsource(sys.modules[module]) for module in modules)


def _names(source: str | None, section: str, name: str) -> bool:
    """Whether a source reads a key: at the top of a file from `opt`, else in any way. No section holds another one."""
    if source is None or section and name in _BY_RUN['']:
        return source is None
    before = '' if section else r'\bopt(\[|\.get\()'
    return re.search(f'{before}[\'"]{re.escape(name)}[\'"]', source) is not None


def _told(key: str, reader: str) -> str:
    name = key.rpartition('.')[2]
    elsewhere = [known for known in KEYS if known.rpartition('.')[2] == name and '*' not in known]
    near = f'; did you mean {min(elsewhere, key=len)}?' if elsewhere and key not in KEYS else ''
    return f'{key} is given and not used: {reader} does not read it{near}'


def _not_done(opt: dict) -> Iterator[str]:
    """What is read and has no effect."""
    data, schedule = opt['datasets']['train'], opt['train']['scheduler']
    if data.get('use_shuffle') is False:
        yield 'datasets.train.use_shuffle: false is not used: samples are shuffled, anew in each pass'
    if data.get('prefetch_mode') == 'cpu':
        yield 'datasets.train.prefetch_mode: cpu is not used: the loader workers load ahead'
    late = [str(each) for each in schedule.get('milestones', ()) if each > opt['train']['total_iter']]
    if late:
        yield (f'train.scheduler.milestones: {", ".join(late)} will not be reached in train.total_iter, '
               f'{opt["train"]["total_iter"]}')
