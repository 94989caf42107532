"""Checkpoints, read safely, written whole and loaded into networks.

`elan_basicsr.contents` finds the weights in what a file holds, `elan_basicsr.forms` knows the names they come under.
"""
from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

import safetensors.torch
import torch
from torch import nn

from elan_basicsr.archs.elan_arch import ELAN
from elan_basicsr.contents import (
    Known,
    Needs,
    StateDict,
    all_of,
    any_weights,
    check_finite,
    choose_network,
    described,
    find_networks,
    shown_name,
)
from elan_basicsr.errors import UserError
from elan_basicsr.forms import NOTE, UNSEEN, elan_hyperparameters, is_elan, native_names, needs_of_elan, to_native
from elan_basicsr.plain_values import NOTE_KINDS, STATE_KINDS, check_values
from elan_basicsr.safe_read import bounded_building, check_regular, opened_records, read_safetensors, read_torch

# ---------------------------------------------------------------------------------------------------------- reading

def read_state_dict(path: str | os.PathLike, param_key: str | None = None, known: Known = is_elan) -> StateDict:
    """The weights of a network in a file, names as they stand there after any prefix; tensors on the CPU.

    Takes what torch.save or safetensors wrote, with the network's dict of tensors under any keys, and with any prefix
    of wrappers before its names: the network is what `known` recognises. Where nothing is, weights as they stand there.

    Args:
        path: The file.
        param_key: Which of several networks: a key or prefix. When not given or absent, the average of the weights
            where the file has one, and where `params` is absent, the others.
        known: Tells by the names, and tensors, whether it is a network.

    Raises:
        UserError: The file is missing, truncated, no checkpoint, holds objects other than tensors, which are never
            unpickled, holds several networks, or weights that are not finite.
    """
    return read_checkpoint(path, param_key, known=known)[0]


def read_checkpoint(path: str | os.PathLike, param_key: str | None = None, exact: bool = False,
                    known: Known = is_elan) -> tuple[StateDict, dict]:
    """The network weights in a file, as `read_state_dict`, and the hyper-parameters noted beside them, if any.

    With `exact`, a file that has no `param_key` is an error.
    """
    content = read_safetensors(path, NOTE) if str(path).endswith('.safetensors') else read_torch(path)
    noted = content.pop(NOTE, None)
    found = find_networks(content, known)
    state = choose_network(found, param_key, path, exact) if found else any_weights(content, param_key, path)
    check_finite(state, path)
    noted = {key: noted[key] for key in UNSEEN if key in noted} if isinstance(noted, dict) else {}
    check_values(noted, NOTE_KINDS, path)
    return state, noted


def own_state_name(iteration: int | str, rank: int) -> str:
    """The file beside `ITER.state` with what only the process `rank` had."""
    return f'{iteration}.rank{rank}.state'


def read_training_state(path: str | os.PathLike, expected=('iter', 'epoch', 'optimizers', 'schedulers')) -> dict:
    """A `.state` file of a training run: iteration, optimizers, schedulers.

    Raises:
        UserError: The file is missing, damaged, or no training state.
    """
    state = read_torch(path)
    missing = [key for key in expected if key not in state]
    if missing:
        raise UserError(f'{path}: is no training state: {", ".join(missing)} missing; expected a file ITER.state that '
                        'a training run wrote')
    check_values(state, STATE_KINDS, path)
    return state


def damage(path: str | os.PathLike) -> str | None:
    """What is wrong with a file that torch.save wrote: missing, cut off, or a record whose CRC-32 does not match."""
    try:
        check_regular(path)
    except UserError as error:
        return str(error).removeprefix(f'{path}: ')
    try:
        with opened_records(path) as archive:
            bad = archive.testzip()
    except UserError as error:
        return f'cut off or damaged ({str(error).removeprefix(f"{path}: ")})'
    return f'damaged at {bad}' if bad else None


def _one_line(error: BaseException) -> str:
    text = ' '.join(str(error).split())
    return (text[:120] + '…' if len(text) > 120 else text) or type(error).__name__


# ---------------------------------------------------------------------------------------------------------- writing

UNFINISHED = '.tmp'  # ends the name of a file that is being written


def save_atomic(content: dict, path: str | os.PathLike) -> str:
    """Write `content` with torch.save to a temporary file beside `path`, flush it to the disk, and rename it.

    Returns:
        The file's `checksum`.

    Raises:
        UserError: The folder cannot be written or the disk is full; a file that stood at `path` before is untouched.
    """
    return _write_atomic(lambda file: torch.save(content, file), path)


def checksum(file: IO[bytes]) -> str:
    """SHA-256 of a file open for reading, from its beginning, in hexadecimal digits."""
    file.seek(0)
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def save_safetensors(state: StateDict, note: dict, path: str | os.PathLike) -> None:
    """The same for weights as `.safetensors`, with the hyper-parameters of `note` in its metadata."""
    state = {name: value.detach().clone().contiguous() for name, value in state.items()}
    data = safetensors.torch.save(state, {'format': 'pt', NOTE: json.dumps(note)})
    _write_atomic(lambda file: file.write(data), path)


