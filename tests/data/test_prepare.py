"""`basicsr data build` makes the same bytes however often it is disturbed, and tells what it cannot use."""
import hashlib
import os
import signal
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest
from PIL import Image, ImageCms

from elan_basicsr.cli import main
from elan_basicsr.data import raw_lmdb
from elan_basicsr.data.images import find_images, read_bgr
from elan_basicsr.data.prepare import build
from elan_basicsr.data.resize import imresize
from elan_basicsr.errors import UserError

from basicsr.data.paired_image_dataset import PairedImageDataset


def stored(transaction, key):
    """The BGR image under a key of a raw LMDB."""
    return raw_lmdb.to_bgr(raw_lmdb.decode(transaction.get(key.encode())))


def digest(path):
    return hashlib.sha256((path / 'data.mdb').read_bytes() + (path / raw_lmdb.META).read_bytes()).hexdigest()


@pytest.fixture
def photographs(tmp_path):
    """Twelve images of several kinds, in folders, with awkward names."""
    rng = np.random.default_rng(0)
    for i in range(12):
        img = cv2.resize(rng.integers(0, 256, (20, 20, 3), np.uint8), (61 + i, 50))
        path = tmp_path / 'hr' / f'sub.{i % 2}' / f'Bild {i} ä.{("png", "jpg", "webp", "tiff", "bmp", "png")[i % 6]}'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(cv2.imencode(path.suffix, img)[1].tobytes())
    cv2.imwrite(str(tmp_path / 'hr' / 'grey16.png'), rng.integers(0, 65536, (48, 48)).astype(np.uint16))
    return tmp_path / 'hr'


