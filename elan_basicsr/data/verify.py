"""`basicsr data verify`: read every record that a training would read, and tell what is wrong."""
from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import lmdb
import numpy as np
from tqdm import tqdm

from elan_basicsr.data import raw_lmdb
from elan_basicsr.data.images import Changes, decode_bgr, find_images, read_bgr, say_what_is_left_out
from elan_basicsr.errors import UserError


@dataclass
class Collection:
    """The images of one LMDB or folder: (height, width, digest of the pixels) by key, and what is wrong with it.

    `passed_over` are a folder's files that are no images, `changes` what the pixels of its images lose.
    """
    path: str
    images: dict[str, tuple[int, int, bytes]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    passed_over: list[Path] = field(default_factory=list)
    changes: Changes = field(default_factory=Changes)


def verify_path(path: str | os.PathLike) -> Collection:
    """Read every image of an LMDB (a folder with data.mdb) or of a folder, on every core.

    Raises:
        UserError: There is no such folder, or it is no LMDB and holds no images.
    """
    path = Path(path)
    collection = Collection(str(path))
    is_lmdb = (path / 'data.mdb').exists() or path.suffix == '.lmdb'
    try:
        readers = dict(_lmdb_readers(path, collection) if is_lmdb else _folder_readers(path, collection))
    except (lmdb.Error, OSError) as error:
        collection.problems.append(f'{path}: cannot be opened, it may be damaged or unfinished ({error})')
        return collection
    except UserError as error:
        if not is_lmdb:
            raise
        collection.problems.append(str(error))
        return collection
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = pool.map(lambda key: (key, *_read(readers[key])), readers)
        for key, found, problem in tqdm(rows, desc=path.name, total=len(readers), unit='image', disable=None):
            if problem:
                collection.problems.append(f'{path}: {key}: {problem}')
            else:
                collection.images[key] = found
    _note_duplicates(collection)
    say_what_is_left_out(collection.changes, path, collection.passed_over)
    return collection


def _lmdb_readers(path: Path, collection: Collection) -> Iterator[tuple]:
    """A function that decodes it for each record listed, after comparing the list with what is there."""
    if not (path / raw_lmdb.META).is_file():
        collection.problems.append(f'{path}: {raw_lmdb.META} is missing, so the LMDB was not finished; build it again')
        return
    listed = raw_lmdb.read_keys(path)
    environment = raw_lmdb.open_readonly(path)
    with environment.begin() as transaction:
        present = {bytes(key).decode(errors='replace') for key in transaction.cursor().iternext(values=False)}
    for key in sorted(set(listed) - present):
        collection.problems.append(f'{path}: {key}: is listed in {raw_lmdb.META} but not there')
    for key in sorted(present - set(listed)):
        collection.problems.append(f'{path}: {key}: is there but not listed in {raw_lmdb.META}')

    def reader(key: str):
        def read() -> np.ndarray:
            with environment.begin(buffers=True) as transaction:
                return _decode(transaction.get(key.encode()))
        return read

    for key in listed:
        if key in present:
            yield key, reader(key)


def _decode(record) -> np.ndarray:
    """The image in a record, raw or encoded; a copy, since the record's memory is lent."""
    if bytes(record[:4]) == raw_lmdb.MAGIC:
        return raw_lmdb.to_bgr(raw_lmdb.decode(record)).copy()
    return decode_bgr(record, 'record')


def _folder_readers(path: Path, collection: Collection) -> Iterator[tuple]:
    for key, file in find_images(path, collection.passed_over).items():
        yield key, lambda file=file: read_bgr(file, collection.changes)


def _read(reader) -> tuple[tuple[int, int, bytes] | None, str | None]:
    try:
        img = reader()
    except UserError as error:
        return None, str(error).split(': ', 1)[-1]
    except (ValueError, cv2.error, lmdb.Error) as error:
        return None, ' '.join(str(error).split())
    digest = hashlib.blake2b(np.ascontiguousarray(img).data, digest_size=16)
    digest.update(str(img.shape).encode())
    return (*img.shape[:2], digest.digest()), None


def _note_duplicates(collection: Collection) -> None:
    first: dict[bytes, str] = {}
    for key, (_, _, digest) in collection.images.items():
        if digest in first:
            collection.problems.append(f'{collection.path}: {key}: has the same pixels as {first[digest]}')
        first.setdefault(digest, key)


def verify_pair(gt: Collection, lq: Collection, scale: int, gt_size: int | None = None,
                template: str = '{}') -> list[str]:
    """What is wrong between the GT and the LQ images of a data set.

    Args:
        scale: GT edge over LQ edge.
        gt_size: Edge of the training patches, which every GT image must hold.
        template: The toolbox's `filename_tmpl`: the LQ key of a GT key.
    """
    problems = []
    expected = {key: template.format(key) for key in gt.images}
    for key in sorted(set(expected.values()) - lq.images.keys()):
        problems.append(f'{lq.path}: {key}: is missing, the GT image is there')
    for key in sorted(lq.images.keys() - set(expected.values())):
        problems.append(f'{gt.path}: there is no GT image for {key} of {lq.path}')
    for key, (h, w, _) in gt.images.items():
        other = lq.images.get(expected[key])
        if other and (h, w) != (other[0] * scale, other[1] * scale):
            problems.append(f'{gt.path}: {key}: is {w}x{h}, expected {other[1] * scale}x{other[0] * scale}, {scale} '
                            'times its LQ image')
        if gt_size and min(h, w) < gt_size:
            problems.append(f'{gt.path}: {key}: is {w}x{h}, smaller than gt_size {gt_size}')
    return problems


def verify(paths=(), opt: dict | None = None) -> int:
    """Verify LMDBs and folders, or the data sets of an option file; print what is wrong.

    Args:
        paths: LMDBs or folders.
        opt: The content of an option file; its `datasets` are verified in pairs.

    Returns:
        The exit code: 1 when something is wrong.
    """
    problems, number = [], 0
    for path in paths:
        collection = verify_path(path)
        problems += collection.problems
        number += len(collection.images)
    opt = opt or {}
    for phase, dataset in opt.get('datasets', {}).items():
        if not isinstance(dataset, dict):
            continue
        pair = {kind: verify_path(os.path.expanduser(dataset[f'dataroot_{kind}'])) for kind in ('gt', 'lq')
                if isinstance(dataset.get(f'dataroot_{kind}'), str)}
        problems += [problem for collection in pair.values() for problem in collection.problems]
        number += sum(len(collection.images) for collection in pair.values())
        if len(pair) == 2:
            size = dataset.get('gt_size') if phase.startswith('train') else None
            template = dataset.get('filename_tmpl', '{}')
            problems += verify_pair(pair['gt'], pair['lq'], opt.get('scale', 1), size, template)
    for problem in problems:
        print(problem)
    print(f'{number} images read, {len(problems)} problems')
    return 1 if problems else 0
