"""pyiqa's metrics by name; what needs the package is skipped where it is not installed."""
import sys

import cv2
import numpy as np
import pytest
import torch

from elan_basicsr.config.options import load_options
from elan_basicsr.errors import UserError
from elan_basicsr.interop import pyiqa as ours
from tests.engine.test_train import write

from basicsr.metrics import calculate_metric, calculate_psnr


@pytest.fixture
def measured(options):
    """Loads the options of a training with one metric of pyiqa, and gives back the section of it."""
    def load(**section):
        options['val']['metrics'] = {'figure': {'type': 'calculate_pyiqa', **section}}
        return load_options(write(options), is_train=True)['val']['metrics']['figure']
    return load


def refused(measured, **section) -> str:
    with pytest.raises(UserError) as raised:
        measured(**section)
    assert '\n' not in str(raised.value)
    return str(raised.value)


def test_without_the_package_a_line_says_what_to_install(measured, monkeypatch):
    monkeypatch.setitem(sys.modules, 'pyiqa', None)
    ours.load.cache_clear()
    line = refused(measured, metric='lpips')
    assert 'run.yml:' in line and 'val.metrics.figure.metric: needs pyiqa' in line
    assert line.endswith("pip install 'elan-basicsr[metrics]'")


def test_a_metric_needs_its_name(measured):
    assert 'metric is missing, which calculate_pyiqa needs' in refused(measured)


def test_a_wrong_name_and_a_wrong_direction_are_told_before_training(measured):
    pytest.importorskip('pyiqa')
    assert "pyiqa has no metric 'lpisp' for an image; did you mean lpips" in refused(measured, metric='lpisp')
    assert "pyiqa has no metric 'fid' for an image" in refused(measured, metric='fid')
    assert 'lower values of gmsd are better; remove the key' in refused(measured, metric='gmsd', better='higher')


def test_weights_that_cannot_be_fetched_are_told_before_training(measured, monkeypatch, tmp_path):
    pytest.importorskip('pyiqa')
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'nothing'))
    for name in ('https_proxy', 'HTTPS_PROXY'):
        monkeypatch.setenv(name, 'http://127.0.0.1:9')
    line = refused(measured, metric='lpips')
    assert 'pyiqa cannot make lpips: ' in line and str(tmp_path / 'nothing') in line


def test_the_direction_is_that_of_the_metric(measured):
    pytest.importorskip('pyiqa')
    assert measured(metric='gmsd')['better'] == 'lower' and measured(metric='psnr')['better'] == 'higher'


def test_images_reach_it_as_they_are(measured):
    """RGB from 0 to 1, cropped: its PSNR is that of the toolbox. One without a reference needs no ground truth."""
    pytest.importorskip('pyiqa')
    gt = np.random.default_rng(0).integers(0, 256, (48, 40, 3), np.uint8)
    img = cv2.GaussianBlur(gt, (3, 3), 0)
    found = calculate_metric({'img': img, 'img2': gt}, measured(metric='psnr', crop_border=4))
    assert found == pytest.approx(calculate_psnr(img, gt, crop_border=4), abs=1e-4)
    assert calculate_metric({'img': img}, measured(metric='entropy')) > 0
    red = np.zeros((32, 32, 3), np.uint8)
    red[..., 2] = 200  # of BGR
    seen = []
    torch.nn.Module.register_forward_pre_hook(ours.load('entropy').net, lambda _, given: seen.append(given[0]))
    calculate_metric({'img': red}, measured(metric='entropy'))
    assert seen[0][0, :, 0, 0].tolist() == pytest.approx([200 / 255, 0, 0])


def test_a_photograph_without_ground_truth_takes_none_that_compares(options):
    pytest.importorskip('pyiqa')
    options['datasets']['val'].update(type='SingleImageDataset')
    options['datasets']['val'].pop('dataroot_gt')
    for name, refuses in (('entropy', False), ('gmsd', True)):
        options['val']['metrics'] = {'figure': {'type': 'calculate_pyiqa', 'metric': name}}
        file = write(options)
        if refuses:
            with pytest.raises(UserError, match='calculate_pyiqa compares with a ground truth'):
                load_options(file, is_train=True)
        else:
            load_options(file, is_train=True)
