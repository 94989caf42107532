"""PairedRawLmdbDataset: patches cut straight out of the memory map of whole, undecoded images."""
from __future__ import annotations

import os
import random
from os import path as osp

import lmdb
import numpy as np
import torch
from basicsr.utils import bgr2ycbcr
from basicsr.utils.registry import DATASET_REGISTRY
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.functional import normalize

from elan_basicsr.data.raw_lmdb import decode, open_readonly, read_keys
from elan_basicsr.errors import UserError


@DATASET_REGISTRY.register()
class PairedRawLmdbDataset(Dataset):
    """LQ and GT images from two raw LMDBs that `basicsr data` made; options and samples as in `PairedImageDataset`.

    Random numbers come from Python's `random`, in the order the toolbox draws them, so that with one seed both datasets
    give the same sample. The LMDBs are opened at the first sample of each process: forked and spawned workers work.

    Args:
        opt: `dataroot_gt`, `dataroot_lq`, `scale`, `phase`; to train also `gt_size`, `use_hflip`, `use_rot`; optional
            `color: y`, `mean`, `std`.

    Raises:
        UserError: The LMDBs cannot be read, or their keys differ.
    """

    def __init__(self, opt: dict):
        self.opt = opt
        self.roots = {'lq': opt['dataroot_lq'], 'gt': opt['dataroot_gt']}
        self.keys = self._matching_keys()
        self._transactions = self._process = None

    def _matching_keys(self) -> list[str]:
        keys = {}
        for kind, root in self.roots.items():
            if not osp.isfile(osp.join(root, 'data.mdb')):
                raise UserError(f'{root}: no LMDB there, expected a raw one made by `basicsr data`')
            keys[kind] = read_keys(root)
        only = {kind: sorted(set(keys[kind]) - set(keys[other])) for kind, other in (('gt', 'lq'), ('lq', 'gt'))}
        for kind, names in only.items():
            if names:
                raise UserError(f'{self.roots[kind]}: {len(names)} keys are not in the other LMDB, the first: '
                                f'{", ".join(names[:3])}; run `basicsr data verify` and build both again')
        return keys['gt']

    def __len__(self) -> int:
        return len(self.keys)

    def __getstate__(self) -> dict:
        # An open LMDB does not travel to another process.
        return {**self.__dict__, '_transactions': None, '_process': None}

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        key = self.keys[index]
        lq, gt = self._image('lq', key), self._image('gt', key)
        scale = self.opt['scale']
        if self.opt['phase'] == 'train':
            lq, gt = self._cut_patch(lq, gt, key, scale)
        else:
            gt = gt[:lq.shape[0] * scale, :lq.shape[1] * scale]
        lq, gt = self._to_tensor(lq), self._to_tensor(gt)
        return {'lq': lq, 'gt': gt, 'lq_path': key, 'gt_path': key}

    def _image(self, kind: str, key: str) -> np.ndarray:
        """A view of the whole image, (H, W, C), BGR."""
        if self._process != os.getpid():  # a forked worker must not use the parent's
            self._transactions = {name: self._begin(root) for name, root in self.roots.items()}
            self._process = os.getpid()
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

    def _cut_patch(self, lq: np.ndarray, gt: np.ndarray, key: str, scale: int) -> tuple[np.ndarray, np.ndarray]:
        size = self.opt['gt_size'] // scale
        h, w = lq.shape[:2]
        if gt.shape[:2] != (h * scale, w * scale):
            raise UserError(f'{self.roots["gt"]}: image {key} is {gt.shape[1]}x{gt.shape[0]}, expected {w * scale}x'
                            f'{h * scale}: {scale} times its LQ image')
        if h < size or w < size:
            raise UserError(f'{self.roots["gt"]}: image {key} is {gt.shape[1]}x{gt.shape[0]}, smaller than gt_size '
                            f'{self.opt["gt_size"]}; leave it out or take smaller patches')
        top, left = random.randint(0, h - size), random.randint(0, w - size)
        lq = lq[top:top + size, left:left + size]
        gt = gt[top * scale:(top + size) * scale, left * scale:(left + size) * scale]
        flip_h = self.opt.get('use_hflip') and random.random() < 0.5
        flip_v = self.opt.get('use_rot') and random.random() < 0.5
        transpose = self.opt.get('use_rot') and random.random() < 0.5
        return tuple(_augment(patch, flip_h, flip_v, transpose) for patch in (lq, gt))

    def _to_tensor(self, img: np.ndarray) -> Tensor:
        """(H, W, C) BGR to (C, H, W) RGB in 0..1, or to one channel of Y."""
        largest = np.iinfo(img.dtype).max
        if self.opt.get('color') == 'y':
            y = bgr2ycbcr(np.float32(img) / largest, y_only=True)
            tensor = torch.from_numpy(np.ascontiguousarray(y))[None]
        else:
            planes = np.ascontiguousarray(img.transpose(2, 0, 1)[::-1])
            if planes.dtype == np.uint16:
                planes = planes.astype(np.int32)
            tensor = torch.from_numpy(planes).float().div_(largest)
        if self.opt.get('mean') is not None or self.opt.get('std') is not None:
            normalize(tensor, self.opt['mean'], self.opt['std'], inplace=True)
        return tensor


def _augment(patch: np.ndarray, flip_h: bool, flip_v: bool, transpose: bool) -> np.ndarray:
    if flip_h:
        patch = patch[:, ::-1]
    if flip_v:
        patch = patch[::-1]
    return patch.transpose(1, 0, 2) if transpose else patch
