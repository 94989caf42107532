"""Known weights: a table of trained networks that others publish, fetched when they are first used.

None of them comes with the package. A file lies in the user's cache folder whole or not at all, and its checksum is
looked at before anything reads it, whoever put it there.
"""
from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tqdm import tqdm

from elan_basicsr.errors import UserError, nearest

FOLDER = 'ELAN_WEIGHTS'
"""The environment variable that names another folder than the user's cache."""
_TRIES_AGAIN = 2
_BLOCK = 1 << 16


@dataclass(frozen=True)
class Weights:
    """A file of weights that is published.

    Attributes:
        name: What `--weights` takes.
        architecture, scale: Of the network.
        url: Of the file, as it was at one commit.
        size, sha256: Of the file, in bytes and in hexadecimal digits.
        licence, holder: Under which, and whose it is.
        origin: Who trained it, and where that can be read.
        figures: By benchmark and scale the PSNR in dB and the SSIM, if measured, of Y, with this package.
    """
    name: str
    architecture: str
    scale: int
    url: str
    size: int
    sha256: str
    licence: str
    holder: str
    origin: str
    figures: dict[str, tuple[float, ...]]

    @property
    def file(self) -> str:
        return self.name + Path(self.url).suffix

    @property
    def description(self) -> str:
        return f'{self.architecture} x{self.scale}, {self.size / 1e6:.1f} MB'

    @property
    def rights(self) -> str:
        return f'licence {self.licence}, {self.holder}'


_FRIED_RICE_LAB = 'Fried-Rice-Lab/FriedRiceLab/d03aff7776edb831d815836496b6693b8281ca01'
KNOWN = {weights.name: weights for weights in (
    Weights(
        name='ELAN-light-x4', architecture='ELAN-light', scale=4,
        url=f'https://raw.githubusercontent.com/{_FRIED_RICE_LAB}/modelzoo/ELAN/ELAN-light_LSR_x4_unofficial.pth',
        size=2_698_593, sha256='433400f0b3182d1c0e363edd122a070d04215283621b968367d2caac2de10493',
        licence='MIT', holder='Copyright (c) 2022 Fried Rice Lab',
        origin='trained by Fried Rice Lab, https://github.com/Fried-Rice-Lab/FriedRiceLab',
        figures={'Set5 x4': (32.4018, 0.8983), 'Set14 x4': (28.7762, 0.7864),
                 'Set5 x3 by --scale 3': (34.582,), 'Set5 x2 by --scale 2': (37.997,)}),
)}


# ------------------------------------------------------------------------------------------------- what a word means

def is_known(word: str | os.PathLike) -> bool:
    """Whether a word names weights of the table; a file of that name comes first."""
    return str(word) in KNOWN and not os.path.isfile(word)


def local_file(word: str | os.PathLike) -> Path:
    """The file that a user means: `word` itself, or what it names in the table, which is fetched if it is not there.

    Raises:
        UserError: It is neither, or `fetch` fails.
    """
    if is_known(word):
        return fetch(KNOWN[str(word)])
    if not os.path.exists(word):
        raise UserError(f'{word}: no such file, expected one, or {names(word)}')
    return Path(word)


def names(near: str | os.PathLike = '') -> str:
    """The names of the table in words, or of them those that are near a word."""
    return f'a name of `basicsr weights` such as {nearest(str(near), KNOWN, count=2) or " or ".join(KNOWN)}'


def fitting(scale: float) -> str:
    """The name of the weights for an enlargement: those of the smallest scale from which it is reached.

    Raises:
        UserError: No network of the table enlarges that much.
    """
    enough = [weights for weights in KNOWN.values() if weights.scale >= scale]
    if not enough:
        most = max(weights.scale for weights in KNOWN.values())
        raise UserError(f'--scale {scale}: the weights of `basicsr weights` enlarge by {most} at most; expected that '
                        'or less, or --weights FILE')
    return min(enough, key=lambda weights: weights.scale).name


def listing() -> list[str]:
    """Lines that name every entry of the table, with what is there already."""
    lines = []
    for weights in KNOWN.values():
        path = cache_folder() / weights.file
        found = (_wrong(path, weights) or 'there') if os.path.lexists(path) else 'not there, fetched when it is used'
        figures = ', '.join(f'{where} {"/".join(map(str, values))}' for where, values in weights.figures.items())
        lines += [f'{weights.name}: {weights.description}',
                  f'    {path}: {found}',
                  f'    {weights.origin}; {weights.rights}',
                  f'    PSNR/SSIM: {figures}']
    return lines


# ---------------------------------------------------------------------------------------------------------- fetching

def cache_folder() -> Path:
    """Where files are kept: what ELAN_WEIGHTS says, else in the platform's folder for caches."""
    import pooch
    chosen = os.environ.get(FOLDER) or os.path.join(pooch.os_cache('elan-basicsr'), 'weights')
    return Path(os.path.expanduser(chosen)).absolute()


