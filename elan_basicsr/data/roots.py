"""The data sets of an option file: each of one root or several, checked before the first sample, errors with names."""
from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from os import path as osp

import cv2
import lmdb
import numpy as np
from torch.utils.data import ConcatDataset, Dataset

from elan_basicsr.data.images import read_bgr
from elan_basicsr.data.pairing import check_sizes, header_sizes
from elan_basicsr.data.raw_lmdb_dataset import PairedRawLmdbDataset
from elan_basicsr.data.sampling import ToolboxDataset
from elan_basicsr.errors import UserError

from basicsr.data import build_dataset

OF_A_ROOT = ('dataroot_gt', 'dataroot_lq', 'meta_info', 'meta_info_file')
"""Options that may be lists, an entry for each root."""
# What a dataset of the toolbox raises where a file is missing or damaged.
_READING = (ValueError, OSError, TypeError, AttributeError, UnboundLocalError, cv2.error, lmdb.Error)


class RootedDataset(ConcatDataset[dict], ToolboxDataset):
    """The samples of one data set, root after root; those of a single root as they are.

    Args:
        datasets: A dataset of the toolbox's for each root.
        opt: The options of the whole.
        where: What messages call it, such as `datasets.train`.
    """

    def __init__(self, datasets: list[ToolboxDataset], opt: dict, where: str):
        super().__init__(datasets)
        self.opt, self.where = opt, where

    def __getitem__(self, index: int) -> dict:
        """Sample `index`.

        Raises:
            UserError: A file cannot be read; it is named.
        """
        with self._files_named(index) as (dataset, own):
            return dataset[own]

    def fill(self, index: int, lq: np.ndarray, gt: np.ndarray) -> dict[str, str]:
        """As `PairedRawLmdbDataset.fill`, where there are `batch_shapes`."""
        with self._files_named(index) as (dataset, own):
            return dataset.fill(own, lq, gt)

    @property
    def batch_shapes(self) -> tuple | None:
        """Shapes of samples that `fill` can write, if it can and they are those of every root."""
        shapes = {getattr(dataset, 'batch_shapes', None) for dataset in self.datasets}
        return shapes.pop() if len(shapes) == 1 else None

    @property
    def is_known(self) -> bool:
        """Whether its datasets are the toolbox's or ours; others may do anything with an image."""
        return all(type(dataset).__module__.startswith(('basicsr.', 'elan_basicsr.')) for dataset in self.datasets)

    def smallest(self) -> int:
        """The sample with the fewest pixels in its LQ image, by the headers; those that tell nothing count as large."""
        areas = [math.prod(size) if size else math.inf for dataset in self.datasets for size in _sizes(dataset)]
        return min(range(len(self)), key=areas.__getitem__) if len(areas) == len(self) else 0

    @contextmanager
    def _files_named(self, index: int) -> Iterator[tuple]:
        number = bisect_right(self.cumulative_sizes, index)
        dataset = self.datasets[number]
        own = index - (self.cumulative_sizes[number - 1] if number else 0)
        try:
            yield dataset, own
        except _READING as error:
            raise UserError(f'{self.where}: {_what_failed(dataset, own, error)}; `basicsr data verify -opt FILE` lists '
                            'what is wrong with the data') from error


def _what_failed(dataset, index: int, error: Exception) -> str:
    """The files of a sample and why it cannot be read; if one of them is damaged, that one."""
    rows = paths_of(dataset)
    if not rows:
        return f'image {index} cannot be read: {error}'
    files = [*rows[index].values()] if isinstance(rows[index], dict) else [rows[index]]
    for file in filter(osp.isfile, files):
        try:
            read_bgr(file)
        except UserError as damage:
            return str(damage)
    reason = ' '.join(error.args) if type(error) is ValueError else str(error)  # upstream raises texts in parts
    root = '' if osp.isabs(files[0]) or osp.exists(files[0]) else f'{_root(getattr(dataset, "opt", {}))}: '
    return f'{root}{" and ".join(dict.fromkeys(files))}: cannot be read: {reason}'


def _sizes(dataset) -> list[tuple[int, int] | None]:
    """(height, width) of each LQ image, or of what there is, by the headers."""
    if isinstance(dataset, PairedRawLmdbDataset):
        return [dataset.size(index) for index in range(len(dataset))]
    names = [row['lq_path'] if isinstance(row, dict) else row for row in paths_of(dataset)]
    return header_sizes(str(dataset.opt.get('dataroot_lq') or dataset.opt.get('dataroot_gt')), names)


def _root(opt: dict) -> str:
    return str(opt.get('dataroot_gt') or opt.get('dataroot_lq'))


def split(opt: dict) -> list[dict]:
    """The options of a data set for each of its roots; what is null is left out.

    Raises:
        UserError: There are not as many roots of one kind as of the other.
    """
    opt = {key: value for key, value in opt.items() if key not in OF_A_ROOT or value is not None}
    numbers = {key: len(opt[key]) for key in OF_A_ROOT if isinstance(opt.get(key), list)}
    if not numbers:
        return [opt]
    numbers |= {key: 1 for key in OF_A_ROOT if isinstance(opt.get(key), str)}
    if len({*numbers.values()}) > 1:
        raise UserError(f'{" and ".join(f"{key} has {n}" for key, n in numbers.items())}; expected lists of the same '
                        'length, an entry for each root')
    return [{**opt, **{key: opt[key][i] for key in numbers if isinstance(opt[key], list)}}
            for i in range(max(numbers.values()))]


def build(opt: dict, where: str) -> RootedDataset:
    """The data set of a section of an option file, with images in it, and pairs that fit by their headers.

    Args:
        opt: The section with `phase` and, for pairs, `scale`.
        where: Its key, such as `datasets.train`.

    Raises:
        UserError: It cannot be opened, is empty, or its images do not belong together; the first one is named.
    """
    datasets = []
    for part in split(opt):
        try:
            dataset = open_root(part)
            if isinstance(dataset, PairedRawLmdbDataset):
                dataset.check_sizes()
            elif is_paired(dataset) and 'scale' in part:
                check_sizes(paths_of(dataset), part)
        except UserError as error:
            raise UserError(f'{where}: {error}') from None
        datasets.append(dataset)
    return RootedDataset(datasets, opt, where)


def open_root(opt: dict) -> ToolboxDataset:
    """The toolbox's dataset of one root, in an order that does not differ from host to host.

    Raises:
        Unpaired: Images have no partner.
        UserError: It cannot be opened, or is empty.
    """
    try:
        dataset = build_dataset(opt)
    except (AssertionError, OSError, ValueError, KeyError) as error:
        reason = ' '.join(str(error).split())
        raise UserError(f'{_root(opt)}: the dataset cannot be opened: {reason or type(error).__name__}; '
                        '`basicsr data verify -opt FILE` lists what is wrong with it') from error
    paths_of(dataset).sort(key=lambda row: sorted(row.values()) if isinstance(row, dict) else [row])
    if len(dataset) == 0:
        raise UserError(f'{_root(opt)}: the dataset is empty, expected at least one image')
    return dataset


def paths_of(dataset: Dataset) -> list:
    """What a dataset of the toolbox's has in `paths`, for each sample a path or a row of them; empty if it has none."""
    rows = getattr(dataset, 'paths', None)
    return rows if isinstance(rows, list) else []


def is_paired(dataset: Dataset) -> bool:
    """Whether its paths are rows of a GT and an LQ image."""
    return all(isinstance(row, dict) and {*row} == {'gt_path', 'lq_path'} for row in paths_of(dataset)[:1] or [None])
