"""What a training would find out after hours, found out before its first iteration.

Sizes come from the heads of files and records; one image of each validation set goes through the network. All of it
leaves weights, random numbers and best values as they are.
"""
from __future__ import annotations

import itertools
import logging
import math
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from os import path as osp
from pathlib import Path
from typing import Any

from PIL import Image
from torch import nn

from elan_basicsr.data.raw_lmdb_dataset import PairedRawLmdbDataset
from elan_basicsr.data.sampling import ToolboxDataset, generators_kept
from elan_basicsr.errors import UserError
from elan_basicsr.models.validation import gather, restore_and_measure

from basicsr.data.paired_image_dataset import PairedImageDataset
from basicsr.data.realesrgan_dataset import RealESRGANDataset
from basicsr.data.single_image_dataset import SingleImageDataset
from basicsr.models.sr_model import SRModel
from basicsr.utils import imfrombytes
from basicsr.utils.dist_util import get_dist_info

SECONDS = 5
"""For the sizes of one data set: what is left of one so large, or on so slow a disk, shows when its turn comes."""
CHUNK = 256  # samples between two looks at the clock

Size = tuple[int, int]
Sizes = Callable[[int], dict[str, tuple[str, Size]]]
"""From an index to the name, width and height of the images `lq` and `gt`, or of one of them."""


def look_ahead(opt: dict, model, train_set: ToolboxDataset, validation: dict, logger: logging.Logger) -> None:
    """Raise UserError, on all processes alike, for what a training with these parts would stumble over later.

    Args:
        opt: The options of the run.
        model: The model, complete with what it goes on from.
        train_set: The training set.
        validation: The loaders of the validation sets, by their keys in the option file.
        logger: Where it is told what the disk will not hold.
    """
    rank, world_size = get_dist_info()
    sets = {'train': train_set, **{phase: loader.dataset for phase, loader in validation.items()}}
    found = _together(lambda: {phase: _look_at_sizes(dataset, phase, logger) for phase, dataset in sets.items()})
    smallest = {phase: min(each[phase] for each in found)[1] for phase in validation}
    own = dict(itertools.islice(smallest.items(), rank, None, world_size))
    _together(lambda: _try_images(model, {sets[phase]: index for phase, index in own.items()}))
    _together(lambda: _look_at_disk(opt, model, logger) if rank == 0 else None)


def _together(work: Callable) -> list:
    """What each process finds, by rank; what is wrong for one ends them all."""
    found, wrong = None, None
    try:
        found = work()
    except UserError as error:
        wrong = str(error)
    shares = gather((found, wrong))
    if mistakes := [each for _, each in shares if each]:
        raise UserError(mistakes[0])
    return [each for each, _ in shares]


# ------------------------------------------------------------------------------------------------- sizes

def _look_at_sizes(dataset: ToolboxDataset, phase: str, logger: logging.Logger) -> tuple[float, int]:
    """Compare the sizes of this process's share of a data set; return the area and the index of its smallest image."""
    sizes = _sizes_of(dataset)
    if sizes is None:
        return math.inf, 0
    rank, world_size = get_dist_info()
    share = range(rank, len(dataset), world_size)
    smallest, end = (math.inf, 0), time.monotonic() + SECONDS

    def look(index: int) -> tuple[float, int]:
        images = _fitting(dataset, phase, sizes, index)
        return min(math.prod(size) for _, size in images.values()), index

    # Records of an LMDB belong to one thread.
    with ThreadPoolExecutor(1 if isinstance(dataset, PairedRawLmdbDataset) else 8) as pool, warnings.catch_warnings():
        warnings.simplefilter('ignore')  # Pillow's, of large images
        for start in range(0, len(share), CHUNK):
            smallest = min(smallest, *pool.map(look, share[start:start + CHUNK]))
            if time.monotonic() > end and start + CHUNK < len(share):
                logger.info(f'datasets.{phase}: the sizes of {start + CHUNK} of {len(share)} samples were compared in '
                            f'{SECONDS} s; the others are when their turn comes')
                break
    return smallest


def _fitting(dataset: ToolboxDataset, phase: str, sizes: Sizes, index: int) -> dict[str, tuple[str, Size]]:
    """The images of a sample, if they belong together; heads that say otherwise are not believed before the pixels."""
    try:
        images = sizes(index)
        if _misfit(dataset, images):
            images = {kind: (name, _decoded_size(name) if osp.isfile(name) else size)
                      for kind, (name, size) in images.items()}
    except OSError as error:
        raise UserError(f'datasets.{phase}: {error.filename}: cannot be read ({error.strerror})') from None
    except ValueError as error:
        raise UserError(f'datasets.{phase}: {error}; `basicsr data verify` lists what is wrong with the data') from None
    if misfit := _misfit(dataset, images):
        raise UserError(f'datasets.{phase}: {misfit}')
    return images


