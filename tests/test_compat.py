"""basicsr 1.4.2 works on today's dependencies, and runs no code that an option file names."""
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml

from elan_basicsr import compat
from elan_basicsr.cli import main

from basicsr.utils import options as upstream


def test_each_repair_says_what_breaks_and_where_it_was_reported():
    for repair in compat.REPAIRS:
        assert 'Upstream' in repair.__doc__ or 'No upstream report' in repair.__doc__, repair.__name__
        assert repair.__name__ in compat.applied


def test_upstream_alone_does_not_import():
    """Should it import one day, the first repair has become idle."""
    code = 'import basicsr'
    alone = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert (alone.returncode != 0) == compat.applied['functional_tensor']
    # Of the toolbox's modules: torch has deprecations of its own.
    strict = "import warnings; warnings.filterwarnings('error', category=DeprecationWarning, module='(elan_)?basicsr')"
    repaired = subprocess.run([sys.executable, '-c', f'{strict}; import elan_basicsr; {code}'], capture_output=True,
                              text=True)
    assert repaired.returncode == 0, repaired.stderr


def test_degradations_of_the_toolbox_work():
    from basicsr.data.degradations import random_add_gaussian_noise_pt, random_add_jpg_compression
    img = np.random.default_rng(0).random((16, 16, 3)).astype(np.float32)
    assert random_add_jpg_compression(img, (30, 95)).shape == img.shape
    assert random_add_gaussian_noise_pt(torch.rand(2, 3, 8, 8), gray_prob=0.5).shape == (2, 3, 8, 8)


def test_what_projects_for_basicsr_1_3_import_is_found_at_its_old_place():
    """Every function and class of 1.3.4.9 that 1.4.2 holds elsewhere, as a list of what the two define tells."""
    from basicsr.losses import CharbonnierLoss, GANLoss, L1Loss, MSELoss, PerceptualLoss, WeightedTVLoss
    from basicsr.losses.losses import (  # noqa: F401
        MultiScaleGANLoss,
        charbonnier_loss,
        g_path_regularize,
        gradient_penalty_loss,
        l1_loss,
        mse_loss,
        r1_penalty,
    )
    from basicsr.utils import color_util
    from basicsr.utils.matlab_functions import bgr2ycbcr, imresize, rgb2ycbcr, ycbcr2bgr, ycbcr2rgb
    assert (bgr2ycbcr, rgb2ycbcr) == (color_util.bgr2ycbcr, color_util.rgb2ycbcr)
    assert (ycbcr2bgr, ycbcr2rgb) == (color_util.ycbcr2bgr, color_util.ycbcr2rgb)
    assert imresize.__module__ == 'basicsr.utils.matlab_functions'
    import basicsr.losses.losses as old
    assert {CharbonnierLoss, GANLoss, L1Loss, MSELoss, PerceptualLoss, WeightedTVLoss} <= set(vars(old).values())


def test_niqe_works():
    from basicsr.metrics import calculate_niqe
    img = np.random.default_rng(0).integers(0, 256, (200, 200, 3)).astype(np.uint8)
    assert np.isfinite(calculate_niqe(img, 0))


def test_yaml_of_the_toolbox_builds_no_objects(tmp_path):
    text = f'a: !!python/object/apply:os.mkdir ["{tmp_path}/ran"]'
    with pytest.raises(yaml.constructor.ConstructorError):
        yaml.load(text, Loader=upstream.ordered_yaml()[0])
    assert not (tmp_path / 'ran').exists()
    loaded = yaml.load('b: 1\na: 2', Loader=upstream.ordered_yaml()[0])
    assert list(loaded.items()) == [('b', 1), ('a', 2)]


@pytest.mark.parametrize('entry', ['name=[__import__("os").mkdir("ran")]', 'name"];import os;os.mkdir("ran");opt["a=1'])
def test_force_yml_of_the_toolbox_runs_nothing(entry, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'a.yml').write_text('name: a\nnum_gpu: 0\ndatasets: {}\npath: {}\nlogger: {}\n')
    monkeypatch.setattr(sys, 'argv', ['train', '-opt', 'a.yml', '--force_yml', entry])
    with pytest.raises((SystemExit, ValueError, SyntaxError)):
        upstream.parse_options(str(tmp_path))
    assert not os.path.exists('ran')


def test_processes_of_the_toolbox_meet_on_a_gpu_host_whatever_they_use(monkeypatch):
    """`num_gpu` is read after they have met, so tensors on a CPU have to have a way as well."""
    met = []
    for name in ('is_available', 'device_count', 'set_device'):
        monkeypatch.setattr(torch.cuda, name, lambda *device: 1)
    monkeypatch.setattr(torch.distributed, 'init_process_group', lambda backend: met.append(backend))
    monkeypatch.setenv('RANK', '1')
    monkeypatch.setattr(torch.multiprocessing, 'get_start_method', lambda allow_none: 'fork')
    upstream.init_dist('pytorch')
    assert met == ['cpu:gloo,cuda:nccl']


def test_doctor_finds_everything_registered(capsys):
    assert main(['doctor']) == 0
    printed = capsys.readouterr().out
    for expected in ('basicsr', '1.4.2', 'functional_tensor', 'ARCH_REGISTRY', 'complete'):
        assert expected in printed
    assert 'MISSING' not in printed


@pytest.mark.slow
def test_the_toolboxs_own_train_pipeline_trains_elan(options, monkeypatch):
    """`python -m basicsr.train` after `import elan_basicsr`, resumed on a machine without a GPU."""
    import pathlib

    from basicsr.train import train_pipeline
    pathlib.Path('run.yml').write_text(yaml.safe_dump(options))
    for arguments in (['--force_yml', 'train:total_iter=4'], ['--auto_resume']):
        monkeypatch.setattr(sys, 'argv', ['train', '-opt', 'run.yml', *arguments])
        train_pipeline(os.getcwd())
    assert pathlib.Path('experiments/run/models/net_g_8.pth').exists()
