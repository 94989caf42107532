"""What an option file must hold, checked before anything starts: single keys, then what spans several keys, then files.

What is wrong in the text comes first and missing files last, so that a file can be put right on a machine without data.
"""
from __future__ import annotations

from os import path as osp

from elan_basicsr.engine.option_keys import (
    DATASET_KEYS,
    KEYS,
    OURS,
    PATCH_KEYS,
    REQUIRED,
    REQUIRED_TO_TRAIN,
    is_int,
    known,
    known_keys,
)
from elan_basicsr.engine.option_parts import (
    check_choice,
    check_loss,
    check_metric,
    check_network,
    check_optimizer,
    check_registered,
    check_scheduler,
)
from elan_basicsr.engine.option_reader import Source, nearest

from basicsr.models.base_model import BaseModel
from basicsr.models.srgan_model import SRGANModel
from basicsr.models.stylegan2_model import StyleGAN2Model
from basicsr.models.swinir_model import SwinIRModel
from basicsr.utils import registry

BENCHMARKS = ('Set5', 'Set14', 'B100', 'BSD100', 'Urban100', 'Manga109')
LAYOUTS = (('_raw.lmdb', 'a raw LMDB', 'PairedRawLmdbDataset'),
           ('_sub.lmdb', 'an LMDB of sub-images', 'PairedImageDataset'))
PAIRED = ('PairedImageDataset', 'PairedRawLmdbDataset')
LARGEST_SCALE = 64
EXAMPLES = {'name': 'a name for the run and its folder', 'model_type': 'the name of a model such as ELANModel',
            'train': 'a section of keys; a file without it is for `basicsr test`'}


def check_options(opt: dict, source: Source, is_train: bool) -> None:
    """Raise a UserError that names the first mistake."""
    _check_keys(opt, source)
    _check_required(opt, source, is_train)
    model = check_registered(opt['model_type'], registry.MODEL_REGISTRY, 'model', source, 'model_type')
    for key in opt:
        if key.startswith('network_'):
            check_network(opt, key, source)
    _check_scale(opt, source)
    _check_model(opt, model, source)
    for phase in opt['datasets']:
        _check_dataset(opt, phase, source, is_train)
    if is_train:
        _check_training(opt, model, source)
    _check_validation(opt, source, is_train)
    for phase in opt['datasets']:
        if _is_used(opt, phase, is_train):
            _check_data_files(opt['datasets'][phase], ('datasets', phase), source)
    _check_files(opt.get('path') or {}, source)


# ------------------------------------------------------------------------------------------------- single keys

def _check_keys(section: dict, source: Source, path: tuple[str, ...] = ()) -> None:
    for key, value in section.items():
        here = (*path, key)
        kind = known(here)
        if kind is not None and not kind.accepts(value):
            raise source.error(here, f'is {_shown(value)}, expected {kind.words}')
        if kind is None and not (path and path[0].startswith('network_')):
            _refuse_misspelling(section, source, here)
        if isinstance(value, dict):
            _check_keys(value, source, here)


def _refuse_misspelling(section: dict, source: Source, here: tuple[str, ...]) -> None:
    """An unknown key is somebody's extension, unless it is nearly a known one that is not there.

    From the command line it must be known at the top level, and must not be nearly a known one anywhere: there a slip
    would leave the file's own value in force.
    """
    added = here in source.added
    names = known_keys(here[:-1])
    near = nearest(here[-1], names if added else [name for name in names if name not in section], cutoff=0.8)
    if not near and added and len(here) == 1:
        near = ' or '.join([pattern for pattern in KEYS if pattern.split('.')[-1] == here[-1] and '*' not in pattern])
        near = near or nearest(here[-1], names)
        raise source.error(here, f'there is no such key{f"; did you mean {near}?" if near else ""}')
    if near:
        raise source.error(here, f'unknown key; did you mean {near}?')


def _shown(value) -> str:
    text = 'none' if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return f'{text[:60]}…' if len(text) > 60 else text


def _check_required(opt: dict, source: Source, is_train: bool) -> None:
    for key in REQUIRED + (REQUIRED_TO_TRAIN if is_train else ()):
        section, parts = opt, key.split('.')
        for depth, part in enumerate(parts):
            if part not in section:
                expected = EXAMPLES.get(part) or known(tuple(parts[:depth + 1])).words
                if depth == 0:
                    raise source.error(part, f'is missing, expected {expected}')
                raise source.error('.'.join(parts[:depth]), f'{part} is missing, expected {expected}')
            section = section[part]
    if not is_train and not any(phase.split('_')[0] in ('test', 'val') for phase in opt['datasets']):
        raise source.error('datasets', 'there is no test set, expected a section test_1')


# ------------------------------------------------------------------------------------------------- model and scale

