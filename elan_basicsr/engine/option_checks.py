"""What an option file must hold, checked before anything starts: one table of keys, then what spans several keys."""
from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from os import path as osp

import torch
from basicsr.utils import registry

from elan_basicsr.archs.elan_arch import ELAN
from elan_basicsr.engine.option_reader import Source


@dataclass(frozen=True)
class Kind:
    """What a value may be, in words and as a test."""
    words: str
    accepts: Callable[[object], bool]


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


TEXT = Kind('a text', lambda v: isinstance(v, str) and bool(v.strip()))
NAME = Kind('a text without / that can name a folder',
            lambda v: TEXT.accepts(v) and '/' not in v and v not in ('.', '..'))
PATH = Kind('a path, or ~ for none', lambda v: v is None or TEXT.accepts(v))
SWITCH = Kind('true or false', lambda v: isinstance(v, bool))
COUNT = Kind('an integer from 1', lambda v: _is_int(v) and v >= 1)
COUNT_OR_NONE = Kind('an integer from 0', lambda v: _is_int(v) and v >= 0)
ITERATIONS = Kind('a whole number from 1', lambda v: _is_number(v) and v >= 1 and v == int(v))
POSITIVE = Kind('a number above 0', lambda v: _is_number(v) and v > 0)
NUMBER = Kind('a number', _is_number)
NOT_NEGATIVE = Kind('a number from 0', lambda v: _is_number(v) and v >= 0)
DECAY = Kind('a number from 0 to below 1', lambda v: _is_number(v) and 0 <= v < 1)
BETAS = Kind('two numbers from 0 to below 1, such as [0.9, 0.999]',
             lambda v: isinstance(v, list) and len(v) == 2 and all(DECAY.accepts(b) for b in v))
MILESTONES = Kind('a list of iterations, such as [250000, 400000]',
                  lambda v: isinstance(v, list) and len(v) > 0 and all(_is_int(m) and m > 0 for m in v))
SECTION = Kind('a section of keys', lambda v: isinstance(v, dict) and bool(v))
SECTION_OR_NONE = Kind('a section of keys, or ~ for none', lambda v: v is None or isinstance(v, dict))
SEED = Kind('an integer from 0 to 4294967295, or ~ for a random one',
            lambda v: v is None or (_is_int(v) and 0 <= v < 2**32))
GPUS = Kind('auto or an integer from 0', lambda v: v == 'auto' or COUNT_OR_NONE.accepts(v))
AMP = Kind('bf16, fp16 or false', lambda v: v in ('bf16', 'fp16', False, None))
LESS = 'higher', 'lower'