def test_images_of_every_kind_are_stored_as_they_are(photographs, tmp_path):
    paths = build(hr=photographs, out=tmp_path / 'out', scales=[2, 3])
    assert [path.name for path in paths] == ['HR_raw.lmdb', 'LR_bicubic_X2_raw.lmdb', 'LR_bicubic_X3_raw.lmdb']
    images = find_images(photographs)
    assert raw_lmdb.read_keys(paths[0]) == list(images)
    for path, scale in zip(paths, (1, 2, 3), strict=True):
        with raw_lmdb.open_readonly(path).begin(buffers=True) as transaction:
            for key, source in images.items():
                hr = read_bgr(source)
                hr = hr[:hr.shape[0] // 6 * 6, :hr.shape[1] // 6 * 6]
                expected = hr if scale == 1 else imresize(hr, 1 / scale)
                assert np.array_equal(stored(transaction, key), expected), (key, scale)
    assert len({img.dtype for img in map(read_bgr, images.values())}) == 2


def test_subimages_are_the_toolboxs(tmp_path):
    (tmp_path / 'hr').mkdir()
    cv2.imwrite(str(tmp_path / 'hr' / 'a.png'), np.random.default_rng(1).integers(0, 256, (520, 740, 3), np.uint8))
    hr, lr = build(hr=tmp_path / 'hr', out=tmp_path / 'out', scales=[4], layout='subimages')
    dataset = PairedImageDataset({'dataroot_gt': str(hr), 'dataroot_lq': str(lr), 'io_backend': {'type': 'lmdb'},
                                  'scale': 4, 'phase': 'train', 'gt_size': 128, 'use_hflip': False, 'use_rot': False})
    assert len(dataset) == 2 * 3  # starts 0 and 40 by 0, 240 and 260
    assert dataset[5]['gt'].shape == (3, 128, 128) and dataset[5]['lq'].shape == (3, 32, 32)
    assert (hr / raw_lmdb.META).read_text().splitlines()[0] == 'a_s001.png (480,480,3) 1'


@pytest.mark.slow
def test_a_build_killed_three_times_ends_with_the_same_bytes(photographs, tmp_path):
    build(hr=photographs, out=tmp_path / 'calm', scales=[2])
    code = ('import sys, time; from elan_basicsr.data import prepare; real = prepare.imresize\n'
            'prepare.imresize = lambda *args: (time.sleep(0.3), real(*args))[1]\n'  # slow enough to be killed midway
            f'prepare.build(hr={str(photographs)!r}, out={str(tmp_path / "killed")!r}, scales=[2])')
    kills = 0
    for _ in range(3):
        process = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        parts = tmp_path / 'killed' / '.LR_bicubic_X2_raw.lmdb.parts'
        before = len(list(parts.glob('*.part')))
        while process.poll() is None and len(list(parts.glob('*.part'))) < before + 2:
            time.sleep(0.02)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
        assert not (tmp_path / 'killed' / 'LR_bicubic_X2_raw.lmdb').exists()
    assert kills == 3
    for calm, killed in zip(build(hr=photographs, out=tmp_path / 'calm', scales=[2]),
                            build(hr=photographs, out=tmp_path / 'killed', scales=[2]), strict=True):
        assert digest(calm) == digest(killed)


def test_bd_is_a_blur_and_the_bicubic(photographs, tmp_path):
    _, lr = build(hr=photographs, out=tmp_path / 'out', scales=[3], blur=1.6)
    assert lr.name == 'LR_BD_X3_raw.lmdb'
    x = np.arange(-3, 4)
    kernel = np.exp(-x**2 / (2 * 1.6**2)) / np.exp(-x**2 / (2 * 1.6**2)).sum()
    key, path = next((key, path) for key, path in find_images(photographs).items() if path.suffix == '.bmp')
    hr = read_bgr(path)
    hr = hr[:hr.shape[0] // 3 * 3, :hr.shape[1] // 3 * 3]
    padded = np.pad(hr.astype(float), ((3, 3), (3, 3), (0, 0)), mode='edge')
    rows = sum(weight * padded[i:i + hr.shape[0]] for i, weight in enumerate(kernel))
    blurred = sum(weight * rows[:, i:i + hr.shape[1]] for i, weight in enumerate(kernel))
    with raw_lmdb.open_readonly(lr).begin(buffers=True) as transaction:
        difference = stored(transaction, key).astype(int) - imresize(np.round(blurred).astype(np.uint8), 1 / 3)
    assert np.abs(difference).max() <= 1  # OpenCV's kernel is in fixed point


def test_lr_images_given_are_used(photographs, tmp_path):
    for key, path in find_images(photographs).items():
        hr = read_bgr(path)
        (tmp_path / 'lr' / 'X2').mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(tmp_path / 'lr' / 'X2' / f'{key}x2.png'), 255 - hr[:hr.shape[0] // 2, :hr.shape[1] // 2])
    _, lr = build(hr=photographs, lr=tmp_path / 'lr', out=tmp_path / 'out', scales=[2])
    key, path = next(iter(find_images(photographs).items()))
    with raw_lmdb.open_readonly(lr).begin(buffers=True) as transaction:
        lr_image = stored(transaction, key)
    hr = read_bgr(path)
    assert np.array_equal(lr_image, (255 - hr)[:hr.shape[0] // 2, :hr.shape[1] // 2])


def test_bad_input_gives_one_line_that_names_it(photographs, tmp_path):
    def fails(match, **arguments):
        with pytest.raises(UserError, match=match) as caught:
            build(**{'hr': photographs, 'out': tmp_path / 'out', 'scales': [2], **arguments})
        assert '\n' not in str(caught.value)

    fails('no such folder', hr=tmp_path / 'absent')
    (tmp_path / 'empty').mkdir()
    fails('holds no images', hr=tmp_path / 'empty')
    fails('--scales', scales=[1])
    fails('--layout', layout='tar')
    fails('no LR image for 13', lr=tmp_path / 'empty2') if (tmp_path / 'empty2').mkdir() else fails(
        'holds no images', lr=tmp_path / 'empty2')
    fails('expected a folder X2', lr=photographs, scales=[2, 3])
    fails('pixels, expected at least 200x200', scales=[200])
    whole = (photographs / 'sub.0' / 'Bild 0 ä.png').read_bytes()
    (photographs / 'sub.0' / 'Bild 0 ä.png').write_bytes(whole[:len(whole) // 2])
    fails(r'Bild 0 ä\.png: is no readable image', out=tmp_path / 'out2')
    (photographs / 'sub.0' / 'Bild 0 ä.jpg').write_bytes(b'')
    fails(r'has the same key', out=tmp_path / 'out3')


def keys_of(path):
    with raw_lmdb.open_readonly(path).begin() as transaction:
        return sorted(bytes(key).decode() for key in transaction.cursor().iternext(values=False))


@pytest.mark.parametrize('layout', ['raw', 'subimages'])
def test_a_file_that_cannot_be_used_is_named_and_the_rest_is_built(photographs, tmp_path, capsys, layout):
    """One is cut off, one too small, one of floats: none of them is in any LMDB, and the exit code says so."""
    whole = (photographs / 'sub.0' / 'Bild 0 ä.png').read_bytes()
    (photographs / 'sub.0' / 'Bild 0 ä.png').write_bytes(whole[:len(whole) // 2])
    cv2.imwrite(str(photographs / 'small.png'), np.zeros((1, 9, 3), np.uint8))
    cv2.imwrite(str(photographs / 'float.tif'), np.zeros((9, 9, 3), np.float32))
    (photographs / 'notes.txt').write_text('x')
    words = ['data', 'build', '--hr', str(photographs), '--out', str(tmp_path / 'out'), '--scales', '2', '3',
             '--layout', layout]
    assert main(words) == 1
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if line.startswith('basicsr: ')]
    assert [line for line in lines if 'Bild 0 ä.png: is no readable image, it may be cut off or damaged' in line]
    assert [line for line in lines if 'small.png: is 9x1 pixels, expected at least 6x6' in line]
    assert [line for line in lines if 'float.tif: has 32-bit floating-point pixels' in line]
    assert f'basicsr: {photographs}: 1 file (.txt 1: notes.txt) passed over' in lines
    assert lines[-1] == 'basicsr: 3 images cannot be used and were left out'
    lmdbs = [tmp_path / 'out' / line.rpartition('/')[2] for line in printed.out.splitlines()]
    keys = [keys_of(path) for path in lmdbs]
    assert len(keys) == 3 and keys[0] == keys[1] == keys[2] == sorted(raw_lmdb.read_keys(lmdbs[0]))
    assert len(keys[0]) == 12 and not any(key.startswith(('sub_0_Bild 0', 'small', 'float')) for key in keys[0])
    assert main(words) == 1 and 'left out' in capsys.readouterr().err  # as often as it is asked


def test_an_lr_image_that_cannot_be_read_keeps_its_hr_image_out(photographs, tmp_path):
    for key, path in find_images(photographs).items():
        hr = read_bgr(path)
        (tmp_path / 'lr').mkdir(exist_ok=True)
        cv2.imwrite(str(tmp_path / 'lr' / f'{key}.png'), hr[:hr.shape[0] // 2, :hr.shape[1] // 2])
    (tmp_path / 'lr' / 'grey16.png').write_bytes(b'')
    failed = []
    hr, lr = build(hr=photographs, lr=tmp_path / 'lr', out=tmp_path / 'out', scales=[2], failed=failed)
    assert failed == [f'{tmp_path}/lr/grey16.png: is empty']
    assert keys_of(hr) == keys_of(lr) and 'grey16' not in keys_of(hr) and len(keys_of(hr)) == 12


def test_a_scale_added_later_has_the_images_that_are_there(photographs, tmp_path):
    """An image that came into the folder since would have LR without HR."""
    build(hr=photographs, out=tmp_path / 'out', scales=[2])
    cv2.imwrite(str(photographs / 'later.png'), np.zeros((12, 12, 3), np.uint8))
    failed = []
    hr, lr = build(hr=photographs, out=tmp_path / 'out', scales=[3], failed=failed)
    assert keys_of(hr) == keys_of(lr) and len(failed) == 1 and 'later.png: is not in' in failed[0]
    with pytest.raises(UserError, match='later.png: is not in'):
        build(hr=photographs, out=tmp_path / 'out', scales=[4])


def test_a_phones_photograph_is_built_and_verified(tmp_path, capsys):
    (tmp_path / 'hr').mkdir()
    photograph = cv2.imencode('.jpg', np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8))[1].tobytes()
    (tmp_path / 'hr' / 'motion.jpg').write_bytes(photograph + b'\0\0\0\x18ftypmp42' + bytes(90_000))
    (tmp_path / 'hr' / 'tail.png').write_bytes(cv2.imencode('.png', np.zeros((24, 24), np.uint8))[1].tobytes()
                                               + bytes(9000))
    assert main(['data', 'build', '--hr', str(tmp_path / 'hr'), '--out', str(tmp_path / 'out'), '--scales', '2']) == 0
    assert main(['data', 'verify', str(tmp_path / 'hr'), str(tmp_path / 'out' / 'HR_raw.lmdb')]) == 0
    (tmp_path / 'hr' / 'IMG_1.heic').touch()
    assert main(['data', 'verify', str(tmp_path / 'hr')]) == 0
    printed = capsys.readouterr()
    assert '4 images read, 0 problems' in printed.out
    assert f'basicsr: {tmp_path}/hr: 1 file (.heic 1: IMG_1.heic) passed over' in printed.err


def test_what_the_pixels_lose_is_said_once(tmp_path, capsys):
    (tmp_path / 'hr').mkdir()
    rgba = np.random.default_rng(0).integers(0, 256, (24, 24, 4), np.uint8)
    for name in 'ab':
        cv2.imwrite(str(tmp_path / 'hr' / f'{name}.png'), rgba)
    Image.fromarray(rgba).convert('CMYK').save(tmp_path / 'hr' / 'c.jpg')
    Image.fromarray(rgba[..., :3]).save(tmp_path / 'hr' / 'd.png', icc_profile=ImageCms.ImageCmsProfile(
        ImageCms.createProfile('XYZ')).tobytes())
    build(hr=tmp_path / 'hr', out=tmp_path / 'out', scales=[2, 3])
    lines = [line.partition('/hr/')[2] for line in capsys.readouterr().err.splitlines() if line.startswith('basicsr')]
    assert sorted(line for line in lines if line) == [
        'a.png and 1 more: transparency is left out', 'c.jpg: CMYK becomes sRGB',
        'd.png: the values stay, but the colour profile is left out (XYZ identity built-in)']
