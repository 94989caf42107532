"""A run that goes on with other options: what takes effect, what is told, and what is refused."""
import json
import re
from pathlib import Path

import pytest
import torch

from elan_basicsr.cli import main
from elan_basicsr.config.parts import SCHEDULER
from elan_basicsr.config.reader import shown
from tests.engine.test_train import assert_same_run, write

RUN = Path('experiments/run')
STATE = RUN / 'training_states'


def train(options, *changes, resumed=False, **sections) -> int:
    return main(['train', '-opt', write(options, **sections), *['--auto_resume'] * resumed,
                 *(['--set', *changes] if changes else [])])


def rates(run=RUN) -> dict[int, float]:
    """The logged learning rate of every iteration."""
    text = '\n'.join(path.read_text() for path in sorted(run.glob('train_*.log')))
    return {int(number.replace(',', '')): float(rate)
            for number, rate in re.findall(r'iter:\s*([\d,]+), lr:\(([\d.e+-]+),', text)}


def newest_log() -> str:
    """What the latest start of the run has told, one line a message."""
    path = max(RUN.glob('train_*.log'), key=lambda path: (path.stat().st_mtime_ns, path.name))
    return path.read_text()


@pytest.fixture
def started(options) -> dict:
    """Options of which four iterations of eight are done; MultiStepLR halves the rate at 6."""
    del options['val'], options['datasets']['val']
    options['logger']['print_freq'] = 1
    assert train(options, 'train.total_iter=4') == 0
    return options


def forget_options(state: Path = STATE / '4.state') -> None:
    """Make a state that an older version, or the toolbox, would have left."""
    content = torch.load(state, weights_only=True)
    for key in ('options', 'schedule_start', 'samples', 'step_size', 'imports'):
        del content[key]
    torch.save(content, state)


OTHER_SCHEDULES = [
    ({'type': 'MultiStepLR', 'milestones': [2, 7], 'gamma': 0.1}, 'train.scheduler.milestones'),
    ({'type': 'CosineAnnealingLR', 'T_max': 8, 'eta_min': 1e-6}, 'train.scheduler.type'),
    ({'type': 'CosineAnnealingRestartLR', 'periods': [8], 'eta_min': 1e-6}, 'train.scheduler.type'),
    ({'type': 'OneCycleLR', 'max_lr': 2e-3, 'total_steps': 8}, 'train.scheduler.type'),
]


@pytest.mark.parametrize('scheduler, key', OTHER_SCHEDULES, ids=[each['type'] for each, _ in OTHER_SCHEDULES])
@pytest.mark.parametrize('told_by', ['note', 'objects'])
def test_another_schedule_takes_effect_and_is_told(started, scheduler, key, told_by):
    """From a resume on the rates are those of a run that had the schedule from its start."""
    if told_by == 'objects':
        forget_options()
    started['train']['scheduler'] = scheduler
    assert train(started, resumed=True) == 0
    log = newest_log()
    assert re.search(rf'INFO: {re.escape(key)}: .* so far, .* from here on\n', log)
    assert 'as if the schedule had been this one from iteration 0 on' in log
    RUN.rename('resumed')
    assert train(started) == 0
    assert {n: rate for n, rate in rates(Path('resumed')).items() if n > 4} == {
        n: rate for n, rate in rates().items() if n > 4}


def test_another_rate_takes_effect_and_is_told(started):
    assert train(started, 'train.optim_g.lr=1e-4', resumed=True) == 0
    assert {n: rate for n, rate in rates().items() if n > 4} == {5: 1e-4, 6: 1e-4, 7: 5e-5, 8: 5e-5}
    assert 'train.optim_g.lr: 0.001 so far, 0.0001 from here on\n' in newest_log()


def test_a_schedule_begins_anew_where_that_is_asked_for_and_once(started):
    """Stopped again it goes on; a changed schedule begins anew again."""
    anew = ('train.restart_scheduler=true', 'train.scheduler.milestones=[2]', 'train.warmup_iter=2')
    assert train(started, *anew, resumed=True) == 0
    assert 'train.restart_scheduler: the schedule begins anew behind iteration 4; the learning rate was 1.000e-03' in (
        newest_log())
    expected = {5: 5e-4, 6: 1e-3, 7: 5e-4, 8: 5e-4}
    assert {n: rate for n, rate in rates().items() if n > 4} == expected
    assert train(started, *anew, 'train.total_iter=10', resumed=True) == 0
    assert rates() == {**dict.fromkeys(range(1, 5), 1e-3), **expected, 9: 5e-4, 10: 5e-4}
    assert 'the schedule began anew behind iteration 4 and goes on' in newest_log()
    assert train(started, *anew, 'train.total_iter=12', 'train.scheduler.milestones=[1]', resumed=True) == 0
    assert (rates()[11], rates()[12]) == (5e-4, 5e-4)
    assert 'begins anew behind iteration 10' in newest_log()


