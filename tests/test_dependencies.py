"""What this package stands on, missing or broken: one line that says what to type; and what `basicsr setup` mends."""
import os
import subprocess
import sys

import pytest

from elan_basicsr import bootstrap
from elan_basicsr.bootstrap import BASICSR, EXEC, OPENCV, version

from .conftest import ROOT, with_checkout

HIDE = '''
import sys
from importlib.machinery import PathFinder
class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, *rest):
        return None if name == {name!r} else super().find_spec(name, *rest)
sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
'''
BROKEN = {
    'no_opencv': ('sitecustomize.py', HIDE.format(name='cv2'), 'cv2 is not installed', 'pip install opencv-python'),
    'no_basicsr': ('sitecustomize.py', HIDE.format(name='basicsr'), 'BasicSR is not installed', 'type: basicsr setup'),
    'no_torch': ('sitecustomize.py', HIDE.format(name='torch'), 'torch is not installed', 'pip install torch'),
    'no_yapf': ('sitecustomize.py', HIDE.format(name='lmdb'), 'lmdb is not installed', 'pip install lmdb'),
    'no_distutils': ('basicsr/__init__.py', 'import distutils.nothing', 'distutils.nothing', 'type: pip install'),
    'no_desktop': ('cv2/__init__.py', 'raise ImportError("libGL.so.1: cannot open shared object file: No such file")',
                   'libGL.so.1: cannot open shared object file', 'basicsr setup'),
    'half_an_opencv': ('cv2/__init__.py', '', 'its folder holds no library', 'pip install --force-reinstall opencv'),
    'other_torch': ('torchvision/__init__.py', 'raise RuntimeError("operator torchvision::nms does not exist")',
                    'operator torchvision::nms does not exist', 'type: pip install'),
    'broken_torch': ('torch/__init__.py', 'import ctypes; ctypes.CDLL("libcudart.so.0")', 'libcudart.so.0',
                     'pip install --force-reinstall torch'),
}


def run_with(tmp_path, case: str, *words: str) -> subprocess.CompletedProcess:
    """Python with those words, where the case's module stands before the installed one."""
    file = tmp_path / BROKEN[case][0]
    file.parent.mkdir(exist_ok=True)
    file.write_text(BROKEN[case][1])
    path = os.pathsep.join([str(tmp_path), with_checkout()])
    return subprocess.run([sys.executable, *words], env={**os.environ, 'PYTHONPATH': path}, capture_output=True,
                          text=True, cwd=tmp_path)


@pytest.mark.parametrize('case', BROKEN)
def test_a_command_says_in_one_line_what_cannot_be_loaded_and_what_to_type(case, tmp_path):
    main = 'import sys; sys.argv[0] = "basicsr"; import elan_basicsr_command; sys.exit(elan_basicsr_command.main())'
    done = run_with(tmp_path, case, '-c', main, 'doctor')
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith('basicsr: error: ') and done.stderr.count('\n') == 1, done.stderr
    for expected in BROKEN[case][2:]:
        assert expected in done.stderr


@pytest.mark.parametrize('words', [['train', '-opt', 'x.yml'], ['upscale', 'x.png', '-o', 'y', '--weights', 'z']])
def test_so_does_python_m(words, tmp_path):
    done = run_with(tmp_path, 'no_desktop', '-m', 'elan_basicsr', *words)
    assert done.returncode == 2 and done.stderr.count('\n') == 1
    assert done.stderr.startswith('basicsr: error: OpenCV cannot be loaded: libGL.so.1')


def test_so_does_an_import(tmp_path):
    code = 'try:\n    import elan_basicsr\nexcept ImportError as error:\n    print(error)'
    done = run_with(tmp_path, 'no_desktop', '-c', code)
    assert done.stdout.startswith('OpenCV cannot be loaded: ') and done.stdout.count('\n') == 1, done.stderr
    done = run_with(tmp_path, 'no_desktop', '-c', 'import elan_basicsr')
    assert done.stderr.splitlines()[-1].startswith('elan_basicsr.dependencies.CannotLoad: OpenCV cannot be loaded: ')
    assert done.stderr.count('Traceback') == 1


def test_what_needs_nothing_works_without(tmp_path):
    main = 'import sys; sys.argv[0] = "basicsr"; import elan_basicsr_command; sys.exit(elan_basicsr_command.main())'
    done = run_with(tmp_path, 'no_torch', '-c', main, 'options', 'list')
    assert done.returncode == 0 and 'train_ELAN_x4.yml' in done.stdout


def test_torchvision_beside_another_torch_names_the_one_it_was_built_for(monkeypatch):
    from elan_basicsr import dependencies
    monkeypatch.setattr(dependencies.metadata, 'requires', lambda name: ['numpy', 'torch==2.1.2'])
    reason = dependencies._broken('torchvision', RuntimeError('operator torchvision::nms does not exist'))
    assert reason.endswith('it was built for torch 2.1.2; type: pip install torch==2.1.2')


