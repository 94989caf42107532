"""Reading option files and overrides: YAML as data, never as code, with the line of every key.

PyYAML parses; its constructors are used for plain scalars only. So no tag can build an object, aliases cannot blow a
file up, and a mistake can be reported with the line it stands on.
"""
from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from elan_basicsr.errors import UserError, nearest

MAX_BYTES = 1 << 20
MAX_NODES = 20_000
MAX_DEPTH = 30
MAX_NUMBER = 100
"""Characters of a number. Python takes quadratic time for long ones, and refuses to print them."""
MAX_MESSAGE = 500
TOO_MUCH = 'too many or too deeply nested values'

_Loader = getattr(yaml, 'CSafeLoader', yaml.SafeLoader)
_PLAIN_TAGS = {f'tag:yaml.org,2002:{kind}' for kind in ('str', 'int', 'float', 'bool', 'null')}
_TIMESTAMP = 'tag:yaml.org,2002:timestamp'
# YAML 1.1 wants a dot in the mantissa and a sign in the exponent; people write 1e-4 and mean a number.
_FLOAT = re.compile(r'[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+')

Path_ = tuple[str, ...]


@dataclass
class Source:
    """Where each option came from, for messages."""
    file: str
    lines: dict[Path_, int] = field(default_factory=dict)
    overridden: dict[Path_, str] = field(default_factory=dict)
    added: set[Path_] = field(default_factory=set)

    def line(self, path: Path_) -> int:
        """The line of a key, or of the nearest section around it; 0 for none."""
        return next((self.lines[above] for above in _upwards(path) if above in self.lines), 0)

    def error(self, key: Path_ | str, message: str) -> UserError:
        """A UserError `FILE:LINE: key: message`; for an overridden key it begins with the override."""
        path = tuple(key.split('.')) if isinstance(key, str) else key
        above = next((above for above in _upwards(path) if above in self.overridden or above in self.lines), ())
        where = self.overridden.get(above) or (f'{self.file}:{self.lines[above]}' if above else self.file)
        return user_error(f'{where}: {".".join(path)}: {message}')


def _upwards(path: Path_) -> Iterator[Path_]:
    return (path[:length] for length in range(len(path), 0, -1))


def user_error(message: str) -> UserError:
    """A UserError that stays one printable line of bounded length, whatever the file holds."""
    line = ''.join(c if c.isprintable() else ' ' for c in ' '.join(message.split()))
    return UserError(line if len(line) <= MAX_MESSAGE else f'{line[:MAX_MESSAGE]}…')


def shown(value) -> str:
    """A value as people write it, shortened."""
    text = 'none' if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return f'{text[:60]}…' if len(text) > 60 else text


def read_yaml(file: str | os.PathLike) -> tuple[dict, Source]:
    """The options in a YAML file, as dicts, lists and scalars, and where they stand.

    Raises:
        UserError: The file is missing, too large, not UTF-8, not YAML, no mapping, has a key twice or a tag that would
            build an object.
    """
    try:
        if Path(file).is_dir():
            raise user_error(f'{file}: is a folder, expected an option file')
        with open(file, 'rb') as stream:
            raw = stream.read(MAX_BYTES + 1)
        text = raw.decode('utf-8-sig')
    except FileNotFoundError:
        raise user_error(f'{file}: no such option file') from None
    except (OSError, ValueError) as error:
        raise user_error(f'{file}: cannot be read as a text file ({" ".join(str(error).split())[:120]})') from None
    if len(raw) > MAX_BYTES:
        raise user_error(f'{file}: larger than {MAX_BYTES >> 20} MiB, which no option file is')
    source = Source(str(file))
    options = _Builder(text, str(file), source.lines).build()
    if not isinstance(options, dict):
        raise user_error(f'{file}: expected keys and values (name: …), found '
                        f'{"nothing" if options is None else type(options).__name__}')
    return options, source


_QUOTES = "write a path in single quotes ('C:\\Users') or with /"


