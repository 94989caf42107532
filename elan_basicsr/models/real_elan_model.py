"""ELAN for real photographs: Real-ESRGAN's degradations and losses (Wang et al., ICCVW 2021, arXiv 2107.10833).

The degradations, the pool and the losses are the toolbox's `RealESRNetModel` and `RealESRGANModel`; what is here makes
them run without a GPU, keeps the pool across a resume, and adds what ELANModel has.
"""
from __future__ import annotations

from pathlib import Path

import torch

from elan_basicsr.errors import UserError
from elan_basicsr.models.elan_model import ELANModel
from elan_basicsr.plain_values import is_count

from basicsr.models.realesrgan_model import RealESRGANModel
from basicsr.models.realesrnet_model import RealESRNetModel
from basicsr.models.sr_model import SRModel
from basicsr.utils import DiffJPEG, USMSharp, get_root_logger, imwrite, tensor2img
from basicsr.utils.registry import MODEL_REGISTRY

_POOL = ('queue_lr', 'queue_gt', 'queue_ptr')


class _Degradations(ELANModel):
    """The parts of both models that upstream ties to a GPU: the JPEG and sharpening modules, and the pool."""

    def __init__(self, opt):
        SRModel.__init__(self, opt)  # past the toolbox's own, which calls .cuda()
        self.jpeger = DiffJPEG(differentiable=False).to(self.device)
        self.usm_sharpener = USMSharp().to(self.device)
        self.queue_size = opt.get('queue_size', 180)

    def _lq_edge(self) -> int:
        degrades = self.opt.get('high_order_degradation', True)
        return self.opt['gt_size'] // self.opt['scale'] if degrades else super()._lq_edge()

    def feed_data(self, data):
        super().feed_data(data)
        wanted = (self.opt.get('logger') or {}).get('save_degraded')
        if wanted and self.is_train and self.opt['rank'] == 0:
            self._save_degraded(wanted)

    def _save_degraded(self, wanted: int) -> None:
        """Save the batch's LR images beside their ground truth until the run has so many of them."""
        folder = Path(self.opt['path']['visualization'], 'degraded')
        if not hasattr(self, '_degraded'):
            self._degraded = len(list(folder.glob('*_lq.png')))  # of the run that is resumed
        for lq, gt in zip(self.lq[:wanted - self._degraded], self.gt, strict=False) if self._degraded < wanted else ():
            self._degraded += 1
            for kind, image in (('lq', lq), ('gt', gt)):
                imwrite(tensor2img([image]), str(folder / f'{self._degraded:04}_{kind}.png'))

    def _pool_fits(self, pool: dict) -> bool:
        """Whether a pool of an earlier start takes the batches of this one."""
        size, batch = self.opt['gt_size'], self.opt['datasets']['train']['batch_size_per_gpu']
        edges = {'queue_lr': size // self.opt['scale'], 'queue_gt': size}
        filled = pool.get('queue_ptr')
        return is_count(filled) and filled % batch == 0 and filled <= self.queue_size and all(
            isinstance(value := pool.get(name), torch.Tensor) and value.dim() == 4
            and (len(value), *value.shape[2:]) == (self.queue_size, edge, edge) for name, edge in edges.items())

    @torch.no_grad()
    def _dequeue_and_enqueue(self):
        """Exchange the batch with one from the pool, in which degradations mix."""
        batch = self.lq.shape[0]
        if not hasattr(self, 'queue_lr'):
            if self.queue_size % batch:
                raise UserError(f'queue_size is {self.queue_size}, expected a multiple of batch_size_per_gpu, {batch}: '
                                'the training pool is filled batch by batch')
            self.queue_lr = self.lq.new_zeros(self.queue_size, *self.lq.shape[1:])
            self.queue_gt = self.gt.new_zeros(self.queue_size, *self.gt.shape[1:])
            self.queue_ptr = 0
        super()._dequeue_and_enqueue()

    def nondist_validation(self, dataloader, current_iter, tb_logger, save_img):
        self.is_train = False  # feed_data degrades what it takes for training data
        try:
            super().nondist_validation(dataloader, current_iter, tb_logger, save_img)
        finally:
            self.is_train = True

    def own_state(self) -> dict:
        pool = {name: getattr(self, name) for name in _POOL if hasattr(self, name)}
        return {'pool': pool} if pool else {}

    def resume_training(self, resume_state):
        super().resume_training(resume_state)
        pool = resume_state.get('pool', {})
        if pool and not self._pool_fits(pool):
            get_root_logger().info('The training pool begins empty: queue_size, gt_size or the batch is another than '
                                   'it was')
            return
        for name in (each for each in _POOL if each in pool):
            value = pool[name]
            setattr(self, name, value.to(self.device) if isinstance(value, torch.Tensor) else value)


@MODEL_REGISTRY.register()
class RealELANNetModel(_Degradations, RealESRNetModel):
    """ELANModel on images degraded as in Real-ESRGAN, with a pixel loss."""


@MODEL_REGISTRY.register()
class RealELANGANModel(_Degradations, RealESRGANModel):
    """The same with Real-ESRGAN's adversarial loss, and its perceptual one where the option file asks for it."""

    def init_training_settings(self):
        for key in ('amp', 'accumulate', 'grad_clip'):
            if self.opt['train'].get(key) not in (None, False, 1):
                raise UserError(f'train.{key}: RealELANGANModel trains in float32, whole batches and unclipped; leave '
                                'the key out, or train with RealELANNetModel')
        super().init_training_settings()

    def optimize_parameters(self, current_iter: int) -> None:
        RealESRGANModel.optimize_parameters(self, current_iter)
        self._stop_unless_finite(current_iter)

    def _save_networks(self, label: int | str) -> None:
        super()._save_networks(label)
        self.save_network(self.net_d, 'net_d', label)
