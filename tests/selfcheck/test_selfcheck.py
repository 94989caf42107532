"""`basicsr doctor --check`: it passes here, and it finds what is wrong with a device."""
import json
import random

import pytest
import torch
import torch.nn.functional as F

from elan_basicsr.archs import elan_arch
from elan_basicsr.cli import main
from elan_basicsr.selfcheck import attention, network, processes, run, training, upscaling
from elan_basicsr.selfcheck.checks import Check, Machine, Outcome
from elan_basicsr.selfcheck.network import MODULES, Case, Way

SMALL = {'num_feat': 30, 'num_block': 4, 'num_share': 1}


@pytest.fixture
def machine(tmp_path) -> Machine:
    return Machine(torch.device('cpu'), True, tmp_path)


@pytest.fixture
def case(machine) -> Case:
    """A network that has been computed rightly before a test makes the device wrong."""
    case = Case(machine, SMALL, edge=32)
    for training_ in (False, True):
        assert case.compare(MODULES, training_).ok
    return case


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_everything_is_right_on_a_cpu(tmp_path, capsys, monkeypatch):
    """The whole command, on a terminal of 80 columns; its report is small enough to attach."""
    monkeypatch.setenv('COLUMNS', '80')
    assert main(['doctor', '--check', '--quick', '--device', 'cpu', '--json', str(tmp_path / 'check.json')]) == 0
    output = capsys.readouterr().out
    assert 'checks, all is right' in output
    assert all(len(line) <= 80 for line in output.split('registries')[1].splitlines() if 'left out' not in line)
    report = json.loads((tmp_path / 'check.json').read_text())
    assert {row['group'] for row in report['checks']} == {'network', 'attention', 'training', 'processes', 'upscale'}
    assert all(row['outcome']['ok'] is not False for row in report['checks'])
    assert report['device'] == {'name': 'cpu', 'threads': torch.get_num_threads()} and report['machine']['torch']
    assert len(json.dumps(report)) < 50_000


def test_what_is_wrong_is_a_row_a_line_and_the_exit_code(capsys, monkeypatch, tmp_path):
    def checks(machine):
        yield Check('attention', 'an odd one', lambda: Outcome(False, '1.0', '0.1', 'the output'))
        yield Check('attention', 'a broken one', lambda: 1 / 0)
        yield Check('attention', 'an absent one', lambda: Outcome(None, note='there is no [GPU]'))
    for part in (network, attention, training, processes, upscaling, run.speed):
        monkeypatch.setattr(part, 'checks', checks if part is attention else lambda machine: ())
    assert main(['doctor', '--check', '--device', 'cpu']) == 1
    output = capsys.readouterr().out
    assert 'WRONG attention, an odd one: the output\n' in output
    assert 'WRONG attention, a broken one: ZeroDivisionError: division by zero\n' in output
    assert 'left out attention, an absent one: there is no [GPU]\n' in output
    assert output.endswith('2 of 3 checks found something wrong\n')


def test_a_device_that_is_not_there_is_one_line(capsys):
    assert main(['doctor', '--check', '--device', 'cuda:77']) == 2
    assert '--device cuda:77: cannot be used' in capsys.readouterr().err


def test_a_wrong_gradient_is_found(case, monkeypatch):
    right = elan_arch.attend
    monkeypatch.setattr(elan_arch, 'attend', lambda q, v: right(q.detach(), v))
    assert case.compare(MODULES, False).ok
    outcome = case.compare(MODULES, True)
    assert outcome.ok is False and outcome.note.startswith('gradient of body.')


@pytest.mark.parametrize('kind', ['cut', 'paste'])
def test_a_wrong_window_is_found(case, monkeypatch, kind):
    """Shifted by a pixel more, as an index that is off by one would."""
    right = getattr(elan_arch, f'{kind}_windows')
    monkeypatch.setattr(elan_arch, f'{kind}_windows', lambda x, *rest: right(x.roll(1, dims=1), *rest))
    assert case.compare(MODULES, False).ok is False and case.compare(MODULES, True).ok is False


def test_statistics_that_stand_still_are_found(case, monkeypatch):
    right = F.batch_norm
    monkeypatch.setattr(F, 'batch_norm', lambda x, mean, var, *rest: right(x, mean.clone(), var.clone(), *rest))
    outcome = case.compare(MODULES, True)
    assert outcome.ok is False and outcome.note.startswith('statistic') and 'running_' in outcome.note


def test_a_precision_that_is_not_the_one_asked_for_is_found(case):
    """bf16 where float32 was to be."""
    assert case.compare(Way('', 'float32', torch.bfloat16, modules=True), False).ok is False
    assert case.compare(Way('', 'bf16', torch.bfloat16, modules=True), False).ok


def test_values_that_are_not_finite_are_found(case, monkeypatch):
    right = elan_arch.attend
    monkeypatch.setattr(elan_arch, 'attend', lambda q, v: right(q, v) * float('nan'))
    assert case.compare(MODULES, False).ok is False


def test_tf32_rounds_a_hundred_times_as_much_as_float32_and_less_than_half_precision(case):
    """What TF32 may deviate is measured by rounding to its bits, which lie between."""
    float32, tf32, bf16 = (case.allowed(rounding, True)['gradient'] for rounding in ('float32', 'TF32', 'bf16'))
    assert 100 * float32 < tf32 < bf16


def test_windows_that_a_kernel_forgets_are_found(monkeypatch):
    right = attention.attend
    assert attention.compare(70_000, 20, torch.device('cpu')).ok
    monkeypatch.setattr(attention, 'attend', lambda q, v: right(q, v) * (torch.arange(len(q)) < 65_536)[:, None, None])
    assert attention.compare(65_536, 20, torch.device('cpu')).ok
    assert attention.compare(70_000, 20, torch.device('cpu')).ok is False


def test_an_operation_that_does_not_repeat_itself_is_found(machine, monkeypatch):
    assert training.repeats(machine).ok and training.resumes(machine).ok
    right = elan_arch.ELAN._run_body
    monkeypatch.setattr(elan_arch.ELAN, '_run_body',
                        lambda net, x: right(net, x * (1 + 1e-6 * random.SystemRandom().random())))
    outcome = training.repeats(machine)
    assert outcome.ok is False and 'params' in outcome.note


@pytest.mark.slow
def test_statistics_of_one_process_alone_are_found(machine, monkeypatch):
    monkeypatch.setattr(processes, 'ONE_STEP', [*processes.ONE_STEP, 'sync_bn=false'])
    assert processes.gradients_agree(machine, 2).ok is False


def test_files_that_differ_are_found(machine, monkeypatch):
    case = upscaling.Upscaling(machine)
    assert case.images().ok
    right = upscaling.Upscaling.enlarge
    monkeypatch.setattr(upscaling.Upscaling, 'enlarge', lambda *args: [*right(*args), b''])
    outcome = upscaling.Upscaling(machine).images()
    assert outcome.ok is False and outcome.note == '2 of 4 differ'
