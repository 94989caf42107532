"""Reading a stranger's checkpoint: what it claims is looked at before any memory is taken for it.

torch.load with `weights_only` runs no code, but takes what memory a file asks for: a few bytes can stand for a tensor
of terabytes. Here the file's pickles are read with names that stand for nothing but the claims, and the claims are
compared with the size of the file.
"""
from __future__ import annotations

import contextlib
import io
import json
import math
import os
import pickle
import pickletools
import stat
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from typing import BinaryIO

import safetensors
import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from elan_basicsr.errors import UserError

MAX_PICKLE = 1 << 24
"""Bytes of the pickles in a file; the weights are not in them. A training state of ELAN has 0.2 MB."""
MAX_OPERATIONS = 2_000_000
MAX_RECORDS = 100_000
MAX_VALUES = 1_000_000
"""Values in a file, one that is referred to twice counting twice: so grow the small files that unfold without end."""
MAX_DEPTH = 20
MAX_INTEGER = 1 << 64
SHARING = 4
"""How many times its storages the tensors of a file may be: tied weights share, but not a whole network one number."""

_MAGIC = 0x1950A86A20F9469CFC6C  # the first of five pickles in files of torch before 1.6
# What torch.save writes, and torch's own weights_only reader takes; none of them calls anything but REDUCE.
_OPERATIONS = frozenset((
    'PROTO', 'STOP', 'MARK', 'GLOBAL', 'REDUCE', 'BUILD', 'BINPERSID', 'BINPUT', 'LONG_BINPUT', 'BINGET', 'LONG_BINGET',
    'EMPTY_DICT', 'EMPTY_LIST', 'EMPTY_TUPLE', 'TUPLE', 'TUPLE1', 'TUPLE2', 'TUPLE3', 'APPEND', 'APPENDS', 'SETITEM',
    'SETITEMS', 'NONE', 'NEWTRUE', 'NEWFALSE', 'BININT', 'BININT1', 'BININT2', 'LONG1', 'BINFLOAT', 'BINUNICODE',
    'SHORT_BINSTRING'))
_ITEM_SIZES = {
    'Double': 8, 'Float': 4, 'Half': 2, 'BFloat16': 2, 'Long': 8, 'Int': 4, 'Short': 2, 'Char': 1, 'Byte': 1, 'Bool': 1,
    'ComplexDouble': 16, 'ComplexFloat': 8, 'Untyped': 1}


class _Refused(Exception):
    """Why a file is not read, in one line without its name."""


def read_torch(path: str | os.PathLike) -> dict:
    """The dict in a file of torch.save, its tensors on the CPU.

    Raises:
        UserError: See `check_torch_file`; or the file holds no dict.
    """
    check_torch_file(path)
    try:
        content = torch.load(path, map_location='cpu', weights_only=True)
    except MemoryError:
        raise UserError(f'{path}: there is not the memory to read it') from None
    except Exception as error:  # torch's readers raise a dozen types on damaged files
        raise UserError(f'{path}: cannot be read as a checkpoint, it may be cut off or damaged ({_words(error)})'
                        ) from None
    if not isinstance(content, dict):
        raise UserError(f'{path}: holds a {type(content).__name__}, expected a dict of tensors')
    return content


def read_safetensors(path: str | os.PathLike, note: str) -> dict:
    """The tensors in a file, and under `note` what stands in its metadata under that name, as JSON.

    Raises:
        UserError: The file is missing or damaged. The library compares the sizes in its header with the file.
    """
    check_regular(path)
    try:
        with safetensors.safe_open(path, 'pt') as file:
            content = {name: file.get_tensor(name) for name in file.keys()}
            content[note] = json.loads((file.metadata() or {}).get(note, '{}'))
        return content
    except (safetensors.SafetensorError, OSError, ValueError, RuntimeError, KeyError, AttributeError, MemoryError
            ) as error:
        raise UserError(f'{path}: cannot be read as safetensors, it may be cut off or damaged ({_words(error)})'
                        ) from None


