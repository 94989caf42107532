"""Trainings of twenty steps through `basicsr train`, in every precision; twice to the bit; stopped and resumed."""
from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from elan_basicsr.data.prepare import build
from elan_basicsr.data.resize import imresize
from elan_basicsr.engine.train import train
from elan_basicsr.selfcheck.checks import Check, Machine, Outcome

STEPS = 20
SCALE = 2
EDGE = 96  # of the images, in HR pixels


def checks(machine: Machine) -> Iterator[Check]:
    """Every precision that a device has, then that a run repeats itself and goes on from what it saved."""
    precisions = ('float32', 'bf16', *(('fp16',) if machine.on_gpu else ()))
    for precision in precisions:
        yield Check('training', f'{STEPS} steps in {precision}', partial(learns, machine, precision))
    yield Check('training', 'the same twice, deterministic', partial(repeats, machine))
    yield Check('training', 'stopped halfway and resumed', partial(resumes, machine))


def learns(machine: Machine, precision: str) -> Outcome:
    """The loss of the last steps is finite and below that of the first ones."""
    amp = [] if precision == 'float32' else [f'train.amp={precision}']
    log = run(machine, precision, amp)
    losses = [float(loss) for loss in re.findall(r'l_pix: (\S+)', log)]
    first, last = sum(losses[:5]) / 5, sum(losses[-5:]) / 5
    return Outcome(len(losses) == STEPS and last < first, f'{first:.3f} → {last:.3f}', note='the loss does not fall')


def repeats(machine: Machine) -> Outcome:
    """Two runs end with the same bits."""
    for name in ('once', 'again'):
        run(machine, name, ['deterministic=true'])
    return same_bits(checkpoint(machine, 'once'), checkpoint(machine, 'again'))


def resumes(machine: Machine) -> Outcome:
    """A run that ended halfway and goes on ends as the one that did not stop."""
    run(machine, 'parts', ['deterministic=true', f'train.total_iter={STEPS // 2}'])
    run(machine, 'parts', ['deterministic=true'], auto_resume=True)
    return same_bits(checkpoint(machine, 'once'), checkpoint(machine, 'parts'))


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> Outcome:
    differ = [name for name, value in one.items() if not torch.equal(value, other[name])]
    return Outcome(not differ, f'{len(differ)} of {len(one)} differ', '0', ', '.join(differ[:2]))


def run(machine: Machine, name: str, overrides: list[str], auto_resume: bool = False) -> str:
    """Train; the text of the run's logs."""
    options = write_options(machine)
    with quiet(), flags_kept():
        train(str(options), overrides=[f'name={name}', *overrides], auto_resume=auto_resume, root=str(machine.folder),
              launcher='none')
    logs = sorted((machine.folder / 'experiments' / name).glob('*.log'))
    return '\n'.join(log.read_text(encoding='utf-8') for log in logs)


def checkpoint(machine: Machine, name: str, iteration: int = STEPS) -> dict[str, Tensor]:
    """The network and its average that a run has saved."""
    file = machine.folder / 'experiments' / name / 'models' / f'net_g_{iteration}.pth'
    content = torch.load(file, weights_only=True)
    return {f'{key}.{name}': value for key in ('params', 'params_ema') for name, value in content[key].items()}


def write_options(machine: Machine) -> Path:
    """The option file of all runs, with data of its own: EMA, accumulation, clipping and prefetching at once."""
    file = machine.folder / 'options.json'  # which YAML reads, too
    if file.exists():
        return file
    data = make_data(machine.folder / 'data')
    options = {
        'name': 'check', 'model_type': 'ELANModel', 'scale': SCALE, 'num_gpu': int(machine.on_gpu), 'manual_seed': 1,
        'datasets': {
            'train': {
                'name': 'check', 'type': 'PairedRawLmdbDataset', 'io_backend': {'type': 'lmdb'},
                'dataroot_gt': str(data / 'HR_raw.lmdb'), 'dataroot_lq': str(data / 'LR_bicubic_X2_raw.lmdb'),
                'gt_size': 32, 'use_hflip': True, 'use_rot': True, 'batch_size_per_gpu': 4, 'num_worker_per_gpu': 1,
                'pin_memory': True, 'prefetch_mode': 'cuda' if machine.on_gpu else None,
            },
            'val': {'name': 'val', 'type': 'PairedImageDataset', 'io_backend': {'type': 'disk'},
                    'dataroot_gt': str(data / 'HR'), 'dataroot_lq': str(data / 'LR')},
        },
        'network_g': {'type': 'ELAN', 'upscale': SCALE, 'num_feat': 30, 'num_block': 4, 'num_share': 1},
        'path': {},
        'train': {
            'optim_g': {'type': 'Adam', 'lr': 1e-3, 'fused': True},
            'scheduler': {'type': 'MultiStepLR', 'milestones': [15]},
            'total_iter': STEPS, 'ema_decay': 0.9, 'accumulate': 2, 'grad_clip': 1., 'pixel_opt': {'type': 'L1Loss'},
        },
        'val': {'val_freq': STEPS, 'metrics': {'psnr': {'type': 'calculate_psnr', 'crop_border': SCALE}}},
        'logger': {'print_freq': 1, 'save_checkpoint_freq': STEPS // 2},
    }
    file.write_text(json.dumps(options), encoding='utf-8')
    return file


def make_data(folder: Path) -> Path:
    """Five images of smooth noise, as LMDBs to train on, and as folders `HR` and `LR`."""
    random = np.random.default_rng(0)
    for kind in ('HR', 'LR'):
        (folder / kind).mkdir(parents=True)
    for number in range(5):
        noise = cv2.GaussianBlur(random.random((EDGE, EDGE, 3)), (0, 0), 2)
        image = (255 * (noise - noise.min()) / np.ptp(noise)).astype(np.uint8)
        cv2.imwrite(str(folder / 'HR' / f'{number}.png'), image)
        cv2.imwrite(str(folder / 'LR' / f'{number}.png'), imresize(image, 1 / SCALE))
    with quiet():
        build(hr=folder / 'HR', out=folder, scales=[SCALE])
    return folder


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the output of what is called."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


@contextlib.contextmanager
def flags_kept() -> Iterator[None]:
    """torch's settings afterwards as they were: a training sets them for its process."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    benchmark = torch.backends.cudnn.benchmark
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        torch.backends.cudnn.benchmark = benchmark
