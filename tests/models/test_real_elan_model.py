"""Real-ESRGAN's training on a CPU: from the option files, and resumed as if nothing had happened."""
from pathlib import Path

import cv2
import numpy as np
import pytest
import skimage.data
import torch
import yaml

from elan_basicsr.cli import main
from elan_basicsr.data import roots
from elan_basicsr.data.prepare import build
from elan_basicsr.errors import UserError
from tests.conftest import ROOT
from tests.engine.test_train import assert_same_run

SMALL = ['datasets.train.num_worker_per_gpu=0', 'datasets.train.batch_size_per_gpu=2', 'gt_size=64', 'queue_size=4',
         'datasets.train.gt_size=64', 'network_g.num_block=2', 'network_g.num_feat=15', 'logger.use_tb_logger=false']


@pytest.fixture(scope='module')
def sub_images(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp('photos')
    (root / 'hr').mkdir()
    for name in ('astronaut', 'coffee'):
        cv2.imwrite(str(root / 'hr' / f'{name}.png'), getattr(skimage.data, name)()[:400, :400, ::-1])
    return build(hr=root / 'hr', out=root, scales=[4], layout='subimages')[0]


def run(name, sub_images, *changes):
    data = f'datasets.train.dataroot_gt={sub_images}'
    return main(['train', '-opt', str(ROOT / 'options' / f'{name}.yml'), '--set', data, *SMALL, *changes])


@pytest.mark.slow
@pytest.mark.parametrize('name, extra', [('train_RealELANNet_x4', []),
                                         ('train_RealELANGAN_x4', ['network_d.num_feat=8'])])
def test_training_goes_on_with_its_pool(name, extra, sub_images, tmp_path, monkeypatch):
    """Four pairs in the pool, two a batch: from the third iteration on batches come out of it."""
    monkeypatch.chdir(tmp_path)
    often = [*extra, 'logger.save_checkpoint_freq=5']
    assert run(name, sub_images, *often, 'train.total_iter=8') == 0
    Path('experiments', name).rename('calm')
    assert run(name, sub_images, *often, 'train.total_iter=5') == 0
    options = str(ROOT / 'options' / f'{name}.yml')
    assert main(['train', '-opt', options, '--auto_resume', '--set', f'datasets.train.dataroot_gt={sub_images}', *SMALL,
                 *often, 'train.total_iter=8']) == 0
    assert_same_run(Path('calm'), Path('experiments', name), 8)
    if name == 'train_RealELANGAN_x4':
        assert Path('experiments', name, 'models', 'net_d_8.pth').exists()
    state = torch.load(Path('calm', 'training_states', '8.state'), weights_only=True)
    assert state['pool']['queue_lr'].shape == (4, 3, 16, 16)


def test_a_pool_that_batches_cannot_fill_is_one_line(sub_images, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert run('train_RealELANNet_x4', sub_images, 'queue_size=5') == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith('basicsr: error')]
    assert len(errors) == 1 and 'queue_size' in errors[0]


def test_some_degraded_images_are_kept_beside_their_ground_truth(sub_images, tmp_path, monkeypatch):
    """As many as asked for of a run, however often it is resumed."""
    monkeypatch.chdir(tmp_path)
    name = 'train_RealELANNet_x4'
    assert run(name, sub_images, 'logger.save_degraded=5', 'train.total_iter=2') == 0
    folder = Path('experiments', name, 'visualization', 'degraded')
    names = [f'000{n}_{kind}.png' for n in (1, 2, 3, 4) for kind in ('gt', 'lq')]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert cv2.imread(str(folder / '0001_lq.png')).shape == (16, 16, 3)
    assert cv2.imread(str(folder / '0001_gt.png')).shape == (64, 64, 3)
    before = (folder / '0001_lq.png').read_bytes()
    again = [f'datasets.train.dataroot_gt={sub_images}', *SMALL, 'logger.save_degraded=5', 'train.total_iter=4']
    assert main(['train', '-opt', str(ROOT / 'options' / f'{name}.yml'), '--auto_resume', '--set', *again]) == 0
    assert len(list(folder.iterdir())) == 10 and (folder / '0001_lq.png').read_bytes() == before


@pytest.mark.parametrize('change', ['datasets.train.batch_size_per_gpu=4', 'gt_size=32', 'queue_size=8'])
def test_a_pool_that_fits_no_longer_begins_empty(sub_images, tmp_path, monkeypatch, capfd, change):
    """Half full with two pairs of 64x64, it takes neither batches of four nor other patches."""
    monkeypatch.chdir(tmp_path)
    assert run('train_RealELANNet_x4', sub_images, 'train.total_iter=1') == 0
    assert main(['train', '-opt', str(ROOT / 'options' / 'train_RealELANNet_x4.yml'), '--auto_resume', '--set',
                 f'datasets.train.dataroot_gt={sub_images}', *SMALL, 'train.total_iter=4', change]) == 0
    assert 'The training pool begins empty' in capfd.readouterr().err


def test_patches_larger_than_the_datasets_images_are_one_line_before_training(sub_images, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert run('train_RealELANNet_x4', sub_images, 'gt_size=512') == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith('basicsr: error: ') and 'gt_size: is 512, expected at most 400' in error
    assert not Path('experiments').exists()


def test_images_of_a_folder_need_no_list(tmp_path, monkeypatch):
    """With a list they are those of the list, and what is missing is named at the start."""
    monkeypatch.chdir(tmp_path)
    Path('hr').mkdir()
    for name in ('a', 'b c'):
        cv2.imwrite(f'hr/{name}.png', np.zeros((64, 64, 3), np.uint8))
    Path('hr/Thumbs.db').write_bytes(b'x')
    section = yaml.safe_load((ROOT / 'options' / 'train_RealELANNet_x4.yml').read_text())['datasets']['train']
    section.update(dataroot_gt='hr', io_backend={'type': 'disk'}, phase='train')
    for lines, expected in ((None, ['hr/a.png', 'hr/b c.png']), ('b c.png\n', ['hr/b c.png'])):
        if lines:
            Path('list.txt').write_text(lines)
            section['meta_info'] = 'list.txt'
        dataset = roots.build(section, 'datasets.train')
        assert [dataset[i]['gt_path'] for i in range(len(dataset))] == expected
    Path('list.txt').write_text('a.png\nabsent.png\n')
    with pytest.raises(UserError, match=r'datasets\.train: hr/absent\.png: is not there'):
        roots.build(section, 'datasets.train')


def test_validation_takes_pairs_as_they_are(sub_images, options, tmp_path):
    val = options['datasets']['val']
    lr = sorted(Path(val['dataroot_lq']).iterdir())
    (tmp_path / 'lr').mkdir()
    for path in lr:
        img = cv2.imread(str(path))
        cv2.imwrite(str(tmp_path / 'lr' / path.name), cv2.resize(img, (img.shape[1] // 2, img.shape[0] // 2)))
    gt = tmp_path / 'gt'
    gt.mkdir()
    for path in (tmp_path / 'lr').iterdir():
        h, w = cv2.imread(str(path)).shape[:2]
        cv2.imwrite(str(gt / path.name), np.zeros((4 * h, 4 * w, 3), np.uint8))
    section = {'name': 'pairs', 'type': 'PairedImageDataset', 'io_backend': '{type: disk}', 'dataroot_gt': gt,
               'dataroot_lq': tmp_path / 'lr'}
    changes = [f'datasets.val.{key}={value}' for key, value in section.items()]
    changes += ['val={val_freq: 2, metrics: {psnr: {type: calculate_psnr, crop_border: 0}}}', 'train.total_iter=2']
    assert run('train_RealELANNet_x4', sub_images, *changes) == 0
    assert 'psnr' in next(Path('experiments/train_RealELANNet_x4').glob('*.log')).read_text()
