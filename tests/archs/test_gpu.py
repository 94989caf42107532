"""Triton's kernels compute what the modules compute, and so do their gradients: interpreted, and on a GPU."""
import copy
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from elan_basicsr.archs import elan_arch, gpu
from elan_basicsr.archs.elan_arch import ELAN
from elan_basicsr.report.timing import inference_call, time_interleaved, training_step
from elan_basicsr.selfcheck.network import SIZES
from tests.conftest import with_checkout

from .steps import step, weights_like
from .test_cpu import CHANGED, WATCHING, _assert_near, _evaluate, _network

ROOT = Path(__file__).parents[2]
has_triton = pytest.mark.skipif(importlib.util.find_spec('triton') is None, reason='needs triton')


@has_triton
def test_interpreted_they_give_what_the_modules_give():
    env = {**os.environ, 'TRITON_INTERPRET': '1', 'CUDA_VISIBLE_DEVICES': '', 'PYTHONPATH': with_checkout()}
    run = subprocess.run([sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', 'tests/archs/interpreted.py'],
                         cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:]


@has_triton
@pytest.mark.parametrize('capability', [80, 90])
def test_they_compile_for_gpus_that_are_not_here(capability):
    """With the registers and the shared memory of such a GPU: 163 KiB, 227 KiB."""
    if [int(part) for part in gpu.triton_version().split('.')] < [3, 3]:
        pytest.skip('its compiler is called otherwise')
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from elan_basicsr.archs.gpu import attention

    kernel = attention._attend_back_kernel
    constants = {'Q': 0, 'Q_STEP': 360, 'V': 60, 'V_STEP': 360, 'OUT': 0, 'OUT_STEP': 180, 'WIDTH': 60, 'PADDED': 64,
                 'WINDOW': 16, 'MORE': True, 'PRECISION': 'tf32x3', 'ROWS': attention.ROWS, 'OTHERS': attention.OTHERS}
    numbers = 'number', 'height', 'width', 'offset'
    signature = {name: 'constexpr' if name in constants else 'i32' if name in numbers else '*fp32'
                 for name in kernel.arg_names}
    made = compile(ASTSource(kernel, signature, constants), target=GPUTarget('cuda', capability, 32),
                   options={'num_warps': 4, 'num_stages': 1})
    assert made.asm['cubin'] and made.metadata.shared <= (227 if capability == 90 else 163) * 1024


def test_they_are_for_gpus_on_which_they_were_measured(monkeypatch):
    """`ELAN_KERNELS=triton` has them on others that can run them, `ELAN_KERNELS=0` on none."""
    monkeypatch.setattr(gpu, '_compiles', lambda device: True)
    for capability, version, setting, expected in (
            ((9, 0), '3.6', '', True), ((9, 0), '3.8', '', False), ((8, 6), '3.6', '', False), ((9, 0), '', '', False),
            ((8, 6), '3.8', 'triton', True), ((7, 5), '3.6', 'triton', False), ((9, 0), '3.6', '0', False)):
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda _, capability=capability: capability)
        monkeypatch.setattr(gpu, 'triton_version', lambda version=version: version)
        monkeypatch.setenv('ELAN_KERNELS', setting)
        assert gpu.usable(torch.device('cuda')) == expected, (capability, version, setting)


@has_triton
def test_where_triton_cannot_compile_the_modules_do_it_and_a_line_says_why(monkeypatch):
    """Triton takes a C compiler when a kernel is first called, which PyTorch does not need."""
    from elan_basicsr.archs.gpu import products

    def fail(device):
        raise RuntimeError('Failed to find C compiler.\nPlease specify via CC')

    monkeypatch.setattr(products, 'try_a_kernel', fail)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda _: (9, 0))
    monkeypatch.setenv('ELAN_KERNELS', 'triton')
    gpu._compiles.cache_clear()
    with pytest.warns(UserWarning, match=r'Failed to find C compiler. Please specify via CC\).*apt install gcc'):
        assert not gpu.usable(torch.device('cuda'))
    assert not gpu.usable(torch.device('cuda'))  # and not again
    gpu._compiles.cache_clear()


@pytest.fixture
def kernels(monkeypatch):
    """On whatever GPU there is; convolutions in float32."""
    monkeypatch.setenv('ELAN_KERNELS', 'triton')
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip('needs a GPU of compute capability 8.0')


def _on_gpu(net: ELAN, x: torch.Tensor, run):
    result = run(copy.deepcopy(net).cuda(), x.cuda())
    return {name: value.cpu() for name, value in result.items()} if isinstance(result, dict) else result.cpu()


def _exactly(net: ELAN, x: torch.Tensor, run):
    """In float64, which kernels leave to the modules."""
    return run(copy.deepcopy(net).double(), x.double())


