"""Registration waits for the other package, and never stands in its way."""
import importlib
import subprocess
import sys

import pytest

from elan_basicsr.interop import on_import


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A package `host` to register with and a module `guest` of ours that does; what stood in sys.* comes back."""
    (tmp_path / 'host').mkdir()
    (tmp_path / 'host' / '__init__.py').write_text('names = ["its own"]')
    (tmp_path / 'guest.py').write_text('import host\n\n\ndef install():\n    host.names.append("ours")\n')
    monkeypatch.setattr(sys, 'meta_path', [*sys.meta_path])
    monkeypatch.setattr(on_import, 'REGISTRATIONS', {'host': 'guest'})
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in ('host', 'guest'):
        sys.modules.pop(name, None)


def test_whichever_comes_first(packages):
    on_import.register()
    assert 'host' not in sys.modules
    host = importlib.import_module('host')
    assert host.names == ['its own', 'ours']
    assert host.__spec__.loader.get_data(host.__file__)  # the loader is the ordinary one
    on_import.register()  # as a program that imported the other package first
    assert host.names == ['its own', 'ours', 'ours']


def test_a_reload_registers_no_second_time(packages):
    on_import.register()
    host = importlib.import_module('host')
    assert importlib.reload(host).names == ['its own']


def test_a_package_that_is_not_there_stays_absent(packages, monkeypatch):
    monkeypatch.setattr(on_import, 'REGISTRATIONS', {'no_such_package': 'guest'})
    on_import.register()
    with pytest.raises(ModuleNotFoundError, match='no_such_package'):
        importlib.import_module('no_such_package')
    assert importlib.util.find_spec('no_such_package') is None


def test_a_failing_registration_leaves_the_package_usable(packages):
    (packages / 'guest.py').write_text('from host import gone\n')
    on_import.register()
    with pytest.warns(UserWarning, match='ELAN could not be registered with host: .*gone'):
        host = importlib.import_module('host')
    assert host.names == ['its own']


def test_a_package_whose_import_fails_can_be_tried_again(packages):
    on_import.register()
    source = (packages / 'host' / '__init__.py').read_text()
    (packages / 'host' / '__init__.py').write_text('raise ImportError("not today, and that is a longer text")')
    with pytest.raises(ImportError, match='not today'):
        importlib.import_module('host')
    (packages / 'host' / '__init__.py').write_text(source)
    assert importlib.import_module('host').names == ['its own', 'ours']


def test_spandrel_is_imported_by_the_program_alone():
    pytest.importorskip('spandrel')
    code = ('import sys, elan_basicsr; assert "spandrel" not in sys.modules; '
            'import spandrel; assert "ELAN" in spandrel.MAIN_REGISTRY')
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0
