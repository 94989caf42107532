"""Validation over all processes: each restores its share of the images, and every process knows the same figures."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from os import path as osp

import torch.distributed as dist
from torch.utils.data import default_collate
from tqdm import tqdm

from elan_basicsr.errors import UserError

from basicsr.metrics import calculate_metric
from basicsr.utils import imwrite, tensor2img
from basicsr.utils.dist_util import get_dist_info

ROUND = 4
"""Images that a process restores before all of them meet: none waits long, and all know if one was asked to stop."""


class Interrupted(Exception):
    """A validation that was broken off, on all processes."""


def validate(model, dataset, current_iter: int | str, save_img: bool,
             interrupted: Callable[[], bool] = lambda: False) -> dict[str, float]:
    """Restore every image of `dataset` with `model` and return the mean of each metric of `val.metrics`.

    Process r of n takes images r, r + n, r + 2n, …; the values are gathered and added up in the order of the images, so
    the figures are the same to the last digit for any number of processes. Images are saved where the toolbox saves
    them.

    Raises:
        Interrupted: `interrupted`, asked after each image, was true on some process.
        UserError: An image cannot be read, restored, measured or saved on some process; all of them raise it.
    """
    rank, world_size = get_dist_info()
    metrics = model.opt['val'].get('metrics') or {}
    show = rank == 0 and model.opt['val'].get('pbar', False)
    values = {}
    with tqdm(total=len(dataset), unit='image', disable=not show, leave=False) as bar:
        for start in range(0, len(dataset), ROUND * world_size):
            own, wrong = {}, None
            for index in range(start + rank, min(start + ROUND * world_size, len(dataset)), world_size):
                if interrupted():
                    break
                try:
                    own[index] = restore_and_measure(model, dataset, index, current_iter if save_img else None)
                except UserError as error:
                    wrong = str(error)
                    break
            shares = gather((own, interrupted(), wrong))
            if mistakes := [each for *_, each in shares if each]:
                raise UserError(mistakes[0])
            if any(stop for _, stop, _ in shares):
                raise Interrupted
            for share, *_ in shares:
                values.update(share)
            bar.update(len(values) - bar.n)
    return {metric: sum(values[i][metric] for i in sorted(values)) / len(values) for metric in metrics}


def gather(value) -> list:
    """What every process gives, by rank."""
    world_size = get_dist_info()[1]
    values = [value] * world_size
    if world_size > 1:
        dist.all_gather_object(values, value)
    return values


def restore_and_measure(model, dataset, index: int, save_as: int | str | None = None) -> dict[str, float]:
    """The metrics `val.metrics` of one image of `dataset`, which is saved if `save_as` names an iteration or a test.

    Raises:
        UserError: It cannot be read, restored, measured or saved.
    """
    title = dataset.opt['name']
    with _failure_named(f'{title}: image {index} cannot be read'):
        data = default_collate([dataset[index]])
    name = osp.splitext(osp.basename(data['lq_path'][0]))[0]
    with _failure_named(f'{title}: image {name} cannot be restored'):
        restored, gt = restore(model, data)
    if save_as is not None:
        with _failure_named(f'{title}: image {name} cannot be saved'):
            imwrite(restored, image_path(model.opt, title, name, save_as))
    return _measure(model.opt['val'].get('metrics') or {}, restored, gt, title, name)


@contextmanager
def _failure_named(what: str) -> Iterator[None]:
    """Whatever goes wrong inside becomes a UserError of one line: metrics and readers fail in every way."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or ['']
        raise UserError(f'{what}: {type(error).__name__}{lines[0] and ": "}{lines[0]}') from error


def restore(model, data: dict):
    """Run `model` on one batch of one; return the result and the ground truth (or None) as uint8 BGR images."""
    model.feed_data(data)
    model.test()
    visuals = model.get_current_visuals()
    gt = tensor2img([visuals['gt']]) if 'gt' in visuals else None
    restored = tensor2img([visuals['result']])
    # Held no longer than needed: a validation image can be a hundred times a training patch.
    for name in ('lq', 'gt', 'output'):
        if hasattr(model, name):
            delattr(model, name)
    return restored, gt


def image_path(opt: dict, dataset_name: str, name: str, current_iter: int | str) -> str:
    """Where the toolbox saves a restored image."""
    folder = opt['path']['visualization']
    if opt['is_train']:
        return osp.join(folder, name, f'{name}_{current_iter}.png')
    return osp.join(folder, dataset_name, f'{name}_{opt["val"].get("suffix") or opt["name"]}.png')


def _measure(metrics: dict, restored, gt, dataset_name: str, name: str) -> dict[str, float]:
    images = {'img': restored} if gt is None else {'img': restored, 'img2': gt}
    if gt is not None and gt.shape != restored.shape:
        raise UserError(f'{dataset_name}: image {name}: the network gives {restored.shape[1]}x{restored.shape[0]} '
                        f'pixels, the ground truth has {gt.shape[1]}x{gt.shape[0]}; do the scale of the data and that '
                        'of the network agree?')
    values = {}
    for metric, options in metrics.items():
        size = f'{restored.shape[1]}x{restored.shape[0]}'
        with _failure_named(f'val.metrics.{metric} cannot be computed on {dataset_name}: image {name} of {size}'):
            values[metric] = float(calculate_metric(images, options))
    return values
