"""Option files, complete: read, overridden, checked, and with everything in place that the toolbox's parts expect."""
from __future__ import annotations

import os
from os import path as osp

import torch

from elan_basicsr.config.checks import check
from elan_basicsr.config.reader import Source, apply_overrides, read_yaml
from elan_basicsr.config.schema import check_keys, is_number

DEBUG_FREQUENCY = 8


def load_options(file: str | os.PathLike, *, is_train: bool, overrides=(), force_yml=(), debug: bool = False,
                 auto_resume: bool = False, root: str | None = None) -> dict:
    """The options of a run, as BasicSR's own parser would leave them, without its `eval`, `exec` and tag handling.

    Args:
        file: A BasicSR option file.
        is_train: For training, or for testing.
        overrides: Texts `key.sub=value`, from `--set`.
        force_yml: Texts `key:sub=value`, from `--force_yml`.
        debug: BasicSR's debug run: its name, and log, save and validation frequencies.
        auto_resume: Continue from the newest checkpoint of the run.
        root: Folder of `experiments`, `results` and `tb_logger`; the current one by default.

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
    check_keys(opt, source, is_train)
    check(opt, source, is_train)
    opt.update(is_train=is_train, auto_resume=auto_resume, root_path=osp.abspath(root or os.getcwd()))
    opt['path'] = opt.get('path') or {}
    opt['notices'] = []
    _choose_device(opt)
    if debug and not opt['name'].startswith('debug'):
        opt['name'] = f'debug_{opt["name"]}'
    _complete_datasets(opt)
    _complete_paths(opt)
    if is_train:
        _complete_logger(opt)
    _whole_numbers(opt)
    _check_again(opt, source)
    return opt


def _choose_device(opt: dict) -> None:
    present = torch.cuda.device_count()
    wanted = opt.setdefault('num_gpu', 'auto')
    if wanted == 'auto':
        opt['num_gpu'] = present
        if not present:
            opt['notices'].append('num_gpu: auto found no GPU; running on the CPU.')
    elif wanted > present:
        opt['num_gpu'] = present
        opt['notices'].append(f'num_gpu: {wanted} asked for, {present} there; running on '
                              f'{f"{present} GPUs" if present else "the CPU"}.')


def _complete_datasets(opt: dict) -> None:
    for phase, dataset in opt['datasets'].items():
        dataset['phase'] = phase.split('_')[0]
        dataset.setdefault('name', phase)
        if 'scale' in opt:
            dataset['scale'] = opt['scale']
        for key, value in dataset.items():
            if key.startswith('dataroot_') and isinstance(value, str):
                dataset[key] = osp.expanduser(value)


def _complete_paths(opt: dict) -> None:
    """The folders of the run, under `root_path`, named as the toolbox names them."""
    path = opt['path']
    for key, value in path.items():
        if isinstance(value, str) and ('resume_state' in key or 'pretrain_network' in key):
            path[key] = osp.expanduser(value)
    if opt['is_train']:
        run = osp.join(_folder(opt, 'experiments'), opt['name'])
        path.update(experiments_root=run, models=osp.join(run, 'models'),
                    training_states=osp.join(run, 'training_states'), log=run,
                    visualization=osp.join(run, 'visualization'))
        path.setdefault('resume_state', None)
    else:
        run = osp.join(_folder(opt, 'results'), opt['name'])
        path.update(results_root=run, log=run, visualization=osp.join(run, 'visualization'))
        opt['val'] = opt.get('val') or {}
        opt['val'].setdefault('suffix', None)  # the toolbox's own models index it


def _folder(opt: dict, kind: str) -> str:
    """Where the runs lie: as `path.KIND_root` says, else in KIND under the root."""
    chosen = opt['path'].get(f'{kind}_root')
    return osp.join(opt['root_path'], osp.expanduser(chosen) if chosen else kind)


def _complete_logger(opt: dict) -> None:
    opt['logger'] = logger = opt.get('logger') or {}
    for key, default in (('print_freq', 100), ('save_checkpoint_freq', 5000), ('use_tb_logger', False)):
        logger.setdefault(key, default)
    if opt.get('val'):
        opt['val'].setdefault('val_freq', 5000)
        opt['val'].setdefault('save_img', False)
    if 'debug' in opt['name']:
        logger.update(print_freq=1, save_checkpoint_freq=DEBUG_FREQUENCY)
        if opt.get('val'):
            opt['val']['val_freq'] = DEBUG_FREQUENCY


def _whole_numbers(opt: dict) -> None:
    """`!!float 5e3`, as BasicSR's files write counts of iterations, becomes 5000."""
    sections = [opt.get('train') or {}, opt.get('val') or {}, opt.get('logger') or {}, *opt['datasets'].values()]
    for section in filter(lambda section: isinstance(section, dict), sections):
        for key in ('total_iter', 'val_freq', 'save_checkpoint_freq', 'dataset_enlarge_ratio'):
            if is_number(section.get(key)):  # anything may stand under a key of another section
                section[key] = int(section[key])


def _check_again(opt: dict, source: Source) -> None:
    """What can be checked only once the devices are known."""
    if not opt['is_train']:
        return
    if opt['train'].get('amp') == 'fp16' and opt['num_gpu'] == 0:
        raise source.error('train.amp', 'fp16 needs a GPU, and there is none; expected bf16 or false')
    resume = opt['path'].get('resume_state')
    if opt['auto_resume'] and resume:
        opt['notices'].append(f'--auto_resume: path.resume_state ({resume}) is not used.')
