"""Option files, complete: read, overridden, checked, and with everything in place that the toolbox's parts expect."""
from __future__ import annotations

import os
import shlex
from os import path as osp

import torch

from elan_basicsr.config.checks import check
from elan_basicsr.config.reader import Source, apply_overrides, read_yaml
from elan_basicsr.config.schema import KEYS, check_keys, expand_paths
from elan_basicsr.interop import plugins
from elan_basicsr.interop.weights import local_file

DEBUG_FREQUENCY = 8


def load_options(file: str | os.PathLike, *, is_train: bool, overrides=(), force_yml=(), debug: bool = False,
                 auto_resume: bool = False, root: str | None = None, launched: bool = False) -> dict:
    """The options of a run, as BasicSR's own parser would leave them, without its `eval`, `exec` and tag handling.

    Args:
        file: A BasicSR option file.
        is_train: For training, or for testing.
        overrides: Texts `key.sub=value`, from `--set`.
        force_yml: Texts `key:sub=value`, from `--force_yml`.
        debug: BasicSR's debug run: its name, and log, save and validation frequencies.
        auto_resume: Continue from the newest checkpoint of the run.
        root: Folder of `experiments`, `results` and `tb_logger`; the current one by default.
        launched: Whether the run is one of several processes with a GPU each, rather than one process with one GPU.

    Returns:
        A dict of plain values. `notices` lists lines the log should show. `dist`, `rank`, `world_size` and a missing
        `manual_seed` are the launcher's to fill in.

    Raises:
        UserError: The first mistake found, in one line with file, key and line.
    """
    opt, source = read_yaml(file)
    apply_overrides(opt, source, overrides, force_yml)
    if isinstance(opt.get('datasets'), dict):  # `--set datasets.test_5=~` leaves a set out
        opt['datasets'] = {phase: dataset for phase, dataset in opt['datasets'].items() if dataset is not None}
    opt = expand_paths(opt)
    check_keys(opt, source, is_train)
    check(opt, source, is_train)
    opt.update(is_train=is_train, auto_resume=auto_resume, root_path=osp.abspath(root or os.getcwd()))
    opt['path'] = opt.get('path') or {}
    opt['notices'] = plugins.notices()
    _choose_device(opt, source, launched)
    if debug and not opt['name'].startswith('debug'):
        opt['name'] = f'debug_{opt["name"]}'
    _complete_datasets(opt)
    _complete_paths(opt)
    if is_train:
        _complete_frequencies(opt)
    _whole_numbers(opt)
    return opt


def _choose_device(opt: dict, source: Source, launched: bool) -> None:
    wanted = opt.get('num_gpu', KEYS['num_gpu'][2])
    present = torch.cuda.device_count() if wanted else 0
    opt['num_gpu'] = present if wanted == 'auto' else min(wanted, present)
    if opt['num_gpu'] > 1 and not launched:
        command = (f'torchrun --nproc_per_node {opt["num_gpu"]} -m elan_basicsr '
                   f'{"train" if opt["is_train"] else "test"} -opt {shlex.quote(source.file)}')
        if wanted != 'auto':
            raise source.error('num_gpu', f'is {wanted}, and each GPU takes a process of its own, as in {command}; '
                                          'expected auto, 1 or 0 for a single process')
        opt['notices'].append(f'num_gpu: auto takes one of {present} GPUs; for all: {command}')
        opt['num_gpu'] = 1
    elif wanted == 'auto' and not present:
        opt['notices'].append('num_gpu: auto found no GPU; running on the CPU.')
    elif wanted != 'auto' and wanted > present:
        opt['notices'].append(f'num_gpu: {wanted} asked for, {present} there; running on '
                              f'{f"{present} GPUs" if present else "the CPU"}.')
    if opt['is_train'] and opt['train'].get('amp') == 'fp16' and opt['num_gpu'] == 0:
        raise source.error('train.amp', 'fp16 needs a GPU, and there is none; expected bf16 or false')
    if launched and (opt.get('dist_params') or {}).get('backend') == 'nccl' and opt['num_gpu'] == 0:
        opt['dist_params']['backend'] = 'gloo'  # BasicSR's own files name nccl, and are to run everywhere
        opt['notices'].append('dist_params.backend: nccl is for GPUs; the processes meet by gloo.')


def _complete_datasets(opt: dict) -> None:
    for phase, dataset in opt['datasets'].items():
        dataset['phase'] = phase.split('_')[0]
        dataset.setdefault('name', phase)
        if 'scale' in opt:
            dataset['scale'] = opt['scale']


def _complete_paths(opt: dict) -> None:
    """The folders of the run, under `root_path`, named as the toolbox names them."""
    path = opt['path']
    for key, value in path.items():
        if isinstance(value, str) and key.startswith('pretrain_network_'):
            path[key] = str(local_file(value))
    if opt['is_train']:
        run = osp.join(_folder(opt, 'experiments'), opt['name'])
        path.update(experiments_root=run, models=osp.join(run, 'models'),
                    training_states=osp.join(run, 'training_states'), log=run,
                    visualization=osp.join(run, 'visualization'))
        if path.setdefault('resume_state', None) and opt['auto_resume']:
            opt['notices'].append(f'--auto_resume: path.resume_state ({path["resume_state"]}) is not used.')
    else:
        run = osp.join(_folder(opt, 'results'), opt['name'])
        path.update(results_root=run, log=run, visualization=osp.join(run, 'visualization'))
        opt['val'] = opt.get('val') or {}
        opt['val'].setdefault('suffix', None)  # the toolbox's own models index it


def _folder(opt: dict, kind: str) -> str:
    """Where the runs lie: as `path.KIND_root` says, else in KIND under the root."""
    chosen = opt['path'].get(f'{kind}_root')
    return osp.join(opt['root_path'], chosen or kind)


def _complete_frequencies(opt: dict) -> None:
    opt['logger'] = opt.get('logger') or {}
    for section, *names in (('logger', 'print_freq', 'save_checkpoint_freq', 'use_tb_logger'),
                            *([('val', 'val_freq', 'save_img')] if opt.get('val') else [])):
        for name in names:
            opt[section].setdefault(name, KEYS[f'{section}.{name}'][2])
    if 'debug' in opt['name']:
        opt['logger'].update(print_freq=1, save_checkpoint_freq=DEBUG_FREQUENCY)
        if opt.get('val'):
            opt['val']['val_freq'] = DEBUG_FREQUENCY


def _whole_numbers(opt: dict) -> None:
    """`!!float 5e3`, as BasicSR's files write counts of iterations, becomes 5000."""
    for section, name in ((opt.get('train'), 'total_iter'), (opt.get('val'), 'val_freq'),
                          (opt.get('logger'), 'save_checkpoint_freq'),
                          *((dataset, 'dataset_enlarge_ratio') for dataset in opt['datasets'].values())):
        if section and name in section:
            section[name] = int(section[name])
