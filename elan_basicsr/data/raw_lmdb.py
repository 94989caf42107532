"""An LMDB of whole images, undecoded: the records, and how they are written and read.

A record is a header of 16 bytes (magic, height, width, channels, bytes per value) and the planes of the image, red
first, so that a patch is a few runs of memory in the order a network wants them. `meta_info.txt` beside the data lists
the keys as the toolbox's LMDBs do.
"""
from __future__ import annotations

import os
import struct
from pathlib import Path

import lmdb
import numpy as np

from elan_basicsr.errors import UserError

_HEADER = struct.Struct('<4sIIHH')
MAGIC = b'ERAW'
_TYPES: dict[int, np.dtype] = {1: np.dtype(np.uint8), 2: np.dtype('<u2')}
META = 'meta_info.txt'


def encode(img: np.ndarray) -> bytes:
    """The record of an (H, W, C) image of uint8 or uint16, BGR as OpenCV decodes it."""
    h, w, c = img.shape
    planes = np.ascontiguousarray(img[..., ::-1].transpose(2, 0, 1))
    return _HEADER.pack(MAGIC, h, w, c, img.itemsize) + planes.tobytes()


def decode(record) -> np.ndarray:
    """The planes (C, H, W) of the image in a record, red first, as a read-only view of its memory.

    Raises:
        ValueError: The record is none of ours, or cut off.
    """
    if len(record) < _HEADER.size or bytes(record[:4]) != MAGIC:
        raise ValueError('is no raw image record')
    _, h, w, c, itemsize = _HEADER.unpack_from(record)
    if itemsize not in _TYPES or len(record) != _HEADER.size + h * w * c * itemsize:
        raise ValueError(f'a record of {len(record)} bytes cannot hold {h}x{w}x{c} values of {itemsize} bytes')
    return np.frombuffer(record, _TYPES[itemsize], offset=_HEADER.size).reshape(c, h, w)


def to_bgr(planes: np.ndarray) -> np.ndarray:
    """The (H, W, C) BGR image of (C, H, W) planes."""
    return planes[::-1].transpose(1, 2, 0)


_open: dict[str, tuple[tuple, lmdb.Environment]] = {}


def open_readonly(path: str | Path) -> lmdb.Environment:
    """The LMDB at `path`, opened once in each process, for it refuses to be open twice in one.

    Raises:
        UserError: The LMDB is cut off.
        lmdb.Error: There is no LMDB, or it is damaged.
        OSError: There is no such file.
    """
    path = os.path.realpath(path)
    file = os.stat(os.path.join(path, 'data.mdb'))
    identity = (os.getpid(), file.st_ino, file.st_mtime_ns)
    if path in _open:
        known, environment = _open[path]
        if known == identity:
            return environment
        environment.close()  # inherited by a fork, or of a file that has been replaced
    environment = lmdb.open(path, readonly=True, lock=False, readahead=False, meminit=False)
    needed = (environment.info()['last_pgno'] + 1) * environment.stat()['psize']
    if file.st_size < needed:  # reading beyond the end of a memory map kills the process
        environment.close()
        raise UserError(f'{path}: is cut off: {file.st_size} of {needed} bytes; build it again')
    _open[path] = identity, environment
    return environment


def close(path: str | Path) -> None:
    """Close an LMDB that `open_readonly` has opened, for others that want to open it in this process."""
    _open.pop(os.path.realpath(path))[1].close()


def read_keys(path: str | Path) -> list[str]:
    """The keys listed in `meta_info.txt`, in its order; a line is `KEY.EXT (H,W,C) LEVEL`."""
    with open(Path(path) / META, encoding='utf-8') as file:
        return [line.split('.')[0] for line in file if line.strip()]
