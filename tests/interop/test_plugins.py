"""What `--import` and entry points register counts everywhere, and what cannot be imported is one line."""
import json
import os
import re
import stat
import subprocess
import sys

import pytest
import yaml

from elan_basicsr.cli import main
from elan_basicsr.interop import plugins

from ..conftest import ROOT

PAGE = (ROOT / 'docs' / 'your_network.md').read_text(encoding='utf-8')
[MY_ARCH] = re.findall(r'```python\n(.*?)```', PAGE, re.S)
[MY_NET] = re.findall(r'```yaml\n(.*?)```', PAGE, re.S)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty current directory; what imports leave in registries, modules and path is taken back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', [*sys.path])
    monkeypatch.setattr(plugins, '_lines', {})
    monkeypatch.setattr(plugins, '_notices', [])
    for registry in plugins.REGISTRIES:
        monkeypatch.setattr(registry, '_obj_map', {**registry._obj_map})
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in repr(sys.modules[name]):
            del sys.modules[name]


@pytest.fixture
def my_arch(folder):
    (folder / 'my_arch.py').write_text(MY_ARCH)


def train(options, *words) -> int:
    with open('run.yml', 'w') as file:
        yaml.safe_dump(options, file)
    return main(['train', '-opt', 'run.yml', *words])


def log_of(folder) -> str:
    logs = sorted(folder.glob('experiments/run/*.log'), key=lambda path: path.stat().st_mtime_ns)
    return logs[-1].read_text()


def test_the_file_of_the_page_has_fifteen_lines():
    assert len(MY_ARCH.splitlines()) == 15


def test_an_imported_network_trains_and_the_log_says_what_was_imported(options, my_arch, folder, capsys):
    options.update(network_g={'type': 'MyNet', 'upscale': 2})
    options['train']['total_iter'] = 4
    assert train(options) == 2
    assert 'needs --import PACKAGE' in capsys.readouterr().err
    assert train(options, '--import', 'my_arch') == 0
    assert f'Imported my_arch ({folder}/my_arch.py), which registered arch MyNet' in log_of(folder)


def test_resuming_with_other_imports_says_so_in_one_line(options, my_arch, folder, monkeypatch):
    (folder / 'another.py').write_text('')
    options['train']['total_iter'] = 4
    assert train(options, '--import', 'my_arch') == 0
    options['train']['total_iter'] = 6
    assert train(options, '--auto_resume', '--import', 'my_arch') == 0
    assert 'goes on with' not in log_of(folder)
    monkeypatch.setattr(plugins, '_lines', {})
    options['train']['total_iter'] = 7
    assert train(options, '--auto_resume') == 0
    assert 'The run imported my_arch so far, and goes on with nothing imported' in log_of(folder)


@pytest.mark.parametrize('before', [None, 'my_arch', {'a': 1}, [3, None]])
def test_a_state_of_an_older_version_or_of_a_stranger_is_no_obstacle(before):
    assert len(plugins.changes(before)) == isinstance(before, list)


def test_the_schema_knows_what_was_imported_and_what_it_prints_is_elsewhere(my_arch, folder, capsys):
    with open('my_arch.py', 'a') as file:
        file.write('\n\nprint("hello")\n')
    assert main(['options', 'schema', '--import', 'my_arch']) == 0
    printed = capsys.readouterr()
    schema = json.loads(printed.out)
    [found] = [each['then'] for each in schema['definitions']['architecture']['allOf']
               if each['if']['properties']['type']['const'] == 'MyNet']
    assert found['properties']['num_feat']['default'] == 32
    assert 'hello' in printed.err


def test_an_argument_that_an_imported_network_does_not_have_is_refused(options, my_arch, capsys):
    options.update(network_g={'type': 'MyNet', 'num_feet': 3})
    assert train(options, '--import', 'my_arch') == 2
    assert 'did you mean num_feat?' in capsys.readouterr().err


