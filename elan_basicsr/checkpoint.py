"""Checkpoints: every form in circulation in, every form out, read safely and written whole.

The table FORMS has the names that ELAN's weights come under; all become ours. `elan_basicsr.contents` finds the weights
in what a file holds.
"""
from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import IO, NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn

from elan_basicsr.archs.elan_arch import ELAN, NUM_SHIFT_GROUPS
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
from elan_basicsr.plain_values import NOTE_KINDS, STATE_KINDS, check_values
from elan_basicsr.safe_read import bounded_building, check_regular, opened_records, read_safetensors, read_torch

RGB_MEAN = (0.4488, 0.4371, 0.4040)
# Where a masked 3x3 kernel is open for each group of input channels: right, left, below, above, itself.
_SHIFT_TAPS = ((1, 2), (1, 0), (2, 1), (0, 1), (1, 1))

# What the weights of an ELAN do not tell, and the key under which files of ours note it beside the weights.
UNSEEN = ('window_sizes', 'img_range', 'rgb_mean')
NOTE = 'hyperparameters'


# ------------------------------------------------------------------------------------------------------------ forms

def _names(head: str, tail: str, lfe: str, convolutions: Collection[str], gmsa: str, projections: Collection[str]
           ) -> tuple[str, ...]:
    """The names of a network's parts, where {b} is a block and {m} a module in it; any leaf follows a dot at the end.
    """
    return head, tail, *(lfe + name for name in convolutions), *(gmsa + name for name in projections)


class Form(NamedTuple):
    """One kind of names.

    Attributes:
        title: Whose it is.
        names: What it calls the parts in the order of `_names`. It is recognised by those of the first module.
        img_range: The range that its networks compute on without a mean where there are no mean-shift layers.
    """
    title: str
    names: tuple[str, ...]
    img_range: float | None = None

    def first(self) -> list[str]:
        """The names that every network of this form has."""
        leaves = ('weight',) * 2 + ('',) * 4 + ('weight', 'running_var', 'weight')
        return [name.format(b=0, m=0) + leaf for name, leaf in zip(self.names, leaves, strict=True)]

    def patterns(self) -> list[re.Pattern[str]]:
        """For each part, what its names match; the groups are the block, the module and the leaf."""
        return [re.compile(re.escape(name).replace(r'\{b\}', r'(?P<b>\d+)').replace(r'\{m\}', r'(?P<m>\d+)')
                           + (r'(?P<leaf>\w+)' if name.endswith('.') else '(?P<leaf>)')) for name in self.names]


OURS = Form('ours', _names(
    'head.', 'tail.', 'body.{b}.lfe.{m}.', ('conv0.weight', 'conv0.bias', 'conv1.weight', 'conv1.bias'),
    'body.{b}.gmsa.{m}.', ('project_in.', 'norm.', 'project_out.')))
# With a fixed depthwise kernel before each 1x1 convolution; traiNNer-redux's has no mean-shift layers.
AUTHORS = Form("the authors'", _names(
    'head.0.', 'tail.0.', 'body.{b}.modules_lfe.lfe_{m}.', (
        'conv0.shift_conv.conv1x1.weight', 'conv0.shift_conv.conv1x1.bias',
        'conv1.shift_conv.conv1x1.weight', 'conv1.shift_conv.conv1x1.bias'),
    'body.{b}.modules_gmsa.gmsa_{m}.', ('project_inp.0.', 'project_inp.1.', 'project_out.')), img_range=1.)
MASKED = Form("the authors' with masked 3x3 kernels", _names(
    'head.0.', 'tail.0.', 'body.{b}.modules_lfe.lfe_{m}.', (
        'conv0.shift_conv.w', 'conv0.shift_conv.b', 'conv1.shift_conv.w', 'conv1.shift_conv.b'),
    'body.{b}.modules_gmsa.gmsa_{m}.', ('project_inp.0.', 'project_inp.1.', 'project_out.')), img_range=1.)
FRIED_RICE_LAB = Form("FriedRiceLab's", _names(
    'head.', 'tail.0.', 'body.{b}.modules_lfe.{m}.', ('lfe.0.weight', 'lfe.0.bias', 'lfe.2.weight', 'lfe.2.bias'),
    'body.{b}.modules_gmsa.{m}.', ('project_inp.0.', 'project_inp.1.', 'project_out.')))
FORMS = (OURS, AUTHORS, MASKED, FRIED_RICE_LAB)

