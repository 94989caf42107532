"""Networks, models, data sets, losses and metrics of other packages: modules imported so that they register themselves.

Named on the command line (`--import PACKAGE`), or by an installed package in the entry-point group `basicsr.plugins`.
Never by an option file, which may come from anyone and runs no code.
"""
from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import pkgutil
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from types import ModuleType

from elan_basicsr.dependencies import DISTRIBUTIONS
from elan_basicsr.errors import UserError, nearest

from basicsr.utils import registry

GROUP = 'basicsr.plugins'
REGISTRIES = (registry.ARCH_REGISTRY, registry.MODEL_REGISTRY, registry.DATASET_REGISTRY, registry.LOSS_REGISTRY,
              registry.METRIC_REGISTRY)
TOOLBOX = ('basicsr', 'elan_basicsr')

_lines: dict[str, str] = {}
"""What is told of each module that was imported, by its name."""
_notices: list[str] = []


def imported() -> list[str]:
    """The modules that were imported here, by name."""
    return [*_lines]


def told(name: str) -> str:
    """What is told of a module that was imported: from where, and what it registered."""
    return _lines[name]


def notices() -> list[str]:
    """What a log should hold of the imports."""
    return [*_lines.values(), *_notices]


def changes(before: object) -> list[str]:
    """What a run that goes on should tell, in one line, when it imported `before` and something else is imported today.

    `before` is what its training state holds: a list of names, or nothing where an older version saved it.
    """
    if not isinstance(before, list) or set(map(str, before)) == set(_lines):
        return []
    names = [', '.join(map(str, each)) or 'nothing' for each in (before, _lines)]
    return [f'The run imported {names[0]} so far, and goes on with {names[1]} imported: what is registered may differ']


def import_plugins(names: Sequence[str] = ()) -> None:
    """Import what installed packages offer, then the modules `names`, found as `python -m` finds them.

    An installed package that cannot be imported is told of and left out.

    Raises:
        UserError: One of `names` cannot be imported, or registers a name that the toolbox has.
    """
    for entry_point, wrong in import_installed():
        if wrong:
            notice = f'{entry_point.name} ({entry_point.value}), which is installed, is left out: {wrong}'
            _notices.append(notice)
            sys.stderr.write(f'basicsr: {notice}\n')
    import_modules(names)


def import_installed() -> Iterator[tuple[metadata.EntryPoint, str]]:
    """Import each entry point of the group; yield it with what is wrong with it, if anything."""
    for entry_point in sorted(metadata.entry_points(group=GROUP)):
        try:
            _import(entry_point.module)
            yield entry_point, ''
        except UserError as error:
            yield entry_point, str(error)


def import_modules(names: Sequence[str]) -> None:
    """Import modules by name, with the current directory on the path; `UserError` as `import_plugins` says."""
    if names and not {'', os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())
    for name in names:
        if not re.fullmatch(r'\w[\w-]*(\.\w[\w-]*)*', name) or Path(name).is_file():
            raise UserError(f'--import {name}: {_as_module(name)}')
        try:
            module = _import(name)
            _check_whereabouts(name, module)
        except UserError as error:
            raise UserError(f'--import {name}: {error}') from error.__cause__


def _as_module(text: str) -> str:
    """How to name the module of a file or folder."""
    if not text.endswith('.py') and not Path(text or '-').is_dir():
        return 'expected the name of a module, as Python imports it: my_arch for my_arch.py, package.module'
    path = Path(text).resolve()
    words = Path(os.path.relpath(path.with_name(path.name.removesuffix('.py')), Path.cwd())).parts
    if words and all(word.isidentifier() for word in words):
        return f'expected the name of a module and not a path; type: --import {".".join(words)}'
    return (f'expected the name of a module and not a path; type: --import {path.name.removesuffix(".py")} after '
            f'export PYTHONPATH={path.parent}')


def _import(name: str) -> ModuleType:
    before = {each: set(each.keys()) for each in REGISTRIES}
    try:
        # What it prints would end up in what a command prints, such as a schema.
        with contextlib.redirect_stdout(sys.stderr), _namesakes_told_apart():
            module = importlib.import_module(name)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # a stranger's code fails in every way
        raise UserError(_cause(name, error)) from error
    if name not in _lines:
        new = '; '.join(f'{each._name} {", ".join(added)}' for each in REGISTRIES
                        if (added := sorted(set(each.keys()) - before[each])))
        _lines[name] = f'Imported {name} ({_place(module)}), which registered {new or "nothing new"}'
    return module