def _misfit(dataset: ToolboxDataset, images: dict[str, tuple[str, Size]]) -> str | None:
    """What is wrong between the images of a sample, as the dataset will cut or crop them."""
    if len(images) < 2:
        return None
    (lq, (w, h)), (gt, (width, height)) = images['lq'], images['gt']
    scale, patch = dataset.opt['scale'], dataset.opt['gt_size'] if dataset.opt['phase'] == 'train' else 0
    # Ground truth that exceeds its LR image by a few pixels is cropped in validation, as the benchmarks need.
    fits = (width, height) == (w * scale, h * scale) if patch else (width // w, height // h) == (scale, scale)
    if not fits:
        return (f'{gt}: is {width}x{height}, expected {w * scale}x{h * scale}, {scale} times its LQ image {lq} of '
                f'{w}x{h}; cut or exchange one of them, or leave both out')
    if min(width, height) < patch:
        return f'{gt}: is {width}x{height}, smaller than gt_size {patch}; leave it out or take smaller patches'
    return None


def _sizes_of(dataset: Any) -> Sizes | None:
    """How the sizes of a dataset's images are read without decoding them; None for those of other packages."""
    if isinstance(dataset, PairedRawLmdbDataset):
        return dataset.sizes
    kinds = {PairedImageDataset: '', SingleImageDataset: 'lq', RealESRGANDataset: 'gt'}
    single = next((kind for base, kind in kinds.items() if isinstance(dataset, base)), None)
    if single is None or not type(dataset).__module__.startswith(('basicsr.', 'elan_basicsr.')):
        return None
    backend = dataset.io_backend_opt
    listed = {kind: _listed_sizes(root) for kind, root in
              zip(backend.get('client_keys', ()), backend.get('db_paths', ()), strict=True)}
    if not listed and backend.get('type') != 'disk':
        return None

    def sizes(index: int) -> dict[str, tuple[str, Size]]:
        row = dataset.paths[index]
        row = row if isinstance(row, dict) else {f'{single}_path': row}
        names = {key.removesuffix('_path'): name for key, name in row.items()}
        return {kind: (name, listed[kind][name] if listed else _size_by_head(name)) for kind, name in names.items()}

    return sizes


def _listed_sizes(root: str) -> dict[str, Size]:
    """Width and height by key, as `meta_info.txt` of an LMDB lists them: `KEY.png (H,W,C) LEVEL`."""
    listed = {}
    for line in (Path(root) / 'meta_info.txt').read_text(encoding='utf-8').splitlines():
        key, _, rest = line.partition('.')
        h, w = rest.partition('(')[2].split(',')[:2]
        listed[key] = int(w), int(h)
    return listed


def _size_by_head(path: str) -> Size:
    try:
        with Image.open(path) as image:
            return image.size
    except FileNotFoundError:
        raise
    except Exception:  # Pillow's readers fail in every way, and OpenCV may know better
        return _decoded_size(path)


def _decoded_size(path: str) -> Size:
    try:
        img = imfrombytes(Path(path).read_bytes(), float32=True)
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from None
    return img.shape[1], img.shape[0]


# ------------------------------------------------------------------------------------------------- validation

def _try_images(model, chosen: dict[ToolboxDataset, int]) -> None:
    """Restore and measure one image of each dataset as a validation will; nothing is kept of it."""
    if not isinstance(model, SRModel) or type(model).get_current_visuals is not SRModel.get_current_visuals:
        return  # models that validate in a way of their own
    was_training, model.is_train = model.is_train, False  # the models of Real-ESRGAN degrade what is for training
    try:
        with generators_kept():
            for dataset, index in chosen.items():
                if _sizes_of(dataset):
                    restore_and_measure(model, dataset, index)
    finally:
        model.is_train = was_training


# ------------------------------------------------------------------------------------------------- the disk

def _look_at_disk(opt: dict, model, logger: logging.Logger) -> None:
    """Folders must take files; where the disk will not hold all that is to be saved, that is told."""
    for folder in (opt['path']['models'], opt['path']['training_states']):
        try:
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise UserError(f'{folder}: cannot be written ({error.strerror}), so nothing could be saved') from None
    networks = [net for name, net in vars(model).items() if name.startswith('net_') and isinstance(net, nn.Module)]
    weights = sum(tensor.nbytes for net in networks for tensor in net.state_dict().values())
    moments = 2 * sum(p.nbytes for optimizer in model.optimizers for group in optimizer.param_groups
                      for p in group['params'])
    count = math.ceil(opt['train']['total_iter'] / opt['logger']['save_checkpoint_freq'])
    count = min(count, opt['logger'].get('keep_last') or count)
    free, needed = shutil.disk_usage(opt['path']['models']).free, count * (weights + moments)
    if needed > free:
        logger.warning(f'{opt["path"]["models"]}: {free / 1e9:.2f} GB are free, and {count} checkpoints with their '
                       f'training states take about {needed / 1e9:.2f} GB; logger.keep_last keeps fewer')
