"""Which images of a data set belong together: by their names, then by their sizes.

The toolbox's rule comes first: the LQ image is called `filename_tmpl` of the GT image's name, with its suffix. Where
that finds nothing, another suffix will do, and the usual endings are passed over (`0001x4`, `0001_LR` of `0001_HR`).
What lies in a folder beside the images (notes, Thumbs.db, hidden files, folders) counts for nothing.
"""
from __future__ import annotations

import functools
import io
import logging
import math
import os
import re
import time
import unicodedata
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from os import path as osp

import cv2
import lmdb
from PIL import ExifTags, Image

from elan_basicsr.data import raw_lmdb
from elan_basicsr.data.images import EXTENSIONS, read_bgr
from elan_basicsr.errors import UserError

TEMPLATE = '{}'
CROP = 12
"""Multiple to which the field crops GT images: that of the scales 2, 3 and 4, as the benchmarks have it."""
SECONDS = 10
"""For the sizes of a data set: what is left of a larger one, or on a slower disk, shows when its turn comes."""
CHUNK = 256  # pairs between two looks at the clock
_ENDING = re.compile(r'(?:x\d+|[ _.-](?:x\d+|[hl][rq]|gt|bic(?:ubic)?)(?:x\d+)?)+$', re.I)
_HEADER_BYTES = 1 << 16
# What meta_info files tell behind a name.
_TOLD = re.compile(r'\s+\(\d+,\s*\d+(,\s*\d+)?\).*$')


class Unpaired(UserError):
    """Images that have no partner, or one that does not fit: `problems`, a line each; `rows`, what can be used."""

    def __init__(self, rows: list[dict[str, str]], problems: list[str]):
        self.rows, self.problems = rows, problems
        more = f'; {len(problems) - 1} more like it' if len(problems) > 1 else ''
        super().__init__(f'{problems[0]}{more}; `basicsr data verify -opt FILE` lists what is wrong')


# ------------------------------------------------------------------------------------------------- names

def images_of(folder: str) -> list[str]:
    """The names of the images right in a folder, sorted.

    Raises:
        UserError: There is no such folder, it holds none, or a link to one that is not there.
    """
    try:
        with os.scandir(folder) as entries:
            found = {entry.name: entry.is_symlink() and not osp.exists(entry.path) for entry in entries
                     if _is_image(entry)}
    except OSError as error:
        raise UserError(f'{folder}: cannot be read as a folder of images ({error.strerror})') from None
    for name in [name for name, is_lost in sorted(found.items()) if is_lost]:
        raise UserError(f'{osp.join(folder, name)}: is a link to a file that is not there; remove it')
    if not found:
        below = next((base for base, _, names in os.walk(folder) for name in names
                      if osp.splitext(name)[1].lower() in EXTENSIONS), None)
        there = f'; those in {below} do not count, give that folder itself' if below else ''
        raise UserError(f'{folder}: holds no images ({", ".join(EXTENSIONS)}){there}')
    return sorted(found)


def _is_image(entry: os.DirEntry) -> bool:
    if entry.name.startswith('.') or entry.is_dir():
        return False
    # A name that is none of an image may still be one, and a link to nowhere is an image that is missing.
    return osp.splitext(entry.name)[1].lower() in EXTENSIONS or entry.is_file() and cv2.haveImageReader(entry.path)


def _normal(name: str) -> str:
    return unicodedata.normalize('NFC', name)  # macOS takes accents apart


def core(stem: str) -> str:
    """A name without the usual endings of HR and LR images."""
    return _ENDING.sub('', _normal(stem)) or _normal(stem)


def _wanted(gt_name: str, template: str) -> str:
    """The name of an LQ image by the toolbox's rule."""
    stem, suffix = osp.splitext(osp.basename(gt_name))
    return template.format(stem) + suffix


