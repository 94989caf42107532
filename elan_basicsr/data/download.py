"""Files from the web: resumed where a connection dropped, and not called finished before their checksum fits."""
from __future__ import annotations

import errno
import hashlib
import http.client
import os
import time
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

from elan_basicsr.errors import UserError

_BLOCK = 1 << 20
_TRIES = 5
_TIMEOUT = 60  # seconds without a byte


def download(url: str, target: str | os.PathLike, md5: str) -> Path:
    """Download `url` to `target`, unless it is there; either way its MD5 must be `md5`.

    What has arrived is kept in `TARGET.part`, and a further call asks for the rest only.

    Raises:
        UserError: The server cannot be reached, gives up midway five times, or the file is not the one expected.
    """
    target = Path(target)
    if target.exists():
        check_md5(target, md5)
        return target
    part = target.with_name(target.name + '.part')
    target.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(_TRIES):
        try:
            _fetch_rest(url, part)
            break
        except urllib.error.HTTPError as error:
            raise UserError(f'{url}: the server answers {error.code} {error.reason}') from None
        except (OSError, http.client.HTTPException) as error:
            full = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
            if isinstance(error, OSError) and (error.filename or error.errno in full):
                raise UserError(f'{error.filename or part}: cannot be written ({error.strerror}); what has arrived is '
                                'kept, make room or mend the folder and run the same command again') from None
            if attempt == _TRIES - 1:
                raise UserError(f'{url}: the connection broke {_TRIES} times ({error}); what has arrived is in {part}, '
                                'run the same command again to go on') from None
            time.sleep(min(2**attempt, 10) if attempt else 0)
    check_md5(part, md5)
    os.replace(part, target)
    return target


def _fetch_rest(url: str, part: Path) -> None:
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={'Range': f'bytes={have}-'} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # nothing is left to send
            return
        raise
    with response:
        if have and response.status != 206:  # the server does not resume
            have = 0
        length = response.headers.get('Content-Length')
        total = have + int(length) if length else None
        with open(part, 'ab' if have else 'wb') as file, tqdm(desc=part.stem, total=total, initial=have, unit='B',
                                                               unit_scale=True, disable=None) as bar:
            while block := response.read(_BLOCK):
                file.write(block)
                bar.update(len(block))
        if total is not None and part.stat().st_size < total:
            raise ConnectionError(f'{part.stat().st_size} of {total} bytes arrived')


def check_md5(path: Path, md5: str) -> None:
    """Raise a UserError unless the file has the MD5 expected."""
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, 'rb') as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    if digest.hexdigest() != md5:
        raise UserError(f'{path}: its MD5 is {digest.hexdigest()}, expected {md5}: it is damaged or another file; '
                        'move it away and run the command again')
