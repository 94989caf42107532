"""ELANModel: BasicSR's SRModel with what training ELAN needs. Works with every architecture that SRModel takes."""
from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.distributed as dist
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from elan_basicsr import inference
from elan_basicsr.checkpoint import load_into
from elan_basicsr.errors import UserError
from elan_basicsr.models import cuda_graphs
from elan_basicsr.models.saving import WholeFiles
from elan_basicsr.models.sync_bn import synchronise
from elan_basicsr.models.validation import validate

from basicsr.models.sr_model import SRModel
from basicsr.utils import get_root_logger
from basicsr.utils.dist_util import get_dist_info, master_only
from basicsr.utils.registry import MODEL_REGISTRY

TOOLBOX_SCHEDULERS = ('MultiStepLR', 'MultiStepRestartLR', 'CosineAnnealingRestartLR')
AMP_DTYPES = {'bf16': torch.bfloat16, 'fp16': torch.float16}


class _Wrapper(OptimWrapper):
    """mmengine's, which in clipping waits for every norm and keeps it, in a history without an end."""

    def _clip_grad(self) -> None:
        self.clip_func([p for group in self.optimizer.param_groups for p in group['params']], **self.clip_grad_kwargs)


class _ScalingWrapper(_Wrapper, AmpOptimWrapper):
    """The same with a scaler of losses, for fp16."""


