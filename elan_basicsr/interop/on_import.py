"""Registering with other programs' registries when, and only if, those programs are imported.

Importing spandrel takes as long as importing this package, and most users never need it. So nothing of it is imported
here: a finder at the front of `sys.meta_path` waits for the package's name, lets the ordinary finders load it, and runs
the registration as soon as its module has been executed. A package that has been imported before is registered with at
once.
"""
from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from importlib.abc import MetaPathFinder

# Module to wait for -> ours, whose `install()` registers with it.
REGISTRATIONS = {'spandrel': 'elan_basicsr.interop.spandrel', 'mmengine.registry': 'elan_basicsr.interop.mmengine'}


class _Finder(MetaPathFinder):
    """Finds nothing itself; has `install()` called after a module it waits for has been executed."""

    def __init__(self) -> None:
        self.waiting = set(REGISTRATIONS)

    def find_spec(self, name, path=None, target=None):
        if name not in self.waiting:
            return None
        self.waiting.discard(name)  # so that the search below does not come back here
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.waiting.add(name)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def exec_module(module) -> None:
            run(module)
            self.waiting.discard(name)
            _install(name)

        spec.loader.exec_module = exec_module
        return spec


def _install(name: str) -> None:
    try:
        importlib.import_module(REGISTRATIONS[name]).install()
    except Exception as error:  # a version whose interface is another one must stay importable all the same
        warnings.warn(f'elan_basicsr: ELAN could not be registered with {name}: {error!r}', stacklevel=2)


def register() -> None:
    """Register with the packages that are imported already, and with the others when they come; call it once."""
    finder = _Finder()
    for name in REGISTRATIONS:
        if name in sys.modules:
            finder.waiting.discard(name)
            _install(name)
    sys.meta_path.insert(0, finder)