class Names:
    """Names of the LQ images in a folder, found by those of GT images."""

    def __init__(self, folder: str, names: Iterable[str], template: str):
        self.folder, self.all, self.template = folder, set(names), template
        self._by_stem, self._by_core = defaultdict[str, list[str]](list), defaultdict[str, list[str]](list)
        for name in sorted(self.all):
            stem = osp.splitext(name)[0]
            self._by_stem[_normal(stem)].append(name)
            self._by_core[core(stem)].append(name)

    def paths(self, gt_name: str) -> list[str]:
        """Paths of those that may belong to a GT image: none, or one, or several, if names cannot tell."""
        return [osp.join(self.folder, name) for name in self._of(gt_name)]

    def _of(self, gt_name: str) -> list[str]:
        wanted = _wanted(gt_name, self.template)
        if wanted in self.all:
            return [wanted]
        found = self._by_stem.get(_normal(osp.splitext(wanted)[0]), [])
        stem = osp.splitext(osp.basename(gt_name))[0]
        return found if found or self.template != TEMPLATE else self._by_core.get(core(stem), [])

    def without_gt(self, gt_names: Iterable[str], taken: Iterable[str]) -> list[str]:
        """Those that belong to no GT image. With a template, those for another scale are meant to be left out."""
        left = sorted(name for name in self.all if osp.join(self.folder, name) not in taken)
        known = {core(osp.splitext(name)[0]) for name in gt_names} if self.template != TEMPLATE else set()
        return [name for name in left if core(osp.splitext(name)[0]) not in known]


def pair_folders(folders: Sequence[str], keys: Sequence[str], template: str) -> list[dict[str, str]]:
    """The toolbox's `paired_paths_from_folder`: a row of paths (`lq_path`, `gt_path`) for each pair.

    Raises:
        Unpaired: An image has no partner, or several.
        UserError: A folder cannot be read, or holds no images.
    """
    lq_folder, gt_folder = folders
    names, gt_names = Names(lq_folder, images_of(lq_folder), template), images_of(gt_folder)
    rows, problems = list[dict[str, str]](), list[str]()
    taken: dict[str, str] = {}
    for gt_name in gt_names:
        gt, found = osp.join(gt_folder, gt_name), names.paths(gt_name)
        problem = _not_one(found, gt, lq_folder, template) or found[0] in taken and (
            f'{found[0]}: would be the LQ image of both {taken[found[0]]} and {gt}; rename one')
        if problem:
            problems.append(problem)
        else:
            taken[found[0]] = gt
            rows.append({f'{keys[0]}_path': found[0], f'{keys[1]}_path': gt})
    problems += [f'{gt_folder}: there is no GT image for {osp.join(lq_folder, name)}'
                 for name in names.without_gt(gt_names, taken)]
    return _complete(rows, problems)


def _not_one(found: Sequence[str], gt: str, lq_folder: str, template: str) -> str | None:
    """What is wrong with the paths found for a GT image."""
    if len(found) == 1:
        return None
    if found:
        return (f'{gt}: has several LQ images, {", ".join(found[:3])}; say which by filename_tmpl, such as '
                "'{}x4', or leave one")
    return f'{lq_folder}: there is no LQ image for {gt}, such as {_wanted(gt, template)}'


def pair_listed(folders: Sequence[str], keys: Sequence[str], list_file: str, template: str) -> list[dict[str, str]]:
    """The toolbox's `paired_paths_from_meta_info_file`, which takes the GT images that a file lists.

    Raises:
        Unpaired: A file that is listed is not there, or its LQ image.
        OSError: The list cannot be read.
    """
    lq_folder, gt_folder = folders
    rows, problems = list[dict[str, str]](), list[str]()
    names_in = functools.cache(functools.partial(_names_in, template=template))
    for name in listed(list_file, gt_folder):
        gt = osp.join(gt_folder, name)
        places = [lq_folder, *([osp.join(lq_folder, below)] if (below := osp.dirname(name)) else [])]
        exact = [path for place in places if osp.isfile(path := osp.join(place, _wanted(name, template)))]
        found = exact[:1] or next(filter(None, (names_in(place).paths(name) for place in places)), [])
        if not osp.isfile(gt):
            problems.append(f'{gt}: is listed in {list_file} and not there')
        elif problem := _not_one(found, gt, lq_folder, template):
            problems.append(problem)
        else:
            rows.append({f'{keys[0]}_path': found[0], f'{keys[1]}_path': gt})
    return _complete(rows, problems)


