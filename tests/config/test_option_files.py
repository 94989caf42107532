"""The option files that are shipped: complete, readable by BasicSR itself, and the authors' recipe."""
from __future__ import annotations

from pathlib import Path

import elan_basicsr  # noqa: F401 - basicsr does not import without it

# isort: split
import pytest
import yaml

from elan_basicsr.config.options import load_options
from elan_basicsr.config.reader import read_yaml
from elan_basicsr.errors import UserError

from basicsr.utils.options import ordered_yaml
from basicsr.utils.registry import DATASET_REGISTRY

OPTIONS = Path(__file__).parents[2] / 'options'
SHIPPED = sorted(OPTIONS.rglob('*.yml'))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def prepare(opt: dict) -> None:
    """Empty stand-ins for the data and weights that a shipped file names."""
    for dataset in opt['datasets'].values():
        for key in ('dataroot_gt', 'dataroot_lq'):
            if key in dataset:
                Path(dataset[key]).mkdir(parents=True, exist_ok=True)
                if dataset[key].endswith('.lmdb'):
                    Path(dataset[key], 'data.mdb').touch()
        for key in ('meta_info', 'meta_info_file'):
            if dataset.get(key):
                Path(dataset[key]).parent.mkdir(parents=True, exist_ok=True)
                Path(dataset[key]).touch()
    for key, value in opt['path'].items():
        if key.startswith('pretrain_network') and value:
            Path(value).parent.mkdir(parents=True, exist_ok=True)
            Path(value).touch()


@pytest.mark.parametrize('file', SHIPPED, ids=[str(file.relative_to(OPTIONS)) for file in SHIPPED])
def test_a_shipped_file_passes_once_its_data_is_there(file):
    opt, _ = read_yaml(file)
    used = {dataset['type'] for dataset in opt['datasets'].values()}
    assert all(name in DATASET_REGISTRY or f'{name}_basicsr' in DATASET_REGISTRY for name in used)
    with pytest.raises(UserError, match='no such folder; '):
        load_options(file, is_train='train' in opt)
    prepare(opt)
    loaded = load_options(file, is_train='train' in opt)
    assert loaded['name'] in (file.stem, 'demo')
    metrics = (opt.get('val') or {}).get('metrics') or {}
    assert all(metric['crop_border'] == loaded['scale'] for metric in metrics.values())


@pytest.mark.parametrize('file', SHIPPED, ids=[str(file.relative_to(OPTIONS)) for file in SHIPPED])
def test_a_shipped_file_reads_the_same_in_basicsr(file):
    theirs = yaml.load(file.read_text(encoding='utf-8'), Loader=ordered_yaml()[0])
    assert read_yaml(file)[0] == theirs


@pytest.mark.parametrize('scale', [2, 3, 4])
@pytest.mark.parametrize('kind, batch, patch, shape', [('ELAN_light', 64, 64, (60, 24, 1)),
                                                       ('ELAN', 32, 48, (180, 36, 0))])
def test_the_recipe_is_the_authors(kind, batch, patch, shape, scale):
    opt, _ = read_yaml(OPTIONS / f'train_{kind}_x{scale}.yml')
    network, data, train = opt['network_g'], opt['datasets']['train'], opt['train']
    assert (network['num_feat'], network['num_block'], network['num_share']) == shape
    assert network['upscale'] == opt['scale'] == scale and data['gt_size'] == patch * scale
    assert data['batch_size_per_gpu'] == batch and data['dataset_enlarge_ratio'] * 800 == 64_000
    epoch = 64_000 // batch
    assert train['total_iter'] == 500 * epoch
    assert train['scheduler']['milestones'] == [epoch * n for n in (250, 400, 450, 475)]
    assert train['scheduler']['gamma'] == 0.5 and train['pixel_opt']['type'] == 'L1Loss'
    recipe = {'type': 'Adam', 'lr': 2e-4, 'weight_decay': 0, 'betas': [0.9, 0.999]}
    assert train['optim_g'] == {**recipe, 'fused': True}  # which is how it is computed
    assert f'X{scale}_raw' in data['dataroot_lq'] and opt['datasets']['val']['dataroot_lq'].endswith(f'LRbicx{scale}')
    sets = read_yaml(OPTIONS / f'test_{kind}_x{scale}.yml')[0]
    assert [each['name'] for each in sets['datasets'].values()] == ['Set5', 'Set14', 'B100', 'Urban100', 'Manga109']
    assert sets['network_g'] == network