def _hint(reason: str, line: str) -> str:
    """What to do about a mistake that PyYAML tells in its own terms."""
    if line.lstrip(' ').startswith('\t'):
        return '; YAML is indented with spaces, not tabs'
    if 'hexdecimal number' in reason or 'unknown escape character' in reason:
        return f'; in double quotes a backslash begins such a character: {_QUOTES}'
    if 'mapping values are not allowed' in reason:
        return '; a value with a colon is written in quotes, and a key stands as far to the right as its neighbours'
    if 'cannot start any token' in reason or 'alphabetic or numeric character' in reason:
        return '; a value that begins with one of @ ` % * & ! is written in quotes'
    if "expected ',' or" in reason:
        return '; a bracket or brace is not closed before here'
    if 'unexpected end of stream' in reason:
        return '; a quotation mark is not closed'
    if 'expected key' in reason or "could not find expected ':'" in reason or 'block end' in reason:
        return '; keys of one section stand one below the other, each with a colon and a space after it'
    if 'undefined alias' in reason:
        return '; a value that begins with * is written in quotes'
    return ''


class _Builder:
    """Turns the node tree of one YAML document into plain values."""

    def __init__(self, text: str, where: str, lines: dict[Path_, int] | None = None):
        self.text, self.where, self.is_file = text, where, lines is not None
        self.lines = {} if lines is None else lines
        self.nodes = 0

    def build(self):
        try:
            self.loader = _Loader(self.text)
            self._refuse_depth()
            node = self.loader.get_single_node()
            return None if node is None else self._value(node, (), ())
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            if error.problem == 'exceeded maximum nesting depth':  # libyaml's scanner has a limit too, and runs ahead
                raise self._error(mark, TOO_MUCH) from None
            reason = ', '.join(part for part in (error.context, error.problem) if part)
            line = ''.join(self.text.splitlines()[mark.line:mark.line + 1]) if mark else ''
            raise self._error(mark, f'not valid YAML: {reason}{_hint(reason, line)}') from None
        except yaml.YAMLError as error:
            raise user_error(f'{self.where}: not valid YAML: {" ".join(str(error).split())[:120]}') from None

    def _refuse_depth(self) -> None:
        """PyYAML composes nodes by recursion in C: half a million nested lists, one MiB of `- - -`, end the process."""
        depth = 0
        for number, event in enumerate(yaml.parse(self.text, Loader=_Loader)):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH or number > 2 * MAX_NODES:
                raise self._error(event.start_mark, TOO_MUCH)

    def _error(self, mark, message: str) -> UserError:
        line = f':{mark.line + 1}' if mark and self.is_file else ''
        return user_error(f'{self.where}{line}: {message}')

    def _value(self, node, path: Path_, parents: tuple):
        self.nodes += 1
        if self.nodes > MAX_NODES or len(parents) > MAX_DEPTH or any(node is parent for parent in parents):
            raise self._error(node.start_mark, f'{TOO_MUCH}, or an alias of itself')
        if isinstance(node, yaml.MappingNode) and node.tag == 'tag:yaml.org,2002:map':
            return self._mapping(node, path, (*parents, node))
        if isinstance(node, yaml.SequenceNode) and node.tag == 'tag:yaml.org,2002:seq':
            return [self._value(item, (*path, str(i)), (*parents, node)) for i, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        raise self._tag_error(node)

    def _mapping(self, node, path: Path_, parents: tuple) -> dict:
        result: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise self._error(key_node.start_mark, 'a key is a list or a section, expected a name')
            key = key_node.value  # as written: YAML would turn a metric named `y` into True
            self._scalar(key_node)
            if key_node.tag == 'tag:yaml.org,2002:merge':
                merged_values = self._value(value_node, path, parents)
                for part in merged_values if isinstance(merged_values, list) else [merged_values]:
                    if not isinstance(part, dict):
                        raise self._error(key_node.start_mark, '<<: expected a section to merge')
                    merged = {**part, **merged}
                continue
            here = (*path, key)
            if key in result:
                raise self._error(key_node.start_mark, f'{".".join(here)}: the key is there twice, first in '
                                                       f'line {self.lines[here]}; remove one')
            self.lines[here] = key_node.start_mark.line + 1
            result[key] = self._value(value_node, here, parents)
        return {**merged, **result}

    def _scalar(self, node):
        if node.tag in (_TIMESTAMP, 'tag:yaml.org,2002:merge', 'tag:yaml.org,2002:value'):
            return node.value
        if node.tag not in _PLAIN_TAGS:
            raise self._tag_error(node)
        if node.tag.endswith((':int', ':float')) and len(node.value) > MAX_NUMBER:
            raise self._error(node.start_mark, f'a number of {len(node.value)} characters, expected up to {MAX_NUMBER}')
        if node.tag.endswith(':str') and not node.style and _FLOAT.fullmatch(node.value):
            return float(node.value)
        if node.style == '"' and any(ord(character) < 32 for character in node.value):
            raise self._error(node.start_mark, f'"{repr(node.value[:60])[1:-1]}" holds a control character: in double '
                                               f'quotes a backslash begins one, as \\t and \\n do; {_QUOTES}')
        try:
            return self.loader.construct_object(node)
        except (ValueError, OverflowError, KeyError, IndexError):
            kind = node.tag.rsplit(':', 1)[1]
            raise self._error(node.start_mark, f'{node.value[:40]!r} is no {kind}') from None

    def _tag_error(self, node) -> UserError:
        tag = node.tag.replace('tag:yaml.org,2002:', '!!')
        return self._error(node.start_mark, f'the tag {tag[:80]} is refused, for such a tag could run code; write the '
                                            'value itself')


def apply_overrides(options: dict, source: Source, overrides=(), force_yml=()) -> None:
    """Carry out `--set key.sub=value` and `--force_yml key:sub=value` on `options`, in order.

    Values are read as YAML. `--set` may add a key to a section; `--force_yml` changes keys that exist, as in BasicSR.
    """
    for text in overrides:
        _override(options, source, f'--set {text}', text, '.', may_add=True)
    for text in force_yml:
        _override(options, source, f'--force_yml {text}', text, ':', may_add=False)


def _override(options: dict, source: Source, where: str, text: str, separator: str, may_add: bool) -> None:
    key, equals, value = text.partition('=')
    path = tuple(part.strip() for part in key.split(separator))
    if not equals or not all(path):
        raise user_error(f'{where}: expected key{separator}sub=value, such as train{separator}total_iter=1000')
    section: dict | list = options
    for depth, part in enumerate(path[:-1], 1):
        child = _item(section, part)
        if child is None and may_add and depth > 1 and isinstance(section, dict):
            child = section[part] = {}
        if not isinstance(child, (dict, list)):
            found = f'{".".join(path[:depth])} is no section' if _item(section, part, _ABSENT) is not _ABSENT else \
                f'there is no section {".".join(path[:depth])}'
            raise user_error(f'{where}: {found} in {source.file}{_suggestion(part, section)}')
        section = child
    last = path[-1]
    if _item(section, last, _ABSENT) is _ABSENT and isinstance(section, dict):
        if not may_add:
            raise user_error(f'{where}: there is no key {".".join(path)} in {source.file}{_suggestion(last, section)}')
        source.added.add(path)
    parsed = _Builder(value, where).build()
    if separator == ':' and parsed in ('none', 'None'):
        parsed = None  # BasicSR's own reading
    if isinstance(section, dict):
        section[last] = parsed
    elif last.isdecimal() and int(last[:9]) < len(section):
        section[int(last)] = parsed
    else:
        raise user_error(f'{where}: {".".join(path[:-1])} is a list of {len(section)}; expected an index below that')
    source.overridden[path] = where


_ABSENT = object()


def _item(section: dict | list, part: str, default=None):
    if isinstance(section, dict):
        return section.get(part, default)
    return section[int(part)] if part.isdecimal() and int(part[:9]) < len(section) else default


def _suggestion(part: str, section: dict | list) -> str:
    near = nearest(part, section if isinstance(section, dict) else ())
    return f'; did you mean {near}?' if near else ''
