"""Who has no checkout gets the option files by a command, and loses none of their own to it."""
import pytest

from elan_basicsr.cli import main
from elan_basicsr.config.files import copy_options, list_options, shipped
from elan_basicsr.errors import UserError

from ..conftest import ROOT


def test_all_are_listed_with_what_they_are(capsys):
    folder = ROOT / 'options'
    assert set(shipped()) == {path.relative_to(folder).as_posix() for path in folder.rglob('*.yml')}
    assert all(title and not title.startswith('#') for _, title in list_options())
    assert main(['options', 'list']) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(shipped())


def test_copies_are_the_files_where_their_comments_expect_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(['options', 'copy', 'train_ELAN_light_x4', 'compare/*']) == 0
    copies = capsys.readouterr().out.split()
    assert 'options/train_ELAN_light_x4.yml' in copies and 'options/compare/train_RCAN_x4.yml' in copies
    for copy in copies:
        assert (tmp_path / copy).read_bytes() == (ROOT / copy).read_bytes()
    assert len(copy_options(target=tmp_path / 'all')) == len(shipped())


def test_nothing_is_overwritten_and_nothing_half_copied(tmp_path):
    (tmp_path / 'train_ELAN_x4.yml').write_text('mine')
    with pytest.raises(UserError, match=r'train_ELAN_x4\.yml: is there already'):
        copy_options(['train_ELAN_x*'], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ['train_ELAN_x4.yml']
    assert (tmp_path / 'train_ELAN_x4.yml').read_text() == 'mine'
    with pytest.raises(UserError, match='train_ELEN_x4.yml: no option file has that name'):
        copy_options(['train_ELEN_x4.yml'], tmp_path)