def get(name: str, folder: str | os.PathLike | None = None) -> Path:
    """`basicsr weights get`: the file of a name of the table, in the cache or in another folder.

    Raises:
        UserError: There is no such name, or `fetch` fails.
    """
    if name not in KNOWN:
        raise UserError(f'{name}: no such name, expected {names(name)}')
    return fetch(KNOWN[name], folder)


def fetch(weights: Weights, folder: str | os.PathLike | None = None) -> Path:
    """The file of known weights, whole and checked: in `folder`, or by default in the cache.

    It is fetched if it is not there, into another folder from the cache where that has it. Processes that fetch it at
    once do not disturb each other.

    Raises:
        UserError: It cannot be fetched or written, or what is there is another file; what arrived is removed.
    """
    import pooch  # here: only what fetches needs them
    from requests import RequestException
    cached = cache_folder() / weights.file
    target = cached if folder is None else Path(folder).absolute() / weights.file
    if os.path.lexists(target):
        if wrong := _wrong(target, weights):
            raise UserError(f'{target}: {wrong}, so it is not the file of {weights.name} or is damaged; remove it, '
                            'and it is fetched anew')
        return target
    if target != cached and cached.exists() and not _wrong(cached, weights):
        download = _copy(cached)
    else:
        download = _download(weights, target)
        print(f'basicsr: fetching {weights.name} ({weights.description}), {weights.origin}; {weights.rights}',
              file=sys.stderr)
    pooch.get_logger().setLevel('WARNING')  # it would say the same in its own way
    store = pooch.create(target.parent, base_url='', registry={weights.file: f'sha256:{weights.sha256}'},
                         urls={weights.file: weights.url}, retry_if_failed=_TRIES_AGAIN)
    try:
        store.fetch(weights.file, downloader=download)
    except (RequestException, ValueError) as error:  # ValueError of pooch's check
        raise _failed(weights, target, error) from None
    except OSError as error:
        reason = getattr(error.__cause__ or error, 'strerror', None) or error
        raise UserError(f'{target}: cannot be written: {reason}; name another folder, by {FOLDER} or with '
                        f'`basicsr weights get {weights.name} --to DIR`') from None
    return target


def _wrong(path: Path, weights: Weights) -> str | None:
    """What tells a file from that of the table."""
    import pooch
    try:
        size = path.stat().st_size
        if size != weights.size:
            return f'has {size:,} bytes, expected {weights.size:,}'
        digest = pooch.file_hash(path)
    except OSError as error:
        return f'cannot be read ({error.strerror})'
    return None if digest == weights.sha256 else f'has the sha256 {digest}, expected {weights.sha256}'


def _failed(weights: Weights, target: Path, error: Exception) -> UserError:
    reason = ' '.join(str(error).split()).partition('. Deleted')[0]  # of what pooch says of a wrong checksum
    if len(reason) > 160:  # requests begins with its own objects and ends with the cause
        reason = f'…{reason[-160:]}'
    return UserError(f'{weights.name}: cannot be fetched ({reason}); by hand: take {weights.url} and put it at '
                     f'{target}')


class _Arriving:
    """The file that a download is written to, no larger than was expected."""

    def __init__(self, file: IO[bytes], weights: Weights, bar: tqdm):
        self.file, self.weights, self.bar, self.count = file, weights, bar, 0

    def write(self, data: bytes) -> None:
        self.count += len(data)
        if self.count > self.weights.size:
            raise UserError(f'{self.weights.name}: {self.weights.url} sends more than the {self.weights.size:,} bytes '
                            'expected, so it is another file; nothing of it was kept')
        self.file.write(data)
        self.bar.update(len(data))

    def flush(self) -> None:
        self.file.flush()


def _download(weights: Weights, target: Path) -> Callable:
    """For pooch, which tries again after what is not a UserError, checks the file and moves it into its place."""
    import pooch
    from requests.exceptions import ChunkedEncodingError, RequestException
    # Compressed, it would be counted and checked as something else than it is.
    http = pooch.HTTPDownloader(chunk_size=_BLOCK, headers={'Accept-Encoding': 'identity'})

    def download(url: str, path: str, _) -> None:
        os.chmod(path, 0o644)  # pooch makes files for the owner alone, and the folder may be a group's
        with open(path, 'wb') as file, tqdm(desc=weights.name, total=weights.size, unit='B', unit_scale=True,
                                            disable=None) as bar:
            arriving = _Arriving(file, weights, bar)
            try:
                http(url, arriving, None)
            except RequestException as error:
                if not (arriving.count or isinstance(error, ChunkedEncodingError)):  # no answer, or a refusal
                    raise _failed(weights, target, error) from None
            if arriving.count < weights.size:
                raise ValueError(f'the connection broke before all of the {weights.size:,} bytes were there')

    return download


def _copy(source: Path) -> Callable:
    def copy(url: str, path: str, _) -> None:
        os.chmod(path, 0o644)
        shutil.copyfile(source, path)

    return copy
