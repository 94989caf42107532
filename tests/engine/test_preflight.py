"""What a training would stumble over after hours ends it before its first iteration, and a validation costs none."""
import logging
import re
import shutil
from pathlib import Path

import cv2
import pytest
import torch

from elan_basicsr.cli import main
from elan_basicsr.data import pairing
from elan_basicsr.data.prepare import build
from elan_basicsr.engine import preflight
from elan_basicsr.errors import UserError
from elan_basicsr.models import validation
from tests.engine.test_distributed import finish, outputs, start
from tests.engine.test_train import assert_same_run, write

from basicsr.metrics import calculate_metric

RUN = Path('experiments/run')


def cut(path: Path, rows: int = 0, columns: int = 0) -> None:
    img = cv2.imread(str(path))
    cv2.imwrite(str(path), img[:len(img) - rows, :img.shape[1] - columns])


@pytest.fixture
def copied(options, data) -> dict:
    """Options whose validation set may be changed."""
    shutil.copytree(data / 'test', 'test')
    options['datasets']['val'].update(dataroot_gt='test/GT', dataroot_lq='test/LR')
    return options


def refused(options, capfd, *arguments) -> str:
    """The one line that a training ends with before an iteration is made."""
    assert main(['train', '-opt', write(options), *arguments]) == 2
    text = capfd.readouterr().err
    errors = [line for line in text.splitlines() if line.startswith('basicsr: error')]
    assert len(errors) == 1 and 'Start training' not in text
    return errors[0]


def images(folder: str) -> list[Path]:
    return sorted(Path(folder).iterdir())


def test_a_ground_truth_that_is_a_row_too_short_is_found_at_the_start(copied, capfd):
    cut(images('test/GT')[1], rows=1)
    assert re.search(r'datasets.val: test/GT/\w+.png: is 60x63, expected 60x64, 2 times its LQ image test/LR/\w+.png',
                     refused(copied, capfd))


def test_an_lr_image_of_another_scale_is_found_at_the_start(copied, capfd):
    """The toolbox would crop the ground truth to a corner and measure that."""
    path = images('test/LR')[0]
    cv2.imwrite(str(path), cv2.resize(cv2.imread(str(path)), (15, 11)))
    assert 'expected 30x22, 2 times its LQ image' in refused(copied, capfd)


def test_ground_truth_that_is_cropped_by_a_few_pixels_passes(copied):
    """To a multiple of 12, as the field does it."""
    for gt, lq in zip(images('test/GT'), images('test/LR'), strict=True):
        cut(lq, rows=len(cv2.imread(str(gt))) % 12 // 2)
    copied['val']['metrics'] = {'psnr': {'type': 'calculate_psnr', 'crop_border': 0}}
    assert main(['train', '-opt', write(copied), '--set', 'train.total_iter=1']) == 0


def test_an_image_that_only_its_head_calls_turned_passes(copied):
    """A photograph's EXIF orientation is carried out when its pixels are decoded."""
    from PIL import Image
    for folder in ('GT', 'LR'):
        for path in images(f'test/{folder}'):
            image = Image.open(path)
            exif = Image.Exif()
            if folder == 'GT':
                image, exif[274] = image.transpose(Image.Transpose.ROTATE_90), 6
            image.save(path.with_suffix('.jpg'), quality=95, exif=exif)
            path.unlink()
    assert main(['train', '-opt', write(copied), '--set', 'train.total_iter=1']) == 0


def test_a_file_that_is_no_image_is_found_at_the_start(copied, capfd):
    images('test/LR')[2].write_bytes(b'no image')
    assert re.search(r'datasets.val: test/LR/\w+.png: is no readable image', refused(copied, capfd))


@pytest.mark.parametrize('layout', ['folder', 'subimages', 'raw'])
def test_training_pairs_that_do_not_fit_are_found_at_the_start(options, data, layout, capfd):
    """Of files, of an LMDB of the toolbox's, and of a raw one."""
    for folder, scale in (('hr', 1), ('lr', 2)):
        Path(folder).mkdir()
        for path in images(data / 'photographs')[:3]:
            img = cv2.imread(str(path))
            cv2.imwrite(f'{folder}/{path.name}', img[:128:scale, :128:scale])
    if layout == 'folder':
        cut(images('lr')[2], rows=2)
        options['datasets']['train'].update(type='PairedImageDataset', dataroot_gt='hr', dataroot_lq='lr',
                                            io_backend={'type': 'disk'})
    else:
        made = {}
        for name in ('hr', 'lr'):
            if name == 'lr':
                cut(images('lr')[2], rows=2)
            made[name] = build(hr=Path(name), out=Path(f'of_{name}'), scales=[2], layout=layout)[0]
        kind = 'PairedRawLmdbDataset' if layout == 'raw' else 'PairedImageDataset'
        options['datasets']['train'].update(type=kind, dataroot_gt=str(made['hr']), dataroot_lq=str(made['lr']))
    line = refused(options, capfd)
    assert 'datasets.train: ' in line and re.search('is 128x128, expected 128x124, 2 times its LQ image', line), line


def test_a_patch_larger_than_an_image_is_found_at_the_start(options, capfd):
    assert 'smaller than gt_size 136' in refused(options, capfd, '--set', 'datasets.train.gt_size=136')


def test_a_metric_that_the_smallest_image_is_too_small_for_is_found_at_the_start(options, capfd):
    options['val']['metrics']['niqe'] = {'type': 'calculate_niqe', 'crop_border': 0}
    assert 'val.metrics.niqe cannot be computed on three: image hubble_deep_field of 60x46: ' in refused(options, capfd)


def test_a_folder_that_takes_no_files_is_found_at_the_start():
    """Nobody can make a file there, whatever a folder's rights say to root."""
    opt = {'path': {'models': '/proc/self', 'training_states': '/proc/self'}}
    with pytest.raises(UserError, match='^/proc/self: cannot be written .*, so nothing could be saved$'):
        preflight._look_at_disk(opt, None, logging.getLogger())


def test_a_disk_that_will_not_hold_the_checkpoints_is_told(options, monkeypatch, capfd):
    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage(path)._replace(free=10_000))
    assert main(['train', '-opt', write(options), '--set', 'train.total_iter=8']) == 0
    told = ' '.join(capfd.readouterr().err.split())
    assert '0.00 GB are free, and 2 checkpoints with their training states take about 0.00 GB' in told


