"""From folders of photographs to LMDBs: `basicsr data build`.

The records of all images are made first, one file each, by every core; then they are copied into the LMDBs in one pass,
in the order of their keys. So an interrupted build goes on where it stopped, its result is the same to the byte as that
of an undisturbed one, and an LMDB appears under its name only when it is whole.
"""
from __future__ import annotations

import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import cv2
import lmdb
import numpy as np
from tqdm import tqdm

from elan_basicsr.data import raw_lmdb
from elan_basicsr.data.images import Changes, find_images, read_bgr, say_what_is_left_out
from elan_basicsr.data.pairing import core, header_sizes, misfit
from elan_basicsr.data.resize import imresize
from elan_basicsr.errors import UserError

LAYOUTS = ('raw', 'subimages')
SUBIMAGE_SIZE, SUBIMAGE_STEP, SUBIMAGE_THRESHOLD = 480, 240, 0  # as the toolbox cuts DIV2K
PNG_COMPRESSION = 1  # as the toolbox writes its LMDBs


def build(*, hr: str | os.PathLike, out: str | os.PathLike, scales: Iterable[int], lr: str | os.PathLike | None = None,
          layout: str = 'raw', prefix: str = '', compare: bool = False,
          blur: float | None = None, failed: list[str] | None = None) -> list[Path]:
    """Make the LMDBs of HR images and of their LR images at each scale.

    Args:
        hr: Folder of HR images, searched recursively; cropped once to a multiple of every scale.
        out: Folder of the LMDBs: `HR_raw.lmdb` and `LR_bicubic_X4_raw.lmdb`, or `…_sub.lmdb`; `LR_BD_…` with blur.
        scales: Integers from 2.
        lr: Folder with `X2`, `X4`, … or, for one scale, of the LR images themselves; without it they are made by
            MATLAB's bicubic.
        layout: `raw` (whole images, undecoded) or `subimages` (the toolbox's, PNG).
        prefix: Put before the names of the LMDBs.
        compare: Print how many bytes of the LR images given differ from MATLAB's bicubic.
        blur: Standard deviation in pixels of a Gaussian before the bicubic; 1.6 makes the benchmark called BD.
        failed: Takes a line for each image that cannot be used, which is then in none of the LMDBs; without it the
            first such image is an error.

    Returns:
        The LMDBs, HR first. One that is already whole is left as it is.

    Raises:
        UserError: No image can be used, or one cannot and there is no `failed`, or the disk is full.
    """
    scales = sorted(set(scales))
    if not scales or min(scales) < 2:
        raise UserError(f'--scales {scales}: expected integers from 2')
    if layout not in LAYOUTS:
        raise UserError(f'--layout {layout}: expected raw or subimages')
    passed_over: list[Path] = []
    images, changes = find_images(hr, passed_over), Changes()
    multiple = math.lcm(*scales)
    suffix = 'raw' if layout == 'raw' else 'sub'
    lmdbs = [_Lmdb(Path(out) / f'{prefix}HR_{suffix}.lmdb', layout, 1,
                   lambda path: _crop(read_bgr(path, changes), multiple, path))]
    differing: dict[Path, list[int]] = {}
    for scale in scales:
        target = Path(out) / f'{prefix}LR_{"BD" if blur else "bicubic"}_X{scale}_{suffix}.lmdb'
        counts = differing.setdefault(target, []) if compare else None
        source = _lr_source(images, lr, scale, len(scales), multiple, counts, blur)  # which compares sizes
        lmdbs.append(_Lmdb(target, layout, scale, source))
    _write(lmdbs, images, failed)
    for target, counts in differing.items():
        if counts:
            print(f'{target.name}: {sum(counts)} bytes of {len(counts)} LR images differ from our bicubic')
    say_what_is_left_out(changes, hr, passed_over)
    return [lmdb.target for lmdb in lmdbs]


def degrade(img: np.ndarray, scale: int, blur: float | None = None) -> np.ndarray:
    """The LR image of an HR image: MATLAB's bicubic, after a Gaussian blur if asked.

    With `blur=1.6` it is the degradation BD of the literature (Zhang et al., CVPR 2018, arXiv 1802.08797, section 5.4):
    a Gaussian of 7x7 pixels and that standard deviation, edges repeated, rounded to the image's type.
    """
    if blur:
        img = cv2.GaussianBlur(img, (7, 7), blur, borderType=cv2.BORDER_REPLICATE)
    return imresize(img, Fraction(1, scale))


