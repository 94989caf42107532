"""The command line answers in one line, with an example, and suggests the right word."""
import errno
import os
import subprocess
import sys
import tempfile
import urllib.request

import cv2
import lmdb
import numpy as np
import pytest
import requests
import torch
import yaml

from elan_basicsr.cli import build_parser, main


def commands(parser, path=()):
    yield path, parser
    for action in parser._actions:
        if isinstance(action.choices, dict):
            for name, child in action.choices.items():
                yield from commands(child, (*path, name))


def test_every_help_shows_an_example():
    for path, parser in commands(build_parser()):
        assert 'example' in parser.format_help() or len(path) == 0, path
        assert parser.format_help().isascii() or '…' in parser.format_help()


@pytest.mark.parametrize('words, expected', [
    (['trian', '-opt', 'x'], 'did you mean train?'),
    (['train', '--opt', 'x'], '-opt'),
    (['train', '-opt', 'x', '--auto-resume'], 'did you mean --auto_resume?'),
    (['train', '-opt', 'x', '--launcher', 'pytroch'], 'did you mean pytorch?'),
    (['train', '-opt', 'x', '--imporx', 'hat'], 'did you mean --import?; see `basicsr train --help`'),
    (['data', 'build', '--hr', 'x', '--out', 'y', '--scales', '2', '--layuot', 'raw'],
     'did you mean --layout?; see `basicsr data build --help`'),
    (['upscale', 'x', '-o', 'y', '--memory'], '--memory; see `basicsr upscale --help`'),
    (['benchmark', 'ELAN', '--psnr', 'ELAN=inf'], "'ELAN=inf' is not NAME=VALUE such as ELAN-light=32.43; see"),
    ([], 'COMMAND'),
])
def test_a_mistyped_word_is_answered_in_one_line(words, expected, capsys):
    with pytest.raises(SystemExit) as caught:
        main(words)
    printed = capsys.readouterr().err
    assert caught.value.code == 2
    assert printed.count('\n') == 1 and expected in printed


def test_a_missing_option_file_is_answered_in_one_line(capsys):
    assert main(['train', '-opt', 'absent.yml']) == 2
    assert capsys.readouterr().err == 'basicsr: error: absent.yml: no such option file\n'


@pytest.mark.parametrize('words', [['--local-rank=0', 'train', '-opt', 'absent.yml'],
                                   ['--local_rank=1', 'test', '-opt', 'absent.yml'],
                                   ['train', '--local-rank=0', '-opt', 'absent.yml']])
def test_what_torch_distributed_launch_passes_is_accepted(words, capsys):
    """It comes before the command where the launcher was given `-m elan_basicsr`."""
    assert main(words) == 2
    assert capsys.readouterr().err == 'basicsr: error: absent.yml: no such option file\n'


def _failing(error):
    """Errors as they come from what a command stands on, really raised where that is possible."""
    if error == 'lmdb full':
        with tempfile.TemporaryDirectory() as folder, lmdb.open(folder, map_size=8192) as environment, \
                environment.begin(write=True) as transaction:
            transaction.put(b'a', bytes(100_000))
    if error == 'lmdb absent':
        lmdb.open('/absent/folder', readonly=True)
    if error == 'opencv':
        cv2.resize(np.zeros((0, 0, 3), np.uint8), (4, 4))
    if error == 'yaml':
        yaml.safe_load('a: [')
    if error == 'offline':
        urllib.request.urlopen('http://127.0.0.1:9/file')
    if error == 'requests':
        requests.get('http://127.0.0.1:9/file')
    if error == 'permission':
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), 'folder/x')
    if error == 'folder':
        open(os.path.dirname(__file__))
    if error == 'full':
        with open('/dev/full', 'w') as file:
            file.write('x')
    if error == 'name':
        'c\udcffv'.encode()
    if error == 'text':
        b'\xff'.decode()
    if error == 'module':
        import absent_package  # noqa: F401
    if error == 'memory':
        np.zeros(1 << 50)
    if error == 'torch memory':
        torch.empty(1 << 60)


@pytest.mark.parametrize('error, expected', [
    ('lmdb full', 'LMDB: '), ('lmdb absent', '/absent/folder'), ('opencv', 'OpenCV: '), ('yaml', 'PyYAML: '),
    ('offline', 'cannot be reached (<urlopen error [Errno 111] Connection refused>)'),
    ('requests', 'http://127.0.0.1:9/file: cannot be reached'),
    ('permission', 'folder/x: Permission denied; change its permissions, or name another path'),
    ('folder', 'Is a directory; expected a file'), ('full', 'No space left on device; make room'),
    ('name', "the name 'c\\udcffv' is not UTF-8; rename"), ('text', 'not UTF-8'),
    ('module', 'absent_package is not installed: pip install absent_package'),
    ('memory', 'not enough memory'), ('torch memory', 'not enough memory on the device'),
])
def test_what_a_disk_a_network_or_another_package_fails_with_is_one_line(error, expected, monkeypatch, capsys):
    if error == 'full' and not os.path.exists('/dev/full'):
        pytest.skip('needs /dev/full')
    monkeypatch.setattr('elan_basicsr.config.files.list_options', lambda: _failing(error))
    assert main(['options', 'list']) == 2
    printed = capsys.readouterr().err
    assert printed.startswith('basicsr: error: ') and printed.count('\n') == 1 and expected in printed
    monkeypatch.setenv('ELAN_TRACEBACK', '1')
    assert main(['options', 'list']) == 2 and 'in _failing' in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr('elan_basicsr.config.files.list_options', lambda: {}['key'])
    with pytest.raises(KeyError):
        main(['options', 'list'])


def test_names_that_are_not_utf8_are_printed(tmp_path):
    """A file may have any name; the terminal gets it with escapes, as an error would print it."""
    done = subprocess.run([sys.executable, '-m', 'elan_basicsr', 'options', 'copy', 'train_ELAN_x4.yml', '--to',
                           tmp_path / os.fsdecode(b'c\xffv')], env={**os.environ, 'PYTHONIOENCODING': 'utf-8'},
                          capture_output=True)
    assert (done.returncode, done.stderr) == (0, b'') and b'c\\udcffv/train_ELAN_x4.yml' in done.stdout


def test_python_m_is_the_same():
    process = subprocess.run([sys.executable, '-m', 'elan_basicsr', '--version'], capture_output=True, text=True)
    assert process.returncode == 0 and process.stdout.startswith('elan-basicsr ')
