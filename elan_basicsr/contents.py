"""Which networks a checkpoint holds, whatever keys and prefixes wrappers and training programs put around them.

The search goes from the outside in and asks of every part whether it is a network that is known; so no list of wrappers
is needed, and nothing is taken off that belongs to a name.
"""
from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterable

import torch
from torch import Tensor

from elan_basicsr.errors import UserError
from elan_basicsr.safe_read import MAX_DEPTH

StateDict = dict[str, Tensor]
Known = Callable[[StateDict], bool]

# How programs name the average of a network's weights, as a part of a key or prefix.
_AVERAGE = re.compile(r'(^|[^a-z])(ema|swa|averaged?)([^a-z]|$)', re.IGNORECASE)
# Keys that stand for no network in particular, by preference: for weights that nothing is known of.
_USUAL = ('', 'params_ema', 'params', 'model_state_dict', 'state_dict', 'model')


def find_networks(content: dict, known: Known) -> dict[str, StateDict]:
    """Every known network in what a file holds, by the keys and the prefix that lead to it, joined by dots.

    A dict in a dict is a place to look, and so are the names with one prefix that ends at a dot. Within a network no
    other is looked for. A number is a place in a list, such as a Sequential's, which no wrapper puts before names.
    """
    return _search(content, lambda _, state: known(state))


def _search(content: dict, known: Callable[[str, StateDict], bool]) -> dict[str, StateDict]:
    found: dict[str, StateDict] = {}
    places: list[tuple[str, dict, int]] = [('', content, 0)]
    seen = {id(content)}
    while places:
        place, inside, prefixes = places.pop(0)
        state = {str(name): value for name, value in inside.items() if isinstance(value, Tensor)}
        if state and known(place, state):
            found[place] = state
            continue
        for key, value in inside.items():
            if isinstance(value, dict) and id(value) not in seen:  # a file can hold one dict at a million places
                seen.add(id(value))
                places.append((_joined(place, key), value, 0))
        if prefixes < MAX_DEPTH:
            places += [(_joined(place, prefix), part, prefixes + 1) for prefix, part in _by_prefix(state).items()]
    return found


def _joined(place: str, key) -> str:
    return f'{place}.{key}' if place else str(key)


def _by_prefix(state: StateDict) -> dict[str, StateDict]:
    parts: dict[str, StateDict] = {}
    for name, value in state.items():
        prefix, dot, rest = name.partition('.')
        if dot and not prefix.isdigit():
            parts.setdefault(prefix, {})[rest] = value
    return parts


def choose_network(found: dict[str, StateDict], key: str | None, path, exact: bool = False) -> StateDict:
    """Of some networks the one under `key`, else the only average of weights, or where `key` is no average's the other.

    Copies count once. What was taken of several is logged.

    Raises:
        UserError: Several networks are left, or none with `exact`, which takes nothing but what `key` means.
    """
    named = [place for place in found if key and f'.{key}.' in f'.{place}.']
    averaging = key is None or bool(_AVERAGE.search(key))
    alike = [place for place in found if bool(_AVERAGE.search(place)) == averaging]
    places = named or alike or ([] if exact else list(found))
    if exact and not places:
        raise UserError(f'{path}: has no {key}; it holds {_listed(place or "one network" for place in found)}')
    places = [place for number, place in enumerate(places)
              if not any(_same(found[place], found[before]) for before in places[:number])]
    if len(places) > 1:
        raise UserError(f'{path}: holds {len(places)} networks: {_listed(places)}; choose one by param_key_g of an '
                        'option file, or param_key in Python')
    if len(found) > 1:
        level = logging.INFO if places[0] in ('params', 'params_ema') else logging.WARNING
        others = _listed(place or 'the outermost' for place in found if place != places[0])
        logging.getLogger('basicsr').log(level, f'{path}: {places[0] or "the outermost"} is taken, not {others}')
    return found[places[0]]


def any_weights(content: dict, key: str | None, path) -> StateDict:
    """The weights in a file that holds no known network, names as they stand there: under `key`, the usual, the most.

    Raises:
        UserError: There are none.
    """
    sets: dict[str, StateDict] = {}

    def note(place: str, state: StateDict) -> bool:
        sets[place] = state
        return False

    _search(content, note)
    if not sets:
        found = f'it holds {_listed(map(str, content))} and no tensor' if content else 'it is empty'
        raise UserError(f'{path}: no network weights found: {found}; expected a state dict, bare or under any key')
    if key in sets:
        return sets[key]
    ranks = {place: -rank for rank, place in enumerate(_USUAL)}
    return sets[max(sets, key=lambda place: (len(sets[place]), ranks.get(place, -len(ranks))))]


def check_finite(state: StateDict, path) -> None:
    """Raise UserError naming the first of the weights that hold NaN or infinity, which no network computes with."""
    bad = {name: count for name, value in state.items() if (count := _not_finite(value))}
    if bad:
        first, number = next(iter(bad)), len(bad) - 1
        more = f' and {number} more tensor{"s" * (number > 1)}' if number else ''
        raise UserError(f'{path}: its weights hold NaN or infinity: {shown_name(first)}{more}, '
                        f'{sum(bad.values())} values in all; the training that wrote it had diverged, or the file is '
                        'damaged: take an earlier checkpoint')


def _not_finite(value: Tensor) -> int:
    if not (value.is_floating_point() or value.is_complex()):
        return 0
    value = value.float() if value.dtype.itemsize == 1 else value  # of torch's float8 types not all have isfinite
    return value.numel() - int(torch.isfinite(value).sum())


def _same(a: StateDict, b: StateDict) -> bool:
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


# ----------------------------------------------------------------------------------------- what nothing is known of

Needs = Callable[[Collection[str]], tuple[list[str], int]]
"""Which of an architecture's names are missing among some, and how many it has."""


def all_of(names: Collection[str]) -> Needs:
    return lambda there: ([name for name in names if name not in there], len(names))


def described(state: StateDict, architectures: Iterable[tuple[str, Needs]]) -> str:
    """How many tensors there are, the first names, and the architecture that is nearest by its names."""
    architectures = list(architectures)
    nearest: tuple[float, str, list[str]] = (1., '', [])

    def compare(part: StateDict) -> bool:
        nonlocal nearest
        for title, needs in architectures:
            missing, number = needs(part.keys())
            if number and len(missing) / number < nearest[0]:
                nearest = len(missing) / number, title, missing
        return False

    find_networks(state, compare)
    share, title, missing = nearest
    tensors = f'it holds {len(state)} tensor{"s" * (len(state) > 1)}, {_listed(state, 3)}'
    return tensors + (f'; nearest is {title}, of which {_listed(missing, 3)} {"is" if len(missing) == 1 else "are"} '
                      'missing' if share < 1 else '; no known architecture has a name of them')


def shown_name(name: str) -> str:
    """A name from a stranger's file, fit for a line."""
    name = ''.join(c if c.isprintable() else '?' for c in name)
    return name if len(name) <= 80 else f'{name[:79]}…'


def _listed(names: Iterable[str], most: int = 6) -> str:
    names = list(names)
    more = f' and {len(names) - most} more' if len(names) > most else ''
    return ', '.join(map(shown_name, names[:most])) + more