def test_an_option_file_imports_nothing(options, my_arch, capsys):
    options['import'] = 'my_arch'
    assert train(options) == 2
    assert 'import: an option file runs no code; expected --import PACKAGE' in capsys.readouterr().err
    assert 'my_arch' not in sys.modules


def test_a_process_of_its_own_imports_it_too(my_arch, capsys):
    words = ['benchmark', 'MyNet:num_feat=8', '--scale', '2', '--sizes', '16x16', '--runs', '1', '--memory']
    assert main([*words, '--import', 'my_arch', '--json', 'out.json']) == 0
    with open('out.json') as file:
        [row] = json.load(file)['rows']
    assert row['memory'] is not None


@pytest.mark.parametrize('content, expected', [
    ('x = (', "'(' was never closed ({file}, line 1)"),
    ('\n1 / 0', 'ZeroDivisionError: division by zero ({file}, line 2)'),
    ('import sys\nsys.exit("usage: mine")', "({file}, line 2); expected what a program does under if __name__"),
    ('import no_such_package', 'it needs no_such_package, which is not installed ({file}, line 1); '
                               'type: pip install no_such_package'),
    ('import skimage.no_such_module', 'there is no module skimage.no_such_module ({file}, line 1)'),
    ('from torch import no_such_name', 'ImportError: cannot import name'),
    ('class Odd(Exception):\n    pass\n\n\nraise Odd("odd\\nlines")', 'Odd: odd lines ({file}, line 5)'),
    ('import torch\ntorch.zeros(2) + torch.zeros(3)', '({file}, line 2)'),
    ('x = "\\x00"[5]\n', 'IndexError: string index out of range'),
    ('from basicsr.utils.registry import ARCH_REGISTRY\n\n\n@ARCH_REGISTRY.register()\nclass ELAN:\n    pass',
     'mine registers the arch ELAN, which elan_basicsr.archs.elan_arch has registered already; give it another name'),
])
def test_a_module_that_cannot_be_imported_is_one_line_with_the_cause(content, expected, folder, capsys):
    (folder / 'mine.py').write_text(content)
    assert main(['options', 'schema', '--import', 'mine']) == 2
    printed = capsys.readouterr()
    assert printed.out == '' and printed.err.count('\n') == 1
    assert printed.err.startswith('basicsr: error: --import mine: ')
    assert expected.format(file=folder / 'mine.py') in printed.err


@pytest.mark.parametrize('name, expected', [
    ('my_arch.py', 'type: --import my_arch'), ('./my_arch.py', 'type: --import my_arch'),
    ('nets/net.py', 'type: --import nets.net'), ('nets/', 'type: --import nets'),
    ('../my_arch.py', 'expected the name of a module'),
    ('my_arhc', 'did you mean my_arch?'), ('nets.nett', 'did you mean nets.net?'),
    ('absent', 'there is no module absent, neither in {folder} nor among what is installed'),
    ('my_arch.absent', 'there is no module my_arch.absent'), ('', 'expected the name of a module'),
    ('.my_arch', 'expected the name of a module'), ('a b', 'expected the name of a module'),
    ('bare', 'is a folder without __init__.py'), ('inspect', 'give the file another name'),
])
def test_a_name_that_is_no_modules_is_one_line_that_says_what_to_type(name, expected, my_arch, folder, capsys):
    for inside in ('nets/__init__.py', 'nets/net.py', 'bare/hat/__init__.py', 'inspect.py'):
        (folder / inside).parent.mkdir(parents=True, exist_ok=True)
        (folder / inside).write_text('')
    assert main(['options', 'schema', '--import', name]) == 2
    printed = capsys.readouterr()
    assert printed.out == '' and printed.err.count('\n') == 1
    assert expected.format(folder=folder) in printed.err


