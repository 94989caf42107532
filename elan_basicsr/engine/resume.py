"""Finding where a run stopped, and reading it back."""
from __future__ import annotations

import re
from os import path as osp
from pathlib import Path

from elan_basicsr.checkpoint import damage, read_training_state
from elan_basicsr.errors import UserError

from basicsr.utils.misc import check_resume


def find_resume_state(opt: dict, notices: list[str]) -> dict | None:
    """The training state to continue from, with `path.pretrain_network_*` pointed at its networks; None to start anew.

    `--auto_resume` takes the newest state of the run's folder that is whole together with its networks, and tells in
    `notices` what it passed over and why; `path.resume_state` names one. Tensors are read to the CPU.
    """
    path = _newest_whole_state(opt, notices) if opt.get('auto_resume') else opt['path'].get('resume_state')
    if path is None:
        return None
    state = read_training_state(path)
    wrong = _wrong_networks(opt, Path(path))
    if wrong:
        raise UserError(f'{path}: cannot resume: {wrong}')
    opt['path']['resume_state'] = str(path)
    check_resume(opt, state['iter'])
    return state


def _newest_whole_state(opt: dict, notices: list[str]) -> Path | None:
    folder = Path(opt['path']['training_states'])
    states = [path for path in folder.glob('*.state') if re.fullmatch(r'\d+', path.stem)]
    for path in sorted(states, key=lambda p: int(p.stem), reverse=True):
        wrong = damage(path) or _wrong_networks(opt, path)
        if not wrong:
            return path
        notices.append(f'--auto_resume passes over {path}: {wrong}')
    return None


def _wrong_networks(opt: dict, state: Path) -> str | None:
    """What is wrong with the networks saved with `state`, or None."""
    ignored = opt['path'].get('ignore_resume_networks') or []
    for network in (key for key in opt if key.startswith('network_') and key not in ignored):
        path = osp.join(opt['path']['models'], f'net_{network.removeprefix("network_")}_{state.stem}.pth')
        wrong = damage(path)
        if wrong:
            return f'{path}: {wrong}'
    return None