def _place(module: ModuleType) -> str:
    return getattr(module, '__file__', None) or 'a folder'


def _check_whereabouts(name: str, module: ModuleType) -> None:
    """Refuse what was imported in place of what was meant, and registers nothing."""
    file = getattr(module, '__file__', None)
    if file is None and hasattr(module, '__path__'):
        [folder, *_] = module.__path__
        raise UserError(f'{folder} is a folder without __init__.py, of which Python imports nothing; expected a module '
                        f'in it, such as {name}.my_arch, or, where the package lies in it, PYTHONPATH={folder}')
    here = Path(name.split('.')[0]).with_suffix('.py')
    if here.is_file() and '.' not in name and not (file and here.samefile(file)):
        raise UserError(f'Python has another module of that name ({file or "built in"}), which comes before '
                        f'{here}; give the file another name')


@contextlib.contextmanager
def _namesakes_told_apart() -> Iterator[None]:
    """Let two packages register one name: the later one's gets its package's name added, as the toolbox adds its own.

    A name of the toolbox's is nobody else's, nor does one package get to use a name twice.
    """
    upstream = registry.Registry._do_register

    def do_register(self, name, obj, suffix=None):
        full = f'{name}_{suffix}' if suffix else name
        holder, package = self._obj_map.get(full), obj.__module__.partition('.')[0]
        if holder is not None:
            owner = holder.__module__.partition('.')[0]
            if owner in (package, *TOOLBOX):
                raise UserError(f'{obj.__module__} registers the {self._name} {full}, which {holder.__module__} has '
                                'registered already; give it another name')
            suffix = package
            _notices.append(f'The {self._name} {name} is that of {owner}; that of {package} is {name}_{package}')
        upstream(self, name, obj, suffix)

    registry.Registry._do_register = do_register
    try:
        yield
    finally:
        registry.Registry._do_register = upstream


# ----------------------------------------------------------------------------------------------------- what went wrong

def _cause(name: str, error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name:
        if f'{name}.'.startswith(f'{error.name}.'):
            return _no_such_module(name, error.name)
        needs = f'it needs {error.name}, which is not installed{_line(name, error)}'
        root = error.name.partition('.')[0]
        if importlib.util.find_spec(root) is not None:  # all but this module of it
            return f'there is no module {error.name}{_line(name, error)}; expected other versions of the two'
        return f'{needs}; type: pip install {DISTRIBUTIONS.get(root, root)}'
    if isinstance(error, SyntaxError):
        return f'{error.msg} ({error.filename}, line {error.lineno})'
    if isinstance(error, SystemExit):
        return (f'it leaves Python when it is imported{_line(name, error)}; expected what a program does under '
                "if __name__ == '__main__'")
    return f'{type(error).__name__}: {error}{_line(name, error)}'


def _line(name: str, error: BaseException) -> str:
    """The innermost line of the package's own that the error came from, in brackets."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__)
              if not frame.filename.startswith('<frozen ') and frame.filename not in (__file__, importlib.__file__)]
    root = name.partition('.')[0]
    own = [frame for frame in frames if {root, f'{root}.py'} & set(Path(frame.filename).parts)]
    return f' ({frame.filename}, line {frame.lineno})' if (frame := next(iter((own or frames)[::-1]), None)) else ''


def _no_such_module(name: str, missing: str) -> str:
    parent = missing.rpartition('.')[0]
    folders = getattr(sys.modules.get(parent), '__path__', []) if parent else [os.getcwd()]
    near = nearest(missing.rpartition('.')[2], sorted(module.name for module in pkgutil.iter_modules(folders)))
    if near:
        return f'there is no module {missing}; did you mean {f"{parent}.{near}" if parent else near}?'
    return (f'there is no module {missing}, neither in {os.getcwd()} nor among what is installed; go to the folder '
            'that holds it, or name that folder in PYTHONPATH')