def _far_from_jumps(net: ELAN, *shape: int) -> torch.Tensor:
    """An input for which no rounding decides what passes a ReLU: there gradients jump, for one number by 0.0003."""
    for seed in range(300):
        x = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
        exact, nearest = copy.deepcopy(net).double().train(), []
        for block in exact.body:
            for lfe in block.lfe:
                lfe.conv0.register_forward_hook(
                    lambda module, args, y, near=nearest: near.append(y.abs().min() / y.abs().mean()))
        with torch.no_grad():
            exact(x.double())
        if min(nearest) > 5e-6:
            return x
    raise AssertionError('every input has a number in reach of 0')


@pytest.mark.gpu
@pytest.mark.parametrize('arguments, shape', [
    ({}, (2, 3, 19, 33)), (dict(num_share=0, num_feat=180, num_block=2), (1, 3, 9, 16)),
    (dict(num_share=3, window_sizes=(8, 16), num_feat=20), (2, 3, 19, 33)),
    (dict(num_feat=15, window_sizes=(16,)), (2, 3, 19, 33))], ids=str)
@pytest.mark.parametrize('use_checkpoint', [False, True])
def test_output_gradients_and_statistics(kernels, arguments, shape, use_checkpoint):
    """All of a step on the GPU's kernels are those of the modules in float64, to float32's rounding."""
    net = _network(**arguments)
    net.use_checkpoint = use_checkpoint
    x = _far_from_jumps(net, *shape)
    exact = _exactly(net, x, _evaluate)
    assert (_on_gpu(net, x, _evaluate) - exact).abs().max() <= 4e-6 * (exact.max() - exact.min() + 1)
    net.train()
    _assert_near(_on_gpu(net, x, step), _exactly(net, x, step))


@pytest.mark.gpu
def test_a_step_on_the_gpu_repeats_itself_to_the_bit(kernels, monkeypatch):
    """Nothing is added up in an order that threads settle among themselves. (cuDNN does so unless told.)"""
    monkeypatch.setattr(torch.backends.cudnn, 'deterministic', True)
    net, x = _network().train(), torch.rand(4, 3, 48, 48)
    once, again = _on_gpu(net, x, step), _on_gpu(net, x, step)
    assert all(torch.equal(value, again[name]) for name, value in once.items())


@pytest.mark.gpu
def test_a_gradient_of_a_gradient_on_the_gpu(kernels):
    """It goes through the modules, as on a CPU."""
    def penalty(net, x):
        x = x.clone().requires_grad_()
        y = net(x)
        gradient, = torch.autograd.grad((y * weights_like(y)).sum(), x, create_graph=True)
        gradient.square().sum().backward()
        return net.body[0].lfe[0].conv0.weight.grad

    net, x = _network(num_block=2).train(), torch.rand(1, 3, 16, 16)
    with sdpa_kernel(SDPBackend.MATH):  # the fused one has no second derivative
        exact = _exactly(net, x, penalty)
    assert (_on_gpu(net, x, penalty) - exact).norm() <= 1e-4 * exact.norm()


@pytest.mark.gpu
def test_the_gpus_kernels_leave_to_the_modules_what_was_changed_or_is_watched(kernels):
    """As the CPU's do, but for BatchNorm, which stays torch's own in training."""
    def stands_in(net, dtype=torch.float32):
        return gpu.stand_in(net.body, torch.rand(1, 30, 16, 16, device='cuda', dtype=dtype), net.window_sizes,
                            elan_arch._PLAIN_TYPES) is not None

    net = _network().cuda()
    assert stands_in(net) and stands_in(copy.deepcopy(net).train())
    for name, change in CHANGED.items():
        changed = copy.deepcopy(net)
        change(changed.cuda())
        kept = name in ('batch statistics only', 'some in training', 'another class')
        assert stands_in(changed.cuda(), changed.head.weight.dtype) == kept, name
    for name, watch in WATCHING.items():
        with watch():
            assert not stands_in(net), name
    assert not stands_in(_network(window_sizes=(3, 5)).cuda())


@pytest.mark.gpu
@pytest.mark.parametrize('size', SIZES)
def test_kernels_are_faster_where_they_are_used(size, monkeypatch):
    """A training step and an image take at most 0.75 of the modules' time."""
    if not gpu.usable(torch.device('cuda')):
        pytest.skip('not used on this GPU')
    def calls(setting):
        net = ELAN(upscale=4, **SIZES[size]).cuda()
        run = (training_step(net, torch.rand(16, 3, 48, 48, device='cuda'), torch.rand(16, 3, 192, 192, device='cuda')),
               inference_call(copy.deepcopy(net), torch.rand(1, 3, 360, 640, device='cuda')))

        def chosen(call):
            os.environ['ELAN_KERNELS'] = setting
            return call()
        return {('step', setting): lambda: chosen(run[0]), ('image', setting): lambda: chosen(run[1])}

    monkeypatch.setenv('ELAN_KERNELS', '')
    for kind in ('step', 'image'):
        timed = time_interleaved({key: call for setting in ('', '0') for key, call in calls(setting).items()
                                  if key[0] == kind}, 5, 'cuda')
        assert timed[kind, ''].median <= 0.75 * timed[kind, '0'].median, kind