def test_what_is_unchanged_is_not_told_and_goes_on_to_the_bit(started):
    """A default that the file spells out is no change."""
    started['train']['optim_g'].update(eps=1e-8, weight_decay=0)
    started['train'].update(accumulate=1, amp=False, grad_clip=None)
    assert train(started, resumed=True) == 0
    assert re.findall(r'INFO: (.*) from here on', newest_log()) == ['train.total_iter: 4 so far, 8']
    RUN.rename('resumed')
    assert train(started) == 0
    assert_same_run(Path('resumed'), RUN, 8)


CHANGES = [
    ('train.optim_g.weight_decay', 0.1), ('train.optim_g.betas', [0.8, 0.99]), ('train.optim_g.type', 'AdamW'),
    ('train.ema_decay', 0.5), ('train.accumulate', 2), ('train.grad_clip', 0.5), ('train.amp', 'bf16'),
    ('train.pixel_opt.type', 'MSELoss'), ('train.pixel_opt.loss_weight', 2.0), ('manual_seed', 6),
    ('datasets.train.gt_size', 16), ('datasets.train.use_rot', False), ('network_g.window_sizes', [4, 8, 4]),
    ('model_type', 'SRModel'), ('train.total_iter', 6),
]


@pytest.mark.parametrize('key, value', CHANGES, ids=[key for key, _ in CHANGES])
def test_what_the_file_says_takes_effect_and_is_told(started, key, value):
    """The state that is saved next holds it, and the line names both values."""
    assert train(started, f'{key}={json.dumps(value)}', 'logger.save_checkpoint_freq=5', resumed=True) == 0
    assert re.search(rf'INFO: {re.escape(key)}: .* so far, {re.escape(shown(value))} from here on', newest_log())
    state = torch.load(STATE / '5.state', weights_only=True)
    section = json.loads(state['options'])
    for part in key.split('.'):
        section = section[part]
    assert section == value
    group = state['optimizers'][0]['param_groups'][0]
    if key in ('train.optim_g.weight_decay', 'train.optim_g.betas'):
        assert json.loads(json.dumps(group[key.rpartition('.')[2]])) == value
    if key == 'train.optim_g.type':
        assert group['decoupled_weight_decay'] is True and group['weight_decay'] == 0.01


def test_of_a_state_without_notes_the_optimizer_tells_what_it_was(started):
    forget_options()
    assert train(started, 'train.optim_g.weight_decay=0.1', 'train.optim_g.lr=2e-3', resumed=True) == 0
    log = newest_log()
    assert 'train.optim_g.weight_decay: 0 so far, 0.1 from here on\n' in log
    assert 'train.optim_g.lr: 0.001 so far, 0.002 from here on\n' in log
    assert log.count('from here on') == 2


def test_a_state_without_notes_goes_on_to_the_bit(started):
    forget_options()
    assert train(started, resumed=True) == 0
    assert 'from here on' not in newest_log()
    RUN.rename('resumed')
    assert train(started) == 0
    assert_same_run(Path('resumed'), RUN, 8)


@pytest.mark.parametrize('change, blamed', [
    ('train.optim_g={type: SGD, lr: 1e-3}', "train.optim_g.type ('Adam' so far, 'SGD' here)"),
    ('train.optim_g.amsgrad=true', 'train.optim_g.amsgrad (false so far, true here)'),
    ('network_g.num_feat=30', 'network_g.num_feat (15 so far, 30 here)'),
    ('network_g={type: EDSR, num_in_ch: 3, num_out_ch: 3, num_feat: 8, num_block: 1, upscale: 2}',
     "network_g.type ('ELAN' so far, 'EDSR' here)"),
])
def test_what_cannot_go_on_is_refused_in_a_line_that_names_the_option(started, change, blamed, capfd):
    assert train(started, change, resumed=True) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith('basicsr: error')]
    assert len(errors) == 1 and 'changed since the state was saved: ' in errors[0] and blamed in errors[0]


def test_a_seed_that_was_drawn_stays(options):
    """Without one in the file a resumed run draws the samples that it would have drawn."""
    del options['manual_seed'], options['val'], options['datasets']['val']
    assert train(options, 'train.total_iter=4') == 0
    seed = json.loads(torch.load(STATE / '4.state', weights_only=True)['options'])['manual_seed']
    assert train(options, resumed=True) == 0
    assert f'manual_seed: the file gives none; {seed}, drawn when the run began, stays' in newest_log()
    RUN.rename('resumed')
    assert train(options, f'manual_seed={seed}') == 0
    assert_same_run(Path('resumed'), RUN, 8)


