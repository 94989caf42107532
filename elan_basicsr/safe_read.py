"""Reading a stranger's checkpoint: torch reads it, once its pickle has been followed and nothing in it does harm.

torch.load with `weights_only` runs no code, but calls what a file asks it to as often as it asks: a few bytes stand for
tensors of terabytes, copies of copies, tensors taken apart number by number, or keys so deep that the process crashes.
So the operations are followed first, noting what each would make without making it.
"""
from __future__ import annotations

import contextlib
import json
import math
import os
import pickletools
import re
import stat
import zipfile
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import safetensors
import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from elan_basicsr.errors import UserError

MAX_PICKLE = 1 << 24
"""Bytes of the pickle in a file; the weights are not in it. A training state of ELAN has 0.2 MB."""
MAX_OPERATIONS = 300_000
"""A tensor takes about 25: a training state of 4,000 tensors in the network."""
MAX_COPIED = 1 << 26
"""Bytes that the calls in a pickle may copy, about."""
MAX_DEPTH = 20
MAX_NOTE = 1 << 16
SHARING = 4
"""How many times its storages the tensors of a file may be: tied weights share, but not a whole network one number."""

_MAGIC = 0x1950A86A20F9469CFC6C  # the first of five pickles in files of torch before 1.6
_ITEM_SIZES = dict(Double=8, Float=4, Half=2, BFloat16=2, Long=8, Int=4, Short=2, Char=1, Byte=1, Bool=1,
                   ComplexDouble=16, ComplexFloat=8)
_STORAGES = {'torch.storage.UntypedStorage': 1, **{f'torch.{kind}Storage': n for kind, n in _ITEM_SIZES.items()}}
_DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
_CALLS = {'collections.OrderedDict', 'collections.Counter', 'torch.Size', 'torch.device', '_codecs.encode',
          'numpy.dtype', 'numpy.core.multiarray.scalar', 'numpy._core.multiarray.scalar',
          *(f'torch._utils._rebuild_{what}' for what in ('tensor', 'tensor_v2', 'tensor_v3', 'parameter'))}
# Operations by what they do: add a value, empty or not, or take some from the stack; others are not torch.save's.
_VALUES = {'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False, **dict.fromkeys((
    'BININT', 'BININT1', 'BININT2', 'LONG1', 'BINFLOAT', 'BINUNICODE', 'SHORT_BINSTRING'))}
_EMPTY = {'EMPTY_TUPLE': 'tuple', 'EMPTY_LIST': 'list', 'EMPTY_DICT': 'dict'}
_TAKEN = {'TUPLE1': 1, 'TUPLE2': 2, 'TUPLE3': 3, 'APPEND': 1, 'SETITEM': 2, 'BUILD': 1, 'REDUCE': 1, 'BINPERSID': 1}


_SAVE = 'save its state dict where it was made: torch.save(net.state_dict(), FILE)'
_OTHERWISE = {
    **dict.fromkeys(('NEWOBJ', 'NEWOBJ_EX', 'INST', 'OBJ'), 'holds a whole module or other object, which could run '
                                                            f'code when read, so it is refused; {_SAVE}'),
    **dict.fromkeys(('FRAME', 'STACK_GLOBAL', 'SHORT_BINUNICODE', 'MEMOIZE'), 'was written by pickle, or by torch.save '
                    f'with a pickle_protocol of its own, a whole module perhaps, and is not read; {_SAVE}'),
}
"""Operations that tell how a file came to be."""


class _Refused(Exception):
    """Why a file is not read, in one line without its name."""


def read_torch(path: str | os.PathLike, map_location='cpu') -> dict:
    """The dict in a file of torch.save, new or old: tensors, numbers, texts, and dicts, lists and tuples of them.

    NumPy's numbers become Python's. The memory taken is a small multiple of the file, never of what it claims.

    Raises:
        UserError: The file is missing, damaged, or holds anything else.
    """
    check_regular(path)
    with _refusing(path, 'a checkpoint'), open(path, 'rb') as file:
        (_check_zip if file.read(4) == b'PK\x03\x04' else _check_legacy)(file)
        file.seek(0)
        with torch.serialization.safe_globals(_NUMPY):
            content = torch.load(file, map_location=map_location, weights_only=True)
        if not isinstance(content, dict):
            raise _Refused(f'holds a {type(content).__name__}, expected a dict of tensors; {_SAVE}')
        return content


def read_safetensors(path: str | os.PathLike, note: str) -> dict:
    """The tensors in a file, and under `note` what stands in its metadata under that name, as JSON.

    Raises:
        UserError: The file is missing or damaged. The library compares the sizes in its header with the file.
    """
    check_regular(path)
    with _refusing(path, 'safetensors'), safetensors.safe_open(path, 'pt') as file:
        content = {name: file.get_tensor(name) for name in file.keys()}
        content[note] = json.loads((file.metadata() or {}).get(note, '{}')[:MAX_NOTE])
        return content


