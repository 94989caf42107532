"""What the tests of models share: models of a small training, and steps of it."""
import copy

import pytest
import torch
import yaml

from elan_basicsr.config.options import load_options
from elan_basicsr.engine.launch import Processes
from elan_basicsr.engine.run import join_run

from basicsr.models import build_model
from basicsr.models.sr_model import SRModel

GPU = {'num_gpu': 1}


@pytest.fixture
def make(options, tmp_path):
    """Build the model of the options with some changed: make({'train.amp': 'bf16'})."""
    def build(changes=None, cls=None, processes=None):
        opt = copy.deepcopy(options)
        if cls is SRModel:
            opt['model_type'] = 'SRModel'
        (tmp_path / 'run.yml').write_text(yaml.safe_dump(opt))
        opt = load_options(tmp_path / 'run.yml', is_train=True,
                           overrides=[f'{key}={value}' for key, value in (changes or {}).items()])
        join_run(opt, processes or Processes())
        torch.manual_seed(0)
        return build_model(opt)
    return build


def batch(size=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {'lq': torch.rand(size, 3, 16, 16, generator=generator), 'lq_path': [f'key{i}' for i in range(size)],
            'gt': torch.rand(size, 3, 32, 32, generator=generator)}


def steps(model, number, size=4):
    for i in range(1, number + 1):
        model.update_learning_rate(i)
        model.feed_data(batch(size, i))
        model.optimize_parameters(i)
    return model


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.net_g.parameters()])
