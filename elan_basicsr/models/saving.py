"""Checkpoints and training states that are whole or not there, for every model of the toolbox."""
from __future__ import annotations

from os import path as osp

import numpy as np
import torch.distributed as dist

from elan_basicsr.archs.elan_arch import ELAN
from elan_basicsr.checkpoint import own_state_name, save_atomic
from elan_basicsr.forms import NOTE, note_of_arguments

from basicsr.models.base_model import BaseModel
from basicsr.utils.dist_util import get_dist_info, master_only


class WholeFiles:
    """Mixin before a model of the toolbox: what it saves is written whole, and a training state knows its networks.

    A training state holds, beside upstream's keys, `files`: the names of the networks it belongs to and of the other
    processes' own states, with their SHA-256; and what the training loop wants kept. An error in saving stops the run;
    upstream tries three times and goes on without.
    """

    progress: dict[str, object] = {}
    """What the training loop wants kept in the training state, such as the number of samples used."""

    def save(self, epoch, current_iter):
        self._saved: dict[str, str] = {}
        super().save(epoch, current_iter)

    @master_only
    def save_network(self, net, net_label, current_iter, param_key='params'):
        """Write `models/LABEL_ITER.pth`."""
        nets = net if isinstance(net, list) else [net]
        keys = param_key if isinstance(param_key, list) else [param_key]
        content = {key: {name.removeprefix('module.'): value.cpu()
                         for name, value in self.get_bare_model(one).state_dict().items()}
                   for one, key in zip(nets, keys, strict=True)}
        if isinstance(self.get_bare_model(nets[0]), ELAN):
            note = note_of_arguments(self.opt['network_g'])
            content.update({NOTE: note} if note else {})  # an ordinary network's file is as the toolbox writes it
        name = f'{net_label}_{"latest" if current_iter == -1 else current_iter}.pth'
        digest = save_atomic(content, osp.join(self.opt['path']['models'], name))
        if hasattr(self, '_saved'):
            self._saved[name] = digest

    def save_training_state(self, epoch, current_iter):
        """Write `training_states/ITER.state`, after the networks it belongs to and the other processes' own states."""
        if current_iter == -1:
            return
        rank, world_size = get_dist_info()
        folder = self.opt['path']['training_states']
        own = self.own_state()
        if rank > 0 and own:
            name = own_state_name(current_iter, rank)
            self._saved[name] = save_atomic(own, osp.join(folder, name))
        shares = [self._saved]
        if world_size > 1:
            shares = [None] * world_size
            dist.all_gather_object(shares, self._saved)
        if rank == 0:
            save_atomic({
                'epoch': epoch, 'iter': current_iter,
                'optimizers': [optimizer.state_dict() for optimizer in self.optimizers],
                'schedulers': [scheduler.state_dict() for scheduler in self.schedulers],
                'files': {name: digest for share in shares for name, digest in share.items()},
                **self.extra_state(), **own,
            }, osp.join(folder, f'{current_iter}.state'))
        if world_size > 1:
            dist.barrier()  # a launcher that sees the first process leave may kill the others before they have saved

    def extra_state(self) -> dict:
        """What the training state holds beyond upstream's: tensors, numbers, texts, and dicts and lists of them."""
        best = {name: {metric: {key: value.item() if isinstance(value, np.generic) else value
                                for key, value in record.items()} for metric, record in metrics.items()}
                for name, metrics in getattr(self, 'best_metric_results', {}).items()}
        return {'best_metric_results': best, **self.progress}

    def own_state(self) -> dict:
        """The same, of what differs from process to process; `engine.resume` gives it back to the process it is of."""
        return {}

    def resume_training(self, resume_state):
        super().resume_training(resume_state)
        if resume_state.get('best_metric_results'):
            self.best_metric_results = resume_state['best_metric_results']


def save_whole_files(model: BaseModel) -> None:
    """Let a model of the toolbox's own save as `WholeFiles` does."""
    if not isinstance(model, WholeFiles):
        kind = type(model)
        model.__class__ = type(kind.__name__, (WholeFiles, kind), {})
