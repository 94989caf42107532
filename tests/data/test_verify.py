"""`basicsr data verify` and `benchmark`: what is wrong is found, and what is right is laid out."""
import os
import shutil
import tarfile
from pathlib import Path

import cv2
import lmdb
import numpy as np
import yaml

from elan_basicsr.cli import main
from elan_basicsr.data import raw_lmdb
from elan_basicsr.data.images import read_bgr
from elan_basicsr.data.resize import imresize


def problems(capsys, *words) -> tuple[int, str]:
    code = main(['data', 'verify', *map(str, words)])
    return code, capsys.readouterr().out


def test_a_whole_data_set_has_no_problems(options, capsys):
    Path('run.yml').write_text(yaml.safe_dump(options))
    code, printed = problems(capsys, '-opt', 'run.yml')
    assert code == 0 and printed == '14 images read, 0 problems\n'


def test_every_kind_of_damage_is_found(data, options, capsys, tmp_path):
    shutil.copytree(data / 'train', 'broken')
    root = Path('broken/HR_raw.lmdb')
    environment = lmdb.open(str(root), map_size=1 << 28)
    with environment.begin(write=True) as transaction:
        rocket = bytes(transaction.get(b'rocket'))
        transaction.put(b'chelsea', rocket)  # a duplicate
        transaction.put(b'coffee', rocket[:1000])  # cut off
        transaction.put(b'stray', rocket)
        transaction.delete(b'rocket')
    environment.close()
    train = options['datasets']['train']
    train.update(dataroot_gt=str(root), dataroot_lq='broken/LR_bicubic_X2_raw.lmdb', gt_size=200)
    del options['datasets']['val']
    Path('run.yml').write_text(yaml.safe_dump(options))
    code, printed = problems(capsys, '-opt', 'run.yml')
    assert code == 1
    for expected in ('rocket: is listed', 'stray: is there but not listed', 'coffee: a record of 1000 bytes',
                     'astronaut: is 136x132, smaller than gt_size 200'):
        assert expected in printed, expected


def test_sizes_that_do_not_match_and_duplicates_are_found(data, options, capsys):
    shutil.copytree(data / 'test', 'test')
    lr = Path('test/LR/retina.png')
    cv2.imwrite(str(lr), read_bgr(lr)[1:])
    shutil.copy('test/GT/retina.png', 'test/GT/twin.png')
    shutil.copy('test/GT/hubble_deep_field.png', 'test/GT/again.png')
    shutil.copy('test/LR/hubble_deep_field.png', 'test/LR/again.png')
    options['datasets'] = {'test_1': {**options['datasets']['val'], 'dataroot_gt': 'test/GT', 'dataroot_lq': 'test/LR'}}
    Path('run.yml').write_text(yaml.safe_dump(options))
    code, printed = problems(capsys, '-opt', 'run.yml')
    assert code == 1
    for expected in ('GT/retina.png: is 60x50, expected 60x48, 2 times its LQ image test/LR/retina.png',
                     'there is no LQ image for test/GT/twin.png'):
        assert expected in printed, expected


def test_an_lmdb_cut_off_midway_is_found(data, capsys, tmp_path):
    shutil.copytree(data / 'train' / 'HR_raw.lmdb', tmp_path / 'HR_raw.lmdb')
    file = tmp_path / 'HR_raw.lmdb' / 'data.mdb'
    file.write_bytes(file.read_bytes()[:5000])
    code, printed = problems(capsys, tmp_path / 'HR_raw.lmdb')
    assert code == 1 and 'HR_raw.lmdb' in printed
    (tmp_path / 'HR_raw.lmdb' / raw_lmdb.META).unlink()
    code, printed = problems(capsys, tmp_path / 'HR_raw.lmdb')
    assert code == 1 and 'was not finished' in printed


def test_nothing_to_verify_is_one_line(capsys):
    assert main(['data', 'verify']) == 2
    assert main(['data', 'verify', 'absent']) == 2
    assert capsys.readouterr().err.count('\n') == 2


def test_benchmarks_are_laid_out_from_folders_and_archives(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name in ('Set5/HR/a.png', 'BSD100/b.png', 'Urban100/image_SRF_4/c_HR.png'):
        Path('in/benchmark', name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(f'in/benchmark/{name}', rng.integers(0, 256, (50, 61, 3), np.uint8))
    shutil.make_archive('all', 'gztar', 'in')
    assert main(['data', 'benchmark', 'all.tar.gz']) == 0
    assert capsys.readouterr().out.splitlines() == [
        'datasets/Set5: 1 images', 'datasets/B100: 1 images', 'datasets/Urban100: 1 images']
    gt = read_bgr('datasets/Set5/GTmod12/a.png')
    assert gt.shape == (48, 60, 3)
    for scale in (2, 3, 4):
        assert np.array_equal(read_bgr(f'datasets/Set5/LRbicx{scale}/a.png'), imresize(gt, 1 / scale))
    assert main(['data', 'benchmark', 'in/benchmark/Set5', '--root', 'other', '--scales', '2']) == 0
    assert main(['data', 'benchmark', 'datasets/Set5/GTmod12', '--root', 'third']) == 2
    assert main(['data', 'benchmark', 'absent.zip']) == 2


def test_an_archive_writes_nothing_outside_of_its_folder(tmp_path, monkeypatch, capsys):
    """On any Python: filters came with 3.10.12 and 3.11.4."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delattr(tarfile, 'data_filter', raising=False)
    (tmp_path / 'a.png').write_bytes(b'')
    with tarfile.open('all.tar', 'w') as archive:
        for name in ('../outside.png', str(tmp_path / 'absolute.png'), 'Set5/HR/../../../../outside.png'):
            archive.add('a.png', name)
        link = tarfile.TarInfo('Set5/HR')
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path)
        archive.addfile(link)
        archive.add('a.png', 'Set5/HR/through.png')
    assert main(['data', 'benchmark', 'all.tar']) == 2
    assert 'Set5/HR/through.png: is empty' in capsys.readouterr().err
    assert sorted(os.listdir()) == ['a.png', 'all.tar', 'datasets'] and not (tmp_path.parent / 'outside.png').exists()