# '*' stands for any one key. Keys that only certain datasets, networks or losses know are not in here.
KEYS: dict[str, Kind] = {
    'name': NAME, 'model_type': TEXT, 'scale': COUNT, 'num_gpu': GPUS, 'manual_seed': SEED,
    'find_unused_parameters': SWITCH, 'compile': SWITCH, 'sync_bn': SWITCH, 'deterministic': SWITCH,
    'datasets': SECTION, 'network_g': SECTION, 'path': SECTION_OR_NONE, 'train': SECTION, 'val': SECTION_OR_NONE,
    'logger': SECTION_OR_NONE, 'dist_params': SECTION_OR_NONE,
    'datasets.*': SECTION, 'datasets.*.name': TEXT, 'datasets.*.type': TEXT, 'datasets.*.filename_tmpl': TEXT,
    'datasets.*.dataroot_gt': PATH, 'datasets.*.dataroot_lq': PATH, 'datasets.*.meta_info_file': PATH,
    'datasets.*.meta_info': PATH, 'datasets.*.io_backend': SECTION, 'datasets.*.gt_size': COUNT,
    'datasets.*.use_hflip': SWITCH, 'datasets.*.use_rot': SWITCH, 'datasets.*.use_shuffle': SWITCH,
    'datasets.*.num_worker_per_gpu': COUNT_OR_NONE, 'datasets.*.batch_size_per_gpu': COUNT,
    'datasets.*.dataset_enlarge_ratio': ITERATIONS, 'datasets.*.prefetch_mode': PATH, 'datasets.*.pin_memory': SWITCH,
    'datasets.*.persistent_workers': SWITCH, 'datasets.*.num_prefetch_queue': COUNT, 'datasets.*.color': TEXT,
    'network_g.type': TEXT, 'network_d.type': TEXT,
    'path.pretrain_network_g': PATH, 'path.pretrain_network_d': PATH, 'path.strict_load_g': SWITCH,
    'path.strict_load_d': SWITCH, 'path.resume_state': PATH, 'path.param_key_g': PATH, 'path.param_key_d': PATH,
    'path.experiments_root': PATH, 'path.results_root': PATH,
    'path.ignore_resume_networks': Kind('a list', lambda v: v is None or isinstance(v, (list, str))),
    'train.ema_decay': DECAY, 'train.amp': AMP, 'train.accumulate': COUNT, 'train.grad_clip': NOT_NEGATIVE,
    'train.optim_g': SECTION, 'train.optim_d': SECTION, 'train.optim_*.type': TEXT, 'train.optim_*.lr': POSITIVE,
    'train.optim_*.weight_decay': NOT_NEGATIVE, 'train.optim_*.betas': BETAS, 'train.scheduler': SECTION,
    'train.scheduler.type': TEXT, 'train.scheduler.milestones': MILESTONES, 'train.scheduler.gamma': POSITIVE,
    'train.total_iter': ITERATIONS, 'train.warmup_iter': Kind('an integer, -1 for none', _is_int),
    'train.pixel_opt': SECTION_OR_NONE, 'train.perceptual_opt': SECTION_OR_NONE, 'train.gan_opt': SECTION_OR_NONE,
    'train.*_opt.type': TEXT, 'train.*_opt.loss_weight': NUMBER,
    'val.val_freq': ITERATIONS, 'val.save_img': SWITCH, 'val.pbar': SWITCH, 'val.suffix': PATH,
    'val.metrics': SECTION_OR_NONE, 'val.metrics.*': SECTION, 'val.metrics.*.type': TEXT,
    'val.metrics.*.crop_border': COUNT_OR_NONE, 'val.metrics.*.test_y_channel': SWITCH,
    'val.metrics.*.better': Kind('higher or lower', lambda v: v in LESS),
    'val.tile': COUNT_OR_NONE, 'val.tile_overlap': COUNT_OR_NONE, 'val.self_ensemble': SWITCH,
    'logger.print_freq': COUNT, 'logger.save_checkpoint_freq': ITERATIONS, 'logger.use_tb_logger': SWITCH,
    'logger.wandb': SECTION_OR_NONE,
}
REQUIRED = ('name', 'model_type', 'datasets', 'network_g', 'network_g.type')
REQUIRED_TO_TRAIN = ('train', 'train.total_iter', 'train.optim_g', 'train.optim_g.type', 'train.optim_g.lr',
                     'train.scheduler', 'train.scheduler.type', 'datasets.train', 'datasets.train.batch_size_per_gpu')
SCHEDULERS = ('MultiStepLR', 'MultiStepRestartLR', 'CosineAnnealingRestartLR')
BENCHMARKS = ('Set5', 'Set14', 'B100', 'BSD100', 'Urban100', 'Manga109')


def check_options(opt: dict, source: Source, is_train: bool) -> None:
    """Raise a UserError that names the first mistake."""
    _check_keys(opt, source)
    _check_required(opt, source, is_train)
    _check_names(opt, source, is_train)
    for key in opt:
        if key.startswith('network_'):
            _check_network(opt, key, source)
    _check_scale(opt, source)
    for phase in opt['datasets']:
        _check_dataset(opt, phase, source, is_train)
    if is_train:
        _check_training(opt, source)
    _check_files(opt.get('path') or {}, source)


# ------------------------------------------------------------------------------------------------- single keys

def _known(path: tuple[str, ...]) -> Kind | None:
    for pattern, kind in KEYS.items():
        parts = pattern.split('.')
        if len(parts) == len(path) and all(_matches(part, p) for part, p in zip(path, parts, strict=True)):
            return kind
    return None


def _matches(part: str, pattern: str) -> bool:
    before, star, after = pattern.partition('*')
    return part == pattern if not star else part.startswith(before) and part.endswith(after)


def _check_keys(section: dict, source: Source, path: tuple[str, ...] = ()) -> None:
    for key, value in section.items():
        here = (*path, key)
        kind = _known(here)
        if kind is not None and not kind.accepts(value):
            raise source.error(here, f'is {_shown(value)}, expected {kind.words}')
        if kind is None and not (path and path[0].startswith('network_')):
            _refuse_misspelling(section, source, path, key)
        if isinstance(value, dict):
            _check_keys(value, source, here)


def _refuse_misspelling(section: dict, source: Source, path: tuple[str, ...], key: str) -> None:
    """An unknown key is somebody's extension, unless it is nearly a known one that is not there."""
    siblings = [pattern.split('.')[-1] for pattern in KEYS
                if len(pattern.split('.')) == len(path) + 1
                and all(_matches(part, p) for part, p in zip(path, pattern.split('.'), strict=False))]
    absent = [name for name in siblings if '*' not in name and name not in section]
    near = difflib.get_close_matches(key, absent, n=1, cutoff=0.8)
    if near:
        raise source.error((*path, key), f'unknown key; did you mean {near[0]}?')


def _shown(value) -> str:
    text = repr(value)
    return f'{text[:60]}…' if len(text) > 60 else text


