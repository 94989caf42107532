"""The command line answers in one line, with an example, and suggests the right word."""
import subprocess
import sys

import pytest

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


def test_python_m_is_the_same():
    process = subprocess.run([sys.executable, '-m', 'elan_basicsr', '--version'], capture_output=True, text=True)
    assert process.returncode == 0 and process.stdout.startswith('elan-basicsr ')