def _crop(img: np.ndarray, multiple: int, path) -> np.ndarray:
    h, w = (edge // multiple * multiple for edge in img.shape[:2])
    if h == 0 or w == 0:
        raise UserError(f'{path}: is {img.shape[1]}x{img.shape[0]} pixels, expected at least {multiple}x{multiple}')
    return img[:h, :w]


def _lr_source(images: dict[str, Path], lr, scale: int, number: int, multiple: int,
               differing: list[int] | None = None, blur: float | None = None) -> Callable[[Path], np.ndarray]:
    """How to get the LR image of an HR path: by the bicubic, or from a folder of LR images with the same keys.

    `differing` collects, for each LR image read, how many of its bytes are not those of the bicubic.
    """
    def shrink(path: Path) -> np.ndarray:
        return degrade(_crop(read_bgr(path), multiple, path), scale, blur)

    folder = None if lr is None else Path(lr) / f'X{scale}' if (Path(lr) / f'X{scale}').is_dir() else Path(lr)
    if folder is not None and folder == Path(lr) and (number > 1 or differing is not None):
        if not any(Path(lr).glob('X*')):
            raise UserError(f'{lr}: expected a folder X{scale} in it, since several scales are asked for')
        folder = None  # LR images for other scales only
    if folder is None:
        return shrink
    given = _given_images(images, folder, scale)
    headers = zip(given.items(), *(header_sizes(str(folder), [*map(str, paths)]) for paths in (given, given.values())),
                  strict=True)
    wrong = [problem for (path, file), gt, lq in headers
             if gt and lq and (problem := _misfit(gt, lq, path, file, scale, multiple))]
    if wrong:
        raise UserError(f'{wrong[0]}{f"; {len(wrong) - 1} more like it" if wrong[1:] else ""}')

    def read(path: Path) -> np.ndarray:
        hr, img = read_bgr(path), read_bgr(given[path])
        if problem := _misfit(hr.shape[:2], img.shape[:2], path, given[path], scale, multiple):
            raise UserError(problem)
        h, w = _crop(hr, multiple, path).shape[:2]
        img = img[:h // scale, :w // scale]
        if differing is not None:
            differing.append(int((img != shrink(path)).sum()))
        return img

    return read


def _given_images(images: dict[str, Path], folder: Path, scale: int) -> dict[Path, Path]:
    """The LR images in a folder by the path of their HR image: with its name, or with the usual endings."""
    given = find_images(folder)
    cores = Counter(map(core, given))
    by_core = {core(key): path for key, path in given.items() if cores[core(key)] == 1}
    found = {path: given.get(f'{key}x{scale}') or given.get(key) or by_core.get(core(key))
             for key, path in images.items()}
    absent = [key for key, path in images.items() if found[path] is None]
    if absent:
        raise UserError(f'{folder}: no LR image for {len(absent)} HR images, the first: {", ".join(absent[:3])}; '
                        f'expected {absent[0]} or {absent[0]}x{scale} with any suffix')
    pairs = {path: file for path, file in found.items() if file}
    left = sorted({*given.values()} - {*pairs.values()})
    if left:
        print(f'{folder}: {len(left)} images have no HR image and are left out, the first: {left[0].name}')
    return pairs


def _misfit(gt: tuple[int, ...], lq: tuple[int, ...], path: Path, file: Path, scale: int, multiple: int) -> str | None:
    """What is wrong with the sizes of a pair, (height, width) each.

    HR may have been cropped before, by any multiple of the scale, or not at all, when the bicubic rounds LR up.
    """
    if all(high // multiple * multiple // scale <= edge <= -(-high // scale)
           for high, edge in zip(gt, lq, strict=True)):
        return None
    return misfit(gt, lq, str(path), str(file), scale)


# ------------------------------------------------------------------------------------------------- records

def records(key: str, img: np.ndarray, layout: str, scale: int) -> Iterator[tuple[str, bytes, str]]:
    """The key, bytes and line of meta_info.txt of each record that an image becomes."""
    if layout == 'raw':
        yield key, raw_lmdb.encode(img), f'{key}.raw ({img.shape[0]},{img.shape[1]},{img.shape[2]}) 0'
        return
    size, step = SUBIMAGE_SIZE // scale, SUBIMAGE_STEP // scale
    number = 0
    for top in _starts(img.shape[0], size, step):
        for left in _starts(img.shape[1], size, step):
            number += 1
            part = np.ascontiguousarray(img[top:top + size, left:left + size])
            name = f'{key}_s{number:03d}'
            _, png = cv2.imencode('.png', part, [cv2.IMWRITE_PNG_COMPRESSION, PNG_COMPRESSION])
            h, w, c = part.shape
            yield name, png.tobytes(), f'{name}.png ({h},{w},{c}) {PNG_COMPRESSION}'


def _starts(length: int, size: int, step: int) -> list[int]:
    """Where the sub-images begin, the last one flush with the edge."""
    if length <= size:
        return [0]
    starts = list(range(0, length - size + 1, step))
    if length - (starts[-1] + size) > SUBIMAGE_THRESHOLD:
        starts.append(length - size)
    return starts


# ------------------------------------------------------------------------------------------------- writing

@dataclass
class _Lmdb:
    """An LMDB to be made of `source(path)` for every image."""
    target: Path
    layout: str
    scale: int
    source: Callable[[Path], np.ndarray]

    @property
    def parts(self) -> Path:
        return self.target.parent / f'.{self.target.name}.parts'


def _write(lmdbs: Sequence[_Lmdb], images: dict[str, Path], failed: list[str] | None) -> None:
    """Make the LMDBs, unless they are there: the parts of all first, since an image must be in all of them or none."""
    waiting = [each for each in lmdbs if not (each.target / raw_lmdb.META).is_file()]
    bad = {key: UserError(f'{path}: is not in {each.target}, which was there; remove that to build it anew')
           for each in lmdbs if each not in waiting for key, path in _absent(each, images).items()}
    if bad and failed is None:
        raise bad[min(bad)]
    for each in waiting:
        with _kept(each):
            each.parts.mkdir(parents=True, exist_ok=True)
            _make_parts(each, {key: path for key, path in images.items() if key not in bad}, bad, failed is None)
    good = {key: path for key, path in images.items() if key not in bad}
    if bad and not good:
        raise bad[min(bad)]
    if failed is not None:
        failed += [str(bad[key]) for key in sorted(bad)]
    for each in waiting:
        with _kept(each):
            _join_parts(each.parts, good, each.target)
            shutil.rmtree(each.parts)


def _absent(lmdb: _Lmdb, images: dict[str, Path]) -> dict[str, Path]:
    """The images that a finished LMDB does not hold, whole or as sub-images."""
    names = {*raw_lmdb.read_keys(lmdb.target)}
    return {key: path for key, path in images.items() if key not in names and f'{key}_s001' not in names}


@contextmanager
def _kept(lmdb: _Lmdb) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f'{lmdb.target}: cannot be written ({error.strerror or error}); what is done is kept in '
                        f'{lmdb.parts}, run the same command again to go on') from error


def _make_parts(lmdb: _Lmdb, images: dict[str, Path], bad: dict[str, UserError], strict: bool) -> None:
    """One file of records per image, made by all cores; a file that is there is whole, because it was renamed there.

    `bad` takes the errors of images that cannot be used, the first of which ends it all if `strict`.
    """
    def make(key: str) -> None:
        part = lmdb.parts / f'{key}.part'
        if part.exists():
            return
        try:
            img = lmdb.source(images[key])
        except UserError as error:
            if strict:
                raise
            bad[key] = error
            return
        rows = list(records(key, img, lmdb.layout, lmdb.scale))
        temporary = part.with_suffix('.tmp')
        with open(temporary, 'wb') as file:
            head = json.dumps([[row[0], len(row[1]), row[2]] for row in rows]).encode()
            file.write(len(head).to_bytes(8, 'little') + head)
            for row in rows:
                file.write(row[1])
        os.replace(temporary, part)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            for _ in tqdm(pool.map(make, images), desc=lmdb.target.name, total=len(images), unit='image',
                          dynamic_ncols=True, disable=None):
                pass
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _join_parts(parts: Path, images: dict[str, Path], target: Path) -> None:
    """Copy the records into an LMDB under a temporary name, and rename it."""
    temporary = target.parent / f'.{target.name}.tmp'
    shutil.rmtree(temporary, ignore_errors=True)
    size = sum((parts / f'{key}.part').stat().st_size for key in images)
    needed, free = int(size * 1.1) + (1 << 22), shutil.disk_usage(target.parent).free
    if free < needed:
        raise UserError(f'{target}: needs {needed >> 20} MiB, {free >> 20} MiB are free; free some and run it again')
    environment = lmdb.open(str(temporary), map_size=needed * 2, writemap=False, metasync=False)
    lines = []
    with environment.begin(write=True) as transaction:
        for key in images:
            with open(parts / f'{key}.part', 'rb') as file:
                head = json.loads(file.read(int.from_bytes(file.read(8), 'little')))
                for name, length, line in head:
                    transaction.put(name.encode(), file.read(length), append=False)
                    lines.append(line)
    environment.sync(True)
    environment.close()
    (temporary / 'lock.mdb').unlink(missing_ok=True)
    (temporary / raw_lmdb.META).write_text('\n'.join(lines) + '\n', encoding='utf-8')
    os.replace(temporary, target)