def _check_scale(opt: dict, source: Source) -> None:
    scale, network = opt.get('scale'), opt['network_g']
    if scale is not None and scale > LARGEST_SCALE:
        raise source.error('scale', f'is {scale}, expected up to {LARGEST_SCALE}')
    if scale is None and network['type'] == 'ELAN':
        raise source.error('scale', f'is missing, expected {network.get("upscale", 4)}, the upscale of the network')
    for name in ('upscale', 'scale'):
        if is_int(network.get(name)) and scale is not None and network[name] != scale:
            raise source.error(('network_g', name), f'is {network[name]} but scale is {scale}; make them agree')
    if network['type'] == 'ELAN' and 'upscale' not in network and scale != 4:
        raise source.error('network_g', f'upscale is missing, which ELAN takes as 4, but scale is {scale}')


def _check_model(opt: dict, model: type, source: Source) -> None:
    if issubclass(model, SwinIRModel) and 'window_size' not in opt['network_g']:
        raise source.error('network_g', f'window_size is missing, by whose multiple {opt["model_type"]} pads images')
    if not model.__module__.startswith('basicsr.'):
        return
    for key in OURS:
        section, _, name = key.rpartition('.')
        values = (opt.get(section) or {}) if section else opt
        if values.get(name):
            raise source.error(key, f'{opt["model_type"]} does not know it; use model_type: ELANModel, or remove it')


# ------------------------------------------------------------------------------------------------- data

def _is_used(opt: dict, phase: str, is_train: bool) -> bool:
    kind = phase.split('_')[0]
    if is_train:
        return kind == 'train' or (kind == 'val' and bool(opt.get('val')))
    return kind != 'train'


def _check_dataset(opt: dict, phase: str, source: Source, is_train: bool) -> None:
    dataset, key, kind = opt['datasets'][phase], ('datasets', phase), phase.split('_')[0]
    if kind not in ('train', 'val', 'test'):
        near = nearest(phase, ('train', 'val', 'test')) or 'train, val or test_1'
        raise source.error(key, f'there is no such kind of dataset; expected {near}')
    if not _is_used(opt, phase, is_train):
        return
    if 'type' not in dataset:
        raise source.error(key, 'type is missing, expected the name of a dataset such as PairedImageDataset')
    check_registered(dataset['type'], registry.DATASET_REGISTRY, 'dataset', source, (*key, 'type'))
    paired = dataset['type'] in PAIRED
    needed = DATASET_KEYS.get(dataset['type'], ())
    for name in (*needed, *(PATCH_KEYS if paired and kind == 'train' else ())):
        if dataset.get(name) is None:
            near = nearest(name, [each for each in dataset if each not in needed], cutoff=0.75)
            raise source.error(key, f'{name} is missing, which {dataset["type"]} needs'
                                    f'{f"; did you mean it by {near}?" if near else ""}')
    if 'io_backend' in dataset and 'type' not in dataset['io_backend']:
        raise source.error((*key, 'io_backend'), 'type is missing, expected disk or lmdb')
    if paired and 'scale' not in opt:
        raise source.error('scale', f'is missing, which {dataset["type"]} needs')
    scale = opt.get('scale', 1)
    if kind == 'train' and is_int(dataset.get('gt_size')) and dataset['gt_size'] % scale:
        raise source.error((*key, 'gt_size'), f'is {dataset["gt_size"]}, expected a multiple of scale, {scale}')
    if dataset.get('prefetch_mode') == 'cuda' and not dataset.get('pin_memory'):
        raise source.error((*key, 'prefetch_mode'), 'is cuda, which needs pin_memory: true')
    _check_template(dataset, key, source)


def _check_template(dataset: dict, key: tuple[str, ...], source: Source) -> None:
    """`filename_tmpl` is a Python format with one place, as `{}x4`."""
    template = dataset.get('filename_tmpl', '{}')
    around = template.split('{}')
    if len(around) != 2 or set(''.join(around)) & set('{}'):
        raise source.error((*key, 'filename_tmpl'), f"is {_shown(template)}, expected a text with one {{}}, such as "
                                                    "'{}x4'")


def _check_data_files(dataset: dict, key: tuple[str, ...], source: Source) -> None:
    is_lmdb = dataset['type'] == 'PairedRawLmdbDataset' or dataset.get('io_backend', {}).get('type') == 'lmdb'
    for name in ('dataroot_gt', 'dataroot_lq'):
        if isinstance(dataset.get(name), str):
            _check_data_folder(osp.expanduser(dataset[name]), dataset['type'], is_lmdb, source, (*key, name))
    for name in ('meta_info', 'meta_info_file'):
        if dataset.get(name) is not None and not osp.isfile(dataset[name]):
            raise source.error((*key, name), f'{dataset[name]}: no such file, expected the list of images')


