"""What spans several keys of an option file, what it names, and the files it needs.

What is wrong in the text comes first and missing files last, so that a file can be put right on a machine without data.
"""
from __future__ import annotations

import importlib.util
import os
import shutil
from os import path as osp

import torch

from elan_basicsr.config.parts import DATASET, DATASET_KEYS, MODEL, PATCH_KEYS, check_choice, find, find_type
from elan_basicsr.config.reader import Path_, Source
from elan_basicsr.config.schema import DEGRADATIONS, is_int, mistakes
from elan_basicsr.config.trials import try_loss, try_metric, try_network, try_optimizer, try_scheduler
from elan_basicsr.data.roots import OF_A_ROOT, split
from elan_basicsr.errors import UserError, nearest
from elan_basicsr.interop.weights import is_known, names
from elan_basicsr.models.elan_model import TOOLBOX_SCHEDULERS

from basicsr.models.base_model import BaseModel
from basicsr.models.realesrgan_model import RealESRGANModel
from basicsr.models.realesrnet_model import RealESRNetModel
from basicsr.models.srgan_model import SRGANModel
from basicsr.models.stylegan2_model import StyleGAN2Model
from basicsr.models.swinir_model import SwinIRModel

COMPILES_CHECKPOINTS = '2.11'  # of torch's versions, the first that was seen to compile a recomputed block rightly
BENCHMARKS = ('Set5', 'Set14', 'B100', 'BSD100', 'Urban100', 'Manga109')
LAYOUTS = (('_raw.lmdb', 'a raw LMDB', 'PairedRawLmdbDataset'),
           ('_sub.lmdb', 'an LMDB of sub-images', 'PairedImageDataset'))
REAL_ESRGAN_CROP = 400  # RealESRGANDataset's own constant
PAIRED = ('PairedImageDataset', 'PairedRawLmdbDataset')
OURS = ('train.amp', 'train.accumulate', 'train.grad_clip', 'val.tile', 'val.tile_overlap', 'val.self_ensemble',
        'val.save_best', 'logger.keep_last', 'compile', 'cuda_graphs', 'sync_bn')
"""What ELANModel adds; a model of the toolbox itself would pass over it in silence."""


def check(opt: dict, source: Source, is_train: bool) -> None:
    """Raise a UserError that names the first mistake in options whose keys are right one by one."""
    model = find(opt['model_type'], MODEL, source, ('model_type',))
    for key in opt:
        if key.startswith('network_'):
            try_network(opt[key], (key,), source)
    _check_scale(opt, source)
    _check_model(opt, model, source)
    used = [phase for phase in opt['datasets'] if _is_used(opt, phase, is_train)]
    if not used:
        raise source.error('datasets', 'there is no test set, expected a section test_1')
    for phase in used:
        _check_dataset(opt, phase, source)
    if is_train:
        _check_training(opt, model, source)
    _check_validation(opt, used, source)
    for phase in used:
        _check_data_files(opt['datasets'][phase], ('datasets', phase), source)
    _check_files(opt.get('path') or {}, source)


def _check_scale(opt: dict, source: Source) -> None:
    scale, network = opt.get('scale'), opt['network_g']
    if scale is None and network['type'] == 'ELAN':
        raise source.error('scale', f'is missing, expected {network.get("upscale", 4)}, the upscale of the network')
    for name in ('upscale', 'scale'):
        if is_int(network.get(name)) and scale is not None and network[name] != scale:
            raise source.error(('network_g', name), f'is {network[name]} but scale is {scale}; make them agree')
    if network['type'] == 'ELAN' and 'upscale' not in network and scale != 4:
        raise source.error('network_g', f'upscale is missing, which ELAN takes as 4, but scale is {scale}')


def _check_model(opt: dict, model: type[BaseModel], source: Source) -> None:
    if issubclass(model, SwinIRModel) and 'window_size' not in opt['network_g']:
        raise source.error('network_g', f'window_size is missing, by whose multiple {opt["model_type"]} pads images')
    if issubclass(model, (RealESRNetModel, RealESRGANModel)):
        for _, where, words in mistakes(opt, {'properties': DEGRADATIONS}, source):
            raise source.error(where, words)
    for key in OURS if model.__module__.startswith('basicsr.') else ():
        section, _, name = key.rpartition('.')
        if ((opt.get(section) or {}) if section else opt).get(name):
            raise source.error(key, f'{opt["model_type"]} does not know it; use model_type: ELANModel, or remove it')


# ------------------------------------------------------------------------------------------------- data

def _is_used(opt: dict, phase: str, is_train: bool) -> bool:
    kind = phase.split('_')[0]
    return kind == 'train' or (kind == 'val' and bool(opt.get('val'))) if is_train else kind != 'train'


