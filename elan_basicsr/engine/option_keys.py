"""The keys an option file may hold and what each may be, as one table."""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """What a value may be, in words and as a test."""
    words: str
    accepts: Callable[[object], bool]


def is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_text(value) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _list_of(accepts: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and len(value) > 0 and all(map(accepts, value))


def _one_of(*values) -> Kind:
    words = ' or '.join('null' if value is None else str(value).lower() if isinstance(value, bool) else value
                        for value in values)
    return Kind(words, lambda value: any(value is each or (isinstance(each, str) and value == each) for each in values))


TEXT = Kind('a text', _is_text)
TEXT_OR_NONE = Kind('a text, or null for none', lambda v: v is None or _is_text(v))
NAME = Kind('a text without / that can name a folder',
            lambda v: _is_text(v) and not set(v) & set('/\\\0\n') and v not in ('.', '..') and len(v.encode()) <= 200)
NO_CODE = Kind('nothing, for the Python code in that folder would be run; use PYTHONPATH', lambda v: v is None)
FILE_SUFFIX = Kind('a text without /, or null for none', lambda v: v is None or (_is_text(v) and '/' not in v))
PATH = Kind('a path, or null for none', TEXT_OR_NONE.accepts)
SWITCH = Kind('true or false', lambda v: isinstance(v, bool))
COUNT = Kind('an integer from 1', lambda v: is_int(v) and v >= 1)
COUNT_OR_ZERO = Kind('an integer from 0', lambda v: is_int(v) and v >= 0)
ITERATIONS = Kind('a whole number from 1', lambda v: is_number(v) and v >= 1 and v == int(v))
POSITIVE = Kind('a number above 0', lambda v: is_number(v) and v > 0)
CLIP = Kind('a number above 0, or false', lambda v: v is None or v is False or POSITIVE.accepts(v))
NUMBER = Kind('a number', is_number)
NOT_NEGATIVE = Kind('a number from 0', lambda v: is_number(v) and v >= 0)
DECAY = Kind('a number from 0 to below 1', lambda v: is_number(v) and 0 <= v < 1)
BETAS = Kind('two numbers from 0 to below 1, such as [0.9, 0.999]',
             lambda v: _list_of(DECAY.accepts)(v) and len(v) == 2)
NUMBERS = Kind('a list of numbers', _list_of(is_number))
MILESTONES = Kind('a list of iterations, such as [250000, 400000]', _list_of(COUNT.accepts))
RESTARTS = Kind('a list of iterations from 0, such as [0, 250000]', _list_of(COUNT_OR_ZERO.accepts))
SECTION = Kind('a section of keys', lambda v: isinstance(v, dict) and bool(v))
SECTION_OR_NONE = Kind('a section of keys, or null for none', lambda v: v is None or isinstance(v, dict))
SEED = Kind('an integer from 0 to 4294967295, or null for a random one',
            lambda v: v is None or (is_int(v) and 0 <= v < 2**32))
GPUS = Kind('auto or an integer from 0', lambda v: v == 'auto' or COUNT_OR_ZERO.accepts(v))
NETWORKS = Kind('a list of networks such as [network_d]', lambda v: v is None or _list_of(_is_text)(v))

# '*' stands for any text. Keys that only certain datasets, networks or losses know are not in here.
KEYS: dict[str, Kind] = {
    'name': NAME, 'model_type': TEXT, 'scale': COUNT, 'num_gpu': GPUS, 'manual_seed': SEED,
    'find_unused_parameters': SWITCH, 'compile': SWITCH, 'sync_bn': SWITCH, 'deterministic': SWITCH,
    'datasets': SECTION, 'network_g': SECTION, 'network_*': SECTION, 'path': SECTION_OR_NONE, 'train': SECTION,
    'val': SECTION_OR_NONE, 'logger': SECTION_OR_NONE, 'dist_params': SECTION_OR_NONE,

    'datasets.*': SECTION, 'datasets.*.name': NAME, 'datasets.*.type': TEXT, 'datasets.*.filename_tmpl': TEXT,
    'datasets.*.dataroot_gt': PATH, 'datasets.*.dataroot_lq': PATH, 'datasets.*.meta_info_file': PATH,
    'datasets.*.meta_info': PATH, 'datasets.*.io_backend': SECTION,
    'datasets.*.io_backend.sys_path': NO_CODE,
    'datasets.*.io_backend.type': _one_of('disk', 'lmdb', 'memcached'), 'datasets.*.gt_size': COUNT,
    'datasets.*.use_hflip': SWITCH, 'datasets.*.use_rot': SWITCH, 'datasets.*.use_shuffle': SWITCH,
    'datasets.*.num_worker_per_gpu': COUNT_OR_ZERO, 'datasets.*.batch_size_per_gpu': COUNT,
    'datasets.*.dataset_enlarge_ratio': ITERATIONS, 'datasets.*.prefetch_mode': _one_of('cpu', 'cuda', None),
    'datasets.*.pin_memory': SWITCH, 'datasets.*.persistent_workers': SWITCH, 'datasets.*.num_prefetch_queue': COUNT,
    'datasets.*.color': _one_of('y', None), 'datasets.*.mean': NUMBERS, 'datasets.*.std': NUMBERS,

    'network_*.type': TEXT,

    'path.pretrain_network_g': PATH, 'path.pretrain_network_d': PATH, 'path.pretrain_network_*': PATH,
    'path.strict_load_g': SWITCH, 'path.strict_load_d': SWITCH, 'path.param_key_g': TEXT_OR_NONE,
    'path.param_key_d': TEXT_OR_NONE, 'path.resume_state': PATH, 'path.experiments_root': PATH,
    'path.results_root': PATH, 'path.ignore_resume_networks': NETWORKS,

    'train.total_iter': ITERATIONS, 'train.warmup_iter': Kind('an integer, -1 for none', is_int),
    'train.ema_decay': DECAY, 'train.amp': _one_of('bf16', 'fp16', False, None), 'train.accumulate': COUNT,
    'train.grad_clip': CLIP, 'train.net_d_iters': COUNT, 'train.net_d_init_iters': COUNT_OR_ZERO,
    'train.optim_g': SECTION, 'train.optim_d': SECTION, 'train.optim_*': SECTION, 'train.optim_*.type': TEXT,
    'train.optim_*.lr': POSITIVE, 'train.optim_*.weight_decay': NOT_NEGATIVE, 'train.optim_*.betas': BETAS,
    'train.scheduler': SECTION, 'train.scheduler.type': TEXT, 'train.scheduler.milestones': MILESTONES,
    'train.scheduler.gamma': POSITIVE, 'train.scheduler.periods': MILESTONES, 'train.scheduler.restarts': RESTARTS,
    'train.scheduler.restart_weights': NUMBERS, 'train.scheduler.eta_min': NOT_NEGATIVE,
    'train.pixel_opt': SECTION_OR_NONE, 'train.perceptual_opt': SECTION_OR_NONE, 'train.gan_opt': SECTION_OR_NONE,
    'train.*_opt': SECTION_OR_NONE, 'train.*_opt.type': TEXT, 'train.*_opt.loss_weight': NUMBER,

    'val.val_freq': ITERATIONS, 'val.save_img': SWITCH, 'val.pbar': SWITCH, 'val.suffix': FILE_SUFFIX,
    'val.metrics': SECTION_OR_NONE, 'val.metrics.*': SECTION, 'val.metrics.*.type': TEXT,
    'val.metrics.*.crop_border': COUNT_OR_ZERO, 'val.metrics.*.test_y_channel': SWITCH,
    'val.metrics.*.better': _one_of('higher', 'lower'), 'val.tile': COUNT_OR_ZERO, 'val.tile_overlap': COUNT_OR_ZERO,
    'val.self_ensemble': SWITCH, 'val.save_best': TEXT_OR_NONE,

    'logger.print_freq': COUNT, 'logger.save_checkpoint_freq': ITERATIONS, 'logger.use_tb_logger': SWITCH,
    'logger.keep_last': COUNT, 'logger.wandb': SECTION_OR_NONE, 'logger.wandb.project': TEXT_OR_NONE,
    'logger.wandb.resume_id': TEXT_OR_NONE, 'dist_params.backend': TEXT, 'dist_params.port': COUNT,
    'dist_params.timeout': POSITIVE,
}
REQUIRED = ('name', 'model_type', 'datasets', 'network_g')
REQUIRED_TO_TRAIN = ('train', 'train.total_iter', 'train.optim_g', 'train.scheduler',
                     'train.scheduler.type', 'datasets.train', 'datasets.train.batch_size_per_gpu')

OURS = ('train.amp', 'train.accumulate', 'train.grad_clip', 'val.tile', 'val.tile_overlap', 'val.self_ensemble',
        'val.save_best', 'logger.keep_last', 'compile', 'sync_bn')
"""What ELANModel adds; a model of the toolbox itself would pass over it in silence."""

DATASET_KEYS = {
    'PairedImageDataset': ('dataroot_gt', 'dataroot_lq', 'io_backend'),
    'PairedRawLmdbDataset': ('dataroot_gt', 'dataroot_lq'),
    'SingleImageDataset': ('dataroot_lq', 'io_backend'),
    'RealESRGANDataset': (
        'dataroot_gt', 'io_backend', 'use_hflip', 'use_rot', 'final_sinc_prob',
        *(f'{key}{process}' for process in ('', '2')
          for key in ('blur_kernel_size', 'kernel_list', 'kernel_prob', 'blur_sigma', 'betag_range', 'betap_range',
                      'sinc_prob'))),
}
"""What these datasets read without asking whether it is there."""
PATCH_KEYS = ('gt_size', 'use_hflip', 'use_rot')
"""What the paired ones read besides when they cut training patches."""


def known(path: tuple[str, ...]) -> Kind | None:
    """The kind of the key at `path`; a pattern without stars wins."""
    kind = KEYS.get('.'.join(path))
    if kind is None:
        kind = next((KEYS[pattern] for pattern in KEYS if _fits(path, pattern.split('.'))), None)
    return kind


def known_keys(path: tuple[str, ...]) -> list[str]:
    """The names of the known keys in the section at `path`."""
    patterns = [pattern.split('.') for pattern in KEYS]
    return [pattern[-1] for pattern in patterns if '*' not in pattern[-1] and _fits(path, pattern[:-1])]


def _fits(path: tuple[str, ...], pattern: list[str]) -> bool:
    return len(path) == len(pattern) and all(map(_matches, path, pattern))


def _matches(part: str, pattern: str) -> bool:
    before, star, after = pattern.partition('*')
    return part == pattern if not star else (part.startswith(before) and part.endswith(after)
                                             and len(part) >= len(before) + len(after))
