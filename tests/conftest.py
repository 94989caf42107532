"""What the tests share: small real data from scikit-image's photographs, and the reference data where it is there."""
from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path

import cv2
import pytest
import skimage.data
import torch

import elan_basicsr  # noqa: F401, repairs basicsr before a test imports it
from elan_basicsr.config.checks import has_compiler
from elan_basicsr.data.prepare import build
from elan_basicsr.data.resize import imresize

ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get('ELAN_SHARED', ROOT.parent / 'shared'))


compiler = pytest.mark.skipif(not has_compiler(), reason='torch.compile needs a C++ compiler')


def with_checkout() -> str:
    """PYTHONPATH of a process that is to import this checkout: before what the caller has there, not in its place."""
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if 'gpu' in item.keywords:
                item.add_marker(pytest.mark.skip(reason='needs a CUDA device, and there is none'))


@pytest.fixture(scope='session')
def shared() -> Path:
    """The folder of reference data, which is not part of the project."""
    if not SHARED.is_dir():
        pytest.skip(f'needs the reference data in {SHARED.name}/ beside the checkout')
    return SHARED


@pytest.fixture(scope='session')
def data(tmp_path_factory) -> Path:
    """A small data set: `photographs`, `train/*.lmdb` (raw, x2) and `test/{GT,LR}` folders of PNGs."""
    root = tmp_path_factory.mktemp('data')
    for name in ('astronaut', 'chelsea', 'coffee', 'rocket'):
        photograph = getattr(skimage.data, name)()[100:232, 100:236, ::-1]
        _write(root / 'photographs' / f'{name}.png', photograph)
    build(hr=root / 'photographs', out=root / 'train', scales=[2])
    for name, edge in (('immunohistochemistry', 64), ('retina', 50), ('hubble_deep_field', 46)):
        photograph = getattr(skimage.data, name)()[300:300 + edge, 300:360, ::-1]
        _write(root / 'test' / 'GT' / f'{name}.png', photograph)
        _write(root / 'test' / 'LR' / f'{name}.png', imresize(photograph, Fraction(1, 2)))
    return root


def _write(path: Path, img) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), img)


@pytest.fixture
def options(data, tmp_path, monkeypatch) -> dict:
    """The options of a training that takes seconds; the current directory is an empty one."""
    monkeypatch.chdir(tmp_path)
    return {
        'name': 'run', 'model_type': 'ELANModel', 'scale': 2, 'num_gpu': 0, 'manual_seed': 5,
        'datasets': {
            'train': {
                'name': 'small', 'type': 'PairedRawLmdbDataset', 'dataroot_gt': str(data / 'train' / 'HR_raw.lmdb'),
                'dataroot_lq': str(data / 'train' / 'LR_bicubic_X2_raw.lmdb'), 'io_backend': {'type': 'lmdb'},
                'gt_size': 32, 'use_hflip': True, 'use_rot': True, 'num_worker_per_gpu': 0, 'batch_size_per_gpu': 4,
            },
            'val': {
                'name': 'three', 'type': 'PairedImageDataset', 'dataroot_gt': str(data / 'test' / 'GT'),
                'dataroot_lq': str(data / 'test' / 'LR'), 'io_backend': {'type': 'disk'},
            },
        },
        'network_g': {'type': 'ELAN', 'upscale': 2, 'num_feat': 15, 'num_block': 2, 'num_share': 1},
        'path': {'pretrain_network_g': None},
        'train': {
            'optim_g': {'type': 'Adam', 'lr': 1e-3, 'betas': [0.9, 0.999]},
            'scheduler': {'type': 'MultiStepLR', 'milestones': [6], 'gamma': 0.5},
            'total_iter': 8, 'ema_decay': 0.9, 'pixel_opt': {'type': 'L1Loss'},
        },
        'val': {
            'val_freq': 4, 'save_img': False,
            'metrics': {'psnr': {'type': 'calculate_psnr', 'crop_border': 2, 'test_y_channel': True},
                        'ssim': {'type': 'calculate_ssim', 'crop_border': 2, 'test_y_channel': True}},
        },
        'logger': {'print_freq': 2, 'save_checkpoint_freq': 4, 'use_tb_logger': False},
    }