@MODEL_REGISTRY.register()
class ELANModel(WholeFiles, SRModel):
    """SRModel plus EMA with buffers, mixed precision, accumulation, clipping, tiling, and validation on every rank.

    Everything is off by default, so an option file written for SRModel trains as it did. The keys, beside SRModel's:

    - `train.amp`: `bf16` or `fp16` (a GPU only).
    - `train.accumulate`: the batch of an iteration is worked off in so many equal parts; their gradients are averaged.
    - `train.grad_clip`: largest L2 norm of the gradient.
    - `train.optim_g.type`: any optimizer of `torch.optim`; `train.scheduler.type`: any of `torch.optim.lr_scheduler`.
    - `compile`: run the network through `torch.compile`.
    - `cuda_graphs`: replay the network's passes as CUDA graphs (a GPU only).
    - `sync_bn`: BatchNorm statistics over all processes.
    - `val.tile`, `val.tile_overlap`: LR pixels; restore large images in tiles.
    - `val.self_ensemble`: average over the eight flips and rotations.
    """

    interrupted: Callable[[], bool] = staticmethod(lambda: False)
    """Whether a validation should break off with `validation.Interrupted`; the training loop's business."""

    # ------------------------------------------------------------------ building

    @master_only
    def print_network(self, net):
        """Log name and size in one line; upstream prints every layer."""
        bare = self.get_bare_model(net)
        parameters = sum(p.numel() for p in bare.parameters() if p.requires_grad)
        get_root_logger().info(f'Network: {type(bare).__name__}, {parameters:,} trainable parameters')

    def model_to_device(self, net: nn.Module) -> nn.Module:
        if self.opt.get('sync_bn') and self.opt['dist'] and self.is_train:
            net = synchronise(net, self.device)
        if self.opt.get('cuda_graphs') and self.is_train and self.device.type == 'cuda' and net is self.net_g:
            self._record_graphs(net.to(self.device))
        net = super().model_to_device(net)
        if self.opt.get('compile') and self.is_train:
            net.compile()
        return net

    def _record_graphs(self, net: nn.Module) -> None:
        """Record the passes over a part of a batch, while no other thread works with the GPU."""
        train, parts = self.opt['train'], self.opt['train'].get('accumulate', 1)
        batch, edge = self.opt['datasets']['train']['batch_size_per_gpu'], self._lq_edge()
        shape = batch // parts, self.opt['network_g'].get('num_in_ch', 3), edge, edge
        cuda_graphs.record(net, shape, AMP_DTYPES.get(train.get('amp')), accumulates=parts > 1)

    def _lq_edge(self) -> int:
        """Edge in pixels of the LR patches that are trained on."""
        return self.opt['datasets']['train']['gt_size'] // self.opt.get('scale', 1)

    def load_network(self, net, load_path, strict=True, param_key='params'):
        """Load a checkpoint of any form that `elan_basicsr.checkpoint` reads."""
        bare = self.get_bare_model(net)
        missing = load_into(bare, load_path, strict=strict, param_key=param_key)
        logger = get_root_logger()
        logger.info(f'Loading {type(bare).__name__} from {load_path}.')
        if missing:
            logger.warning(f'Not loaded from {load_path} (absent or of another shape): {", ".join(missing)}')

    def get_optimizer(self, optim_type, params, lr, **kwargs):
        """Any optimizer of `torch.optim` by its name; upstream 1.4.2 knows Adam alone."""
        optimizer = getattr(torch.optim, optim_type, None)
        if not (isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer)):
            raise UserError(f'train.optim_g.type: torch.optim has no optimizer {optim_type!r}')
        return optimizer(params, lr=lr, **kwargs)

    def setup_schedulers(self):
        """Any scheduler of `torch.optim.lr_scheduler` as well, by its name."""
        section = dict(self.opt['train']['scheduler'])
        if section['type'] in TOOLBOX_SCHEDULERS:
            super().setup_schedulers()
            return
        scheduler = getattr(torch.optim.lr_scheduler, section.pop('type'))
        self.schedulers = [scheduler(optimizer, **section) for optimizer in self.optimizers]

    def update_learning_rate(self, current_iter, warmup_iter=-1):
        """Upstream's, where a schedule that goes on from its rate before does not take the warm-up's for that."""
        for scheduler in self.schedulers if 1 < current_iter <= warmup_iter else ():
            for group, rate in zip(scheduler.optimizer.param_groups, scheduler.get_last_lr(), strict=True):
                group['lr'] = rate
        super().update_learning_rate(current_iter, warmup_iter)

    def setup_optimizers(self):
        super().setup_optimizers()
        self.optim_wrapper = self._wrap_optimizer(self.optimizer_g)

    def _wrap_optimizer(self, optimizer: torch.optim.Optimizer) -> OptimWrapper:
        """mmengine's wrapper does accumulation, its DDP silence and clipping; its AMP twin scales fp16 on a GPU."""
        train_opt = self.opt['train']
        amp = train_opt.get('amp') or None
        if amp is not None and amp not in AMP_DTYPES:
            raise UserError(f'train.amp is {amp!r}; expected bf16, fp16 or false')
        if amp == 'fp16' and self.device.type != 'cuda':
            raise UserError('train.amp is fp16, which needs a GPU here; on a CPU use bf16')
        self.amp_dtype = AMP_DTYPES[amp] if amp else None
        clip = train_opt.get('grad_clip')
        options = dict(optimizer=optimizer, accumulative_counts=train_opt.get('accumulate', 1),
                       clip_grad=dict(max_norm=clip) if clip else None)
        if amp == 'fp16':
            return _ScalingWrapper(dtype='float16', **options)
        return _Wrapper(**options)

    # ------------------------------------------------------------------ a training step

    def feed_data(self, data: dict) -> None:
        super().feed_data(data)
        self.lq_paths = data.get('lq_path') or data.get('gt_path')

    def optimize_parameters(self, current_iter: int) -> None:
        parts = self.opt['train'].get('accumulate', 1)
        losses: OrderedDict[str, Tensor] = OrderedDict()
        for lq, gt in zip(self.lq.chunk(parts), self.gt.chunk(parts), strict=True):
            with self.optim_wrapper.optim_context(self.net_g):
                with self._autocast():
                    self.output = self.net_g(lq)
                total, part = self.compute_losses(self.output.float() if self.amp_dtype else self.output, gt)
                for name, value in part.items():
                    losses[name] = losses.get(name, 0) + value.detach() / parts
                if self.optim_wrapper.should_sync():  # the last part: behind it the weights change
                    self.log_dict = self.reduce_loss_dict(losses)
                    self._stop_unless_finite(current_iter)
                self.optim_wrapper.update_params(total)
        if self.ema_decay > 0:
            self.model_ema(decay=self._ema_decay_at(current_iter))

    def compute_losses(self, output: Tensor, gt: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to descend and its named parts, as SRModel logs them."""
        losses = OrderedDict()
        if self.cri_pix:
            losses['l_pix'] = self.cri_pix(output, gt)
        if self.cri_perceptual:
            for name, value in zip(('l_percep', 'l_style'), self.cri_perceptual(output, gt), strict=True):
                if value is not None:
                    losses[name] = value
        return sum(losses.values()), losses

    def _autocast(self):
        if self.amp_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.amp_dtype)

    @torch.no_grad()
    def reduce_loss_dict(self, loss_dict: dict[str, Tensor]) -> dict[str, float]:
        """The losses as numbers, averaged over all processes and known to each: an iteration's one wait for a GPU."""
        losses = torch.stack([loss.mean() for loss in loss_dict.values()])
        if get_dist_info()[1] > 1:
            dist.all_reduce(losses)
            losses /= self.opt['world_size']
        return OrderedDict(zip(loss_dict, losses.tolist(), strict=True))

    def _stop_unless_finite(self, current_iter: int) -> None:
        """Stop all processes together, which know the same losses; none waits for one that left."""
        loss = sum(self.log_dict.values())
        if not math.isfinite(loss):
            rates = ', '.join(f'{rate:.3e}' for rate in self.get_current_learning_rate())
            keys = ', '.join(map(str, self.lq_paths or []))
            raise UserError(f'iteration {current_iter}: the loss is {loss} at learning rate {rates}; stopped, '
                            f'the last checkpoint stands; a lower rate or train.grad_clip may help; batch: {keys}')

    def _ema_decay_at(self, current_iter: int) -> float:
        """The decay, warmed up as TensorFlow's ExponentialMovingAverage does with `num_updates`.

        A constant 0.999 holds 86 % of the random initial weights after 150 iterations. From iteration 8,990 on it makes
        no difference.
        """
        return min(self.ema_decay, (1 + current_iter) / (10 + current_iter))

    @torch.no_grad()
    def model_ema(self, decay: float = 0.999) -> None:
        """Average the parameters and copy the buffers.

        Upstream leaves the buffers of the averaged network at their initial values, so that BatchNorm's running
        statistics never arrive there.
        """
        net_g = self.get_bare_model(self.net_g)
        get_ema_multi_avg_fn(decay)(list(self.net_g_ema.parameters()), list(net_g.parameters()), None)
        averaged, buffers = list(self.net_g_ema.buffers()), list(net_g.buffers())
        for dtype in {buffer.dtype for buffer in buffers}:  # those of one type are copied at once
            torch._foreach_copy_([buffer for buffer in averaged if buffer.dtype == dtype],
                                 [buffer for buffer in buffers if buffer.dtype == dtype])

    # ------------------------------------------------------------------ validation

    def test(self) -> None:
        val = self.opt.get('val') or {}
        net = getattr(self, 'net_g_ema', None) or self.get_bare_model(self.net_g)
        was_training = net.training
        net.eval()
        # A compiled network is for batches of one size; for each size of image it would be compiled again.
        eager = torch.compiler.set_stance('force_eager') if self.opt.get('compile') else nullcontext()
        with torch.no_grad(), eager:
            self.output = inference.forward(
                net, self.lq, scale=self.opt.get('scale', 1), tile=val.get('tile') or 0,
                tile_overlap=val.get('tile_overlap', 16), self_ensemble=bool(val.get('self_ensemble')))
        net.train(was_training)

    def dist_validation(self, dataloader, current_iter, tb_logger, save_img):
        self.nondist_validation(dataloader, current_iter, tb_logger, save_img)

    def nondist_validation(self, dataloader, current_iter, tb_logger, save_img):
        name = dataloader.dataset.opt['name']
        self.metric_results = validate(self, dataloader.dataset, current_iter, save_img, self.interrupted)
        if not self.metric_results:
            return
        self._initialize_best_metric_results(name)
        for metric, value in self.metric_results.items():
            self._update_best_metric_result(name, metric, value, current_iter)
        self._log_validation_metric_values(current_iter, name, tb_logger)
        self._save_best(name, current_iter)

    def _log_validation_metric_values(self, current_iter, dataset_name, tb_logger):
        """Upstream's line, without a best value where a test has no other to compare with."""
        if self.opt['is_train']:
            super()._log_validation_metric_values(current_iter, dataset_name, tb_logger)
            return
        figures = ''.join(f'\n\t # {metric}: {value:.4f}' for metric, value in self.metric_results.items())
        get_root_logger().info(f'Validation {dataset_name}{figures}')

    def _save_best(self, dataset_name: str, current_iter: int) -> None:
        """Keep the network as `net_g_best.pth` when the metric `val.save_best` of the first set is the best so far."""
        metric = self.opt['val'].get('save_best')
        first = next((dataset['name'] for dataset in self.opt['datasets'].values() if dataset['phase'] == 'val'), None)
        if not metric or not self.opt['is_train'] or dataset_name != first:
            return
        if self.best_metric_results[dataset_name][metric]['iter'] == current_iter:
            self._save_networks('best')
            get_root_logger().info(f'Best {metric} on {dataset_name}: saved as net_g_best.pth')

    # ------------------------------------------------------------------ saving and resuming

    def _save_networks(self, label: int | str) -> None:
        if hasattr(self, 'net_g_ema'):
            self.save_network([self.net_g, self.net_g_ema], 'net_g', label, param_key=['params', 'params_ema'])
        else:
            self.save_network(self.net_g, 'net_g', label)

    def extra_state(self) -> dict:
        extra = super().extra_state()
        if hasattr(self.optim_wrapper, 'loss_scaler'):
            extra['loss_scaler'] = self.optim_wrapper.loss_scaler.state_dict()
        return extra

    def resume_training(self, resume_state):
        super().resume_training(resume_state)
        if 'loss_scaler' in resume_state and hasattr(self.optim_wrapper, 'loss_scaler'):
            self.optim_wrapper.loss_scaler.load_state_dict(resume_state['loss_scaler'])
