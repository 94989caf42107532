"""PairedRawLmdbDataset: patches cut straight out of the memory map of whole, undecoded images."""
from __future__ import annotations

import os
import random
from os import path as osp

import cv2
import lmdb
import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.functional import normalize

from elan_basicsr.data.pairing import pair_lmdbs, wrong_sizes
from elan_basicsr.data.raw_lmdb import decode, open_readonly, read_keys
from elan_basicsr.data.sampling import ToolboxDataset
from elan_basicsr.errors import UserError

from basicsr.utils import bgr2ycbcr
from basicsr.utils.registry import DATASET_REGISTRY


@DATASET_REGISTRY.register()
class PairedRawLmdbDataset(ToolboxDataset):
    """LQ and GT images from two raw LMDBs that `basicsr data` made; options and samples as in `PairedImageDataset`.

    Random numbers come from Python's `random`, in the order the toolbox draws them, so that with one seed both datasets
    give the same sample. The LMDBs are opened at the first sample of each process: forked and spawned workers work.

    Args:
        opt: `dataroot_gt`, `dataroot_lq`, `scale`, `phase`; to train also `gt_size`, `use_hflip`, `use_rot`; optional
            `color: y`, `mean`, `std`.

    Raises:
        UserError: The LMDBs cannot be read, or their keys differ (`Unpaired`).
    """

    def __init__(self, opt: dict):
        self.opt = opt
        self.roots = {'lq': opt['dataroot_lq'], 'gt': opt['dataroot_gt']}
        self.keys = self._matching_keys()
        self._transactions: dict[str, lmdb.Transaction] = {}
        self._views: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._process: int | None = None

    def _matching_keys(self) -> list[str]:
        for root in self.roots.values():
            if not osp.isfile(osp.join(root, 'data.mdb')):
                raise UserError(f'{root}: no LMDB there, expected a raw one made by `basicsr data`')
        pair_lmdbs([*self.roots.values()], [*self.roots])
        return read_keys(self.roots['gt'])

    @property
    def paths(self) -> list[dict[str, str]]:
        """The keys of each pair, as the toolbox's datasets have their paths."""
        return [self._paths(index) for index in range(len(self))]

    def __len__(self) -> int:
        return len(self.keys)

    def __getstate__(self) -> dict:
        # An open LMDB does not travel to another process.
        return {**self.__dict__, '_transactions': {}, '_views': {}, '_process': None}

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        lq, gt = self._images(index)
        if self.opt['phase'] == 'train':
            lq, gt = self._draw_patch(lq, gt)
        else:
            gt = gt[:, :lq.shape[1] * self.opt['scale'], :lq.shape[2] * self.opt['scale']]
        return {'lq': self._finish(lq), 'gt': self._finish(gt)} | self._paths(index)

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of an LQ image, of whose record the head alone is read."""
        return self._images(index)[0].shape[1:]

    def fill(self, index: int, lq: np.ndarray, gt: np.ndarray) -> dict[str, str]:
        """Write training sample `index` as bytes into `lq` and `gt`, (C, h, w) uint8, and return its paths."""
        self._draw_patch(*self._images(index), (lq, gt))
        return self._paths(index)

    @property
    def batch_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Shapes of LQ and GT training samples that `fill` can write; None where samples need more work or differ."""
        plain = all(self.opt.get(key) is None for key in ('color', 'mean', 'std'))
        if self.opt['phase'] != 'train' or not plain:
            return None
        if any(img.dtype != np.uint8 for index in range(len(self)) for img in self._images(index)):
            return None
        size, channels = self.opt['gt_size'] // self.opt['scale'], self._images(0)[1].shape[0]
        return (channels, size, size), (channels, size * self.opt['scale'], size * self.opt['scale'])

    def check_sizes(self) -> None:
        """Look at the sizes of all pairs, of which only headers are read.

        Raises:
            UserError: Two do not belong together, or are smaller than a training patch.
        """
        for index in range(len(self)):
            self._images(index)

    def _paths(self, index: int) -> dict[str, str]:
        return {'lq_path': self.keys[index], 'gt_path': self.keys[index]}

    def _images(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Views of the whole LQ and GT image, (C, H, W), RGB; they stay valid as long as the transactions."""
        self._open_in_this_process()
        if index not in self._views:
            key = self.keys[index]
            lq, gt = self._read('lq', key), self._read('gt', key)
            names = (f'{self.roots["gt"]}: {key}', f'{self.roots["lq"]}: {key}')
            if problem := wrong_sizes(gt.shape[1:], lq.shape[1:], *names, self.opt):
                raise UserError(problem)
            self._views[index] = lq, gt
        return self._views[index]

    def _open_in_this_process(self) -> None:
        if self._process != os.getpid():  # a forked worker must not use the parent's
            self._transactions = {name: self._begin(root) for name, root in self.roots.items()}
            self._views, self._process = {}, os.getpid()

    def _read(self, kind: str, key: str) -> np.ndarray:
        record = self._transactions[kind].get(key.encode())
        if record is None:
            raise UserError(f'{self.roots[kind]}: there is no image {key}; run `basicsr data verify`')
        try:
            return decode(record)
        except ValueError as error:
            raise UserError(f'{self.roots[kind]}: image {key}: {error}; run `basicsr data verify`') from None

    @staticmethod
    def _begin(root: str) -> lmdb.Transaction:
        try:
            return open_readonly(root).begin(buffers=True)
        except lmdb.Error as error:
            raise UserError(f'{root}: cannot be opened as an LMDB ({error}); build it again') from None

    def _draw_patch(self, lq: np.ndarray, gt: np.ndarray, outs: tuple = (None, None)) -> list[np.ndarray]:
        """Cut and augment LQ and GT alike, at random; new arrays, or those given."""
        scale = self.opt['scale']
        size = self.opt['gt_size'] // scale
        top, left = random.randint(0, lq.shape[1] - size), random.randint(0, lq.shape[2] - size)
        turn = self._draw_turn()
        patches = (lq[:, top:top + size, left:left + size],
                   gt[:, top * scale:(top + size) * scale, left * scale:(left + size) * scale])
        return [_augment(patch, *turn, out) for patch, out in zip(patches, outs, strict=True)]

    def _draw_turn(self) -> tuple[bool, bool, bool]:
        """Whether to flip left to right, to flip upside down, to transpose; drawn as the toolbox's `augment` does."""
        hflip, rot = bool(self.opt.get('use_hflip')), bool(self.opt.get('use_rot'))
        return hflip and random.random() < 0.5, rot and random.random() < 0.5, rot and random.random() < 0.5

    def _finish(self, planes: np.ndarray) -> Tensor:
        """Floats of 0..1 with the toolbox's options on colour and normalization, for one (C, H, W) image."""
        largest = np.iinfo(planes.dtype).max
        rgb = torch.from_numpy(planes.astype(np.float32)).div_(largest)
        if self.opt.get('color') == 'y':
            bgr = np.ascontiguousarray(rgb.numpy()[::-1].transpose(1, 2, 0))
            rgb = torch.from_numpy(np.ascontiguousarray(bgr2ycbcr(bgr, y_only=True)))[None]
        if self.opt.get('mean') is not None or self.opt.get('std') is not None:
            normalize(rgb, self.opt['mean'], self.opt['std'], inplace=True)
        return rgb


_FLIP_CODES = {(True, False): 1, (False, True): 0, (True, True): -1}  # of cv2.flip, by (left to right, upside down)


def _augment(planes: np.ndarray, flip_h: bool, flip_v: bool, transpose: bool, out: np.ndarray | None) -> np.ndarray:
    """Flip, then transpose square (C, H, W) planes; OpenCV is many times faster than a copy of a strided view."""
    if out is None:
        out = np.empty(planes.shape, planes.dtype)
    code = _FLIP_CODES.get((flip_h, flip_v))
    for plane, target in zip(planes, out, strict=True):
        if code is None:
            np.copyto(target, plane)
        else:
            cv2.flip(plane, code, dst=target)
        if transpose:
            cv2.transpose(target, dst=target)
    return out
