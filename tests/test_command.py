"""The console script: help without loading torch, commands with the package whole; and what an installed user gets."""
import subprocess
import sys
import zipfile

import pytest

from elan_basicsr.archs.cpu.library import library

from .conftest import ROOT

RUN = 'import sys; sys.argv = ["basicsr", *{words}]; sys.path.insert(0, {root!r}); import elan_basicsr_command; '


def run(words: list[str], then: str) -> subprocess.CompletedProcess:
    code = RUN.format(words=words, root=str(ROOT)) + then
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)


@pytest.mark.parametrize('words, expected', [
    (['--help'], 'usage: basicsr'), (['train', '--help'], '--auto_resume'), (['--version'], 'elan-basicsr '),
    (['options', 'list'], 'train_ELAN_x4.yml'), (['trian'], 'did you mean train?'),
])
def test_help_and_mistakes_are_answered_before_torch_is_loaded(words, expected):
    process = run(words, 'import atexit; atexit.register(lambda: print("torch" in sys.modules)); '
                         'sys.exit(elan_basicsr_command.main())')
    assert expected in process.stdout + process.stderr
    assert process.stdout.endswith('False\n')


def test_a_command_finds_the_package_whole():
    process = run(['doctor'], 'print(elan_basicsr_command.main()); '
                              'import elan_basicsr; print(elan_basicsr.ELAN.__name__)')
    assert process.stdout.endswith('0\nELAN\n'), process.stderr
    assert 'complete' in process.stdout and 'MISSING' not in process.stdout


@pytest.mark.parametrize('command', ['doctor', 'options list'])
def test_a_reader_that_has_seen_enough_is_no_error(command):
    process = subprocess.run(['bash', '-c', f'"$0" -m elan_basicsr {command} | head -n 1; echo "${{PIPESTATUS[0]}}"',
                              sys.executable], cwd=ROOT, capture_output=True, text=True)
    assert process.stderr == '' and process.stdout.splitlines()[1] in ('0', '141')


@pytest.mark.parametrize('shell', ['bash', 'zsh'])
def test_completion_knows_every_command(shell, capsys):
    pytest.importorskip('shtab')
    from elan_basicsr.cli import main
    assert main(['completion', shell]) == 0
    script = capsys.readouterr().out
    assert all(word in script for word in ('convert', 'export', '--auto_resume', '--dynamic'))
    assert '_shtab_compgen_files' in script or '_files' in script


def test_completion_without_shtab_says_what_is_missing(monkeypatch, capsys):
    from elan_basicsr.cli import main
    monkeypatch.setitem(sys.modules, 'shtab', None)
    assert main(['completion', 'bash']) == 2
    assert 'pip install shtab' in capsys.readouterr().err


def test_the_wheel_holds_what_the_commands_need(tmp_path):
    if not (ROOT / '.git').exists():
        pytest.skip('needs a checkout')
    files = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split('\n')
    for name in filter(None, files):  # a copy: building leaves folders behind
        target = tmp_path / 'source' / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    # The wheel is built from the source archive, which so holds what a wheel is made of.
    subprocess.run([sys.executable, '-m', 'build', '--no-isolation', '--outdir', str(tmp_path),
                    str(tmp_path / 'source')], check=True, capture_output=True)
    [wheel] = tmp_path.glob('*.whl')
    held = set(zipfile.ZipFile(wheel).namelist())
    kernels = [name for name in files if name.startswith('elan_basicsr/archs/cpu/kernels/')]
    assert kernels and not held & set(kernels)
    assert any(name.startswith('elan_basicsr/archs/cpu/_kernels') for name in held) == (library() is not None)
    for name in filter(None, files):
        if name.startswith(('elan_basicsr/', 'elan_basicsr_command.py')) and name not in kernels:
            assert name in held
        if name.startswith('options/'):
            assert f'elan_basicsr/{name}' in held
    assert not any(name.startswith(('tests/', 'tools/')) for name in held)
