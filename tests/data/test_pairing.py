"""GT and LQ images find each other as their names allow, and what does not belong together is named before training."""
import os
import unicodedata
from pathlib import Path

import cv2
import lmdb
import numpy as np
import pytest
import yaml

from elan_basicsr.cli import main
from elan_basicsr.data import raw_lmdb, roots
from elan_basicsr.data.prepare import build
from elan_basicsr.errors import UserError

from basicsr.utils import FileClient


def write(name: str, width: int = 48, height: int = 40, channels: int = 3, dtype=np.uint8) -> None:
    """An image of noise, each another."""
    shape = (height, width, channels) if channels > 1 else (height, width)
    noise = np.random.default_rng(sum(name.encode())).integers(0, np.iinfo(dtype).max, shape, dtype)
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(name, noise)


def section(**changes) -> dict:
    return {'name': 'pairs', 'type': 'PairedImageDataset', 'dataroot_gt': 'gt', 'dataroot_lq': 'lq', 'phase': 'train',
            'io_backend': {'type': 'disk'}, 'scale': 4, 'gt_size': 16, 'use_hflip': True, 'use_rot': True, **changes}


def pairs(**changes) -> list[tuple[str, str]]:
    """Name of GT and of LQ of every sample, all of which have been read."""
    dataset = roots.build(section(**changes), 'datasets.train')
    samples = [dataset[i] for i in range(len(dataset))]
    return [tuple(os.path.basename(sample[f'{kind}_path']) for kind in ('gt', 'lq')) for sample in samples]


def refusal(**changes) -> str:
    with pytest.raises(UserError) as caught:
        roots.build(section(**changes), 'datasets.train')
    return str(caught.value)


def problems(capsys, **changes) -> list[str]:
    """What `data verify -opt` prints of a training on such a section."""
    Path('run.yml').write_text(yaml.safe_dump({'scale': 4, 'datasets': {'train': section(**changes)}}))
    code = main(['data', 'verify', '-opt', 'run.yml'])
    printed = capsys.readouterr().out.splitlines()
    assert code == bool(printed[:-1])
    return printed[:-1]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize('gt, lq, changes', [
    ('0001.png', '0001.png', {}),
    ('0001.png', '0001x4.png', {}),
    ('0001.png', '0001x4.png', {'filename_tmpl': '{}x4'}),
    ('0001.png', '0001_small.png', {'filename_tmpl': '{}_small'}),
    ('0001.png', '0001.jpg', {}),
    ('0001.PNG', '0001.png', {}),
    ('0001.png', '0001_LRx4.bmp', {}),
    ('img_001_SRF_4_HR.png', 'img_001_SRF_4_LR.png', {}),
    ('a.b.png', 'a.bx4.png', {}),
    ('Bild ä.png', 'Bild äx4.png', {}),
    (unicodedata.normalize('NFC', 'é.png'), unicodedata.normalize('NFD', 'é.png'), {}),
])
def test_names_that_mean_the_same_image_are_paired(gt, lq, changes):
    write(f'gt/{gt}')
    write(f'lq/{lq}', 12, 10)
    assert pairs(**changes) == [(gt, lq)]


def test_what_lies_beside_the_images_counts_for_nothing(capsys):
    write('gt/0001.png')
    write('lq/0001.png', 12, 10)
    for name in ('gt/Thumbs.db', 'gt/notes.txt', 'lq/.DS_Store', 'lq/._0001.png', 'lq/desktop.ini'):
        Path(name).write_bytes(b'\0\5\x16\7')
    write('gt/sub/0002.png')
    assert pairs() == [('0001.png', '0001.png')]
    assert [sample['lq_path'] for sample in roots.build(section(type='SingleImageDataset', phase='test'), 'test')] == [
        'lq/0001.png']
    assert problems(capsys) == []


def test_an_image_of_another_suffix_is_taken_as_before():
    write('gt/0001.ppm')
    write('lq/0001.ppm', 12, 10)
    assert pairs() == [('0001.ppm', '0001.ppm')]


def test_two_images_of_one_name_pair_by_their_suffixes():
    for suffix in ('png', 'jpg'):
        write(f'gt/a.{suffix}')
        write(f'lq/a.{suffix}', 12, 10)
    assert pairs() == [('a.jpg', 'a.jpg'), ('a.png', 'a.png')]
    os.remove('lq/a.jpg')
    assert 'lq/a.png: would be the LQ image of both gt/a.jpg and gt/a.png' in refusal()


