"""The first quarter of an hour with ELAN: train on the photographs scikit-image ships, test on others, compare.

Usage, from the checkout: `make demo`, or `python tools/demo.py` where everything is installed.

Makes datasets/demo, trains with options/demo_ELAN_light_x2.yml, tests, prints a table, and writes side-by-side pictures
to results/demo/comparison and the figures to experiments/demo/summary.json.
"""
from __future__ import annotations

import json
import sys
import time
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import skimage.data
from rich.console import Console
from rich.table import Table

import elan_basicsr  # noqa: F401, registers ELAN and repairs basicsr
from elan_basicsr.data.images import read_bgr
from elan_basicsr.data.prepare import build
from elan_basicsr.data.resize import imresize
from elan_basicsr.engine.test import test
from elan_basicsr.engine.train import train
from elan_basicsr.errors import UserError

from basicsr.metrics import calculate_psnr, calculate_ssim

OPTIONS = 'options/demo_ELAN_light_x2.yml'
SCALE = 2
TRAIN_PHOTOGRAPHS = ('brick', 'camera', 'coins', 'grass', 'gravel', 'hubble_deep_field', 'immunohistochemistry', 'moon',
                     'retina', 'rocket', 'stereo_motorcycle')
TEST_PHOTOGRAPHS = ('astronaut', 'chelsea', 'coffee')
DATA = Path('datasets/demo')
COMPARISON = Path('results/demo/comparison')
SUMMARY = Path('experiments/demo/summary.json')


def main() -> int:
    try:
        lay_out_photographs()
        build(hr=DATA / 'photographs', out=DATA / 'train', scales=[SCALE])
        begin = time.time()
        code = train(OPTIONS)
        seconds = time.time() - begin
        if code != 0:
            return code
        test(OPTIONS, overrides=['path.pretrain_network_g=experiments/demo/models/net_g_latest.pth'])
    except UserError as error:
        print(f'demo: {error}', file=sys.stderr)
        return 2
    compare(seconds)
    return 0


def lay_out_photographs() -> None:
    """The HR photographs to train on, and HR and LR pairs to test on."""
    for name in TRAIN_PHOTOGRAPHS:
        photograph = getattr(skimage.data, name)()
        # stereo_motorcycle is a left view, a right view and a disparity map; one view is enough.
        _write(DATA / 'photographs' / f'{name}.png', photograph[0] if isinstance(photograph, tuple) else photograph)
    for name in TEST_PHOTOGRAPHS:
        photograph = getattr(skimage.data, name)()
        h, w = (edge // 12 * 12 for edge in photograph.shape[:2])
        hr = photograph[:h, :w]
        _write(DATA / 'test' / 'GTmod12' / f'{name}.png', hr)
        _write(DATA / 'test' / f'LRbicx{SCALE}' / f'{name}.png', imresize(hr, Fraction(1, SCALE)))


def _write(path: Path, photograph: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        cv2.imwrite(str(path), photograph[..., ::-1] if photograph.ndim == 3 else photograph)


def compare(seconds: float) -> None:
    """Print the table, write the pictures and the summary."""
    table = Table('photograph', 'bicubic PSNR', 'ELAN PSNR', 'bicubic SSIM', 'ELAN SSIM')
    rows = []
    for name in TEST_PHOTOGRAPHS:
        hr = read_bgr(DATA / 'test' / 'GTmod12' / f'{name}.png')
        bicubic = imresize(read_bgr(DATA / 'test' / f'LRbicx{SCALE}' / f'{name}.png'), SCALE)
        elan = read_bgr(f'results/demo/visualization/demo_test/{name}_demo.png')
        rows.append([metric(img, hr, crop_border=SCALE, test_y_channel=True)
                     for metric in (calculate_psnr, calculate_ssim) for img in (bicubic, elan)])
        table.add_row(name, *_figures(rows[-1]))
        write_comparison(name, hr, bicubic, elan)
    mean = np.mean(rows, axis=0)
    table.add_row('mean', *_figures(mean), style='bold')
    Console().print(table)
    summary = dict(zip(('psnr_bicubic', 'psnr_elan', 'ssim_bicubic', 'ssim_elan'), map(float, mean), strict=True))
    summary.update(iterations=_iterations(), seconds=round(seconds, 1))
    SUMMARY.write_text(json.dumps(summary, indent=2) + '\n', encoding='utf-8')
    print(f'ELAN is {mean[1] - mean[0]:+.2f} dB against bicubic on photographs it has not seen, after '
          f'{summary["iterations"]} iterations in {seconds:.0f} s.\nPictures: {COMPARISON}   Figures: {SUMMARY}')


def _figures(row) -> list[str]:
    return [f'{row[0]:.2f}', f'{row[1]:.2f}', f'{row[2]:.4f}', f'{row[3]:.4f}']


def _iterations() -> int:
    return max(int(path.stem) for path in Path('experiments/demo/training_states').glob('*.state'))


def write_comparison(name: str, hr: np.ndarray, bicubic: np.ndarray, elan: np.ndarray, size: int = 160) -> None:
    """HR, bicubic and ELAN side by side: the most detailed square of `size` pixels, three times enlarged."""
    detail = cv2.boxFilter(np.abs(cv2.Laplacian(cv2.cvtColor(hr, cv2.COLOR_BGR2GRAY), cv2.CV_32F)), -1, (size, size))
    half = size // 2
    inner = detail[half:-half, half:-half]
    y, x = np.unravel_index(inner.argmax(), inner.shape)
    crops = []
    for label, img in (('bicubic', bicubic), ('ELAN', elan), ('HR', hr)):
        crop = cv2.resize(img[y:y + size, x:x + size], None, fx=3, fy=3, interpolation=cv2.INTER_NEAREST)
        cv2.rectangle(crop, (0, 0), (110, 28), (255, 255, 255), -1)
        cv2.putText(crop, label, (6, 21), cv2.FONT_HERSHEY_SIMPLEX, 0.7, (0, 0, 0), 1, cv2.LINE_AA)
        crops.append(crop)
    COMPARISON.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(COMPARISON / f'{name}.png'), cv2.hconcat(crops))


if __name__ == '__main__':
    sys.exit(main())
