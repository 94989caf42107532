"""The one exception for everything that is the user's to mend, and the names that were meant."""
from __future__ import annotations

import difflib
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


def nearest(name: str, names: Iterable[str], count: int = 1, cutoff: float = 0.6) -> str:
    """`A or B`: the closest of `names` to a misspelt `name`, without regard to case; empty where none is close."""
    by_lower = {each.lower(): each for each in names}
    near = difflib.get_close_matches(name.lower()[:100], by_lower, n=count, cutoff=cutoff)
    return ' or '.join(by_lower[each] for each in near)
