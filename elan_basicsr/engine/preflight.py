"""What a training would find out after hours, found out before its first iteration.

One image of each validation set goes through the network, and the disk is looked at. All of it leaves weights, random
numbers and best values as they are. Whether the images of a data set belong together, `data.roots` has seen.
"""
from __future__ import annotations

import logging
import math
import shutil
import tempfile
from collections.abc import Callable

from torch import nn

from elan_basicsr.data.roots import RootedDataset
from elan_basicsr.data.sampling import generators_kept
from elan_basicsr.errors import UserError
from elan_basicsr.models.validation import gather, restore_and_measure

from basicsr.models.sr_model import SRModel
from basicsr.utils.dist_util import get_dist_info


def look_ahead(opt: dict, model, validation: dict, logger: logging.Logger) -> None:
    """Raise UserError, on all processes alike, for what a training with these parts would stumble over later.

    Args:
        opt: The options of the run.
        model: The model, complete with what it goes on from.
        validation: The loaders of the validation sets, by their keys in the option file.
        logger: Where it is told what the disk will not hold.
    """
    rank, world_size = get_dist_info()
    datasets = [loader.dataset for loader in validation.values()]
    _together(lambda: _try_images(model, datasets[rank::world_size]))
    _together(lambda: _look_at_disk(opt, model, logger) if rank == 0 else None)


def _together(work: Callable[[], None]) -> None:
    """Work of which what is wrong for one process ends them all."""
    wrong = None
    try:
        work()
    except UserError as error:
        wrong = str(error)
    if mistakes := [each for each in gather(wrong) if each]:
        raise UserError(mistakes[0])


# ------------------------------------------------------------------------------------------------- validation

def _try_images(model, datasets: list[RootedDataset]) -> None:
    """Restore and measure the smallest image of each dataset as a validation will; nothing is kept of it."""
    if not isinstance(model, SRModel) or type(model).get_current_visuals is not SRModel.get_current_visuals:
        return  # models that validate in a way of their own
    was_training, model.is_train = model.is_train, False  # the models of Real-ESRGAN degrade what is for training
    try:
        with generators_kept():
            for dataset in datasets:
                if dataset.is_known:
                    restore_and_measure(model, dataset, dataset.smallest())
    finally:
        model.is_train = was_training


# ------------------------------------------------------------------------------------------------- the disk

def _look_at_disk(opt: dict, model, logger: logging.Logger) -> None:
    """Folders must take files; where the disk will not hold all that is to be saved, that is told."""
    for folder in (opt['path']['models'], opt['path']['training_states']):
        try:
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise UserError(f'{folder}: cannot be written ({error.strerror}), so nothing could be saved') from None
    networks = [net for name, net in vars(model).items() if name.startswith('net_') and isinstance(net, nn.Module)]
    weights = sum(tensor.nbytes for net in networks for tensor in net.state_dict().values())
    moments = 2 * sum(p.nbytes for optimizer in model.optimizers for group in optimizer.param_groups
                      for p in group['params'])
    count = math.ceil(opt['train']['total_iter'] / opt['logger']['save_checkpoint_freq'])
    count = min(count, opt['logger'].get('keep_last') or count)
    free, needed = shutil.disk_usage(opt['path']['models']).free, count * (weights + moments)
    if needed > free:
        logger.warning(f'{opt["path"]["models"]}: {free / 1e9:.2f} GB are free, and {count} checkpoints with their '
                       f'training states take about {needed / 1e9:.2f} GB; logger.keep_last keeps fewer')
