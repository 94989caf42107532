"""`basicsr data benchmark`: the test sets, laid out as the test option files name them."""
from __future__ import annotations

import errno
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path

import cv2

from elan_basicsr.data.images import find_images, read_bgr
from elan_basicsr.data.prepare import degrade
from elan_basicsr.errors import UserError, outside

# What the sets are called in the archives that go around.
NAMES = {'Set5': ('Set5',), 'Set14': ('Set14',), 'B100': ('B100', 'BSD100', 'BSDS100'), 'Urban100': ('Urban100',),
         'Manga109': ('Manga109', 'manga109')}
HR_FOLDERS = ('GTmod12', 'HR', 'GT', 'original', 'image_SRF_4', '')
MULTIPLE = 12  # of 2, 3 and 4: one ground truth for all scales, as the toolbox has it


def lay_out_benchmarks(sources: Iterable[str | os.PathLike], *, root: str | os.PathLike = 'datasets',
                       scales: Iterable[int] = (2, 3, 4),
                       blur: float | None = None) -> dict[str, int]:
    """Make `ROOT/SET/GTmod12` and `ROOT/SET/LRbicxN` (`LRBDxN` with blur) of every benchmark found in the sources.

    The LR images are made by MATLAB's bicubic from HR images cropped to a multiple of 12.

    Args:
        sources: Folders, or archives (zip, tar), that hold `Set5/HR`, `Set5/GTmod12`, `Set5/image_SRF_4` or `Set5`.
        root: Folder of the sets; a set that is there is left alone.
        scales: Scales of the LR images.
        blur: See `prepare.build`.

    Returns:
        The number of images in each set laid out.

    Raises:
        UserError: A source is missing, damaged, or no source holds a benchmark.
    """
    done = {}
    for source in map(Path, sources):
        if source.is_dir():
            done.update(_lay_out(source, Path(root), scales, blur))
            continue
        beside = source.parent if os.access(source.parent, os.W_OK) else None
        with tempfile.TemporaryDirectory(dir=beside) as unpacked:
            try:
                _unpack(source, unpacked)
            except (OSError, ValueError, shutil.ReadError, tarfile.TarError) as error:
                if getattr(error, 'errno', None) in (errno.ENOSPC, errno.EDQUOT):
                    raise UserError(f'{source}: cannot be unpacked in {unpacked}: {outside(error)}') from None
                raise UserError(f'{source}: is neither a folder nor a readable archive ({error})') from None
            done.update(_lay_out(Path(unpacked), Path(root), scales, blur))
    if not done:
        raise UserError(f'{", ".join(map(str, sources))}: no benchmark found, expected folders such as Set5/HR')
    return done


def _unpack(source: Path, folder: str) -> None:
    """Unpack a zip or tar file; of a tar file what is a plain file and stays inside, for any Python."""
    if not tarfile.is_tarfile(source):
        shutil.unpack_archive(source, folder)
        return
    with tarfile.open(source) as archive:
        # Python 3.11.2, Debian 12's, has no filters; from 3.12 on one is to be chosen.
        archive.extraction_filter = getattr(tarfile, 'data_filter', lambda member, path: member)
        archive.extractall(folder, [member for member in archive
                                    if member.isfile() and not {'..', '/'} & {*Path(member.name).parts}])


def _lay_out(source: Path, root: Path, scales, blur) -> dict[str, int]:
    done = {}
    for name, aliases in NAMES.items():
        folders = [base / sub for alias in aliases for base in (source / alias, *source.glob(f'*/{alias}'))
                   for sub in HR_FOLDERS]
        if source.name in aliases:
            folders += [source / sub for sub in HR_FOLDERS]
        folder = next((folder for folder in folders if folder.is_dir() and _holds_images(folder)), None)
        if folder is not None:
            done[name] = _write_set(folder, root / name, scales, blur)
    return done


def _holds_images(folder: Path) -> bool:
    return any(entry.is_file() and entry.suffix.lower() in ('.png', '.bmp', '.jpg') for entry in folder.iterdir())


def _write_set(folder: Path, target: Path, scales, blur) -> int:
    images = {key: path for key, path in find_images(folder).items() if not key.endswith('_LR')}
    for scale in (1, *scales):
        out = target / ('GTmod12' if scale == 1 else f'LR{"BD" if blur else "bic"}x{scale}')
        if out.is_dir():
            continue
        temporary = target / f'.{out.name}.tmp'
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for key, path in images.items():
            img = read_bgr(path)
            img = img[:img.shape[0] // MULTIPLE * MULTIPLE, :img.shape[1] // MULTIPLE * MULTIPLE]
            content = cv2.imencode('.png', img if scale == 1 else degrade(img, scale, blur))[1]
            (temporary / f'{key}.png').write_bytes(content.tobytes())  # cv2.imwrite says nothing of a full disk
        os.replace(temporary, out)
    return len(images)
