"""`basicsr data verify`: read every record that a training would read, and tell what is wrong."""
from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import cv2
import lmdb
import numpy as np
from tqdm import tqdm

from elan_basicsr.data import raw_lmdb
from elan_basicsr.data.images import Changes, decode_bgr, find_images, read_bgr, say_what_is_left_out
from elan_basicsr.data.pairing import Unpaired, wrong_sizes
from elan_basicsr.data.roots import open_root, paths_of, split
from elan_basicsr.errors import UserError


class Found(NamedTuple):
    """What an image is: (height, width), bits of a value, mean difference between its channels (of 255), digest."""
    size: tuple[int, ...]
    bits: int
    colour: float
    digest: bytes


COLOURED = 4
"""From which difference between channels an image is not grey: compression gives grey ones less than that."""


@dataclass
class Collection:
    """The images of one LMDB or folder by key, or by path where a data set names files; and what is wrong with it.

    `passed_over` are a folder's files that are no images, `changes` what the pixels of its images lose.
    """
    path: str
    images: dict[str, Found] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    passed_over: list[Path] = field(default_factory=list)
    changes: Changes = field(default_factory=Changes)


def verify_path(path: str | os.PathLike, files: Iterable[str] | None = None) -> Collection:
    """Read every image of an LMDB (a folder with data.mdb) or of a folder, or `files`, on every core.

    Raises:
        UserError: There is no such folder, or it is no LMDB and holds no images.
    """
    path = Path(path)
    collection = Collection(str(path))
    is_lmdb = (path / 'data.mdb').exists() or path.suffix == '.lmdb'
    try:
        readers = dict(_lmdb_readers(path, collection) if is_lmdb else _file_readers(path, files, collection))
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
            if found is None:
                collection.problems.append(f'{_full(collection, key)}: {problem}')
            else:
                collection.images[key] = found
    _note_duplicates(collection)
    say_what_is_left_out(collection.changes, path, collection.passed_over)
    return collection


def _full(collection: Collection, key: str) -> str:
    """What messages call an image: its path, or LMDB and key."""
    return key if os.path.dirname(key) else f'{collection.path}: {key}'


def _lmdb_readers(path: Path, collection: Collection) -> Iterator[tuple]:
    """A function that decodes it for each record listed, after comparing the list with what is there."""
    if not path.is_dir():
        collection.problems.append(f'{path}: no such LMDB')
        return
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


def _file_readers(path: Path, files: Iterable[str] | None, collection: Collection) -> Iterator[tuple]:
    found = find_images(path, collection.passed_over).items() if files is None else ((file, file) for file in files)
    for key, file in found:
        yield key, lambda file=file: read_bgr(file, collection.changes)


def _read(reader) -> tuple[Found | None, str | None]:
    try:
        img = reader()
    except UserError as error:
        return None, str(error).split(': ', 1)[-1]
    except (ValueError, cv2.error, lmdb.Error) as error:
        return None, ' '.join(str(error).split())
    digest = hashlib.blake2b(np.ascontiguousarray(img).data, digest_size=16)
    digest.update(str(img.shape).encode())
    return Found(img.shape[:2], 8 * img.itemsize, _colour(img), digest.digest()), None


def _colour(img: np.ndarray) -> float:
    some = img[::4, ::4].astype(np.float32)
    return 0 if img.ndim == 2 else float(np.ptp(some, axis=2).mean()) * 255 / np.iinfo(img.dtype).max


def _note_duplicates(collection: Collection) -> None:
    first: dict[bytes, str] = {}
    for key, found in collection.images.items():
        if found.digest in first:
            collection.problems.append(f'{_full(collection, key)}: has the same pixels as {first[found.digest]}')
        first.setdefault(found.digest, key)


# ------------------------------------------------------------------------------------------------- data sets

def verify_dataset(opt: dict) -> tuple[int, list[str]]:
    """Open a data set as a training does, and read all that it would read.

    Args:
        opt: A section of `datasets` with `phase`, and `scale` for pairs.

    Returns:
        The number of images read, and what is wrong: with the images, with their pairing, with the sizes of pairs.
    """
    number, problems = 0, list[str]()
    for part in split(opt):
        rows, found = _rows(part)
        collections = {}
        for kind in ('gt', 'lq'):
            root = part.get(f'dataroot_{kind}')
            if isinstance(root, str):
                name = f'{kind}_path'
                # Where the data set cannot be opened, each root is looked at for itself.
                files = [row[name] for row in rows if name in row] if rows else None
                collections[kind] = _verify_root(root, files)
        own = [problem for collection in collections.values() for problem in collection.problems]
        problems += own + [problem for problem in found if rows or not own]
        number += sum(len(collection.images) for collection in collections.values())
        if len(collections) == 2 and 'scale' in part:
            problems += verify_pairs(collections['gt'], collections['lq'], rows, part)
    return number, problems