def check_torch_file(path: str | os.PathLike) -> None:
    """Raise UserError unless a file is one of torch.save, new or old, that holds what it claims and tensors only.

    It holds tensors, numbers, texts, and dicts, lists and tuples of them. The memory taken is a small multiple of the
    pickles, never of what tensors claim.
    """
    try:
        check_regular(path)
        with open(path, 'rb') as file:
            size = os.fstat(file.fileno()).st_size
            if file.read(4) == b'PK\x03\x04':
                _check_zip(file, size)
            else:
                _check_legacy(file, size)
    except _Refused as refused:
        raise UserError(f'{path}: {refused}') from None
    except OSError as error:
        raise UserError(f'{path}: cannot be read ({error.strerror or error})') from None


def check_regular(path: str | os.PathLike) -> None:
    """Raise UserError unless there is a file at `path`; a pipe would be waited for, a device never end."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        raise UserError(f'{path}: no such file; expected a checkpoint') from None
    if not stat.S_ISREG(mode):
        what = 'is a folder' if stat.S_ISDIR(mode) else 'is a pipe or a device'
        raise UserError(f'{path}: {what}, expected a checkpoint file')


def check_records(path: str | os.PathLike) -> None:
    """Raise UserError unless the records of a zip file lie in it uncompressed, so that reading them all is bounded."""
    check_regular(path)
    try:
        with open(path, 'rb') as file, _opened(file) as archive:
            _check_layout(archive, os.fstat(file.fileno()).st_size)
    except _Refused as refused:
        raise UserError(f'{path}: {refused}') from None


# ------------------------------------------------------------------------------------------------ the two containers

@contextlib.contextmanager
def _opened(file: BinaryIO) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(file) as archive:
            yield archive
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, RuntimeError, struct.error, OverflowError,
            IndexError, KeyError) as error:
        raise _Refused(f'cut off or damaged ({_words(error)})') from None


def _check_layout(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """The records by name, which must be as torch.save lays them out."""
    records = archive.infolist()
    if any(record.filename.partition('/')[2] == 'constants.pkl' for record in records):
        raise _Refused('is TorchScript, which is a program and not weights alone, so it is refused; save its state '
                       'dict with torch.save')
    if len(records) > MAX_RECORDS:
        raise _Refused(f'holds {len(records)} records, expected up to {MAX_RECORDS}')
    if any(record.compress_type != zipfile.ZIP_STORED or record.compress_size != record.file_size
           or record.flag_bits & 1 for record in records):
        raise _Refused('holds compressed or encrypted records, which torch.save does not write')
    if sum(record.file_size for record in records) > size or any(
            record.header_offset + record.file_size > size for record in records):
        raise _Refused(f'claims more bytes than the {size} it has; it may be cut off or damaged')
    named = {record.filename: record for record in records}
    if len({name.lower() for name in named}) < len(records):  # torch may find the other one
        raise _Refused('holds two records of one name')
    if len({name.partition('/')[0] for name in named}) != 1:
        raise _Refused('is a zip file but no PyTorch checkpoint: its records lie in several folders')
    return named


def _check_zip(file: BinaryIO, size: int) -> None:
    with _opened(file) as archive:
        records = _check_layout(archive, size)
        root = next((name for name in records if name.partition('/')[2] == 'data.pkl'), None)
        if root is None:
            raise _Refused('is a zip file but no PyTorch checkpoint: it holds no data.pkl')
        if records[root].file_size > MAX_PICKLE:
            raise _Refused(f'describes its tensors in {records[root].file_size} bytes, expected up to {MAX_PICKLE}')
        claims = _Claims(archive.read(root))
    folder = root.removesuffix('data.pkl')
    for key, claimed in claims.storages.items():
        record = records.get(f'{folder}data/{key}')
        if record is None or record.file_size != claimed:
            held = 'nothing' if record is None else f'{record.file_size} bytes'
            raise _Refused(f'claims {claimed} bytes for a storage and holds {held}; it may be damaged')
    claims.check()


def _check_legacy(file: BinaryIO, size: int) -> None:
    """Five pickles (a magic number, the protocol, the machine, the content, the storages' keys) and the storages."""
    file.seek(0)
    raw = file.read(MAX_PICKLE)
    first = _Claims(raw)
    if first.content != _MAGIC:
        raise _Refused('is no PyTorch checkpoint')
    position = first.length
    parts = []
    for _ in range(4):
        parts.append(_Claims(raw[position:]))
        position += parts[-1].length
    content, keys = parts[2], parts[3].content
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or \
            sorted(keys) != sorted(content.storages) or any(part.storages for part in (parts[0], parts[1], parts[3])):
        raise _Refused('does not hold the storages it claims; it may be damaged')
    if sum(content.storages.values()) + 8 * len(keys) > size - position:
        raise _Refused(f'claims more bytes than the {size} it has; it may be cut off or damaged')
    content.check()


# --------------------------------------------------------------------------------------------------------- the claims

class _Storage:
    """A storage of so many bytes that a pickle refers to."""
    __slots__ = ('size',)

    def __init__(self, size: int):
        self.size = size


class _Tensor:
    """A tensor that a pickle describes."""
    __slots__ = ('size',)

    def __init__(self, size: int):
        self.size = size


class _Name:
    """What a name in a pickle stands for here. Without attributes, so that BUILD cannot change it."""
    __slots__ = ('_name',)

    def __init__(self, name: str):
        object.__setattr__(self, '_name', name)

    def __setattr__(self, name, value):
        raise AttributeError(name)

    def __call__(self, *args):
        if self._name in ('_rebuild_tensor', '_rebuild_tensor_v2', '_rebuild_tensor_v3'):
            return self._tensor(*args)
        if self._name == '_rebuild_parameter' and isinstance(args[0], _Tensor):
            return args[0]
        if self._name == 'Size' and isinstance(args[0], tuple):
            return args[0]
        if self._name == 'Counter' and len(args) == 1 and type(args[0]) is dict:
            return args[0]
        if self._name == 'encode' and len(args) == 2 and args[1] == 'latin1' and isinstance(args[0], str):
            return args[0]
        if self._name == 'device':
            return None
        raise _Refused(f'calls {self._name} in a way that torch.save does not write')

    def item_size(self) -> int:
        kind = self._name.removesuffix('Storage')
        if kind == self._name or kind not in _ITEM_SIZES:
            raise _Refused(f'holds a storage of type {self._name[:60]!r}, which no network has')
        return _ITEM_SIZES[kind]

    def _tensor(self, storage, offset, sizes, strides, *rest) -> _Tensor:
        if not isinstance(storage, tuple) or not isinstance(storage[0], _Storage):
            raise _Refused('describes a tensor without a storage')
        storage, item = storage
        if self._name == '_rebuild_tensor_v3':
            item = getattr(torch, rest[2]._name).itemsize
        numbers = (offset, *sizes, *strides)
        if len(sizes) != len(strides) or any(type(n) is not int or n < 0 for n in numbers) or len(sizes) > 16:
            raise _Refused('describes a tensor of an impossible shape')
        count = math.prod(sizes)
        reach = offset + 1 + sum((n - 1) * stride for n, stride in zip(sizes, strides, strict=True)) if count else 0
        if reach * item > storage.size:
            raise _Refused(f'claims a tensor of shape {_shape(sizes)} in a storage of {storage.size} bytes')
        return _Tensor(count * item)


def _shape(sizes: tuple) -> str:
    return 'x'.join(str(n)[:20] for n in sizes[:8])


_NAMES = {
    **{f'torch._utils.{name}': name for name in (
        '_rebuild_tensor', '_rebuild_tensor_v2', '_rebuild_tensor_v3', '_rebuild_parameter')},
    **{f'torch.{kind}Storage': f'{kind}Storage' for kind in _ITEM_SIZES},
    **{str(value): name for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    'torch.storage.UntypedStorage': 'UntypedStorage', 'torch.Size': 'Size', 'torch.device': 'device',
    'collections.Counter': 'Counter', '_codecs.encode': 'encode'}


class _Claims(pickle.Unpickler):
    """What one pickle describes.

    Attributes:
        content: The values, with stand-ins for tensors.
        storages: Bytes by key.
        length: Of the pickle, in bytes.
    """

    def __init__(self, raw: bytes):
        self.storages: dict[str, int] = {}
        self.length = _check_operations(raw)
        super().__init__(io.BytesIO(raw[:self.length]))
        try:
            self.content = self.load()
        except _Refused:
            raise
        except Exception as error:  # unpicklers raise a dozen types on damaged pickles
            raise _Refused(f'is no PyTorch checkpoint, or damaged ({_words(error)})') from None

    def find_class(self, module: str, name: str):
        known = f'{module}.{name}'
        if known == 'collections.OrderedDict':
            return OrderedDict
        if known not in _NAMES:
            shown = ''.join(c for c in known[:80] if c.isprintable())
            raise _Refused(f'holds Python objects beside tensors ({shown}), which could run code when read, so it is '
                           'refused; save its state dict alone with torch.save')
        return _Name(_NAMES[known])

    def persistent_load(self, claim) -> tuple[_Storage, int]:
        if not (isinstance(claim, tuple) and len(claim) in (5, 6) and claim[0] == 'storage'
                and isinstance(claim[1], _Name) and isinstance(claim[2], str) and type(claim[4]) is int
                and claim[4] >= 0 and claim[5:] in ((), (None,))):
            raise _Refused('describes a storage in a way that torch.save does not write')
        item = claim[1].item_size()
        size = claim[4] * item
        if self.storages.setdefault(claim[2], size) != size:
            raise _Refused('claims two sizes for one storage')
        return _Storage(size), item

    def check(self) -> None:
        """Refuse content that unfolds to more than the file can hold."""
        count, size, _ = _unfold(self.content, 0, {})
        if count > MAX_VALUES:
            raise _Refused(f'unfolds to more than {MAX_VALUES} values')
        held = sum(self.storages.values())
        if size > SHARING * held:
            raise _Refused(f'claims tensors of {size} bytes and holds {held}')


def _unfold(value, depth: int, known: dict[int, tuple[int, int, int]]) -> tuple[int, int, int]:
    """The values inside `value`, the bytes of the tensors among them, and how deep they lie.

    What is referred to several times counts as often. A value that holds itself is too deep.
    """
    if isinstance(value, _Tensor):
        return 1, value.size, 0
    if not isinstance(value, (dict, list, tuple)):
        return 1, 0, 0
    if id(value) not in known and depth <= MAX_DEPTH:
        inner = [*value, *value.values()] if isinstance(value, dict) else value
        inner = [_unfold(item, depth + 1, known) for item in (*inner, *getattr(value, '__dict__', {}).values())]
        known[id(value)] = (1 + sum(count for count, _, _ in inner), sum(size for _, size, _ in inner),
                            1 + max((height for _, _, height in inner), default=0))
    if depth + known.get(id(value), (0, 0, 1))[2] > MAX_DEPTH:
        raise _Refused(f'is nested more than {MAX_DEPTH} deep')
    return known[id(value)]


def _check_operations(raw: bytes) -> int:
    """The length of the pickle at the start of `raw`, none of whose operations takes memory that is not in it."""
    length = 0
    try:
        for number, (operation, argument, position) in enumerate(pickletools.genops(raw)):
            length = position + 1
            if number > MAX_OPERATIONS:
                raise _Refused(f'describes its content in more than {MAX_OPERATIONS} operations')
            if operation.name not in _OPERATIONS:
                raise _Refused(f'is no PyTorch checkpoint, or damaged (pickle operation {operation.name})')
            if operation.name in ('LONG_BINPUT', 'LONG_BINGET') and argument > number:
                raise _Refused('is damaged (a reference beyond its pickle)')
            if operation.name == 'LONG1' and abs(argument) > MAX_INTEGER and argument != _MAGIC:
                raise _Refused(f'holds an integer of {argument.bit_length()} bits, expected up to 64')
    except _Refused:
        raise
    except Exception as error:
        raise _Refused(f'is no PyTorch checkpoint, it may be cut off or damaged ({_words(error)})') from None
    return length


def _words(error: BaseException) -> str:
    text = ''.join(c for c in ' '.join(str(error).split()) if c.isprintable())
    return text[:120] or type(error).__name__


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