def _check_data_folder(path: str, dataset_type: str, is_lmdb: bool, source: Source, key: tuple[str, ...]) -> None:
    if is_lmdb and not path.endswith('.lmdb'):
        raise source.error(key, f'{path}: expected an LMDB, whose folder ends with .lmdb; for a folder of images use '
                                'PairedImageDataset and io_backend: {type: disk}')
    for ending, what, taken_by in LAYOUTS:
        if path.endswith(ending) and dataset_type in PAIRED and dataset_type != taken_by:
            raise source.error(key, f'{path}: by its name {what}; set type: {taken_by}')
    if not osp.isdir(path):
        what = 'is a file, expected a folder' if osp.isfile(path) else 'no such folder'
        raise source.error(key, f'{path}: {what}; {_how_to_prepare(path, dataset_type)}')
    if is_lmdb and not osp.isfile(osp.join(path, 'data.mdb')):
        raise source.error(key, f'{path}: holds no data.mdb, so it is no finished LMDB; '
                                f'{_how_to_prepare(path, dataset_type)}')
    if not is_lmdb and path.endswith('.lmdb'):
        raise source.error(key, f'{path}: is an LMDB; set io_backend: {{type: lmdb}}')


def _how_to_prepare(path: str, dataset_type: str) -> str:
    parts = path.split('/')
    if 'demo' in parts:
        return '`make demo` prepares it'
    if any(name in parts for name in BENCHMARKS):
        return 'lay it out with `basicsr data benchmark`'
    if 'DIV2K' in path:
        layout = ' --layout subimages' if path.removesuffix('.lmdb').endswith('_sub') else ''
        return f'make it with `basicsr data div2k --download{layout}`'
    if dataset_type.startswith(('Paired', 'Single', 'RealESRGAN')):
        return 'make it from your images with `basicsr data build`, or correct the path'
    return "BasicSR's docs/DatasetPreparation.md tells how to prepare it"


# ------------------------------------------------------------------------------------------------- training

def _check_training(opt: dict, model: type, source: Source) -> None:
    train = opt['train']
    adversarial = issubclass(model, (SRGANModel, StyleGAN2Model))
    for section, name in (('', 'network_d'), ('train', 'optim_d'), ('train', 'gan_opt')) if adversarial else ():
        if not (train if section else opt).get(name):
            raise source.error(section or 'model_type', f'section {name} is missing, which {opt["model_type"]} needs')
    losses = [name for name, value in train.items() if name.endswith('_opt') and value]
    for name in losses:
        check_loss(train[name], ('train', name), source)
    if not losses:
        raise source.error('train', 'there is no loss, expected a section pixel_opt such as {type: L1Loss}')
    for name in [name for name in train if name.startswith('optim_')]:
        optimizer = check_optimizer(train[name], ('train', name), source)
        kind = train[name]['type']
        if model.get_optimizer is BaseModel.get_optimizer and kind != 'Adam':
            raise source.error(('train', name, 'type'), f'{opt["model_type"]} of BasicSR 1.4.2 trains with Adam only, '
                                                        f'not {kind}; use model_type: ELANModel or Adam')
        check_scheduler(train['scheduler'], optimizer, train['total_iter'], source)
    parts, batch = train.get('accumulate', 1), opt['datasets']['train']['batch_size_per_gpu']
    if batch % parts:
        raise source.error('train.accumulate', f'is {parts}, expected a divisor of batch_size_per_gpu, {batch}: the '
                                               'batch is worked off in that many equal parts')
    logger = opt.get('logger') or {}
    if (logger.get('wandb') or {}).get('project') and not logger.get('use_tb_logger'):
        raise source.error('logger.wandb.project', 'needs use_tb_logger: true, from which it takes its figures')


def _check_validation(opt: dict, source: Source, is_train: bool) -> None:
    val = opt.get('val') or {}
    metrics = val.get('metrics') or {}
    without_gt = [opt['datasets'][phase]['type'] for phase in opt['datasets'] if _is_used(opt, phase, is_train)
                  and opt['datasets'][phase]['type'] == 'SingleImageDataset']
    for name, metric in metrics.items():
        needs_gt = check_metric(metric, ('val', 'metrics', name), source)
        if needs_gt and without_gt:
            raise source.error(('val', 'metrics', name), f'{metric["type"]} compares with a ground truth, which '
                                                         f'{without_gt[0]} does not have')
    if val.get('save_best') is not None:
        check_choice(val['save_best'], metrics, 'metric in val.metrics named', source, 'val.save_best')


def _check_files(paths: dict, source: Source) -> None:
    for name, value in paths.items():
        if isinstance(value, str) and (name.startswith('pretrain_network_') or name == 'resume_state'):
            if not osp.isfile(osp.expanduser(value)):
                found = 'is a folder' if osp.isdir(osp.expanduser(value)) else 'no such file'
                what = 'a training state (training_states/….state)' if name == 'resume_state' else 'a checkpoint'
                raise source.error(('path', name), f'{value}: {found}, expected {what}')
