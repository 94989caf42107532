"""The checks of `basicsr doctor --check` on a GPU, each by itself, as far as no other test has them."""
import json

import pytest
import torch

from elan_basicsr.archs.elan_arch import MOST_WINDOWS
from elan_basicsr.checkpoint import load_elan
from elan_basicsr.cli import main
from elan_basicsr.selfcheck import attention, processes, speed, training, upscaling
from elan_basicsr.selfcheck.checks import Machine
from elan_basicsr.selfcheck.network import SIZES, Case, shallow, ways
from tests.archs.golden import GOLDEN, load_golden

pytestmark = pytest.mark.gpu


@pytest.fixture
def machine(tmp_path) -> Machine:
    return Machine(torch.device('cuda'), True, tmp_path)


@pytest.mark.parametrize('name', GOLDEN)
def test_golden_outputs_in_float64(name):
    """The authors' outputs come from the GPU as from the CPU, to float64's rounding."""
    golden = load_golden(name)
    net = load_elan(golden.checkpoint).double().cuda()
    with torch.no_grad():
        output = net(golden.tensor('input').double().cuda() / 255).cpu() * 255
    right = golden.tensor('output').double()
    assert (output - right).abs().max() <= 1e-9 * (right.max() - right.min())


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('training_', [False, True], ids=['eval', 'train'])
@pytest.mark.parametrize('way', list(ways(True, True)), ids=lambda way: way.name)
def test_the_network(machine, way, training_, size):
    """Every precision, layout and compiler gives output, gradients and statistics within its rounding."""
    outcome = Case(machine, shallow(SIZES[size]), edge=32).compare(way, training_)
    assert outcome.ok, outcome


@pytest.mark.parametrize('width', [20, 60])
@pytest.mark.parametrize('windows', [MOST_WINDOWS, MOST_WINDOWS + 1, 130_560])
def test_attention_in_more_windows_than_a_kernel_takes(windows, width):
    """65,536 windows and more are computed rightly, forward and backward."""
    outcome = attention.compare(windows, width, torch.device('cuda'))
    assert outcome.ok, outcome


@pytest.mark.parametrize('precision', ['float32', 'bf16', 'fp16'])
def test_a_training_learns(machine, precision):
    """Twenty steps of `basicsr train` with EMA, accumulation, clipping and prefetching bring the loss down."""
    assert training.learns(machine, precision).ok


def test_a_deterministic_training_repeats_itself_and_resumes(machine):
    """Two runs, and one that stopped halfway, end with the same bits."""
    assert training.repeats(machine).ok and training.resumes(machine).ok


@pytest.mark.slow
def test_all_gpus_train_and_measure_as_one(machine):
    """Under torchrun and NCCL gradients and figures are those of one process."""
    outcome = processes.gradients_agree(machine, torch.cuda.device_count())
    assert outcome.ok, outcome
    assert processes.figures_agree(machine).ok


@pytest.mark.slow
def test_a_killed_process_ends_the_others(machine):
    """torchrun ends with an exit code that is not 0."""
    if torch.cuda.device_count() < 2:
        pytest.skip('needs two GPUs')
    assert processes.ends(machine, torch.cuda.device_count()).ok


def test_upscaling(machine):
    """Equal images give equal files, and an allocation that fails leads to smaller tiles."""
    case = upscaling.Upscaling(machine)
    assert case.images().ok and case.failing_allocation().ok


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_whole_command(tmp_path):
    """`basicsr doctor --check` ends with 0 in some five minutes, with times and peak memory of every row."""
    assert main(['doctor', '--check', '--json', str(tmp_path / 'check.json')]) == 0
    report = json.loads((tmp_path / 'check.json').read_text())
    machine = Machine(torch.device('cuda'), False, tmp_path)
    assert len(report['speed']) == len(list(speed.checks(machine))) and report['device']['capability']
    assert sum(row['seconds'] for row in report['checks'] + report['speed']) < 400
