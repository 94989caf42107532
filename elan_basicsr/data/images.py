"""Reading photographs as training data: any usual format, 8 or 16 bit, as BGR."""
from __future__ import annotations

import functools
import io
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from elan_basicsr.compat import replace_everywhere
from elan_basicsr.data.pictures import (
    EXTENSIONS,
    ORIENTATION,
    Picture,
    decode_picture,
    profile_name,
    read_picture,
)
from elan_basicsr.data.tiff import MAGIC, turned
from elan_basicsr.errors import UserError

from basicsr.utils import img_util

_LARGEST = 'OPENCV_IO_MAX_IMAGE_PIXELS'  # the bound on what the toolbox's own reading takes


def find_images(folder: str | os.PathLike, passed_over: list[Path] | None = None) -> dict[str, Path]:
    """All images below a folder by key, in the order of the keys. `passed_over` takes the files that are none.

    A key is the path below the folder without its extension, with `_` for separators and dots, since the toolbox reads
    an LMDB key up to its first dot.

    Raises:
        UserError: The folder is missing, unreadable or without images, or two images would have one key.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f'{folder}: no such folder, expected a folder of images')
    found: dict[str, Path] = {}
    for path in sorted(walk_files(folder)):
        if path.suffix.lower() in EXTENSIONS and not path.name.startswith('.'):
            key = str(path.relative_to(folder).with_suffix('')).replace(os.sep, '_').replace('.', '_')
            if key in found:
                raise UserError(f'{path}: has the same key ({key}) as {found[key]}; rename one of them')
            found[key] = path
        elif passed_over is not None and not path.name.startswith('.'):
            passed_over.append(path)
    if not found:
        raise UserError(f'{folder}: holds no images ({", ".join(EXTENSIONS)})')
    return dict(sorted(found.items()))


def walk_files(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """All files below a folder, those behind links to folders once each.

    Raises:
        UserError: A folder cannot be read.
    """
    def fail(error: OSError):
        raise UserError(f'{error.filename}: cannot be read ({error.strerror})')

    seen = set()
    for base, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        real = os.path.realpath(base)
        if real in seen:  # a link to a folder above would lead round in circles
            folders.clear()
            continue
        seen.add(real)
        for name in names:
            yield Path(base) / name


def read_bgr(path: str | os.PathLike, changes: Changes | None = None) -> np.ndarray:
    """An image as (H, W, 3) BGR, uint8 or uint16, upright. Grey becomes three equal channels; alpha is dropped.

    `changes` notes what of the pixels is lost, or is not what it seems.

    Raises:
        UserError: See `pictures.read_picture`; of several frames or pages the first is taken.
    """
    picture = read_picture(path, _largest(), bound=_LARGEST, first_frame=True)
    if changes is not None:
        changes.note(path, _changes(picture))
    return _to_bgr(picture)


def decode_bgr(content, name: str) -> np.ndarray:
    """`read_bgr` of a file's content, which error messages call `name`."""
    return _to_bgr(decode_picture(io.BytesIO(content), name, _largest(), bound=_LARGEST, first_frame=True))


def _largest() -> int:
    return int(os.environ.get(_LARGEST, 1 << 30))


def _to_bgr(picture: Picture) -> np.ndarray:
    colour = turned(picture.colour, picture.exif.get(ORIENTATION, 1))
    return np.ascontiguousarray(colour[..., ::-1] if colour.shape[2] == 3 else colour.repeat(3, axis=2))


def _changes(picture: Picture) -> Iterator[str]:
    yield from (*picture.changes, *picture.colour_label)
    if picture.alpha is not None:
        yield 'transparency is left out'
    if (profile := profile_name(picture.icc)) and 'srgb' not in profile.lower():
        yield f'the values stay, but the colour profile is left out ({profile})'


def serve_toolbox() -> None:
    """Have the toolbox's datasets see a TIFF as `read_bgr` does.

    Of TIFFs OpenCV gives noise where the planes are apart, and a negative where 0 is white.
    """
    upstream = img_util.imfrombytes

    @functools.wraps(upstream)
    def imfrombytes(content, flag='color', float32=False):
        if flag == 'color' and bytes(content[:4]) in MAGIC:
            try:
                img = eight_bit(decode_bgr(content, f'an image of {len(content)} bytes'))
            except UserError as error:
                raise ValueError(str(error)) from None
            return img.astype(np.float32) / 255 if float32 else img
        return upstream(content, flag, float32)

    replace_everywhere('imfrombytes', upstream, imfrombytes)


def eight_bit(img: np.ndarray) -> np.ndarray:
    """The upper eight bits of an image, as the toolbox reads those of 16."""
    return (img >> 8).astype(np.uint8) if img.dtype == np.uint16 else img


def counted(files: Sequence[Path]) -> str:
    """How many files there are of each suffix, and the first names: `2 files (.heic 1, .txt 1: a.heic, notes.txt)`."""
    suffixes = Counter(path.suffix.lower() or 'without suffix' for path in files)
    names = ', '.join(path.name for path in files[:3])
    return (f'{len(files)} file{"s" * (len(files) > 1)} ('
            f'{", ".join(f"{suffix} {number}" for suffix, number in suffixes.most_common(5))}: '
            f'{names}{", …" * (len(files) > 3)})')


class Changes:
    """What files lose on their way, each thing said in one line for all of them."""

    def __init__(self) -> None:
        self._files: dict[str, list] = {}

    def note(self, path, whats: Iterable[str]) -> None:
        for what in whats:
            self._files.setdefault(what, []).append(path)

    def lines(self) -> list[str]:
        """Each with the first name and how many more files there are, fit to be printed."""
        return [str(UserError(f'{min(map(str, paths))}{f" and {len(paths) - 1} more" * (len(paths) > 1)}: {what}'))
                for what, paths in sorted(self._files.items())]


def say_what_is_left_out(changes: Changes, folder, passed_over: Sequence[Path]) -> None:
    """A line on stderr for everything that the images of a folder lose, and one for the files that are no images."""
    for line in (*changes.lines(), *([f'{folder}: {counted(passed_over)} passed over'] if passed_over else [])):
        sys.stderr.write(f'basicsr: {line}\n')