def test_links_are_followed_and_a_lost_one_is_named():
    write('elsewhere/gt.png')
    write('lq/0001.png', 12, 10)
    os.makedirs('gt')
    os.symlink('../elsewhere/gt.png', 'gt/0001.png')
    assert pairs() == [('0001.png', '0001.png')]
    os.remove('elsewhere/gt.png')
    assert 'gt/0001.png: is a link to a file that is not there' in refusal()


@pytest.mark.parametrize('lq, expected', [
    ({'a.png': (12, 10)}, 'lq: there is no LQ image for gt/b.png'),
    ({'a.png': (12, 10), 'b.png': (12, 10), 'c.png': (12, 10)}, 'gt: there is no GT image for lq/c.png'),
    ({'a.png': (12, 10), 'bx2.png': (24, 20), 'bx4.png': (12, 10)},
     'gt/b.png: has several LQ images, lq/bx2.png, lq/bx4.png; '),
    ({'a.png': (12, 10), 'b.png': (24, 20)}, 'gt/b.png: is 48x40, expected 96x80, 4 times its LQ image lq/b.png '
                                             '(24x20); the pair fits scale 2'),
    ({'a.png': (12, 10), 'b.png': (96, 80)}, 'gt/b.png: is 48x40, expected 384x320, 4 times its LQ image'),
    ({'a.png': (12, 10), 'b.png': (12, 9)}, 'gt/b.png: is 48x40, expected 48x36, 4 times its LQ image lq/b.png'),
])
def test_what_does_not_belong_together_is_named_before_training_and_by_verify(lq, expected, capsys):
    for name in ('a', 'b'):
        write(f'gt/{name}.png')
    for name, size in lq.items():
        write(f'lq/{name}', *size)
    assert f'datasets.train: {expected}' in refusal()
    assert any(problem.startswith(expected) for problem in problems(capsys))


def test_ground_truth_is_cropped_in_validation_as_far_as_the_field_does():
    write('gt/a.png', 50, 43)
    write('lq/a.png', 12, 10)
    assert pairs(phase='val') == [('a.png', 'a.png')]  # 48x40
    assert 'expected 48x40, 4 times its LQ image lq/a.png (12x10); crop it to that' in refusal()
    write('lq/a.png', 12, 9)
    assert pairs(phase='val') == [('a.png', 'a.png')]  # 48x36, the multiple of 12
    write('lq/a.png', 6, 5)  # of scale 8: the top left corner would be compared
    assert 'the pair fits scale 8' in refusal(phase='val')


@pytest.mark.parametrize('orientation', [1, 6])
def test_a_turned_photograph_is_as_large_as_it_is_read(orientation):
    from PIL import Image
    exif = Image.Exif()
    exif[0x0112] = orientation
    os.makedirs('gt')
    Image.new('RGB', (40, 48) if orientation == 6 else (48, 40)).save('gt/a.jpg', exif=exif)
    write('lq/a.png', 12, 10)
    assert pairs() == [('a.jpg', 'a.png')]


def test_an_empty_folder_is_named_and_where_the_images_are():
    write('gt/deep/a.png')
    write('lq/a.png', 12, 10)
    assert 'gt: holds no images' in refusal() and 'those in gt/deep do not count' in refusal()


@pytest.mark.parametrize('lines, expected', [
    ('a.png (40,48,3)\n\nmy photo.png (40,48,3) 1\n', None),
    ('a.png\nmy photo.png\n', None),
    ('a.png 1\n', None),
    ('a.png\nc.png\n', 'gt/c.png: is listed in list.txt and not there'),
    ('a.png\nb.png\n', 'lq: there is no LQ image for gt/b.png'),
])
def test_a_list_of_images_may_hold_blanks_and_names_what_is_not_there(lines, expected):
    for name in ('a', 'b', 'my photo'):
        write(f'gt/{name}.png')
    for name in ('a', 'my photo'):
        write(f'lq/{name}x4.png', 12, 10)
    Path('list.txt').write_text(lines)
    if expected:
        assert expected in refusal(meta_info_file='list.txt')
    else:
        names = [name for name in ('a', 'my photo') if name in lines]
        assert pairs(meta_info_file='list.txt') == [(f'{name}.png', f'{name}x4.png') for name in names]


