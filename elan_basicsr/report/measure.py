"""Image quality as super-resolution papers report it, and what can be concluded from a few images."""
from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations

import numpy as np
from scipy import stats

from elan_basicsr.errors import UserError
from elan_basicsr.interop import pyiqa

from basicsr.metrics import calculate_niqe, calculate_psnr, calculate_ssim

NIQE_BLOCK = 96
SSIM_WINDOW = 11
CONFIDENCE = 0.95

Values = dict[str, float | None]


@dataclass(frozen=True)
class Metric:
    """How a figure is shown: its label, its decimals, whether more is better, and when an image has none."""
    label: str
    digits: int
    higher_is_better: bool
    absent: str


_INFINITE = 'it is infinite where a result equals HR, and needs pixels inside the border'
_WINDOW = f'it needs {SSIM_WINDOW}x{SSIM_WINDOW} pixels inside the border'
_BLOCKS = f'it needs two blocks of {NIQE_BLOCK}x{NIQE_BLOCK} pixels inside the border that are not of one colour'
_PYIQA = 'pyiqa gives none, as for images too small for its networks'
METRICS = {
    'psnr_y': Metric('PSNR Y (dB)', 2, True, _INFINITE),
    'ssim_y': Metric('SSIM Y', 4, True, _WINDOW),
    'psnr_rgb': Metric('PSNR RGB (dB)', 2, True, _INFINITE),
    'ssim_rgb': Metric('SSIM RGB', 4, True, _WINDOW),
    'niqe': Metric('NIQE', 3, False, _BLOCKS),
    'lpips': Metric('LPIPS', 4, False, _PYIQA),
    'dists': Metric('DISTS', 4, False, _PYIQA),
}
NAMED = 8
"""Images that a note names; the JSON and the tables have all."""


