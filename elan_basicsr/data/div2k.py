"""`basicsr data div2k`: from the official archives to the LMDBs that the option files name."""
from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Iterable
from pathlib import Path

from elan_basicsr.data.download import check_md5, download
from elan_basicsr.data.images import find_images
from elan_basicsr.data.prepare import build
from elan_basicsr.errors import UserError

URL = 'http://data.vision.ee.ethz.ch/cvl/DIV2K/'
SPLITS = {'train': range(1, 801), 'valid': range(801, 901)}
MD5 = {  # the host publishes none; these are what several public loaders check
    'DIV2K_train_HR.zip': 'bdc2d9338d4e574fe81bf7d158758658',
    'DIV2K_valid_HR.zip': '9fcdda83005c5e5997799b69f955ff88',
    'DIV2K_train_LR_bicubic_X2.zip': '9a637d2ef4db0d0a81182be37fb00692',
    'DIV2K_train_LR_bicubic_X3.zip': 'ad80b9fe40c049a07a8a6c51bfab3b6d',
    'DIV2K_train_LR_bicubic_X4.zip': '76c43ec4155851901ebbe8339846d93d',
    'DIV2K_valid_LR_bicubic_X2.zip': '1512c9a3f7bde2a1a21a73044e46b9cb',
    'DIV2K_valid_LR_bicubic_X3.zip': '18b1d310f9f88c13618c287927b29898',
    'DIV2K_valid_LR_bicubic_X4.zip': '21962de700c8d368c6ff83314480eff0',
}


def prepare_div2k(*, root: str | os.PathLike = 'datasets/DIV2K', scales: Iterable[int] = (2, 3, 4),
                  layout: str = 'raw', fetch: bool = False, url: str = URL) -> list[Path]:
    """Extract, check and build DIV2K.

    Args:
        root: Folder of the archives or of what they hold, and of the LMDBs.
        scales: Of 2, 3 and 4.
        layout: `raw` or `subimages`, see `prepare.build`.
        fetch: Download the archives that are neither there nor extracted.
        url: Where they are, with a slash at the end.

    Returns:
        The LMDBs. The official LR images are used where they are, and compared with our bicubic; otherwise ours are.

    Raises:
        UserError: An archive is missing or damaged, or images are missing, unreadable or of the wrong size.
    """
    root, scales = Path(root), sorted(set(scales))
    wrong = [scale for scale in scales if f'DIV2K_train_LR_bicubic_X{scale}.zip' not in MD5]
    if wrong:
        raise UserError(f'--scales {wrong[0]}: DIV2K has bicubic LR images for 2, 3 and 4')
    lmdbs = []
    for split, numbers in SPLITS.items():
        hr = root / f'DIV2K_{split}_HR'
        _provide(hr, f'DIV2K_{split}_HR.zip', root, fetch, url, needed=True)
        _check_complete(hr, [f'{number:04d}' for number in numbers])
        lr = root / f'DIV2K_{split}_LR_bicubic'
        for scale in scales:
            folder = lr / f'X{scale}'
            if _provide(folder, f'DIV2K_{split}_LR_bicubic_X{scale}.zip', root, fetch, url, needed=False):
                _check_complete(folder, [f'{number:04d}x{scale}' for number in numbers])
        lmdbs += build(hr=hr, lr=lr if lr.is_dir() else None, out=root, scales=scales, layout=layout,
                       prefix=f'DIV2K_{split}_', compare=True)
    return lmdbs


def _provide(folder: Path, name: str, root: Path, fetch: bool, url: str, needed: bool) -> bool:
    """Make `folder` from the archive `name`, unless it is there; tell whether it is there now."""
    archive = root / name
    if folder.is_dir():
        return True
    if fetch:
        download(url + name, archive, MD5[name])
    elif archive.exists():
        check_md5(archive, MD5[name])
    elif needed:
        raise UserError(f'{archive}: not there, nor the folder {folder}; put one of them there, or add --download')
    else:
        return False
    _extract(archive, folder, root)
    return True


def _extract(archive: Path, folder: Path, root: Path) -> None:
    """Unpack under a temporary name, so that `folder` is whole when it is there."""
    temporary = root / f'.{archive.stem}.extracting'
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with zipfile.ZipFile(archive) as file:
            size = sum(member.file_size for member in file.infolist())
            free = shutil.disk_usage(root).free
            if size > free:
                raise UserError(f'{archive}: needs {size >> 20} MiB to unpack, {free >> 20} MiB are free')
            file.extractall(temporary)
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(f'{archive}: cannot be unpacked ({error})') from error
    unpacked = temporary / folder.relative_to(root)
    if not unpacked.is_dir():
        raise UserError(f'{archive}: holds no folder {folder.relative_to(root)}')
    folder.parent.mkdir(parents=True, exist_ok=True)
    os.replace(unpacked, folder)
    shutil.rmtree(temporary)


def _check_complete(folder: Path, expected: list[str]) -> None:
    found = find_images(folder)
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    for names, what in ((missing, 'are missing'), (extra, 'do not belong there')):
        if names:
            raise UserError(f'{folder}: {len(names)} images {what}, the first: {", ".join(names[:3])}')