def _check_required(opt: dict, source: Source, is_train: bool) -> None:
    for key in REQUIRED + (REQUIRED_TO_TRAIN if is_train else ()):
        section = opt
        for depth, part in enumerate(key.split('.')):
            if part not in section:
                expected = next((kind.words for pattern, kind in KEYS.items() if pattern == key), None)
                expected = expected or _known(tuple(key.split('.'))).words
                raise source.error(key.split('.')[:depth] or key, f'{key} is missing, expected {expected}')
            section = section[part]
    if not is_train and not any(phase.split('_')[0] in ('test', 'val') for phase in opt['datasets']):
        raise source.error('datasets', 'no test set; expected a section test_1')


# ------------------------------------------------------------------------------------------------- names

def _check_names(opt: dict, source: Source, is_train: bool) -> None:
    _check_registered(opt['model_type'], registry.MODEL_REGISTRY, 'model', source, 'model_type')
    for name, metric in ((opt.get('val') or {}).get('metrics') or {}).items():
        key = ('val', 'metrics', name)
        if 'type' not in metric:
            raise source.error(key, 'type is missing, expected the name of a metric such as calculate_psnr')
        _check_registered(metric['type'], registry.METRIC_REGISTRY, 'metric', source, (*key, 'type'))
    if not is_train:
        return
    for name, loss in opt['train'].items():
        if name.endswith('_opt') and isinstance(loss, dict) and 'type' in loss:
            _check_registered(loss['type'], registry.LOSS_REGISTRY, 'loss', source, ('train', name, 'type'))
        if name.startswith('optim_') and isinstance(loss, dict) and 'type' in loss:
            optimizers = [key for key, value in vars(torch.optim).items()
                          if isinstance(value, type) and issubclass(value, torch.optim.Optimizer)]
            _check_choice(loss['type'], optimizers, 'optimizer of torch.optim', source, ('train', name, 'type'))
    _check_choice(opt['train']['scheduler']['type'], SCHEDULERS, 'scheduler', source, 'train.scheduler.type')


def _check_registered(name: str, entries, what: str, source: Source, key) -> None:
    names = [entry.removesuffix('_basicsr') for entry in entries.keys()]
    _check_choice(name, names + list(entries.keys()), what, source, key)


def _check_choice(name: str, names: Iterable[str], what: str, source: Source, key) -> None:
    names = list(names)
    if name not in names:
        lower = {entry.lower(): entry for entry in names}
        near = [lower[n] for n in difflib.get_close_matches(name.lower(), lower, n=2, cutoff=0.5)]
        some = ', '.join(sorted(set(names))[:12])
        known = f'did you mean {" or ".join(near)}?' if near else f'expected one of {some}'
        raise source.error(key, f'there is no {what} {name!r}; {known}')


# ------------------------------------------------------------------------------------------------- the network

def _check_network(opt: dict, section: str, source: Source) -> None:
    arguments = opt[section]
    if not isinstance(arguments, dict) or 'type' not in arguments:
        raise source.error(section, 'expected a section with type, the name of an architecture')
    _check_registered(arguments['type'], registry.ARCH_REGISTRY, 'architecture', source, (section, 'type'))
    arch = registry.ARCH_REGISTRY.get(arguments['type'])
    parameters = inspect.signature(arch.__init__).parameters
    names = [name for name, parameter in parameters.items()
             if name != 'self' and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)]
    given = {key: value for key, value in arguments.items() if key != 'type'}
    if not any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values()):
        for key in given:
            if key not in names:
                near = difflib.get_close_matches(key, names, n=1)
                known = f'did you mean {near[0]}?' if near else f'expected {", ".join(names)}'
                raise source.error((section, key), f'{arguments["type"]} has no such argument; {known}')
    for name in names:
        if parameters[name].default is inspect.Parameter.empty and name not in given:
            raise source.error(section, f'{name} is missing, which {arguments["type"]} needs')
    if arch is ELAN:
        try:
            with torch.device('meta'):
                arch(**given)
        except (ValueError, TypeError) as error:
            raise source.error(_blamed(section, given, str(error)), ' '.join(str(error).split())) from None


def _blamed(section: str, arguments: dict, message: str) -> tuple[str, ...]:
    """The argument that ELAN's message is about, if it stands in the file."""
    name = next((key for key in arguments if message.startswith(f'ELAN: {key} ')), None)
    return (section, name) if name else (section,)


def _check_scale(opt: dict, source: Source) -> None:
    upscale = opt['network_g'].get('upscale')
    if _is_int(upscale) and 'scale' in opt and opt['scale'] != upscale:
        raise source.error('network_g.upscale', f'is {upscale} but scale is {opt["scale"]}; make them agree')
    if opt['network_g']['type'] == 'ELAN' and 'scale' not in opt:
        raise source.error('scale', f'is missing, expected {upscale or 4}, the upscale of the network')


