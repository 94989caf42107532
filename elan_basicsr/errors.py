"""The one exception for everything that is the user's to mend, other packages' in its words, and what was meant."""
from __future__ import annotations

import difflib
import errno
import traceback
from collections.abc import Iterable

MAX_MESSAGE = 1000


class UserError(Exception):
    """A mistake in what the user gave: an option file, a checkpoint, a path, an argument.

    The message is one line that says what is wrong, where (file, key, line), what was expected and what to do. The
    command line prints it as it stands and exits with code 2; a program that uses the package can catch it.

    It stays one printable line whatever names a stranger's file puts into it.
    """

    def __init__(self, message: str):
        if str(message).startswith('Caught UserError in DataLoader worker'):
            # torch raises a worker's exception again with its traceback for a message; the end of that is the message.
            message = str(message).rpartition('UserError: ')[2]
        line = ''.join(c if c.isprintable() else ' ' for c in ' '.join(str(message).split()))
        super().__init__(line if len(line) <= MAX_MESSAGE else f'{line[:MAX_MESSAGE]}…')


class RunLost(UserError):
    """The run broke off through no fault in its options: a process died or hung. Exit code 1: resume it as it is."""


# Packages whose errors tell of something outside this one: a full database, a damaged image, a refused login.
_SAID_BY = {'lmdb': 'LMDB', 'cv2': 'OpenCV', 'yaml': 'PyYAML', 'wandb': 'Weights & Biases', 'onnx': 'ONNX',
            'onnxruntime': 'ONNX Runtime', 'onnxscript': 'onnxscript', 'requests': 'the network',
            'urllib3': 'the network', 'http': 'the network', 'zipfile': 'a zip file', 'tarfile': 'a tar file',
            'safetensors_rust': 'safetensors', 'google': 'protobuf'}
_ADVICE = {errno.ENOSPC: 'make room, or name another folder', errno.EDQUOT: 'make room, or name another folder',
           errno.EACCES: 'change its permissions, or name another path', errno.EPERM: 'name another path',
           errno.EROFS: 'name another folder', errno.EISDIR: 'expected a file',
           errno.ENOTDIR: 'expected a folder above it', errno.EMFILE: 'raise the limit with `ulimit -n`',
           errno.ENAMETOOLONG: 'choose a shorter name'}


def outside(error: BaseException) -> str | None:
    """In one line what a disk, a network, memory or another package had to say; None for what only a bug can raise."""
    words = _last_words(error)
    package = type(error).__module__.partition('.')[0]
    if package in _SAID_BY and not isinstance(error, OSError):
        return f'{_SAID_BY[package]}: {words}'
    if isinstance(error, OSError):
        return _outside_of(error, words)
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith(('elan_basicsr', 'basicsr')):
        return f'{error.name} is not installed: pip install {error.name.partition(".")[0]}'
    if isinstance(error, ImportError) and error.path and '/elan_basicsr/' not in error.path:
        return f'{error.name or error.path} cannot be imported ({words}); install it again'
    if isinstance(error, UnicodeEncodeError):
        name = error.object[max(error.start - 40, 0):error.end + 40]
        return f'the name {name!a} is not UTF-8; rename the file or folder'
    if isinstance(error, UnicodeDecodeError):
        return f'a text file that is read is not UTF-8 ({words}); save it as UTF-8'
    if isinstance(error, MemoryError):
        return 'there is not enough memory; close other programs, or give less to do at once'
    return None


def _outside_of(error: OSError, words: str) -> str:
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_name == 'download_url_to_file' and {'url', 'dst'} <= set(frame.f_locals):
            # torch.hub's, by which torchvision and the toolbox fetch trained networks; the error names no file.
            return (f'{frame.f_locals["url"]}: cannot be fetched ({words}); by hand: fetch it where there is a '
                    f'network, and put it at {frame.f_locals["dst"]}')
    url = getattr(error, 'url', None) or getattr(getattr(error, 'request', None), 'url', None)
    if url or type(error).__module__.partition('.')[0] in ('urllib', 'requests', 'urllib3'):
        return f'{url or "the network"}: cannot be reached ({words})'
    said = '; '.join(part for part in (error.strerror or words, _ADVICE.get(error.errno or 0)) if part)
    return f'{error.filename}: {said}' if error.filename is not None else said


def _last_words(error: BaseException) -> str:
    """An error's message in one line; of one that torch brings from a loader's worker, what stood at its end."""
    text = str(error)
    if 'Original Traceback' in text:
        text = text.strip().splitlines()[-1]
    return ' '.join(text.split())[:300] or type(error).__name__


def nearest(name: str, names: Iterable[str], count: int = 1, cutoff: float = 0.6) -> str:
    """`A or B`: the closest of `names` to a misspelt `name`, without regard to case; empty where none is close."""
    by_lower = {each.lower(): each for each in names}
    near = difflib.get_close_matches(name.lower()[:100], by_lower, n=count, cutoff=cutoff)
    return ' or '.join(by_lower[each] for each in near)