def _rows(opt: dict) -> tuple[list[dict[str, str]], list[str]]:
    """The paths or keys of the samples of a data set, and what is wrong with them."""
    try:
        dataset = open_root(opt)
    except Unpaired as error:
        return error.rows, error.problems
    except UserError as error:
        return [], [str(error)]
    name = 'gt_path' if 'dataroot_gt' in opt else 'lq_path'
    return [row if isinstance(row, dict) else {name: row} for row in paths_of(dataset)], []


def _verify_root(root: str, files: list[str] | None) -> Collection:
    try:
        return verify_path(root, files)
    except UserError as error:
        return Collection(root, problems=[str(error)])


def verify_pairs(gt: Collection, lq: Collection, rows: Iterable[dict[str, str]], opt: dict) -> list[str]:
    """What is wrong between GT and LQ images that are rows of a data set: sizes, and grey against colour."""
    problems, depths = list[str](), list[str]()
    for row in rows:
        keys = row.get('gt_path', ''), row.get('lq_path', '')
        ours, theirs = gt.images.get(keys[0]), lq.images.get(keys[1])
        if ours is None or theirs is None:
            continue
        names = _full(gt, keys[0]), _full(lq, keys[1])
        if problem := wrong_sizes(ours.size, theirs.size, *names, opt, strict=True):
            problems.append(problem)
        if min(ours.colour, theirs.colour) == 0 and max(ours.colour, theirs.colour) > COLOURED:
            grey, coloured = names if ours.colour == 0 else names[::-1]
            problems.append(f'{grey}: is grey, and {coloured} is coloured')
        if ours.bits != theirs.bits:
            depths.append(f'{names[0]} is {ours.bits} bit, {names[1]} is {theirs.bits}')
    if depths:
        print(f'{gt.path}: {len(depths)} pairs differ in depth, which training allows, the first: {depths[0]}')
    return problems


def verify(paths: Iterable[str] = (), opt: dict | None = None, scale: int | None = None) -> int:
    """Verify LMDBs and folders, or the data sets of an option file; print what is wrong.

    Args:
        paths: LMDBs or folders.
        opt: The content of an option file, whose `datasets` are opened as a training opens them.
        scale: `paths` are two, GT and LQ of one data set of this scale.

    Returns:
        The exit code: 1 when something is wrong.

    Raises:
        UserError: A path is neither LMDB nor folder of images, or with a scale they are not two.
    """
    paths, problems, number = [*paths], list[str](), 0
    for dataset in _datasets(opt or {}) + ([_pair(paths, scale)] if scale else []):
        read, found = verify_dataset(dataset)
        number, problems = number + read, problems + found
    for path in paths if scale is None else ():
        collection = verify_path(path)
        problems += collection.problems
        number += len(collection.images)
    for problem in problems:
        print(problem)
    print(f'{number} images read, {len(problems)} problems')
    return 1 if problems else 0


def _datasets(opt: dict) -> list[dict]:
    """The data sets of an option file with what a run adds to them."""
    scale = {'scale': opt['scale']} if 'scale' in opt else {}
    return [{'name': phase, **dataset, **scale, 'phase': phase.split('_')[0]}
            for phase, dataset in (opt.get('datasets') or {}).items() if isinstance(dataset, dict)]


def _pair(paths: list[str], scale: int) -> dict:
    if len(paths) != 2:
        raise UserError(f'--scale {scale}: expected two paths, of the GT and of the LQ images, found {len(paths)}')
    kind = 'lmdb' if all(Path(path).suffix == '.lmdb' for path in paths) else 'disk'
    return {'name': 'pair', 'type': 'PairedImageDataset', 'phase': 'test', 'scale': scale, 'dataroot_gt': paths[0],
            'dataroot_lq': paths[1], 'io_backend': {'type': kind}}
