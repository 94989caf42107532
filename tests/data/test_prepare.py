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