def test_looking_ahead_changes_no_bit(options, monkeypatch):
    assert main(['train', '-opt', write(options)]) == 0
    RUN.rename('looked')
    monkeypatch.setattr('elan_basicsr.engine.train.look_ahead', lambda *_: None)
    assert main(['train', '-opt', write(options)]) == 0
    assert_same_run(Path('looked'), RUN, 8)


def test_sizes_that_take_too_long_are_left_to_the_training(monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger='basicsr')
    monkeypatch.setattr(logging.getLogger('basicsr'), 'propagate', True)
    clock = iter(range(0, 10**6, 6))
    monkeypatch.setattr(pairing.time, 'monotonic', lambda: next(clock))
    monkeypatch.setattr(pairing, 'CHUNK', 1)
    pairing.check_sizes([{'gt_path': 'a', 'lq_path': 'b'}] * 9, {'dataroot_gt': '.', 'dataroot_lq': 'lr'})
    assert 'lr: the sizes of 1 of 9 pairs were compared in 10 s' in caplog.text


def failing_at(iterations, monkeypatch):
    """Let metrics fail after so many uses; 0 for never."""
    uses = []

    def calculate(images, options):
        uses.append(1)
        if iterations and len(uses) > iterations:
            raise RuntimeError('the disk went away')
        return calculate_metric(images, options)

    monkeypatch.setattr(validation, 'calculate_metric', calculate)


def test_a_validation_that_fails_costs_no_training(options, monkeypatch, capfd):
    """The state of its iteration is there, validates first when the run goes on, and gives the same run."""
    options['logger']['save_checkpoint_freq'] = 100
    file = write(options)
    assert main(['train', '-opt', file]) == 0
    RUN.rename('calm')
    failing_at(3, monkeypatch)
    assert main(['train', '-opt', file]) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith('basicsr: error')]
    assert len(errors) == 1 and errors[0].startswith(
        'basicsr: error: the validation at iteration 4 failed: val.metrics.ssim cannot be computed on three: image ')
    assert 'the disk went away' in errors[0] and 'go on with --auto_resume' in errors[0]
    assert torch.load(RUN / 'training_states' / '4.state', weights_only=True)['validation_due'] is True
    failing_at(0, monkeypatch)
    assert main(['train', '-opt', file, '--auto_resume']) == 0
    assert_same_run(Path('calm'), RUN, 8)


@pytest.mark.parametrize('model_type', ['SRModel', 'ELANModel'])
def test_a_last_validation_that_fails_costs_no_training(options, model_type, monkeypatch):
    options.update(model_type=model_type)
    options['val']['val_freq'] = 100
    if model_type == 'SRModel':
        monkeypatch.setattr('basicsr.models.sr_model.tensor2img', lambda *_: 1 / 0)
    else:
        failing_at(2, monkeypatch)
    assert main(['train', '-opt', write(options)]) == 2
    assert torch.load(RUN / 'training_states' / '8.state', weights_only=True)['validation_due'] is True


ONE_FAILS = """
import os, sys
from elan_basicsr.cli import main
from elan_basicsr.models import validation
uses, measure = [], validation.calculate_metric
def calculate(images, options):
    uses.append(1)
    if os.environ['RANK'] == '1' and len(uses) > 1:
        raise RuntimeError('the disk went away')
    return measure(images, options)
validation.calculate_metric = calculate
sys.exit(main())
"""


@pytest.mark.slow
def test_all_processes_save_and_end_with_the_line_of_the_one_that_fails(options):
    Path('failing.py').write_text(ONE_FAILS)
    file = write(options, dist_params={'timeout': 60})
    assert finish(start(2, 'train', '-opt', file, program=('failing.py',))) == [2, 2], outputs(2)
    for rank in range(2):
        errors = [line for line in Path(f'output.{rank}').read_text().splitlines() if line.startswith('basicsr: error')]
        assert len(errors) == 1 and 'the disk went away' in errors[0]
    assert torch.load(RUN / 'training_states' / '4.state', weights_only=True)['validation_due'] is True


@pytest.mark.slow
def test_all_processes_end_with_the_line_of_the_one_that_finds_a_pair(copied):
    cut(images('test/GT')[1], rows=1)
    assert finish(start(2, 'train', '-opt', write(copied, dist_params={'timeout': 60}))) == [2, 2], outputs(2)
    for rank in range(2):
        errors = [line for line in Path(f'output.{rank}').read_text().splitlines() if line.startswith('basicsr: error')]
        assert len(errors) == 1 and 'datasets.val: test/GT/' in errors[0]