def test_a_file_elsewhere_is_told_with_its_folder(folder, tmp_path_factory, capsys):
    file = tmp_path_factory.mktemp('elsewhere') / 'my_arch.py'
    file.write_text('')
    assert main(['options', 'schema', '--import', str(file)]) == 2
    assert f'type: --import my_arch after export PYTHONPATH={file.parent}' in capsys.readouterr().err


def test_packages_that_register_one_name_are_told_apart(my_arch, folder):
    (folder / 'other.py').write_text(MY_ARCH)
    plugins.import_modules(['my_arch', 'other'])
    entries = plugins.REGISTRIES[0]
    assert entries.get('MyNet').__module__ == 'my_arch' and entries.get('MyNet_other').__module__ == 'other'
    assert 'The arch MyNet is that of my_arch; that of other is MyNet_other' in plugins.notices()


def test_one_package_registers_a_name_once(my_arch, folder, capsys):
    with open('my_arch.py', 'a') as file:
        file.write(MY_ARCH)
    assert main(['options', 'schema', '--import', 'my_arch']) == 2
    assert 'my_arch registers the arch MyNet, which my_arch has registered already' in capsys.readouterr().err


def install(folder, name: str, module: str) -> None:
    """What pip leaves of a package with an entry point, in a folder on the path."""
    info = folder / f'{name}-1.0.dist-info'
    info.mkdir()
    (info / 'METADATA').write_text(f'Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n')
    (info / 'entry_points.txt').write_text(f'[basicsr.plugins]\n{name} = {module}\n')


def test_an_installed_package_counts_and_doctor_lists_it(my_arch, folder, monkeypatch, capsys):
    install(folder, 'mine', 'my_arch')
    monkeypatch.syspath_prepend(str(folder))
    assert main(['doctor']) == 0
    assert re.search(r'mine 1\.0 +Imported my_arch \(.*\), which registered arch MyNet', capsys.readouterr().out)
    assert main(['options', 'schema']) == 0
    assert '"MyNet"' in capsys.readouterr().out


def test_a_broken_installed_package_is_told_of_and_nothing_else_stops(folder, monkeypatch, capsys):
    (folder / 'broken.py').write_text('1 / 0')
    install(folder, 'mine', 'broken')
    monkeypatch.syspath_prepend(str(folder))
    assert main(['options', 'schema']) == 0
    told = capsys.readouterr().err
    assert told.count('\n') == 1 and 'mine (broken), which is installed, is left out: ZeroDivisionError' in told
    assert main(['doctor']) == 1
    assert 'BROKEN ZeroDivisionError' in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_page_takes_a_reader_from_an_empty_file_to_a_report(data, folder, tmp_path_factory):
    """Files and commands as they stand there; the command runs as it is installed, without a folder on its path."""
    pytest.importorskip('matplotlib')
    (folder / 'my_arch.py').write_text(MY_ARCH)
    (folder / 'my_net.yml').write_text(MY_NET)
    for name in ('train', 'test'):
        (folder / name).symlink_to(data / name)
    command = tmp_path_factory.mktemp('bin') / 'basicsr'
    command.write_text(f'#!{sys.executable}\nimport sys\nsys.path.append({str(ROOT)!r})\n'
                       'from elan_basicsr_command import main\nsys.exit(main())\n')
    command.chmod(command.stat().st_mode | stat.S_IEXEC)
    commands = re.findall(r'```bash\n(.*?)```', PAGE, re.S)
    assert len(commands) == 2
    environment = {**os.environ, 'PATH': f'{command.parent}{os.pathsep}{os.environ["PATH"]}'}
    for block in commands:
        process = subprocess.run(['bash', '-ec', block], env=environment, capture_output=True, text=True)
        assert process.returncode == 0, process.stderr
    networks = json.loads((folder / 'results' / 'mine' / 'comparison.json').read_text())['networks']
    assert [row['architecture'] for row in networks] == ['MyNet', 'ELAN', 'bicubic']
    assert (folder / 'results' / 'mine' / 'report.html').stat().st_size > 10_000