def test_an_average_begins_where_it_is_switched_on(started):
    assert train(started, 'train.ema_decay=0', resumed=True) == 0
    assert 'train.ema_decay: 0.9 so far, 0 from here on; the average of the weights ends' in newest_log()
    assert train(started, 'train.total_iter=9', resumed=True) == 0
    assert 'train.ema_decay: 0 so far, 0.9 from here on; the average begins with the weights as they' in newest_log()
    before, after = (torch.load(RUN / 'models' / f'net_g_{n}.pth', weights_only=True) for n in (8, 9))
    decay = min(0.9, 10 / 19)
    for name, value in after['params_ema'].items():
        if value.is_floating_point() and 'running' not in name:
            torch.testing.assert_close(value, decay * before['params'][name] + (1 - decay) * after['params'][name])


def test_another_metric_is_measured_and_the_best_of_the_others_stays(options):
    assert train(options, 'train.total_iter=4') == 0
    before = torch.load(STATE / '4.state', weights_only=True)['best_metric_results']['three']
    options['val']['metrics']['plain'] = {'type': 'calculate_psnr', 'crop_border': 0}
    options['val']['metrics']['ssim']['crop_border'] = 4
    assert train(options, 'train.total_iter=5', 'val.val_freq=100', 'logger.save_checkpoint_freq=5', resumed=True) == 0
    assert 'val.metrics.ssim.crop_border: 2 so far, 4 from here on; its best value begins anew' in newest_log()
    best = torch.load(STATE / '5.state', weights_only=True)['best_metric_results']['three']
    assert best['psnr'] == before['psnr']  # of the iteration before, for the state is saved ahead of the validation
    assert best['ssim']['iter'] == best['plain']['iter'] == -1 or best['ssim']['iter'] == 5


def test_a_run_at_its_end_says_so(started):
    assert train(started, 'train.total_iter=4', resumed=True) == 0
    assert 'train.total_iter is 4 and the run is at iteration 4: nothing is left to train' in newest_log()


def test_auto_resume_says_where_it_found_nothing(started):
    started['name'] = 'other'
    assert train(started, resumed=True) == 0
    log = next(Path('experiments/other').glob('*.log')).read_text()
    assert '--auto_resume: there is no training state in ' in log


ARGUMENTS = {
    'ConstantLR': {'factor': 0.5, 'total_iters': 3}, 'CosineAnnealingLR': {'T_max': 8},
    'CosineAnnealingRestartLR': {'periods': [8]}, 'CosineAnnealingWarmRestarts': {'T_0': 3},
    'CyclicLR': {'base_lr': 1e-4, 'max_lr': 1e-3, 'step_size_up': 2}, 'ExponentialLR': {'gamma': 0.9},
    'LinearLR': {'total_iters': 6}, 'MultiStepLR': {'milestones': [3]}, 'MultiStepRestartLR': {'milestones': [3]},
    'OneCycleLR': {'max_lr': 1e-3, 'total_steps': 8}, 'PolynomialLR': {'total_iters': 8}, 'StepLR': {'step_size': 3},
}


@pytest.mark.slow
@pytest.mark.parametrize('kind', sorted(SCHEDULER.registered()))
def test_every_scheduler_trains_and_goes_on_where_it_stopped(options, kind):
    """All of torch.optim.lr_scheduler that need no function and no measured value, and the toolbox's."""
    del options['val'], options['datasets']['val']
    options['train']['scheduler'] = {'type': kind, **ARGUMENTS[kind]}
    assert train(options) == 0
    RUN.rename('calm')
    assert train(options, 'train.total_iter=5') == 0
    assert train(options, resumed=True) == 0
    assert_same_run(Path('calm'), RUN, 8)


@pytest.mark.parametrize('kind', ['MultiStepLR', 'CosineAnnealingLR'])
def test_warm_up_ends_at_the_schedules_own_rate(options, kind):
    del options['val'], options['datasets']['val']
    options['logger']['print_freq'] = 1
    options['train']['scheduler'] = {'type': kind, **ARGUMENTS[kind]}
    assert train(options) == 0
    plain = rates()
    assert train(options, 'train.warmup_iter=4') == 0
    warm = rates()
    assert [warm[n] for n in (1, 2, 3)] == [2.5e-4, 5e-4, 7.5e-4]
    assert all(warm[n] == pytest.approx(plain[n], rel=1e-3) for n in range(4, 9))