def _check_dataset(opt: dict, phase: str, source: Source) -> None:
    dataset, key, is_train = opt['datasets'][phase], ('datasets', phase), phase.split('_')[0] == 'train'
    find_type(dataset, DATASET, source, key)
    paired = dataset['type'] in PAIRED
    needed = DATASET_KEYS.get(dataset['type'], ())
    for name in (*needed, *(PATCH_KEYS if paired and is_train else ())):
        if dataset.get(name) is None:
            near = nearest(name, [each for each in dataset if each not in needed], cutoff=0.75)
            raise source.error(key, f'{name} is missing, which {dataset["type"]} needs'
                                    f'{f"; did you mean it by {near}?" if near else ""}')
    if 'io_backend' in dataset and 'type' not in dataset['io_backend']:
        raise source.error((*key, 'io_backend'), 'type is missing, expected disk or lmdb')
    if paired and 'scale' not in opt:
        raise source.error('scale', f'is missing, which {dataset["type"]} needs')
    if is_train and is_int(size := dataset.get('gt_size')) and size % (scale := opt.get('scale', 1)):
        raise source.error((*key, 'gt_size'), f'is {size}, expected a multiple of scale, {scale}')
    if dataset.get('prefetch_mode') == 'cuda' and not dataset.get('pin_memory'):
        raise source.error((*key, 'prefetch_mode'), 'is cuda, which needs pin_memory: true')


def _check_data_files(dataset: dict, key: Path_, source: Source) -> None:
    is_lmdb = dataset['type'] == 'PairedRawLmdbDataset' or dataset.get('io_backend', {}).get('type') == 'lmdb'
    try:
        roots = split(dataset)
    except UserError as error:
        raise source.error(key, str(error)) from None
    for root in roots:
        for name in [name for name in OF_A_ROOT if name in root]:
            if name.startswith('dataroot_'):
                wrong = _wrong_folder(root[name], dataset['type'], is_lmdb)
            else:
                wrong = None if osp.isfile(root[name]) else 'no such file, expected the list of images'
            if wrong:
                raise source.error((*key, name), f'{root[name]}: {wrong}')


def _wrong_folder(path: str, dataset: str, is_lmdb: bool) -> str | None:
    """What is wrong with a folder or LMDB of images."""
    if is_lmdb and not path.endswith('.lmdb'):
        return ('expected an LMDB, whose folder ends with .lmdb; for a folder of images use PairedImageDataset and '
                'io_backend: {type: disk}')
    for ending, what, taken_by in LAYOUTS:
        if path.endswith(ending) and dataset in PAIRED and dataset != taken_by:
            return f'by its name {what}; set type: {taken_by}'
    if not osp.isdir(path):
        what = 'is a file, expected a folder' if osp.isfile(path) else 'no such folder'
        return f'{what}; {_how_to_prepare(path, dataset)}'
    if is_lmdb and not osp.isfile(osp.join(path, 'data.mdb')):
        return f'holds no data.mdb, so it is no finished LMDB; {_how_to_prepare(path, dataset)}'
    return None if is_lmdb or not path.endswith('.lmdb') else 'is an LMDB; set io_backend: {type: lmdb}'


def _how_to_prepare(path: str, dataset: str) -> str:
    parts = path.split('/')
    if 'demo' in parts:
        return '`make demo` prepares it'
    if any(name in parts for name in BENCHMARKS):
        return 'lay it out with `basicsr data benchmark`'
    if 'DIV2K' in path:
        layout = ' --layout subimages' if path.removesuffix('.lmdb').endswith('_sub') else ''
        return f'make it with `basicsr data div2k --download{layout}`'
    if dataset.startswith(('Paired', 'Single', 'RealESRGAN')):
        return 'make it from your images with `basicsr data build`, or correct the path'
    return "BasicSR's docs/DatasetPreparation.md tells how to prepare it"


# ------------------------------------------------------------------------------------------------- training

def has_compiler() -> bool:
    """Whether there is a C++ compiler, which `torch.compile` needs."""
    return any((os.environ.get('CXX'), shutil.which('g++'), shutil.which('clang++')))


def _check_compile(opt: dict, source: Source) -> None:
    if not has_compiler():
        raise source.error('compile', 'torch.compile needs a C++ compiler; install g++, or leave the key out')
    if opt['network_g'].get('use_checkpoint') and torch.__version__ < COMPILES_CHECKPOINTS:
        raise source.error('compile', f'with network_g.use_checkpoint needs torch {COMPILES_CHECKPOINTS} or later; in '
                           f'{torch.__version__} BatchNorm would count every batch twice; leave out one of them')


def _check_cuda_graphs(opt: dict, source: Source) -> None:
    for key, value in (('compile', opt.get('compile')), ('sync_bn', opt.get('sync_bn')),
                       ('network_g.use_checkpoint', opt['network_g'].get('use_checkpoint'))):
        if value:
            raise source.error('cuda_graphs', f'cannot be combined with {key}; leave out one of them')
    if opt['datasets']['train'].get('gt_size') is None:
        raise source.error('cuda_graphs', 'needs datasets.train.gt_size, since all batches must have one size; give '
                                          'it, or leave the key out')


