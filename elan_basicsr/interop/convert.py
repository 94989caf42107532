"""`basicsr convert`: a checkpoint of ELAN from one form into another, without a differing weight."""
from __future__ import annotations

import os
from pathlib import Path

import torch

from elan_basicsr.archs.elan_arch import ELAN
from elan_basicsr.checkpoint import build_elan, load_elan, read_checkpoint, save_atomic, save_safetensors
from elan_basicsr.errors import UserError
from elan_basicsr.forms import NOTE, note_of, to_official
from elan_basicsr.interop.weights import local_file

FORMS = ('basicsr', 'official', 'safetensors')


def convert(source: str | os.PathLike, target: str | os.PathLike, form: str | None = None, ema: bool = False) -> ELAN:
    """Write the ELAN in `source` to `target`, read it back, and run both.

    The hyper-parameters that weights do not tell (windows, range, mean) are noted in the new file; other programs pass
    over the note.

    Args:
        source: A checkpoint of any form that `load_elan` reads, or a name of the known weights.
        target: The new file, which must not exist.
        form: `basicsr`: our names under `params`; `official`: the authors' names, as their training writes them, for
            their code to load strictly; `safetensors`: our names. By default what the name of `target` says.
        ema: Take the average of the weights, `params_ema`, of a file that has it.

    Returns:
        The network that was converted.

    Raises:
        UserError: `source` cannot be read or is no ELAN, or `target` cannot be written as `form`.
    """
    target = Path(target)
    form = form or ('safetensors' if target.suffix == '.safetensors' else 'basicsr')
    _check_target(target, form)
    source = local_file(source)
    state, noted = read_checkpoint(source, 'params_ema' if ema else 'params', exact=ema)
    net, note = build_elan(state, noted, source), note_of(state, noted)
    if any(value.dtype == torch.float64 for value in state.values()):
        raise UserError(f'{source}: its weights are float64, which conversion would round; expected float32 or less')
    if form == 'safetensors':
        save_safetensors(net.state_dict(), note, target)
    elif form == 'official':
        official = {f'module.{name}': value for name, value in to_official(net).items()}
        save_atomic({'epoch': 0, 'model_state_dict': official, NOTE: note}, target)
    else:
        save_atomic({'params': net.state_dict(), NOTE: note}, target)
    _check_same(net, target)
    return net


def _check_target(target: Path, form: str) -> None:
    if (form == 'safetensors') != (target.suffix == '.safetensors'):
        wanted = '.safetensors' if form == 'safetensors' else '.pth'
        raise UserError(f'{target}: a file of the form {form} is told by its name; expected one that ends in {wanted}')
    if target.exists():
        raise UserError(f'{target}: is there already and is not overwritten; remove it or choose another name')
    if not target.parent.is_dir():
        raise UserError(f'{target}: the folder {target.parent} does not exist')


def _check_same(net: ELAN, target: Path) -> None:
    """Read the new file back; weights and results must be those of `net` to the bit, else it does not stay."""
    written = load_elan(target)
    ours, theirs = net.state_dict(), written.state_dict()
    x = torch.rand(1, net.head.in_channels, 40, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        same = (ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
                and torch.equal(net(x), written(x)))
    if not same:
        target.unlink()
        raise UserError(f'{target}: does not compute what the original computes, and was removed; please report this')