# What is not learnt: the layers of the mean, depthwise shift kernels (C, 1, 3, 3), and masks (D, C, 3, 3).
_FIXED = re.compile(r'(sub|add)_mean\.|.*\.(shift_conv\.(weight|m)|lfe\.\d+\.mask)$')


def is_elan(state: StateDict) -> bool:
    """Whether a state dict is an ELAN's, in any form, by the names alone."""
    return any(state.keys() >= set(form.first()) for form in FORMS)


def needs_of_elan() -> list[tuple[str, Needs]]:
    """ELAN in each form, for `contents.described`."""
    return [(f'ELAN in {form.title} form' if form is not OURS else 'ELAN', all_of(form.first())) for form in FORMS]


def _form_of(names: Collection[str]) -> Form:
    """The form that most of the names fit: some may be missing, as in a part of a network."""
    def fitting(form: Form) -> int:
        patterns = form.patterns()
        return sum(any(pattern.fullmatch(name) for pattern in patterns) for name in names)
    return max(FORMS, key=fitting)


def _renaming(source: Form, target: Form) -> Callable[[str], str]:
    pairs = list(zip(source.patterns(), target.names, strict=True))

    def rename(name: str) -> str:
        for pattern, part in pairs:
            if match := pattern.fullmatch(name):
                return part.format(**match.groupdict()) + match['leaf']
        return name

    return rename


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


# ------------------------------------------------------------------------------------------------------- converting

def to_native(state: StateDict) -> StateDict:
    """ELAN's weights of any form under our names. Fixed shift kernels and mean-shift layers are dropped.

    Raises:
        UserError: A kernel has another shape than in that form, or shifts otherwise.
    """
    form = _form_of(state)
    rename = _renaming(form, OURS)
    native = {}
    for name, value in state.items():
        if form is not OURS and _FIXED.match(name):
            _check_shift(name, value)
        else:
            native[rename(name)] = _open_taps(value) if form is MASKED and name.endswith('shift_conv.w') else value
    return native


def _check_shift(name: str, value: Tensor) -> None:
    """Of what is fixed the shifts are what could differ without a trace in the result's shape."""
    if '_mean.' in name:
        return
    depthwise = not name.endswith('.m')
    right = value.dim() == 4 and value.shape[2:] == (3, 3) and (not depthwise or value.shape[1] == 1)
    if right:
        kernel = _shift_kernel(value.shape[0 if depthwise else 1])
        kernel = kernel if depthwise else kernel.transpose(0, 1).expand_as(value)
        right = torch.equal(value.to(kernel.dtype), kernel)
    if not right:
        raise UserError(f'the weights are not those of an ELAN: {name} is no kernel that shifts channels right, left, '
                        'below, above and not')


def _open_taps(kernel: Tensor) -> Tensor:
    """The one open tap per group of a masked (D, C, 3, 3) kernel, as a (D, C, 1, 1) one."""
    if kernel.dim() != 4 or kernel.shape[2:] != (3, 3):
        raise UserError(f'the weights are not those of an ELAN: a masked kernel of {tuple(kernel.shape)}, expected 3x3')
    parts = kernel.split(_group_sizes(kernel.shape[1]), dim=1)
    parts = [part[:, :, y, x] for part, (y, x) in zip(parts, _SHIFT_TAPS, strict=True)]
    return torch.cat(parts, dim=1)[:, :, None, None]


def _unseen_defaults() -> dict:
    return {key: inspect.signature(ELAN).parameters[key].default for key in UNSEEN}


def note_of(state: StateDict, noted: dict) -> dict:
    """What is to be noted beside an ELAN's weights, all of UNSEEN, from what `read_checkpoint` has read."""
    return {key: list(value) if isinstance(value, (list, tuple)) else value
            for key, value in {**_unseen_defaults(), **_range_and_mean(state), **noted}.items() if key in UNSEEN}


def note_of_arguments(arguments: dict) -> dict:
    """The same from ELAN's arguments, and only what differs from the defaults, which readers take anyway."""
    whole = note_of({}, arguments)
    return {key: whole[key] for key, value in note_of({}, {}).items() if whole[key] != value}