def listed(list_file: str, folder: str) -> list[str]:
    """The names in a meta_info file. Blanks in a name are part of it where a file has that name."""
    with open(list_file, encoding='utf-8') as file:
        lines = [_TOLD.sub('', line.strip()) for line in file if line.strip()]
    return [line if ' ' not in line or osp.isfile(osp.join(folder, line)) else line.split(' ')[0] for line in lines]


def _names_in(folder: str, template: str) -> Names:
    try:
        return Names(folder, images_of(folder), template)
    except UserError:
        return Names(folder, [], template)


def pair_lmdbs(folders: Sequence[str], keys: Sequence[str]) -> list[dict[str, str]]:
    """The toolbox's `paired_paths_from_lmdb`: both LMDBs have the same keys.

    Raises:
        Unpaired: They have not.
        OSError: A list of keys cannot be read.
    """
    of_lq, of_gt = (set(raw_lmdb.read_keys(folder)) for folder in folders)
    rows = [{f'{keys[0]}_path': key, f'{keys[1]}_path': key} for key in sorted(of_lq & of_gt)]
    problems = [f'{folder}: {key}: is missing, the {other} image is there' for folder, other, missing in (
        (folders[0], 'GT', of_gt - of_lq), (folders[1], 'LQ', of_lq - of_gt)) for key in sorted(missing)]
    return _complete(rows, problems)


def _complete(rows: list[dict[str, str]], problems: list[str]) -> list[dict[str, str]]:
    if problems:
        raise Unpaired(rows, problems)
    return rows


# ------------------------------------------------------------------------------------------------- sizes

