import time

import pytest
import torch
from torch import nn

from elan_basicsr.report.benchmark import ratios
from elan_basicsr.report.timing import Timing, gemm_call, inference_call, takes_tf32, time_interleaved, training_step


def test_every_other_round_runs_in_reverse_after_warming_up():
    order = []
    timings = time_interleaved({name: lambda name=name: order.append(name) for name in 'abc'}, runs=3)
    assert ''.join(order) == 'abc' + 'abc' + 'cba' + 'abc'
    assert all(len(timing.seconds) == 3 for timing in timings.values())


def test_a_call_is_timed_by_the_clock():
    timings = time_interleaved({'sleep': lambda: time.sleep(0.02)}, runs=99, longest=0.1)
    assert 1 <= len(timings['sleep'].seconds) < 9
    assert len(time_interleaved({'sleep': lambda: time.sleep(0.02)}, runs=3, longest=0)['sleep'].seconds) == 1
    timing = time_interleaved({'sleep': lambda: time.sleep(0.05)}, runs=3)['sleep']
    assert 0.05 <= timing.min <= timing.median <= timing.max


def test_median_and_ratios():
    assert Timing((3., 1., 2.)).median == 2
    assert ratios(Timing((1., 2., 6.)), Timing((2., 2., 4.))) == (1., 0.5, 1.5)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_inference_is_in_eval_mode_and_in_the_precision_asked_for(dtype):
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    x = torch.rand(1, 3, 4, 4)
    call = inference_call(net, x, dtype)
    assert not net.training and call().dtype == dtype and not call().requires_grad
    assert torch.equal(net[1].running_mean, torch.zeros(3))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_a_training_step_learns(dtype):
    torch.manual_seed(0)
    net = nn.Conv2d(3, 3, 1)
    x = torch.rand(4, 3, 8, 8)
    step = training_step(net, x, x, dtype)
    before = (net(x) - x).abs().mean()
    for _ in range(50):
        step()
    assert net.training and (net(x) - x).abs().mean() < before - 0.005


def test_the_yardstick_is_a_product():
    call, macs = gemm_call()
    assert call().shape == (2048, 2048) and macs == 2048**3


@pytest.mark.gpu
def test_work_on_a_gpu_is_waited_for():
    """No GPU makes a product as fast as one can be asked for."""
    call, macs = gemm_call('cuda')
    timing = time_interleaved({'gemm': call}, runs=3, device='cuda')['gemm']
    assert macs / timing.median < 1e15


@pytest.mark.gpu
@pytest.mark.parametrize('allowed', [False, True])
def test_the_yardstick_has_the_precision_of_convolutions(allowed, monkeypatch):
    """It loses factors' digits beyond TF32's where cuDNN may lose them; torch's own flag stays as it was."""
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', allowed)
    monkeypatch.setattr(torch, 'rand', lambda *shape, device: torch.full(shape, 1 + 2.**-12, device=device))
    call, _ = gemm_call('cuda')
    assert (float(call()[0, 0]) == 2048.) == takes_tf32('cuda')
    assert not torch.backends.cuda.matmul.allow_tf32
