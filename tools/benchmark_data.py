"""How fast training patches come: PairedRawLmdbDataset against PairedImageDataset on the toolbox's sub-image LMDB.

Usage: python tools/benchmark_data.py [--hr DIR] [--scale 4] [--gt-size 256] [--batch 16] [--seconds 5]

Builds both LMDBs of the same images (scikit-image's photographs by default) in a temporary folder, reads patches
through a PyTorch DataLoader with 0 and with 2 workers, the two datasets in turns, and prints patches per second and
core. The last line is the smaller of the ratios; the exit code is 1 when it is below 30.
"""
from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import elan_basicsr  # noqa: F401, registers the datasets
from elan_basicsr.data.loader import PatchLoader, to_float
from elan_basicsr.data.prepare import build
from elan_basicsr.data.sampling import StreamSampler

from basicsr.data import build_dataset

REQUIRED_RATIO = 30
TURNS = 5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--hr', metavar='DIR', help="folder of HR images (default: scikit-image's photographs)")
    parser.add_argument('--scale', type=int, default=4)
    parser.add_argument('--gt-size', type=int, default=256)
    parser.add_argument('--batch', type=int, default=16)
    parser.add_argument('--seconds', type=float, default=5, help='per turn and dataset')
    args = parser.parse_args()
    torch.set_num_threads(1)  # patches per core
    with tempfile.TemporaryDirectory() as folder:
        hr = Path(args.hr) if args.hr else write_photographs(Path(folder) / 'hr', args.gt_size)
        datasets = {}
        for layout, kind in (('subimages', 'PairedImageDataset'), ('raw', 'PairedRawLmdbDataset')):
            suffix = layout[:3]
            build(hr=hr, out=folder, scales=[args.scale], layout=layout)
            datasets[kind] = build_dataset({
                'name': kind, 'type': kind, 'dataroot_gt': f'{folder}/HR_{suffix}.lmdb', 'phase': 'train',
                'dataroot_lq': f'{folder}/LR_bicubic_X{args.scale}_{suffix}.lmdb', 'io_backend': {'type': 'lmdb'},
                'gt_size': args.gt_size, 'scale': args.scale, 'use_hflip': True, 'use_rot': True})
        return report(datasets, args)


def write_photographs(folder: Path, gt_size: int) -> Path:
    """scikit-image's colour photographs, enlarged where they are smaller than a sub-image."""
    import skimage.data
    folder.mkdir()
    for name in ('astronaut', 'chelsea', 'coffee', 'hubble_deep_field', 'immunohistochemistry', 'retina', 'rocket'):
        img = getattr(skimage.data, name)()[..., ::-1]
        factor = max(1., 800 / min(img.shape[:2]))
        img = cv2.resize(np.ascontiguousarray(img), None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(folder / f'{name}.png'), img)
    return folder


def patches_per_second(dataset, workers: int, batch: int, seconds: float) -> float:
    """Through the loader that training uses; the first batches, which open the files, are not counted."""
    batches = iter(PatchLoader(dataset, StreamSampler(len(dataset), batch, seed=0), workers))
    for _ in range(2 + 2 * workers):
        to_float(next(batches))
    number, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        to_float(next(batches))  # as training does: floats of 0..1, whatever travelled from the workers
        number += batch
    return number / (time.perf_counter() - begin)


def report(datasets: dict, args) -> int:
    table = Table('dataset', 'workers', 'patches/s/core', 'lowest', 'highest', 'ratio')
    ratios = []
    for workers in (0, 2):
        rates = {name: [] for name in datasets}
        for _ in range(TURNS):
            for name, dataset in datasets.items():
                rates[name].append(patches_per_second(dataset, workers, args.batch, args.seconds) / max(workers, 1))
        medians = {name: statistics.median(values) for name, values in rates.items()}
        ratios.append(medians['PairedRawLmdbDataset'] / medians['PairedImageDataset'])
        for name, values in rates.items():
            ratio = f'{ratios[-1]:.1f}' if name == 'PairedRawLmdbDataset' else ''
            table.add_row(name, str(workers), f'{medians[name]:.0f}', f'{min(values):.0f}', f'{max(values):.0f}', ratio)
    Console().print(table)
    print(f'ratio {min(ratios):.1f}')
    return 0 if min(ratios) >= REQUIRED_RATIO else 1


if __name__ == '__main__':
    sys.exit(main())
