"""What training and testing share: the run's folders, its logger, its seeds, its datasets."""
from __future__ import annotations

import ctypes
import itertools
import logging
import os
import random
import sys
import urllib.error
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from os import path as osp

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from elan_basicsr.data import roots
from elan_basicsr.data.sampling import ToolboxDataset
from elan_basicsr.engine.launch import TIMEOUT, Processes
from elan_basicsr.errors import UserError, outside

from basicsr.utils import get_env_info, get_root_logger, get_time_str
from basicsr.utils.logger import initialized_logger
from basicsr.utils.options import dict2str


def meeting(opt: dict) -> dict:
    """How the processes of a run meet, the arguments of `launch.process_group`."""
    chosen, gpu = opt.get('dist_params') or {}, opt['num_gpu'] > 0
    return {'gpu': gpu, 'backend': chosen.get('backend') or ('nccl' if gpu else 'gloo'),
            'timeout': chosen.get('timeout') or TIMEOUT}


def join_run(opt: dict, processes: Processes) -> None:
    """Write rank, size and seed of the run into the options; a seed that the file leaves open is rank 0's for all."""
    opt['dist'] = processes.distributed
    opt['rank'], opt['world_size'] = processes.rank, processes.world_size
    seed = [opt.get('manual_seed')]
    opt['seed_is_drawn'] = seed[0] is None
    if opt['seed_is_drawn']:
        seed = [random.randint(1, 10000)]
        if processes.distributed:
            dist.broadcast_object_list(seed)
    opt['manual_seed'] = seed[0]


@contextmanager
def disk_errors_named() -> Iterator[None]:
    """Around a run: a full disk, a folder that cannot be written and a mount that went away become a UserError.

    So does a network that cannot be reached, from which a loss would fetch its weights.
    """
    try:
        yield
    except urllib.error.URLError as error:
        raise UserError(outside(error) or '') from error
    except OSError as error:
        where = error.filename or 'the run cannot go on'
        raise UserError(f'{where}: {error.strerror or " ".join(str(error).split())}; what was saved before is intact'
                        ) from error


def set_backends(opt: dict) -> None:
    """`deterministic: true` asks torch for kernels that repeat themselves."""
    if opt.get('deterministic'):
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
        torch.use_deterministic_algorithms(True)
        # Every new tensor would be filled first, so that reading one too early repeats itself as well.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


@contextmanager
def one_size(opt: dict) -> Iterator[None]:
    """Around work on inputs of one size: cuDNN looks for its fastest kernels, unless they are to repeat themselves.

    For each new size it would look again, which takes longer than it saves on a few images.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = not opt.get('deterministic')
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def keep_freed_memory() -> None:
    """Have glibc keep what one training step frees for the next one, as torch does for GPUs.

    Otherwise the system takes pages back after every step and clears them for the next: a seventh of the time on a CPU.
    The numbers are mallopt(3)'s for the thresholds of trimming (never) and of mapping single blocks.
    """
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None) if sys.platform == 'linux' else None
    if mallopt:
        mallopt(-1, -1)
        mallopt(-3, 2**31 - 1)


def open_log(opt: dict, kind: str) -> logging.Logger:
    """The toolbox's logger, writing to the terminal and to `KIND_NAME_TIME.log` in the run's folder."""
    initialized_logger.pop('basicsr', None)  # one program can run several trainings, each with a log file of its own
    logger = logging.getLogger('basicsr')
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    stem = osp.join(opt['path']['log'], f'{kind}_{opt["name"]}_{get_time_str()}')
    log_file = next(name for number in itertools.count()  # a run resumed within the second keeps the log before
                    if not osp.exists(name := f'{stem}_{number}.log' if number else f'{stem}.log'))
    logger = get_root_logger(logger_name='basicsr', log_level=logging.INFO, log_file=log_file)
    to_terminal, file_handlers = logger.handlers[0], logger.handlers[1:]
    to_terminal.setFormatter(logging.Formatter('%(asctime)s %(message)s', datefmt='%H:%M:%S'))
    for line in (get_env_info(), dict2str(opt)):  # a page of text that belongs into the file only
        for handler in file_handlers:
            handler.handle(logger.makeRecord('basicsr', logging.INFO, '', 0, line, (), None))
    for notice in opt.get('notices', ()):
        logger.info(notice)
    logging.captureWarnings(True)
    logging.raiseExceptions = False  # on a full disk the next checkpoint says so, and not each line of the log
    warnings.filterwarnings('ignore', message='.*does not have many workers.*')
    # DistributedDataParallel, of the layout of a 1x1 convolution's gradient: some microseconds.
    warnings.filterwarnings('ignore', message='Grad strides do not match bucket view strides')
    return logger


def build_checked_dataset(opt: dict, phase: str) -> ToolboxDataset:
    """The dataset `datasets.PHASE` of the options, with something in it.

    Raises:
        UserError: The dataset cannot be opened, is empty, or its images do not belong together.
    """
    return roots.build(opt['datasets'][phase], f'datasets.{phase}')


def build_validation_loaders(opt: dict, phases: tuple[str, ...]) -> dict[str, DataLoader]:
    """One loader per validation or test set, by its key in the option file; images come one at a time."""
    loaders = {}
    for phase in opt['datasets']:
        if phase.split('_')[0] in phases:
            dataset = build_checked_dataset(opt, phase)
            loaders[phase] = DataLoader(dataset, batch_size=1)
            get_root_logger().info(f'{dataset.opt["name"]}: {len(dataset)} images')
    return loaders


def on_terminal() -> bool:
    """Whether a person watches: a live line is of use there, and garbage in a log file."""
    return sys.stderr.isatty()