def _write_atomic(write: Callable[[IO[bytes]], object], path: str | os.PathLike) -> str:
    path = Path(path)
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f'.{path.name}.', suffix=UNFINISHED,
                                         delete=False) as file:
            temporary = file.name
            write(file)
            file.flush()
            os.fsync(file.fileno())
            digest = checksum(file)
        os.chmod(temporary, 0o666 & ~_umask())  # NamedTemporaryFile makes files for the owner alone
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
        reason = getattr(error, 'strerror', None) or _one_line(error)
        raise UserError(f'{path}: cannot be saved: {reason}; what was saved before is intact') from error
    _sync_folder(path.parent)
    return digest


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut; not every file system lets a folder be opened."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------------------------------------------------- loading

def load_elan(path: str | os.PathLike, *, param_key: str | None = None, **hyperparameters) -> ELAN:
    """The ELAN in a checkpoint of any known form, in eval mode on the CPU.

    Args:
        path: The file; see `read_state_dict`.
        param_key: Which of several networks, such as `params` or `params_ema`.
        hyperparameters: Arguments of `ELAN` that the weights do not tell, such as `window_sizes` or `img_range`, or
            that should be other than found.

    Raises:
        UserError: The file cannot be read, or is no ELAN's.
        ValueError: A hyper-parameter given cannot work.
    """
    state, noted = read_checkpoint(path, param_key)
    return build_elan(state, noted, path, **hyperparameters)


def build_elan(state: StateDict, noted: dict, path: str | os.PathLike, **hyperparameters) -> ELAN:
    """The ELAN of what `read_checkpoint` has read from `path`; see `load_elan`."""
    if not is_elan(state):
        raise UserError(f'{path}: its weights are not those of an ELAN: {described(state, needs_of_elan())}')
    try:
        with bounded_building(2 * len(state) + 100, 2 * sum(value.numel() for value in state.values()) + 1000):
            net = ELAN(**{**elan_hyperparameters(state), **noted, **hyperparameters})
    except UserError as error:
        raise UserError(f'{path}: {error}') from None
    except ValueError as error:
        if hyperparameters:
            raise
        raise UserError(f'{path}: {error}') from None
    _load_native(net, to_native(state), path)
    return net.eval()


def load_into(net: nn.Module, path: str | os.PathLike, strict: bool = True, param_key: str | None = 'params'
              ) -> list[str]:
    """Load a checkpoint into a network: of ELAN in any form, of another architecture by its own names.

    Args:
        net: The network, which keeps its hyper-parameters.
        path: The file; see `read_state_dict`.
        strict: Whether every weight must fit. Otherwise those that are absent or have another shape stay as they are:
            an x2 network starts an x3 or x4 one, all but the tail.
        param_key: Which of several networks, such as `params` or `params_ema`.

    Returns:
        The names of the weights that were not loaded, empty when `strict`.

    Raises:
        UserError: The file cannot be read, or does not fit.
    """
    own = net.state_dict()

    def has_much_of_it(state: StateDict) -> bool:
        names = native_names(state) if isinstance(net, ELAN) else state.keys()
        return 4 * len(own.keys() & set(names)) >= len(own)

    state = read_state_dict(path, param_key, known=has_much_of_it)
    try:
        state = to_native(state) if isinstance(net, ELAN) else state
    except UserError as error:
        raise UserError(f'{path}: {error}') from None
    if strict:
        _load_native(net, state, path)
        return []
    fitting = {name: value for name, value in state.items() if name in own and own[name].shape == value.shape}
    if not fitting:
        raise UserError(f'{path}: none of its weights fits the network: {described(state, [_needs(net)])}; expected an '
                        f'{type(net).__name__} of the same width')
    net.load_state_dict(fitting, strict=False)
    return [name for name in own if name not in fitting]


def _needs(net: nn.Module) -> tuple[str, Needs]:
    return f'the {type(net).__name__} here', all_of(net.state_dict().keys())


def _load_native(net: nn.Module, native: StateDict, path) -> None:
    own = net.state_dict()
    if not own.keys() & native.keys():
        raise UserError(f'{path}: does not fit the network: {described(native, [_needs(net)])}; expected the weights '
                        f'of an {type(net).__name__}')
    wrong = [f'{name} is {tuple(native[name].shape)} there and {tuple(own[name].shape)} here'
             for name in own if name in native and own[name].shape != native[name].shape]
    wrong += [f'{name} is missing there' for name in own if name not in native]
    wrong += [f'{shown_name(name)} is unknown here' for name in native if name not in own]
    if wrong:
        more = f' and {len(wrong) - 2} more' if len(wrong) > 2 else ''
        here, there = getattr(net, 'upscale', None), _scale_of(native) if isinstance(net, ELAN) else None
        hint = f'; the file is x{there}, the network x{here}' if there not in (None, here) else ''
        raise UserError(f'{path}: does not fit the network: {"; ".join(wrong[:2])}{more}{hint}; make network_g agree '
                        'with the file, or set strict_load_g: false to load what fits')
    net.load_state_dict(native)


def _scale_of(native: StateDict) -> int | None:
    try:
        return elan_hyperparameters(native)['upscale']
    except UserError:
        return None
