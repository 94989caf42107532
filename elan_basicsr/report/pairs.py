"""The test images of a comparison: HR and LR in pairs, from folders or from the data sets of an option file."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from elan_basicsr.config.options import load_options
from elan_basicsr.data.images import eight_bit, find_images, read_bgr
from elan_basicsr.data.resize import imresize
from elan_basicsr.engine.run import build_checked_dataset
from elan_basicsr.errors import UserError

from basicsr.utils import tensor2img

HR_FOLDERS = ('GTmod12', 'HR', 'GT')


@dataclass
class Pair:
    """A test image: its data set, its name, and HR and LR as (H, W, 3) BGR uint8."""
    dataset: str
    name: str
    hr: np.ndarray
    lr: np.ndarray


def read_pairs(data: Sequence[str], opt: str | None, scale: int) -> Iterator[Pair]:
    """The pairs of every folder of `data` and of every test or validation set of the option file `opt`.

    Raises:
        UserError: There are none, or HR and LR do not belong together.
    """
    if not data and not opt:
        raise UserError('compare: no images; expected --data DIR or -opt FILE')
    for folder in data:
        yield from _pairs_of_folder(Path(folder), scale)
    if opt:
        options = load_options(opt, is_train=False, overrides=['path.pretrain_network_g=~', 'num_gpu=0'])
        phases = [phase for phase in options['datasets'] if phase.split('_')[0] in ('test', 'val')]
        if options.get('scale', scale) != scale:
            raise UserError(f'{opt}: scale is {options["scale"]}, and the networks enlarge by {scale}; expected an '
                            'option file of their scale')
        for phase in phases:
            yield from _pairs_of_dataset(options, phase)


def _pairs_of_folder(folder: Path, scale: int) -> Iterator[Pair]:
    if not folder.is_dir():
        raise UserError(f'{folder}: no such folder, expected HR and LR images, or HR images alone')
    name = folder.resolve().name
    hr = next((folder / sub for sub in HR_FOLDERS if (folder / sub).is_dir()), None)
    if hr is None:
        for key, path in find_images(folder).items():
            img = eight_bit(read_bgr(path))
            img = img[:img.shape[0] // scale * scale, :img.shape[1] // scale * scale]
            if img.size == 0:
                raise UserError(f'{path}: is smaller than {scale}x{scale} pixels, expected an image that can be '
                                f'reduced by {scale}; take it out of the folder')
            yield Pair(name, key, img, imresize(img, Fraction(1, scale)))
        return
    lr = folder / f'LRbicx{scale}'
    if not lr.is_dir():
        raise UserError(f'{lr}: no such folder, expected the LR images of {hr} for the scale {scale}')
    dataset = {'name': name, 'type': 'PairedImageDataset', 'dataroot_gt': str(hr), 'dataroot_lq': str(lr),
               'io_backend': {'type': 'disk'}, 'phase': 'test', 'scale': scale}
    yield from _pairs_of_dataset({'datasets': {'test': dataset}}, 'test')


def _pairs_of_dataset(options: dict, phase: str) -> Iterator[Pair]:
    """The pairs of a data set of the toolbox, which crops HR to the size of LR times the scale."""
    dataset = build_checked_dataset(options, phase)
    for index in range(len(dataset)):
        item = dataset[index]
        if 'gt' not in item:
            raise UserError(f'datasets.{phase}: has no ground truth, which a comparison needs; expected a data set '
                            'with dataroot_gt, such as PairedImageDataset')
        hr, lr = tensor2img([item['gt']]), tensor2img([item['lq']])
        name = Path(item['lq_path']).stem
        scale = options['datasets'][phase]['scale']
        if hr.shape[:2] != (lr.shape[0] * scale, lr.shape[1] * scale):
            raise UserError(f'datasets.{phase}: image {name}: LR is {lr.shape[1]}x{lr.shape[0]}, HR is '
                            f'{hr.shape[1]}x{hr.shape[0]}; expected {scale} times the size')
        yield Pair(dataset.opt['name'], name, hr, lr)

