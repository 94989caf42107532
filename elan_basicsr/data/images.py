"""Reading photographs as training data: any usual format, 8 or 16 bit, as BGR."""
from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from elan_basicsr.errors import UserError

EXTENSIONS = ('.png', '.jpg', '.jpeg', '.webp', '.tif', '.tiff', '.bmp')


def find_images(folder: str | os.PathLike) -> dict[str, Path]:
    """All images below a folder by key, in the order of the keys.

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


def read_bgr(path: str | os.PathLike) -> np.ndarray:
    """An image as (H, W, 3) BGR, uint8 or uint16. Grey becomes three equal channels; alpha is dropped.

    Raises:
        UserError: The file is missing, empty, cut off, or of a format OpenCV does not read.
    """
    try:
        data = np.fromfile(path, np.uint8)
    except OSError as error:
        raise UserError(f'{path}: cannot be read ({error.strerror or error})') from None
    try:
        img = cv2.imdecode(data, cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH) if data.size else None
    except cv2.error as error:
        if too_large(error):
            raise UserError(f'{path}: {too_large(error)}') from None
        img = None
    if img is None or img.dtype not in (np.uint8, np.uint16) or cut_off(data):
        raise UserError(f'{path}: is no readable image; it may be cut off or damaged')
    return img


def too_large(error: cv2.error) -> str | None:
    """In words, if OpenCV refused an image for the size in its header."""
    if 'MAX_IMAGE' not in str(error):
        return None
    limit = os.environ.get('OPENCV_IO_MAX_IMAGE_PIXELS', 1 << 30)
    return f'has more than {limit} pixels; raise OPENCV_IO_MAX_IMAGE_PIXELS if there is memory for it'


def cut_off(data: np.ndarray) -> bool:
    """Whether a PNG or JPEG lacks its end: OpenCV returns the part it could decode, filled up with grey."""
    head, tail = data[:8].tobytes(), data[-64:].tobytes()
    if head == b'\x89PNG\r\n\x1a\n':
        return b'IEND' not in tail
    if head[:3] == b'\xff\xd8\xff':
        return b'\xff\xd9' not in data[-4096:].tobytes()
    return False