def to_official(net: ELAN) -> StateDict:
    """The weights of a network by the authors' names, complete: they load strictly into the authors' code.

    The shift convolutions are those of their `fast-training-speed`: a fixed depthwise kernel, then the 1x1 one.

    Raises:
        UserError: The network is not one of RGB in and out, which the authors' mean-shift layers are made for.
    """
    mean = net.mean_in.flatten()
    if len(mean) != 3 or not torch.equal(net.mean_in, net.mean_out):
        raise UserError(f"the authors' code takes RGB; a network from {net.head.in_channels} to "
                        f'{net.mean_out.numel()} channels has no official form')
    official = {}
    for layer, sign in (('sub_mean', -1), ('add_mean', 1)):
        official[f'{layer}.weight'] = torch.eye(3)[:, :, None, None]
        official[f'{layer}.bias'] = sign * mean
    rename = _renaming(OURS, AUTHORS)
    for name, value in net.state_dict().items():
        official_name = rename(name)
        if official_name.endswith('conv1x1.weight'):
            official[official_name.replace('conv1x1.', '')] = _shift_kernel(value.shape[1])
        official[official_name] = value
    return official


def _shift_kernel(channels: int) -> Tensor:
    """The depthwise kernel (C, 1, 3, 3) that shifts each group of channels."""
    kernel = torch.zeros(channels, 1, 3, 3)
    for part, (y, x) in zip(kernel.split(_group_sizes(channels)), _SHIFT_TAPS, strict=True):
        part[:, :, y, x] = 1
    return kernel


def _group_sizes(channels: int) -> list[int]:
    group = channels // NUM_SHIFT_GROUPS
    return [group] * 4 + [channels - 4 * group]


def elan_hyperparameters(state: StateDict) -> dict:
    """Every hyper-parameter of ELAN from the shapes of its weights, in any form.

    The window sizes leave no trace in the weights and are not in the result; the range and the mean do only where the
    authors' mean-shift layers are there.

    Raises:
        UserError: The weights are not those of an ELAN.
    """
    native = to_native(state)
    try:
        num_feat, num_in_ch = native['head.weight'].shape[:2]
        blocks = 1 + max(int(name.split('.')[1]) for name in native if name.startswith('body.'))
        modules = 1 + max(int(name.split('.')[3]) for name in native if name.startswith('body.0.lfe.'))
        expansion = native['body.0.lfe.0.conv0.weight'].shape[0] // num_feat  # (num_feat * expansion, num_feat, 1, 1)
        out = native['tail.weight'].shape[0]  # num_out_ch * upscale²
        if not num_in_ch * out:
            raise ValueError
    except (KeyError, ValueError, IndexError, ZeroDivisionError):
        raise UserError('the weights are not those of an ELAN: expected head, body and tail') from None
    # Colour in, colour out. Grey to grey and RGB to RGB are told apart from out = num_out_ch * upscale² by trying the
    # channels of the input first.
    for num_out_ch in (num_in_ch, 1, 3):
        upscale = round((out / num_out_ch) ** 0.5)
        if num_out_ch * upscale**2 == out:
            break
    else:
        raise UserError(f'the tail has {out} channels, which is no num_out_ch * upscale²')
    found = dict(upscale=upscale, num_in_ch=num_in_ch, num_out_ch=num_out_ch, num_feat=num_feat,
                 num_block=blocks * modules, num_share=modules - 1, expansion=expansion)
    found.update(_range_and_mean(state))
    return found


def _range_and_mean(state: StateDict) -> dict:
    """img_range and rgb_mean, where the form tells them.

    The authors' layer adds bias = img_range * rgb_mean, so that with the published mean the range is bias / mean. With
    another mean the range is taken for 255, or for 1 where the bias would fit it.
    """
    if 'add_mean.bias' in state and state['add_mean.bias'].shape == (3,):
        bias = state['add_mean.bias'].double()
        ratios = bias / torch.tensor(RGB_MEAN, dtype=torch.float64)
        if ratios[0] > 0 and torch.allclose(ratios, ratios[0].expand(3), rtol=1e-4):
            return {'img_range': round(ratios[0].item(), 3)}
        img_range = 255. if bias.max() > 1 else 1.
        return {'img_range': img_range, 'rgb_mean': tuple(round(value / img_range, 6) for value in bias.tolist())}
    form = _form_of(state)
    if form.img_range is None:
        return {}
    return {'img_range': form.img_range, 'rgb_mean': (0.,) * state[form.first()[0]].shape[1]}


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
        rename = _renaming(_form_of(state), OURS) if isinstance(net, ELAN) else str
        return 4 * len(own.keys() & map(rename, state)) >= len(own)

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