def measure(image: np.ndarray, hr: np.ndarray, border: int, perceptual: Mapping[str, Callable] | None = None) -> Values:
    """Every metric of one restored image.

    Args:
        image, hr: (H, W, 3) BGR, uint8.
        border: Pixels cut off at each edge, the scale in every table; LPIPS and DISTS see the whole image.
        perceptual: What `perceptual_metrics` found.

    Returns:
        Values by the keys of `METRICS`, finite; None where an image has none, for the reason in `METRICS`.
    """
    values: Values = {}
    inside = min(image.shape[:2]) - 2 * border
    for suffix, on_y in (('y', True), ('rgb', False)):
        for name, metric, needed in (('psnr', calculate_psnr, 1), ('ssim', calculate_ssim, SSIM_WINDOW)):
            values[f'{name}_{suffix}'] = _finite(
                metric(image, hr, crop_border=border, test_y_channel=on_y)) if inside >= needed else None
    values['niqe'] = _niqe(image, border)
    for name, metric in (perceptual or {}).items():
        values[name] = metric(image, hr)
    return values


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _niqe(image: np.ndarray, border: int) -> float | None:
    blocks = math.prod((edge - 2 * border) // NIQE_BLOCK for edge in image.shape[:2])
    if blocks < 2:  # its covariance is over blocks
        return None
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # blocks of one colour divide by zero and are left out
        try:
            return _finite(np.squeeze(calculate_niqe(image, crop_border=border)))
        except np.linalg.LinAlgError:  # all of them are of one colour
            return None


def perceptual_metrics(device: str) -> tuple[dict[str, Callable], list[str]]:
    """LPIPS and DISTS through pyiqa, as functions of two BGR uint8 images, and notes on what is not to be had."""
    found: dict[str, Callable] = {}
    missing: dict[str, list[str]] = {}
    for name in ('lpips', 'dists'):
        try:
            pyiqa.load(name)
        except UserError as error:
            missing.setdefault(str(error), []).append(name.upper())
            continue
        found[name] = partial(_perceptual, name, device)
    return found, [f'{" and ".join(names)} left out: {reason}' for reason, names in missing.items()]


def _perceptual(name: str, device: str, image: np.ndarray, hr: np.ndarray) -> float | None:
    try:
        return _finite(pyiqa.score(name, image, hr, device))
    except (RuntimeError, AssertionError, ValueError):  # a layer of its network has nothing left to look at
        return None


def left_out(rows: Sequence[Mapping]) -> list[dict]:
    """Where some network has no value of a metric, so that the image counts for none of them.

    Args:
        rows: One per data set, image and network, with `dataset`, `image`, `network` and the metrics.

    Returns:
        One dict per data set and metric concerned: `dataset`, `metric`, `of` (the images there are), and `images`: by
        name, the networks without a value.
    """
    found: dict[tuple[str, str], dict[str, list[str]]] = {}
    for row in rows:
        for metric in METRICS:
            if metric in row and row[metric] is None:
                images = found.setdefault((row['dataset'], metric), {})
                images.setdefault(row['image'], []).append(row['network'])
    return [{'dataset': dataset, 'metric': metric, 'images': images,
             'of': len({row['image'] for row in rows if row['dataset'] == dataset})}
            for (dataset, metric), images in found.items()]


def without(rows: Sequence[Mapping], left: Sequence[Mapping]) -> list[dict]:
    """The rows with None for every value of an image that is left out, so that networks are averaged over the same."""
    out = {(each['dataset'], each['metric'], image) for each in left for image in each['images']}
    return [{**row, **{key: None for key in METRICS if (row['dataset'], key, row['image']) in out}} for row in rows]


def told(left: Mapping) -> str:
    """One entry of `left_out` as a sentence."""
    names = [f'{image} ({", ".join(networks)})' for image, networks in left['images'].items()]
    more = f' and {len(names) - NAMED} more' if len(names) > NAMED else ''
    metric = METRICS[left['metric']]
    return (f'{metric.label} on {left["dataset"]}: {len(names)} of {left["of"]} images count for no network, since '
            f'some have no value there: {", ".join(names[:NAMED])}{more}; {metric.absent}.')


def mean(values: Sequence[float | None]) -> float | None:
    """The mean of the values there are, or None."""
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


def paired_difference(first: Sequence[float | None], second: Sequence[float | None]) -> dict | None:
    """The mean of `first - second` over images, with its 95 % bootstrap interval.

    The interval is the percentile bootstrap over images (Efron and Tibshirani 1993, chapter 13), from 9,999 resamples
    of a fixed seed. Of a handful of images it is too narrow rather than too wide.

    Returns:
        `mean`, `low`, `high` (None with fewer than two images), `images`, and `larger`, on how many of them `first` is
        larger; None where no image has both values.
    """
    pairs = zip(first, second, strict=True)
    differences = np.array([a - b for a, b in pairs if a is not None and b is not None])
    if differences.size == 0:
        return None
    low = high = None
    if differences.size > 1:
        interval = stats.bootstrap((differences,), np.mean, confidence_level=CONFIDENCE, method='percentile',
                                   random_state=0).confidence_interval
        low, high = float(interval.low), float(interval.high)
    return {'mean': float(differences.mean()), 'low': low, 'high': high, 'images': int(differences.size),
            'larger': int((differences > 0).sum())}


def all_differences(rows: Sequence[Mapping], networks: Sequence[str], metrics: Sequence[str]) -> list[dict]:
    """`paired_difference` of every two networks on every data set.

    Args:
        rows: One per data set, image and network, with `dataset`, `image`, `network` and the metrics.
        networks: Names, in the order of the table.
        metrics: Keys of `METRICS`.
    """
    found = []
    for dataset in dict.fromkeys(row['dataset'] for row in rows):
        for first, second in combinations(networks, 2):
            for metric in metrics:
                values = {network: [row[metric] for row in rows if row['dataset'] == dataset
                                    and row['network'] == network] for network in (first, second)}
                difference = paired_difference(values[first], values[second])
                if difference is not None:
                    found.append({'dataset': dataset, 'metric': metric, 'first': first, 'second': second, **difference})
    return found