# ------------------------------------------------------------------------------------------------- data and files

def _check_dataset(opt: dict, phase: str, source: Source, is_train: bool) -> None:
    dataset, key = opt['datasets'][phase], ('datasets', phase)
    kind = phase.split('_')[0]
    if kind not in ('train', 'val', 'test'):
        raise source.error(key, 'unknown set, expected train, val, val_1, … or test_1, …')
    if (kind == 'val' and is_train and not opt.get('val')) or (kind == 'train' and not is_train):
        return
    if 'type' not in dataset:
        raise source.error(key, 'type is missing, expected the name of a dataset such as PairedImageDataset')
    _check_registered(dataset['type'], registry.DATASET_REGISTRY, 'dataset', source, (*key, 'type'))
    backend = dataset.get('io_backend')
    if backend is not None and backend.get('type') not in ('disk', 'lmdb', 'memcached'):
        raise source.error((*key, 'io_backend'), f'type is {_shown(backend.get("type"))}, expected disk or lmdb')
    if dataset['type'].startswith('Paired'):
        needed = ['dataroot_gt', 'dataroot_lq']
        if dataset['type'] == 'PairedImageDataset':
            needed.append('io_backend')
        for name in needed:
            if dataset.get(name) is None:
                raise source.error(key, f'{name} is missing, which {dataset["type"]} needs')
    is_lmdb = dataset['type'] == 'PairedRawLmdbDataset' or (backend or {}).get('type') == 'lmdb'
    for name in ('dataroot_gt', 'dataroot_lq'):
        for path in [dataset[name]] if isinstance(dataset.get(name), str) else []:
            _check_data_path(osp.expanduser(path), is_lmdb, source, (*key, name))
    for name in ('meta_info', 'meta_info_file'):
        if dataset.get(name) is not None and not osp.isfile(osp.expanduser(dataset[name])):
            raise source.error((*key, name), f'{dataset[name]}: no such file')
    scale = opt.get('scale', 1)
    if kind == 'train' and _is_int(dataset.get('gt_size')) and dataset['gt_size'] % scale:
        raise source.error((*key, 'gt_size'), f'is {dataset["gt_size"]}, expected a multiple of scale, {scale}')
    if kind == 'train' and dataset['type'].startswith('Paired') and 'gt_size' not in dataset:
        raise source.error(key, 'gt_size is missing, expected the edge of the GT patches in pixels')


def _check_data_path(path: str, is_lmdb: bool, source: Source, key) -> None:
    if not osp.isdir(path):
        raise source.error(key, f'{path}: no such folder; {_how_to_prepare(path)}')
    if is_lmdb and not path.endswith('.lmdb'):
        raise source.error(key, f'{path}: expected an LMDB folder, whose name ends with .lmdb')
    if is_lmdb and not osp.isfile(osp.join(path, 'data.mdb')):
        raise source.error(key, f'{path}: holds no data.mdb, so it is no finished LMDB; {_how_to_prepare(path)}')


def _how_to_prepare(path: str) -> str:
    if 'DIV2K' in path:
        return 'make it with `basicsr data div2k --download`'
    if any(name in path.split('/') for name in BENCHMARKS):
        return 'lay it out with `basicsr data benchmark`'
    if 'demo' in path.split('/'):
        return '`make demo` prepares it'
    return 'make it from your images with `basicsr data build`'


def _check_training(opt: dict, source: Source) -> None:
    train, scheduler = opt['train'], opt['train']['scheduler']
    if not any(isinstance(train.get(name), dict) for name in ('pixel_opt', 'perceptual_opt', 'gan_opt')):
        raise source.error('train', 'no loss; expected a section pixel_opt such as {type: L1Loss}')
    if scheduler['type'] != 'CosineAnnealingRestartLR' and 'milestones' not in scheduler:
        raise source.error('train.scheduler', f'milestones is missing, expected {MILESTONES.words}')
    if scheduler['type'] == 'CosineAnnealingRestartLR' and 'periods' not in scheduler:
        raise source.error('train.scheduler', 'periods is missing, expected a list of iterations')
    parts, batch = train.get('accumulate', 1), opt['datasets']['train']['batch_size_per_gpu']
    if batch % parts:
        raise source.error('train.accumulate', f'is {parts}, expected a divisor of batch_size_per_gpu, {batch}: the '
                                               'batch is worked off in that many equal parts')


def _check_files(paths: dict, source: Source) -> None:
    for name, value in paths.items():
        if isinstance(value, str) and (name.startswith('pretrain_network_') or name == 'resume_state'):
            if not osp.isfile(osp.expanduser(value)):
                raise source.error(('path', name), f'{value}: no such file, expected a '
                                                   f'{"training state" if name == "resume_state" else "checkpoint"}')