@contextlib.contextmanager
def opened_records(path: str | os.PathLike) -> Iterator[zipfile.ZipFile]:
    """A file of torch.save, whose records lie in it uncompressed, so that reading them all is bounded.

    Raises:
        UserError: It is something else, or reading the records fails.
    """
    check_regular(path)
    with _refusing(path, 'a checkpoint'), open(path, 'rb') as file, zipfile.ZipFile(file) as archive:
        _check_records(archive, file)
        yield archive


def check_regular(path: str | os.PathLike) -> None:
    """Raise UserError unless there is a file at `path`; a pipe would be waited for, a device never end."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        raise UserError(f'{path}: no such file; expected a checkpoint') from None
    if not stat.S_ISREG(mode):
        what = 'is a folder' if stat.S_ISDIR(mode) else 'is a pipe or a device'
        raise UserError(f'{path}: {what}, expected a checkpoint file')


@contextlib.contextmanager
def _refusing(path: str | os.PathLike, what: str) -> Iterator[None]:
    try:
        yield
    except _Refused as refused:
        raise UserError(f'{path}: {refused}') from None
    except MemoryError:
        raise UserError(f'{path}: there is not the memory to read it') from None
    except Exception as error:  # the libraries raise a dozen types on damaged files
        words = ''.join(c for c in ' '.join(str(error).split()) if c.isprintable())[:120] or type(error).__name__
        raise UserError(f'{path}: cannot be read as {what}, it may be cut off or damaged ({words})') from None


# ------------------------------------------------------------------------------------------------ the two containers

def _check_records(archive: zipfile.ZipFile, file: BinaryIO) -> dict[str, int]:
    """The sizes of the records by name. They must lie in the file as torch.save lays them out."""
    records = archive.infolist()
    size = file.seek(0, os.SEEK_END)
    file.seek(-min(size, 98), os.SEEK_END)
    end = file.read().rjust(98, b'\0')
    wide = end[56:60] == b'PK\x06\x07'  # for files of more than 4 GB, and written by torch for all
    start, at = (int.from_bytes(number, 'little') for number in (end[48:56] if wide else end[92:96], end[64:72]))
    # Python finds the table of records from the end of the file, torch by `start`: it must not be two tables.
    if start != archive.start_dir or end[76:80] + end[96:] != b'PK\x05\x06\0\0' or \
            wide and (end[:4] != b'PK\x06\x06' or at != size - 98):
        raise _Refused('does not end as torch.save ends a file; it may be damaged')
    if any(record.filename.partition('/')[2] == 'constants.pkl' for record in records):
        raise _Refused('is TorchScript, which is a program and not weights alone, so it is refused; save its state '
                       'dict with torch.save')
    if any(record.compress_type or record.compress_size != record.file_size or record.flag_bits & 1
           for record in records):
        raise _Refused('holds compressed or encrypted records, which torch.save does not write')
    if sum(record.file_size for record in records) > size:
        raise _Refused(f'claims more bytes than the {size} it has; it may be cut off or damaged')
    sizes = {record.filename: record.file_size for record in records}
    if len({name.lower() for name in sizes}) < len(records) or len({name.partition('/')[0] for name in sizes}) != 1:
        raise _Refused('holds two records of one name, or in several folders')  # torch may find another than we did
    return sizes


def _check_zip(file: BinaryIO) -> None:
    with zipfile.ZipFile(file) as archive:
        records = _check_records(archive, file)
        folder = next(iter(records), '').partition('/')[0]
        storages = _follow(archive.open(f'{folder}/data.pkl').read(MAX_PICKLE)).storages
    for key, claimed in storages.items():
        held = records.get(f'{folder}/data/{key}', 0)
        if held != claimed:
            raise _Refused(f'claims {claimed} bytes for a storage and holds {held}; it may be damaged')


def _check_legacy(file: BinaryIO) -> None:
    """Five pickles (a magic number, the protocol, the machine, the content, the storages' keys) and the storages."""
    size, position = file.seek(0, os.SEEK_END), 0
    parts: list[_Pickle] = []
    file.seek(0)
    raw = file.read(MAX_PICKLE)
    if raw and not raw.startswith(b'\x80'):  # as a pickle begins
        raise _Refused('is no PyTorch checkpoint; expected a file that torch.save wrote')
    while len(parts) < 5:
        parts.append(_follow(raw[position:]))
        position += parts[-1].length
        if parts[0].content != _MAGIC:
            raise _Refused('is no PyTorch checkpoint; expected a file that torch.save wrote')
    storages, keys = parts[3].storages, parts[4].content.items
    if {*keys} != {*storages} or len(keys) != len(storages):
        raise _Refused('does not hold the storages it claims; it may be damaged')
    if sum(storages.values()) + 8 * len(keys) > size - position:
        raise _Refused(f'claims more bytes than the {size} it has; it may be cut off or damaged')


# ------------------------------------------------------------------------------------------- what a pickle would make

class _Name(NamedTuple):
    text: str


class _Pickle(NamedTuple):
    content: Any
    length: int
    """Of the pickle, in bytes."""
    storages: dict[str, int]
    """Bytes by key."""


class _Made:
    """What a pickle would make: a tuple, a list, a dict, a storage, a tensor, or what another call gives.

    Attributes:
        items: What it holds; of a dict, the keys and values.
        size: Of a storage or tensor, in bytes.
        item: Of a storage, the bytes of a number.
    """
    __slots__ = ('kind', 'items', 'size', 'item', 'depth', 'fetched')

    def __init__(self, kind: str, items=(), size: int = 0, item: int = 1):
        self.kind, self.size, self.item, self.depth, self.fetched = kind, size, item, 0, False
        self.items: list[Any] = []
        if items:
            self.add(items)

    def add(self, items) -> None:
        self.items += items
        self.depth = max([self.depth, *(1 + item.depth for item in items if isinstance(item, _Made))])
        if self.depth > MAX_DEPTH or self.fetched:  # what holds itself was fetched before it was complete
            raise _Refused(f'is nested more than {MAX_DEPTH} deep')


def _follow(raw: bytes) -> _Pickle:
    """Follow the pickle at the start of `raw` to its end, without making anything."""
    stack: list[Any] = []
    marks: list[list[Any]] = []
    memo: dict[int, Any] = {}
    storages: dict[str, int] = {}
    copied = claimed = 0
    argument: Any
    for number, (operation, argument, position) in enumerate(pickletools.genops(raw)):
        name, end = operation.name, (position or 0) + 1
        if number > MAX_OPERATIONS or copied > MAX_COPIED:
            raise _Refused(f'is described in more than {MAX_OPERATIONS} operations, or by copying')
        if name in _VALUES:
            if name == 'LONG1' and abs(argument) >= 1 << 64 and argument != _MAGIC:
                raise _Refused(f'holds an integer of {argument.bit_length()} bits, expected up to 64')
            stack.append(_VALUES[name] if argument is None else argument)
        elif name in _EMPTY:
            stack.append(_Made(_EMPTY[name]))
        elif name == 'GLOBAL':
            stack.append(_known(argument.replace(' ', '.', 1), whole=not (stack or marks) or stack == ['module']))
        elif name in ('BINPUT', 'LONG_BINPUT'):
            memo[argument] = stack[-1]
        elif name in ('BINGET', 'LONG_BINGET'):
            stack.append(memo[argument])
            if isinstance(stack[-1], _Made):
                stack[-1].fetched = True
                claimed += stack[-1].size
        elif name == 'MARK':
            marks.append(stack)
            stack = []
        elif name == 'STOP':
            if claimed > SHARING * sum(storages.values()):
                raise _Refused(f'claims tensors of {claimed} bytes and holds {sum(storages.values())}')
            return _Pickle(stack.pop(), end, storages)
        elif name in _TAKEN or name in ('TUPLE', 'APPENDS', 'SETITEMS'):
            items = [stack.pop() for _ in range(_TAKEN[name])][::-1] if name in _TAKEN else stack
            stack = stack if name in _TAKEN else marks.pop()
            if name == 'REDUCE':
                args = items[0].items
                copied += sum(64 * len(arg.items) if isinstance(arg, _Made) else len(arg)
                              for arg in args if isinstance(arg, (_Made, str)))
                stack[-1] = _called(stack[-1].text, args)
                claimed += stack[-1].size
            elif name == 'BINPERSID':
                stack.append(_storage(items[0].items, storages))
            elif name.startswith('TUPLE'):
                stack.append(_Made('tuple', items))
            else:
                stack[-1].add(_added(name, items))
        elif name != 'PROTO':
            raise _Refused(_OTHERWISE.get(name, f'is no PyTorch checkpoint, or damaged (pickle operation {name})'))
    raise _Refused('is no PyTorch checkpoint, or cut off')


def _known(name: str, whole: bool) -> _Name:
    if name not in _CALLS and name not in _STORAGES and name not in _DTYPES:
        what = f'is a whole module or other object ({name[:80]}) and no state dict' if whole else \
            f'holds Python objects beside tensors ({name[:80]})'
        raise _Refused(f'{what}, which could run code when read, so it is refused; {_SAVE}')
    return _Name(name)


def _added(operation: str, items: list) -> list:
    """What is added to a list or dict, if it does no harm there."""
    if operation.startswith('SETITEM') and any(isinstance(key, _Made) for key in items[::2]):
        raise _Refused('has keys other than texts and numbers')  # Python's hash of a deep tuple ends the process
    if operation == 'BUILD':
        match items:
            case [_Made(kind='dict', items=['_metadata', _])] | [_Made(kind='tuple', items=[3, str(), *_])]:
                return items  # of a state dict, or of a type of numbers
        raise _Refused('sets attributes that torch.save does not write')  # which could stand in a method's place
    return items


def _storage(claim: list, storages: dict[str, int]) -> _Made:
    match claim:
        case ['storage', _Name(kind), str(key), str(), int(numel), *view] if kind in _STORAGES and view in ([], [None]):
            size = numel * _STORAGES[kind]
            if size >= 0 and storages.setdefault(key, size) == size:
                return _Made('storage', size=size, item=_STORAGES[kind])
    raise _Refused('describes a storage in a way that torch.save does not write')


def _called(name: str, args: list) -> _Made:
    """What a call would give, unless it is one that may cost more than it copies."""
    match name.rpartition('.')[2], args:
        case '_rebuild_parameter', [_Made(kind='tensor') as tensor, *_]:
            return tensor
        case '_rebuild_tensor' | '_rebuild_tensor_v2', [_Made(kind='storage') as storage, *view]:
            return _tensor(storage, storage.item, *view[:3])
        case '_rebuild_tensor_v3', [_Made(kind='storage') as storage, *view, _, _, _Name(dtype)]:
            return _tensor(storage, _DTYPES[dtype].itemsize, *view)
        case 'encode', [str(), 'latin1']:
            return _Made('bytes')
        case 'OrderedDict' | 'Counter', [] | [_Made(kind='dict')]:
            return _Made('dict', args)
        case 'OrderedDict', [_Made(kind='list', items=pairs)] if all(  # so Python 2 wrote it
                isinstance(pair, _Made) and pair.kind in ('list', 'tuple') and len(pair.items) == 2 for pair in pairs):
            return _Made('dict', [args[0], *_added('SETITEMS', [part for pair in pairs for part in pair.items])])
        case 'Size', [_Made(kind='tuple', items=sizes)] if all(isinstance(size, int) for size in sizes):
            return _Made('size')
        case ('device', [str()] | [str(), int()]) | ('dtype', [str(), bool(), bool()]) | (
                'scalar', [_Made(), _Made(kind='bytes')]):
            return _Made(name)
    raise _Refused(f'calls {name} in a way that torch.save does not write')


def _tensor(storage: _Made, item: int, offset: int, shape: _Made, steps: _Made) -> _Made:
    sizes, strides = shape.items, steps.items
    if any(type(n) is not int or n < 0 for n in (offset, *sizes, *strides)):
        raise _Refused('describes a tensor of an impossible shape')
    count = math.prod(sizes)
    reach = offset + 1 + sum((n - 1) * stride for n, stride in zip(sizes, strides, strict=True)) if count else 0
    if reach * item > storage.size:
        raise _Refused(f'claims a tensor of shape {sizes[:8]} in a storage of {storage.size} bytes')
    return _Made('tensor', size=count * item)


class _Number:
    """In the place of numpy.dtype, whose inner state is not a stranger's to set."""

    def __init__(self, code: str, *_):
        if not re.fullmatch('b1|[iu][1248]|f[248]', code):
            raise ValueError(f'numbers of type {code}')
        self.code = code

    def __setstate__(self, state: tuple) -> None:
        self.code = state[1][:1] + self.code[-2:]


def _scalar(kind: _Number, content: bytes):
    return np.frombuffer(content, kind.code)[0].item()


_NUMPY: list[Any] = [(_Number, 'numpy.dtype'), (_scalar, 'numpy.core.multiarray.scalar'),
          (_scalar, 'numpy._core.multiarray.scalar')]


# ------------------------------------------------------------------------------------------------ networks of a size

@contextlib.contextmanager
def bounded_building(tensors: int, parameters: int) -> Iterator[None]:
    """Raise ValueError as soon as modules that are built inside have more tensors or more parameters than that.

    torch tells of a parameter before it is initialized: the memory is asked for and not yet used.
    """
    counted = [0, 0]

    def count(module: nn.Module, name: str, parameter) -> None:
        if parameter is not None:
            counted[0] += 1
            counted[1] += parameter.numel()
        if counted[0] > tensors or counted[1] > parameters:
            raise ValueError(f'more than {tensors:,} tensors or {parameters:,} parameters')

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()