# ---------------------------------------------------------------------------------------------------- basicsr setup

def test_basicsrs_setup_finds_its_version_on_every_python(tmp_path):
    """Should the setup run alone one day from Python 3.13 on, the repair has become idle."""
    (tmp_path / 'setup.py').write_text('def get_version():\n    exec(compile("__version__ = 1", "f", "exec"))\n'
                                       '    return locals()["__version__"]\nassert get_version() == 1\n'
                                       'a = {}\nexec("b = 1", a)\nassert a["b"] == 1 and "b" not in globals()\n')
    alone = subprocess.run([sys.executable, 'setup.py'], cwd=tmp_path, capture_output=True)
    assert (alone.returncode == 0) == (sys.version_info < (3, 13))
    (tmp_path / 'sitecustomize.py').write_text(EXEC)
    repaired = subprocess.run([sys.executable, 'setup.py'], cwd=tmp_path, capture_output=True, text=True,
                              env={**os.environ, 'PYTHONPATH': str(tmp_path)})
    assert repaired.returncode == 0, repaired.stderr


@pytest.fixture
def pip(monkeypatch) -> list[tuple]:
    """What pip would have been asked for; the packages of these tests' environment stay as they are."""
    calls = []
    monkeypatch.setattr(bootstrap, '_pip', lambda *arguments, **environment: calls.append(arguments))
    return calls


def test_setup_leaves_alone_what_works(pip, capsys):
    assert bootstrap.setup() == 0
    assert pip == [] and capsys.readouterr().out.count('\n') == 1


def test_setup_replaces_an_opencv_that_does_not_load(pip, tmp_path, monkeypatch):
    (tmp_path / 'cv2').mkdir()
    (tmp_path / 'cv2' / '__init__.py').write_text('raise ImportError("libGL.so.1: cannot open shared object file")')
    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    [done] = bootstrap.replace_opencv()
    assert done.startswith('installed opencv-python-headless in the place of opencv')
    assert done.endswith('libGL.so.1: cannot open shared object file')
    installed = [name for name in OPENCV if version(name)]
    assert pip == [('uninstall', '--yes', *installed), ('install', 'opencv-python-headless>=4.8')]


@pytest.mark.parametrize('found, replaced', [(None, True), ('1.3.5', True), ('1.4.2+abc', False), (BASICSR, False)])
def test_setup_installs_the_one_basicsr(found, replaced, pip, monkeypatch):
    monkeypatch.setattr(bootstrap, 'version', lambda name: found)
    done = bootstrap.install_basicsr()
    assert bool(done) == bool(pip) == replaced
    assert not replaced or f'basicsr=={BASICSR}' in pip[-1]


def test_a_failure_of_pip_is_one_line():
    with pytest.raises(SystemExit) as caught:
        bootstrap._pip('install', '--no-index', 'no-such-package-anywhere')
    assert str(caught.value).startswith('basicsr: error: `pip install --no-index') and '\n' not in str(caught.value)


# ------------------------------------------------------------------------------------------------------------- make

def check_machine(*begin: str, path: str = os.environ['PATH']) -> subprocess.CompletedProcess:
    code = '\n'.join([f'import sys\nsys.path.insert(0, {str(ROOT / "tools")!r})\nimport check_machine', *begin,
                      'print(check_machine.missing(), *check_machine.notes("."), sep="\\n")'])
    environment = {**os.environ, 'PATH': path}
    return subprocess.run([sys.executable, '-c', code], env=environment, capture_output=True, text=True)


def test_make_finds_nothing_missing_where_the_tests_run():
    assert check_machine().stdout.startswith('None\n')


@pytest.mark.parametrize('begin, expected', [
    ('sys.version_info = (3, 9, 2)', 'Python 3.10 to 3.14 is needed'),
    ('sys.version_info = (3, 15, 0)', 'Python 3.10 to 3.14 is needed'),
    ('sys.modules["ensurepip"] = None', 'this Python cannot make a virtual environment'),
    ('check_machine.platform.libc_ver = lambda: ("", "")', 'Linux with the GNU C library is needed'),
])
def test_make_says_in_one_line_what_is_missing(begin, expected):
    line = check_machine(begin).stdout.splitlines()[0]
    assert line.startswith(expected)


@pytest.mark.parametrize('manager, line', [('apt-get', 'apt install g++'), ('dnf', 'dnf install gcc-c++')])
def test_make_says_once_what_is_slower_without_a_compiler(manager, line, tmp_path):
    (tmp_path / manager).touch(0o755)
    done = check_machine('check_machine.platform.machine = lambda: "x86_64"', path=str(tmp_path))
    assert done.stdout.count('C++ compiler') == 1 and line in done.stdout, done
    assert 'C++' not in check_machine('check_machine.platform.machine = lambda: "aarch64"', path=str(tmp_path)).stdout
