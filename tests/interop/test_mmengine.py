"""ELAN builds and runs from a config file as mmengine and MMagic read them."""
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, Registry

from elan_basicsr.archs.elan_arch import ELAN

CONFIG = """
custom_imports = dict(imports=['elan_basicsr'], allow_failed_imports=False)
model = dict(generator=dict(type='ELAN', upscale=3, num_feat=15, num_block=2, window_sizes=[2, 4, 8]))
"""


def test_it_builds_and_runs_from_a_config_file(tmp_path):
    (tmp_path / 'elan.py').write_text(CONFIG)
    config = Config.fromfile(tmp_path / 'elan.py')
    net = MODELS.build(config.model.generator).eval()
    assert type(net) is ELAN and net.window_sizes == (2, 4, 8)
    with torch.no_grad():
        y = net(torch.rand(2, 3, 7, 11))
    assert y.shape == (2, 3, 21, 33) and y.isfinite().all()


def test_a_child_registry_such_as_that_of_mmagic_finds_it():
    child = Registry('models', parent=MODELS, scope='a_project')
    assert type(child.build(dict(type='ELAN', upscale=2, num_feat=15, num_block=2))) is ELAN
