"""Finding where a run stopped, and reading it back."""
from __future__ import annotations

import re
from os import path as osp
from pathlib import Path

import torch.distributed as dist

from elan_basicsr.checkpoint import checksum, damage, own_state_name, read_training_state
from elan_basicsr.engine.continuing import keep_seed
from elan_basicsr.errors import UserError
from elan_basicsr.interop import plugins

from basicsr.utils.misc import check_resume


def find_resume_state(opt: dict, notices: list[str]) -> dict | None:
    """The training state to continue from, with `path.pretrain_network_*` pointed at its networks; None to start anew.

    `--auto_resume` takes the newest state of the run's folder that is whole together with its networks, and tells in
    `notices` what it passed over and why; `path.resume_state` names one. Tensors are read to the CPU. What only this
    process had, such as its training pool, comes from a state of its own.
    """
    path = _agree(lambda: _newest_whole_state(opt, notices) if opt.get('auto_resume') else _named_state(opt))
    if path is None:
        if opt.get('auto_resume'):
            notices.append(f'--auto_resume: there is no training state in {opt["path"]["training_states"]} to go on '
                           'from; the run begins')
        return None
    state = read_training_state(path)
    state.update(_own_state(opt, state, Path(path), notices))
    opt['path']['resume_state'] = str(path)
    keep_seed(opt, state)
    notices += plugins.changes(state.get('imports'))
    check_resume(opt, state['iter'])
    return state


def _agree(choose) -> str | None:
    """What the first process chooses: on a network drive the others may not see the same files yet."""
    if not dist.is_initialized():
        return choose()
    answer: list[str | None] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = choose()
        except UserError as error:
            answer[1] = str(error)
    dist.broadcast_object_list(answer)
    if answer[1]:
        raise UserError(answer[1])
    return answer[0]


def _named_state(opt: dict) -> str | None:
    path = opt['path'].get('resume_state')
    if path is not None:
        state = read_training_state(path)
        wrong = _wrong_files(opt, Path(path), state)
        if wrong:
            raise UserError(f'{path}: cannot resume: {wrong}')
    return path


def _newest_whole_state(opt: dict, notices: list[str]) -> str | None:
    for path in reversed(saved_states(opt)):
        wrong = damage(path)
        try:
            wrong = wrong or _wrong_files(opt, path, read_training_state(path))
        except UserError as error:
            wrong = str(error)
        if not wrong:
            return str(path)
        notices.append(f'--auto_resume passes over {path}: {wrong}')
    return None


def saved_states(opt: dict) -> list[Path]:
    """The training states of the run, oldest first."""
    folder = Path(opt['path']['training_states'])
    return sorted((path for path in folder.glob('*.state') if re.fullmatch(r'\d+', path.stem)),
                  key=lambda path: int(path.stem))


def _wrong_files(opt: dict, path: Path, state: dict) -> str | None:
    """What is wrong with the files that belong to the training state at `path`, or None."""
    noted = state.get('files')
    noted = noted if isinstance(noted, dict) else {}
    ignored = opt['path'].get('ignore_resume_networks') or []
    networks = {f'net_{network.removeprefix("network_")}_{path.stem}.pth'
                for network in opt if network.startswith('network_') and network not in ignored}
    own_states = {str(name) for name in noted if str(name).endswith('.state')}
    for name in sorted(networks | own_states):
        file = osp.join(opt['path']['models' if name.endswith('.pth') else 'training_states'], osp.basename(name))
        wrong = _wrong_file(file, noted.get(name))
        if wrong:
            return f'{file}: {wrong}'
    return None


def _wrong_file(path: str, digest: str | None) -> str | None:
    if digest is None:  # saved by the toolbox
        return damage(path)
    try:
        with open(path, 'rb') as file:
            same = checksum(file) == digest
    except OSError:
        same = False
    return None if same else damage(path) or 'is another file than the one saved with it: its checksum differs'


def _own_state(opt: dict, state: dict, path: Path, notices: list[str]) -> dict:
    """The part of the training state that this process had to itself, empty on the first process."""
    names = [own_state_name(path.stem, rank) for rank in range(opt['world_size'])]
    files = state.get('files') or {}
    absent = sum(name not in files for name in names[1:])
    if absent and 'pool' in state:
        notices.append(f'{path.name} was saved by {opt["world_size"] - absent} of today\'s {opt["world_size"]} '
                       'processes; the training pools of the others start empty')
    if opt['rank'] == 0:
        return {}
    name = names[opt['rank']]
    return read_training_state(path.with_name(name), expected=('pool',)) if name in files else {'pool': {}}