def test_a_damaged_image_is_named_whatever_its_number(capsys):
    for i in range(3):
        write(f'gt/{i}.png')
        write(f'lq/{i}.png', 12, 10)
    whole = Path('lq/1.png').read_bytes()
    Path('lq/1.png').write_bytes(whole[:len(whole) // 2])
    dataset = roots.build(section(), 'datasets.train')
    with pytest.raises(UserError, match=r'^datasets\.train: lq/1\.png: is no readable image'):
        dataset[1]
    assert [problem.split(': ')[0] for problem in problems(capsys)] == ['lq/1.png']


def test_verify_tells_grey_from_coloured_and_eight_bit_from_sixteen(capsys):
    write('gt/a.png')
    write('lq/a.png', 12, 10, channels=1)
    write('gt/b.png', dtype=np.uint16)
    write('lq/b.png', 12, 10)
    assert problems(capsys)[-1] == 'lq/a.png: is grey, and gt/a.png is coloured'
    assert len(pairs()) == 2  # which training takes


def test_verify_takes_a_pair_of_folders(capsys):
    write('gt/a.png')
    write('lq/ax4.png', 24, 20)
    assert main(['data', 'verify', 'gt', 'lq', '--scale', '4']) == 1
    assert 'the pair fits scale 2' in capsys.readouterr().out
    assert main(['data', 'verify', 'gt', 'lq', '--scale', '2']) == 0
    assert main(['data', 'verify', 'gt', '--scale', '2']) == 2
    assert 'expected two paths' in capsys.readouterr().err


def test_verify_takes_overrides_variables_and_several_roots_as_training_does(capsys, monkeypatch):
    monkeypatch.setenv('PHOTOS', os.getcwd())
    for folder in ('one', 'two'):
        write(f'{folder}/gt/a.png')
        write(f'{folder}/lq/a.png', 24, 20)
    lists = {f'dataroot_{kind}': [f'$PHOTOS/one/{kind}', f'two/{kind}'] for kind in ('gt', 'lq')}
    assert sum('the pair fits scale 2' in problem for problem in problems(capsys, **lists)) == 2
    assert main(['data', 'verify', '-opt', 'run.yml', '--set', 'scale=2']) == 0
    assert capsys.readouterr().out == '4 images read, 0 problems\n'


def test_verify_tells_a_missing_lmdb_from_an_unfinished_one(capsys):
    assert main(['data', 'verify', 'absent.lmdb']) == 1
    assert 'absent.lmdb: no such LMDB' in capsys.readouterr().out


def test_a_list_may_name_images_in_folders_below():
    """The toolbox looks for their LQ images right in the folder; those in a folder of the same name are found too."""
    write('gt/one/a.png')
    write('gt/two/b.png')
    write('lq/a.png', 12, 10)
    write('lq/two/bx4.png', 12, 10)
    Path('list.txt').write_text('one/a.png (40,48,3)\ntwo/b.png (40,48,3)\n')
    assert pairs(meta_info_file='list.txt') == [('a.png', 'a.png'), ('b.png', 'bx4.png')]


# ------------------------------------------------------------------------------------------------- LMDBs

def toolbox_lmdb(name: str, images: dict[str, tuple[int, int]], listed=None) -> None:
    environment = lmdb.open(name, map_size=1 << 24)
    with environment.begin(write=True) as transaction:
        for key, (width, height) in images.items():
            png = cv2.imencode('.png', np.zeros((height, width, 3), np.uint8))[1]
            transaction.put(key.encode(), png.tobytes())
    environment.close()
    Path(name, raw_lmdb.META).write_text(''.join(f'{key}.png (1,1,3) 1\n' for key in listed or images) + '\n')


def test_an_lmdb_of_the_toolbox_is_checked_and_read_by_any_key():
    options = {'io_backend': {'type': 'lmdb'}, 'dataroot_gt': 'gt.lmdb', 'dataroot_lq': 'lq.lmdb'}
    toolbox_lmdb('gt.lmdb', {'ä b': (48, 40), 'c': (48, 40)})
    toolbox_lmdb('lq.lmdb', {'ä b': (12, 10), 'c': (24, 20)})
    assert 'c: is 48x40, expected 96x80, 4 times its LQ image c (24x20); the pair fits scale 2' in refusal(**options)
    toolbox_lmdb('lq2.lmdb', {'ä b': (12, 10)}, listed=['ä b', 'c'])
    dataset = roots.build(section(**options | {'dataroot_lq': 'lq2.lmdb'}), 'datasets.train')
    names = [row['gt_path'] for row in dataset.datasets[0].paths]
    assert dataset[names.index('ä b')]['lq'].shape == (3, 4, 4)
    with pytest.raises(UserError, match=r'datasets\.train: gt\.lmdb: c: cannot be read: lq2\.lmdb: c: is listed in'):
        dataset[names.index('c')]
    toolbox_lmdb('lq3.lmdb', {'ä b': (12, 10), 'd': (12, 10)})
    assert 'lq3.lmdb: c: is missing, the GT image is there; 1 more like it' in refusal(
        **options | {'dataroot_lq': 'lq3.lmdb'})


def test_an_lmdb_has_the_backends_own_error_for_a_key_that_is_not_there():
    toolbox_lmdb('some.lmdb', {'a': (4, 4)})
    client = FileClient('lmdb', db_paths='some.lmdb')
    assert client.get('a', 'default')
    with pytest.raises(ValueError, match=r'some\.lmdb: b: is listed'):
        client.get('b', 'default')


def test_a_raw_lmdb_with_images_of_both_depths_gives_the_values_of_both():
    """As bytes, 16-bit values would be cut to their lower half."""
    from elan_basicsr.data.loader import PatchLoader, to_float
    from elan_basicsr.data.sampling import SeededDataset, StreamSampler
    write('hr/a.png')
    write('hr/b.png', dtype=np.uint16)
    gt, lq = map(str, build(hr='hr', out='.', scales=[4]))
    dataset = roots.build(section(type='PairedRawLmdbDataset', dataroot_gt=gt, dataroot_lq=lq), 'datasets.train')
    sampler = StreamSampler(2, 2, seed=0)
    batch = to_float(next(iter(PatchLoader(dataset, sampler))))
    keys = iter(sampler)
    assert all((batch['gt'][i] == SeededDataset(dataset)[next(keys)]['gt']).all() for i in range(2))


# ------------------------------------------------------------------------------------------------- several roots

def test_several_roots_are_one_data_set():
    for folder in ('one', 'two'):
        write(f'{folder}/gt/a.png')
        write(f'{folder}/lq/ax4.png', 12, 10)
    write('two/gt/b.png')
    write('two/lq/bx4.png', 12, 10)
    lists = {f'dataroot_{kind}': [f'one/{kind}', f'two/{kind}'] for kind in ('gt', 'lq')}
    dataset = roots.build(section(**lists), 'datasets.train')
    assert [dataset[i]['gt_path'] for i in range(len(dataset))] == ['one/gt/a.png', 'two/gt/a.png', 'two/gt/b.png']
    assert 'dataroot_gt has 2 and dataroot_lq has 1' in refusal(dataroot_gt=['one/gt', 'two/gt'], dataroot_lq='one/lq')
    os.remove('two/lq/bx4.png')
    assert 'two/lq: there is no LQ image for two/gt/b.png' in refusal(**lists)


def test_several_raw_lmdbs_travel_as_bytes():
    from elan_basicsr.data.loader import PatchLoader
    from elan_basicsr.data.sampling import StreamSampler
    made = []
    for folder in ('one', 'two'):
        write(f'{folder}/a.png')
        made.append([*map(str, build(hr=folder, out=f'{folder}_lmdbs', scales=[4]))])
    gt, lq = map(list, zip(*made, strict=True))
    dataset = roots.build(section(type='PairedRawLmdbDataset', dataroot_gt=gt, dataroot_lq=lq), 'datasets.train')
    batch = next(iter(PatchLoader(dataset, StreamSampler(len(dataset), 2, seed=0))))
    assert str(batch['gt'].dtype) == 'torch.uint8' and not (batch['gt'][0] == batch['gt'][1]).all()


# ------------------------------------------------------------------------------------------------- data build --lr

def test_given_lr_images_of_another_scale_are_refused_before_anything_is_built():
    for name in ('0001', '0002'):
        write(f'hr/{name}.png')
        write(f'lr/{name}x2.png', 24, 20)
    with pytest.raises(UserError, match=r'^hr/0001\.png: is 48x40, expected 96x80, 4 times its LQ image lr/0001x2\.png '
                                        r'\(24x20\); the pair fits scale 2; 1 more like it$'):
        build(hr='hr', lr='lr', out='out', scales=[4])
    assert not os.path.exists('out')
    assert len(build(hr='hr', lr='lr', out='out', scales=[2])) == 2


@pytest.mark.parametrize('edge', [50 // 4, -(-50 // 4), 48 // 4])
def test_given_lr_images_of_a_cropped_or_uncropped_original_are_taken(edge):
    """Of 50 pixels, the bicubic makes 13 by 4; cropped to a multiple of 12 before, 12."""
    write('hr/x4.png', 50, 50)  # a name that is all ending
    write('lr/x4.png', edge, edge)
    hr, lr = build(hr='hr', lr='lr', out='out', scales=[4])
    with raw_lmdb.open_readonly(lr).begin() as transaction:
        assert raw_lmdb.decode(transaction.get(b'x4')).shape == (3, 12, 12)


def test_given_lr_images_without_an_original_are_counted(capsys):
    write('hr/a.png')
    for name in ('a_LR', 'b_LR'):
        write(f'lr/{name}.png', 12, 10)
    build(hr='hr', lr='lr', out='out', scales=[4])
    assert 'lr: 1 images have no HR image and are left out, the first: b_LR.png' in capsys.readouterr().out