def fits(gt: tuple[int, ...], lq: tuple[int, ...], scale: int) -> bool:
    """Whether LQ can be of GT, by (height, width): LQ times scale is GT, or GT cropped as the field does it."""
    multiple = math.lcm(CROP, scale)
    return all(g // multiple * multiple <= q * scale <= g for g, q in zip(gt, lq, strict=True))


def misfit(gt: tuple[int, ...], lq: tuple[int, ...], gt_name: str, lq_name: str, scale: int) -> str:
    """In words, that a GT image and an LQ image, by their (height, width), do not belong together."""
    expected = tuple(edge * scale for edge in lq)
    hint = f'; the pair fits scale {found}' if (found := fitting_scale(gt, lq)) not in (None, scale) else ''
    if fits(gt, lq, scale):
        hint = '; crop it to that'
    return (f'{gt_name}: is {_size(gt)}, expected {_size(expected)}, {scale} times its LQ image {lq_name} '
            f'({_size(lq)}){hint}')


def _size(edges: tuple[int, ...]) -> str:
    return f'{edges[1]}x{edges[0]}'


def fitting_scale(gt: tuple[int, ...], lq: tuple[int, ...]) -> int | None:
    """The scale by which a GT image of this size gives an LQ image of that one, if there is any."""
    ratio, edges = gt[0] / max(lq[0], 1), [*zip(gt, lq, strict=True)]
    near = [scale for scale in (math.floor(ratio), math.ceil(ratio)) if scale]
    down = [scale for scale in near if all(g // scale == q for g, q in edges)]
    return next((scale for scale in down + near if all(g // scale <= q <= -(-g // scale) for g, q in edges)), None)


def check_sizes(rows: Sequence[dict[str, str]], opt: dict) -> None:
    """Compare the sizes in the headers of all pairs of files or of records of an LMDB, as far as SECONDS allow.

    Raises:
        Unpaired: A pair does not fit the scale, or is smaller than a training patch.
        UserError: An LMDB is cut off, or a file is no image.
    """
    end, problems = time.monotonic() + SECONDS, list[str]()
    for start in range(0, len(rows), CHUNK):
        if time.monotonic() > end:
            logging.getLogger('basicsr').info(
                f'{opt["dataroot_lq"]}: the sizes of {start} of {len(rows)} pairs were compared in {SECONDS} s; the '
                'others are when their turn comes')
            break
        chunk = rows[start:start + CHUNK]
        sizes = [header_sizes(opt[f'dataroot_{kind}'], [row[f'{kind}_path'] for row in chunk]) for kind in ('gt', 'lq')]
        for row, gt, lq in zip(chunk, *sizes, strict=True):
            problem = gt and lq and wrong_sizes(gt, lq, row['gt_path'], row['lq_path'], opt)
            problems += [problem] if problem else []
            for path in [path for path, size in ((row['gt_path'], gt), (row['lq_path'], lq)) if not size]:
                _check_file(path)
    _complete([*rows], problems)


def _check_file(path: str) -> None:
    """What a file without a size is damaged by; nothing is wrong with one that is turned when it is read."""
    if osp.isfile(path):
        try:
            with Image.open(path):
                pass
        except Exception:  # Pillow's decoders raise anything on damaged files, and others may read it
            read_bgr(path)


def wrong_sizes(gt: tuple[int, ...], lq: tuple[int, ...], gt_name: str, lq_name: str, opt: dict,
                strict: bool = False) -> str | None:
    """What is wrong with the sizes of a pair, (height, width), in a data set of these options.

    In training GT has to be LQ times scale. Elsewhere it is cropped to that: by less than the scale, if `strict`.
    """
    scale, training = opt['scale'], opt['phase'] == 'train'
    if training:
        right = gt == tuple(edge * scale for edge in lq)
    else:
        right = lq == tuple(edge // scale for edge in gt) if strict else fits(gt, lq, scale)
    if not right:
        return misfit(gt, lq, gt_name, lq_name, scale)
    if training and opt.get('gt_size') and min(gt) < opt['gt_size']:
        return (f'{gt_name}: is {_size(gt)}, smaller than gt_size {opt["gt_size"]}; leave it out or take smaller '
                'patches')
    return None


def header_sizes(root: str, names: Sequence[str]) -> list[tuple[int, int] | None]:
    """(height, width) of files, or of records of the LMDB `root`, by their headers; None where those do not tell."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of many pixels, which are not decoded here
        if osp.isfile(osp.join(root, 'data.mdb')):
            return _record_sizes(root, names)
        with ThreadPoolExecutor(16) as pool:  # the folder may be far away
            return [*pool.map(_header_size, names)]


def _record_sizes(root: str, names: Sequence[str]) -> list[tuple[int, int] | None]:
    try:
        environment = raw_lmdb.open_readonly(root)
    except lmdb.Error:  # damaged, or open in this process already: reading tells
        return [None for _ in names]
    try:
        with environment.begin(buffers=True) as transaction:
            records = (transaction.get(name.encode()) for name in names)
            return [None if record is None else _header_size(io.BytesIO(record[:_HEADER_BYTES]))
                    for record in records]
    finally:
        raw_lmdb.close(root)  # the toolbox opens it anew, which LMDB allows once in a process


def _header_size(file) -> tuple[int, int] | None:
    try:
        with Image.open(file) as image:
            # Pillow would decode a PNG to look for it behind the pixels.
            exif = image.getexif() if image.format != 'PNG' or 'exif' in image.info else {}
            return None if exif.get(ExifTags.Base.Orientation, 1) > 4 else image.size[::-1]  # else it may be turned
    except Exception:  # Pillow's decoders raise anything on damaged files, of which reading tells
        return None