def _check_training(opt: dict, model: type[BaseModel], source: Source) -> None:
    train, name = opt['train'], opt['model_type']
    adversarial = issubclass(model, (SRGANModel, StyleGAN2Model))
    for section, key in (('', 'network_d'), ('train', 'optim_d'), ('train', 'gan_opt')) if adversarial else ():
        if not (train if section else opt).get(key):
            raise source.error(section or 'model_type', f'section {key} is missing, which {name} needs')
    if issubclass(model, (RealESRNetModel, RealESRGANModel)):
        _check_patches_of_real_esrgan(opt, source)
    if opt.get('compile'):
        _check_compile(opt, source)
    if opt.get('cuda_graphs'):
        _check_cuda_graphs(opt, source)
    losses = [key for key, value in train.items() if key.endswith('_opt') and value]
    for key in losses:
        try_loss(train[key], ('train', key), source)
    if not losses:
        raise source.error('train', 'there is no loss, expected a section pixel_opt such as {type: L1Loss}')
    for key in [key for key in train if key.startswith('optim_')]:
        optimizer = try_optimizer(train[key], ('train', key), source)
        if model.get_optimizer is BaseModel.get_optimizer and (kind := train[key]['type']) != 'Adam':
            raise source.error(('train', key, 'type'), f'{name} of BasicSR 1.4.2 trains with Adam only, not {kind}; '
                                                       'use model_type: ELANModel or Adam')
        try_scheduler(train['scheduler'], ('train', 'scheduler'), source, optimizer, train['total_iter'])
    kind = train['scheduler']['type']
    if model.setup_schedulers is BaseModel.setup_schedulers and kind not in TOOLBOX_SCHEDULERS:
        raise source.error('train.scheduler.type', f'{name} of BasicSR 1.4.2 does not know {kind}; use model_type: '
                                                   f'ELANModel, or one of {", ".join(TOOLBOX_SCHEDULERS)}')
    parts, batch = train.get('accumulate', 1), opt['datasets']['train']['batch_size_per_gpu']
    if batch % parts:
        raise source.error('train.accumulate', f'is {parts}, expected a divisor of batch_size_per_gpu, {batch}: the '
                                               'batch is worked off in that many equal parts')
    logger = opt.get('logger') or {}
    if (logger.get('wandb') or {}).get('project') and not logger.get('use_tb_logger'):
        raise source.error('logger.wandb.project', 'needs use_tb_logger: true, from which it takes its figures')
    for key, wanted, package in (('wandb.project', (logger.get('wandb') or {}).get('project'), 'wandb'),
                                 ('use_tb_logger', logger.get('use_tb_logger'), 'tensorboard')):
        # A folder of the name, such as the one that wandb leaves where it ran, is found as a package without an origin.
        if wanted and getattr(importlib.util.find_spec(package), 'origin', None) is None:
            raise source.error(f'logger.{key}', f'needs {package}, which is not installed: pip install {package}, or '
                                                'leave the key out')


def _check_patches_of_real_esrgan(opt: dict, source: Source) -> None:
    """The toolbox's RealESRGANDataset cuts images to a fixed size, out of which the model cuts patches."""
    name, size = opt['datasets']['train']['type'], opt.get('gt_size', 0)
    if name == 'RealESRGANDataset' and size > REAL_ESRGAN_CROP:
        method = DATASET.registered()[name].__getitem__
        if REAL_ESRGAN_CROP in method.__code__.co_consts:  # not so in somebody's own
            raise source.error('gt_size', f'is {size}, expected at most {REAL_ESRGAN_CROP}, to which {name} cuts every '
                                          'image; take smaller patches, or a dataset of your own')


def _check_validation(opt: dict, used: list[str], source: Source) -> None:
    val = opt.get('val') or {}
    metrics = val.get('metrics') or {}
    without_gt = any(opt['datasets'][phase]['type'] == 'SingleImageDataset' for phase in used)
    for name, metric in metrics.items():
        if try_metric(metric, ('val', 'metrics', name), source) and without_gt:
            raise source.error(('val', 'metrics', name), f'{metric["type"]} compares with a ground truth, which '
                                                         'SingleImageDataset does not have')
    if val.get('save_best') is not None:
        check_choice(val['save_best'], metrics, 'metric in val.metrics named', source, ('val', 'save_best'))


def _check_files(paths: dict, source: Source) -> None:
    for name, value in paths.items():
        if isinstance(value, str) and (name.startswith('pretrain_network_') or name == 'resume_state'):
            is_state = name == 'resume_state'
            if not osp.isfile(value) and (is_state or not is_known(value)):
                found = 'is a folder' if osp.isdir(value) else 'no such file'
                what = 'a training state (training_states/….state)' if is_state else f'a checkpoint, or {names(value)}'
                raise source.error(('path', name), f'{value}: {found}, expected {what}')
