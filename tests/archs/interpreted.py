"""Triton's kernels in Triton's interpreter, which needs no GPU. `test_gpu.py` has pytest run this file by itself:

Triton reads TRITON_INTERPRET when a kernel is defined, and the rest of the suite is not to be interpreted.
"""
import copy

import numpy as np
import pytest
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter

from elan_basicsr.archs.elan_arch import ELAB
from elan_basicsr.archs.gpu import blocks
from elan_basicsr.archs.gpu.attention import Group, attend
from elan_basicsr.archs.gpu.pointwise import Norm, convolve
from elan_basicsr.archs.gpu.products import Precision, try_a_kernel

CASES = {  # channels, shared modules, shifted, windows, size of a batch
    'shared queries, shifted': (6, 1, True, (4, 8, 16), (1, 16, 16)),
    'own queries': (10, 0, False, (4, 8), (2, 8, 24)),
    'three modules, the last program not full': (6, 2, True, (2, 4), (3, 12, 4)),
    'too few channels for a shift': (4, 0, False, (4,), (1, 8, 8)),
}


@pytest.fixture(autouse=True)
def dot_of_bfloat16(monkeypatch):
    """The interpreter keeps bfloat16 as 16-bit integers, and multiplies those."""
    def value(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    dot = interpreter.InterpreterBuilder.create_dot
    monkeypatch.setattr(interpreter.InterpreterBuilder, 'create_dot',
                        lambda self, a, b, *rest: dot(self, value(a), value(b), *rest))


def _block(channels, num_share, shifted, windows, size):
    torch.manual_seed(0)
    block = ELAB(channels, 2, windows, shifted, num_share)
    for gmsa in block.gmsa:
        torch.nn.init.normal_(gmsa.norm.running_mean)
        torch.nn.init.uniform_(gmsa.norm.running_var, .5, 2)
        torch.nn.init.uniform_(gmsa.norm.weight, .5, 1.5)
        torch.nn.init.normal_(gmsa.norm.bias, std=.1)
    return block, torch.randn(size[0], channels, *size[1:])


def _step(run, block, x, weight):
    x = x.clone().requires_grad_()
    y = run(block, x)
    y.backward(weight)
    return {'output': y.detach(), 'of the input': x.grad, **dict(block.named_buffers()),
            **{name: p.grad for name, p in block.named_parameters()}}


def _assert_near(found, exact, limit):
    steepest = max(float(value.double().norm()) for name, value in exact.items() if 'running' not in name)
    for name, right in exact.items():
        off = float((found[name].double() - right).norm()) / (float(right.double().norm()) + 1e-2 * steepest)
        assert off <= limit, (name, off)


@pytest.mark.parametrize('train', [True, False])
@pytest.mark.parametrize('case', CASES)
def test_a_block_and_its_gradients_are_those_of_the_modules(case, train, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    block, x = _block(*CASES[case])
    weight = torch.randn_like(x)
    exact = _step(lambda block, x: block(x), copy.deepcopy(block).double().train(train), x.double(), weight.double())
    _assert_near(_step(blocks.run_block, block.train(train), x, weight), exact, 2e-5)


@pytest.mark.parametrize('case', ['own queries', 'three modules, the last program not full'])
def test_without_gradients_batchnorm_is_part_of_the_projection(case, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    block, x = _block(*CASES[case])
    with torch.no_grad():
        exact = copy.deepcopy(block).double().eval()(x.double())
        assert (blocks.run_block(block.eval(), x) - exact).norm() <= 1e-6 * exact.norm()


def test_tf32_rounds_to_the_nearest(monkeypatch):
    """Errors are those of 11 bits and do not all have one sign, and what is not finite stays."""
    x = torch.rand(1, 8, 8, 64) + .5
    one = torch.eye(64)
    rounded = convolve(x, one, torch.zeros(64), Precision.TF32)
    off = (rounded - x) / x
    assert 2**-13 < off.abs().max() <= 2**-11 and off.mean().abs() < 2**-15
    for value in (float('nan'), float('inf')):
        x[0, 2, 3, 5] = value
        assert not convolve(x, one, torch.zeros(64), Precision.TF32)[0, 2, 3, 5].isfinite()


@pytest.mark.parametrize('precision, limit', [(Precision.TF32, 2e-2), (Precision.BFLOAT16, 1e-1)])
def test_gradients_in_less_precision_are_near(precision, limit, monkeypatch):
    """Linear but for the ReLU, at which a few values fall on the other side."""
    block, x = _block(*CASES['own queries'])
    weight = torch.randn_like(x)
    exact = _step(lambda block, x: block(x), copy.deepcopy(block).double(), x.double(), weight.double())
    if precision is not Precision.TF32:
        monkeypatch.setattr(torch, 'is_autocast_enabled', lambda *_: True)
        monkeypatch.setattr(torch, 'get_autocast_dtype', lambda *_: precision.dtype)
    found = _step(blocks.run_block, block, x, weight)
    assert all(value.dtype in (torch.float32, torch.int64) for value in found.values())
    _assert_near(found, exact, limit)


def test_a_kernel_is_tried_before_others_are_used():
    try_a_kernel(torch.device('cpu'))


def test_batchnorm_without_weights():
    x, weight = torch.randn(1, 8, 8, 20), torch.randn(12, 20)
    mean, variance = torch.randn(12), torch.rand(12) + .5
    found = convolve(x, weight, torch.zeros(12), Precision.EXACT, norm=Norm(mean, variance, None, None, 1e-5))
    assert torch.allclose(found, (x @ weight.T - mean) / (variance + 1e-5).sqrt(), atol=1e-5)


def test_logits_of_hundreds():
    y = 10 * torch.randn(1, 16, 16, 8)
    out, _ = attend(y, y, [Group(16, 4, 0, 4, 0)], False, Precision.EXACT, False)
    assert torch.allclose(out, _attended(y), atol=1e-3)


def _attended(y):
    q, v = (y[..., part].reshape(256, 4).double() for part in (slice(0, 4), slice(4, 8)))
    return ((q @ q.T).softmax(1) @ v).view(1, 16, 16, 4).float()
