"""A training state that passes the check loads and makes a step; any other is refused in one line."""
import copy
import io
import os
import random
from types import SimpleNamespace

import pytest
import torch

from elan_basicsr.errors import UserError
from elan_basicsr.models.state_checks import check_training_state

from ..fuzz import mutate_content
from basicsr.models.lr_scheduler import CosineAnnealingRestartLR, MultiStepRestartLR

STATES = int(os.environ.get('ELAN_FUZZ_CHECKPOINTS', 150))
OPTIMIZERS = {'Adam': {}, 'AdamW': {'amsgrad': True}, 'SGD': {'momentum': 0.9}, 'RMSprop': {}, 'Adadelta': {},
              'NAdam': {}}


def model(kind='Adam', cosine=False):
    net = torch.nn.Conv2d(3, 4, 3)
    optimizer = getattr(torch.optim, kind)(net.parameters(), lr=1e-3, **OPTIMIZERS[kind])
    scheduler = CosineAnnealingRestartLR(optimizer, [9, 9], (1, 1)) if cosine else MultiStepRestartLR(optimizer, [2, 5])
    return SimpleNamespace(net=net, optimizers=[optimizer], schedulers=[scheduler])


def step(model):
    model.net(torch.ones(1, 3, 4, 4)).sum().backward()
    model.optimizers[0].step()
    model.schedulers[0].step()


def state_of(model) -> dict:
    return {'iter': 1, 'epoch': 0, 'optimizers': [model.optimizers[0].state_dict()],
            'schedulers': [model.schedulers[0].state_dict()]}


def resume(model, state):
    model.optimizers[0].load_state_dict(state['optimizers'][0])
    model.schedulers[0].load_state_dict(state['schedulers'][0])


@pytest.mark.parametrize('kind', OPTIMIZERS)
@pytest.mark.parametrize('cosine', [False, True])
def test_a_sound_state_passes(kind, cosine):
    one, two = model(kind, cosine), model(kind, cosine)
    check_training_state(two, state_of(one), 'x.state')  # of a run that has made no step
    step(one)
    check_training_state(two, state_of(one), 'x.state')
    resume(two, copy.deepcopy(state_of(one)))
    step(two)


def change(path, value):
    def mutate(state):
        *sections, last = path
        for key in sections:
            state = state[key]
        state[last] = value
    return mutate


PARAMETER = ('optimizers', 0, 'state', 0)
GROUP = ('optimizers', 0, 'param_groups', 0)


@pytest.mark.parametrize('path, value', [
    ((*PARAMETER, 'exp_avg'), torch.zeros(1)), ((*PARAMETER, 'exp_avg'), torch.full((4, 3, 3, 3), float('nan'))),
    ((*PARAMETER, 'exp_avg'), torch.zeros(4, 3, 3, 3).to(torch.float8_e4m3fn)),
    ((*PARAMETER, 'exp_avg'), None), ((*PARAMETER, 'step'), 'x'), ((*PARAMETER, 'step'), 10**30 * 10**300),
    (PARAMETER, {'step': 1}), (PARAMETER, 5), (('optimizers', 0, 'state', 7), {}), ((*GROUP, 'lr'), float('nan')),
    ((*GROUP, 'lr'), '1'), ((*GROUP, 'betas'), (0.9,)), ((*GROUP, 'params'), [0]), ((*GROUP, 'amsgrad'), 'yes'),
    (('optimizers', 0), {}), (('optimizers',), []), (('schedulers',), []), (('schedulers', 0, 'last_epoch'), 1.5),
    (('schedulers', 0, 'step'), 5), (('schedulers', 0, 'get_lr'), None), (('schedulers', 0, 'milestones'), 3),
    (('schedulers', 0, 'base_lrs'), [1, 2]), (('schedulers', 0, 'optimizer'), None),
])
def test_a_state_of_another_kind_is_refused_in_a_line(path, value):
    trained = model()
    step(trained)
    state = copy.deepcopy(state_of(trained))
    change(path, value)(state)
    with pytest.raises(UserError, match=rf'^x\.state: {path[0]}.*start anew$'):
        check_training_state(model(), state, 'x.state')


def test_any_mutated_state_is_refused_or_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from elan_basicsr.checkpoint import read_training_state
    trained = model()
    step(trained)
    out = io.BytesIO()
    torch.save(state_of(trained), out)
    passed = 0
    for seed in range(STATES):
        data = mutate_content(out.getvalue(), 'x.state', random.Random(seed))
        try:
            with open('x.state', 'wb') as file:
                file.write(data)
            state, other = read_training_state('x.state'), model()
            check_training_state(other, state, 'x.state')
        except UserError as error:
            assert str(error).startswith('x.state: ') and str(error).isprintable(), seed
            continue
        try:
            resume(other, state)
            step(other)
        except Exception as error:
            raise AssertionError(f'seed {seed}: {error!r}') from error
        passed += 1
    assert 0 < passed < STATES
    print(f'{STATES} mutated training states: {passed} resumed, the others refused')
