"""The kernels compiled for a CPU compute what the modules compute, in float32, and so do their gradients."""
import copy
import os
import pickle
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from elan_basicsr.archs import cpu, elan_arch
from elan_basicsr.archs.cpu import inference, library, training
from elan_basicsr.archs.elan_arch import ELAN

from .steps import step, weights_like

compiled = pytest.mark.skipif(library.library() is None, reason='no kernels were compiled for this processor')
# float32 against float64: of the range of an image, and of the norm of a gradient.
ROUNDING, GRADIENT_ROUNDING = 2e-6, 2e-5


def _network(**arguments) -> ELAN:
    """A small network in float32 whose BatchNorms hold the statistics of what passes through them."""
    torch.manual_seed(0)
    net = ELAN(**{**dict(upscale=2, num_feat=30, num_block=4, num_share=1), **arguments}).double()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
            torch.nn.init.uniform_(module.weight, .5, 1.5)
            torch.nn.init.normal_(module.bias, std=.1)
    with torch.no_grad():
        net.train()(torch.rand(4, net.head.in_channels, 32, 32, dtype=torch.float64))
    return net.eval().float()


def _of_the_modules(net: ELAN, x: torch.Tensor, run):
    """What `run(net, x)` gives in float64 by the modules alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, 'stand_in', lambda *_: None)
        return run(copy.deepcopy(net).double(), x.double())


def _evaluate(net: ELAN, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return net(x)


def _assert_near(ours: dict, exact: dict) -> None:
    assert ours.keys() == exact.keys()
    for name, value in ours.items():
        if not name.endswith('project_in.bias'):  # before BatchNorm a bias has no gradient but rounding
            wanted = exact[name].double()
            assert (value.double() - wanted).norm() <= GRADIENT_ROUNDING * max(wanted.norm(), 1e-3), name


@pytest.mark.skipif(sys.platform != 'linux' or platform.machine() not in ('x86_64', 'aarch64')
                    or not shutil.which('g++') or os.environ.get('ELAN_KERNELS') == '0',
                    reason='needs Linux on x86-64 or aarch64 and a C++ compiler')
def test_they_are_installed_where_they_can_be():
    flags = Path('/proc/cpuinfo').read_text().split()
    wide = 'avx512dq' in flags and os.environ.get('ELAN_KERNELS') != 'avx2'
    lanes = 4 if platform.machine() == 'aarch64' else 16 if wide else 8 if 'avx2' in flags else None
    found = library.library()
    assert (found.elan_lanes() if found else None) == lanes


@compiled
@pytest.mark.skipif('ELAN_KERNELS' in os.environ, reason='the kernels were chosen already')
@pytest.mark.skipif(library.vector_lanes() < 16, reason='this processor has no others')
def test_those_for_avx2_hold_the_same_promises():
    run = subprocess.run([sys.executable, '-m', 'pytest', __file__, '-k', 'not concurrent'], capture_output=True,
                         text=True, env={**os.environ, 'ELAN_KERNELS': 'avx2'})
    assert run.returncode == 0, run.stdout


@compiled
@settings(max_examples=25, deadline=None)
@given(h=st.integers(1, 70), w=st.integers(1, 150), batch=st.integers(1, 2), num_share=st.sampled_from([0, 1, 3]),
       windows=st.sampled_from([(4, 8, 16), (8, 12), (16,), (4, 20)]), width=st.integers(1, 4),
       count=st.integers(1, 3), at_once=st.sampled_from([1, 2**18, 2**26]))
def test_an_image_is_what_the_modules_give(h, w, batch, num_share, windows, width, count, at_once):
    feat = 10 * width * len(windows)  # odd numbers of channels for a group, and for a shift, among them
    net = _network(num_feat=feat, num_share=num_share, window_sizes=windows)
    x = torch.rand(batch, 3, h, w, generator=torch.Generator().manual_seed(h * w))
    before, threads = x.clone(), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference, 'NUMBERS_AT_ONCE', at_once)
        try:
            torch.set_num_threads(count)
            ours = _evaluate(net, x)
        finally:
            torch.set_num_threads(threads)
    exact = _of_the_modules(net, x, _evaluate)
    assert (ours - exact).abs().max() <= ROUNDING * (exact.max() - exact.min() + 1)
    assert torch.equal(x, before)


@compiled
@settings(max_examples=15, deadline=None)
@given(bands=st.integers(1, 9), across=st.integers(1, 5), num_share=st.sampled_from([0, 1]),
       windows=st.sampled_from([(4, 8, 16), (8,)]), count=st.sampled_from([2, 7, 16]))
def test_the_number_of_threads_changes_no_bit(bands, across, num_share, windows, count):
    net = _network(num_feat=10 * len(windows), num_block=8, num_share=num_share, window_sizes=windows)
    x = torch.rand(1, 10 * len(windows), bands * windows[-1], across * windows[-1])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = inference.run_body(net.body, x, windows)
        torch.set_num_threads(count)
        assert all(torch.equal(inference.run_body(net.body, x, windows), alone) for _ in range(5))
    finally:
        torch.set_num_threads(threads)


CHANGED = {
    'a hook': lambda net: net.body[0].lfe[0].register_forward_hook(lambda *_: None),
    'a backward hook': lambda net: net.body[1].gmsa[0].register_full_backward_hook(lambda *_: None),
    'another class': lambda net: setattr(net.body[0].gmsa[0], 'norm', torch.nn.SyncBatchNorm(60)),
    'a parametrised weight': lambda net: torch.nn.utils.parametrizations.weight_norm(net.body[0].lfe[0].conv0),
    'a function in place of forward': lambda net: setattr(net.body[0], 'forward', net.body[0].forward),
    'a compiled block': lambda net: net.body[0].compile(backend='eager'),
    'batch statistics only': lambda net: setattr(net.body[0].gmsa[0].norm, 'running_mean', None),
    'some in training': lambda net: net.body[0].gmsa[0].norm.train(not net.training),
    'bfloat16': lambda net: net.bfloat16(),
    'float64': lambda net: net.double(),
}
WATCHING = {
    'a hook on all modules': lambda: torch.nn.modules.module.register_module_forward_hook(lambda *_: None),
    'a counter of operations': lambda: FlopCounterMode(display=False),
    'forward differentiation': forward_ad.dual_level,
}


@compiled
@pytest.mark.parametrize('train', [False, True])
def test_they_leave_to_the_modules_what_was_changed_or_is_watched(train):
    def choice(net, x=None):
        with torch.set_grad_enabled(train):
            x = torch.rand(1, 30, 16, 16) if x is None else x
            return cpu.stand_in(net.body, x, net.window_sizes, elan_arch._PLAIN_TYPES)

    net = _network().train(train)
    assert choice(net) is (training if train else inference)
    for name, change in CHANGED.items():
        changed = copy.deepcopy(net)
        change(changed)
        assert choice(changed, torch.rand(1, 30, 16, 16, dtype=changed.head.weight.dtype)) is None, name
    for name, watch in WATCHING.items():
        watching = watch()
        with watching:
            assert choice(net) is None, name
    assert choice(_network(window_sizes=(3, 5)).train(train)) is None
    assert choice(net) is (training if train else inference)
    if not train:
        with torch.enable_grad():
            assert cpu.stand_in(net.body, torch.rand(1, 30, 16, 16), net.window_sizes, elan_arch._PLAIN_TYPES) is None


@compiled
@pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::DeprecationWarning', 'ignore::torch.jit.TracerWarning')
def test_what_traces_or_transforms_the_network_sees_its_modules():
    net, x = _network(), torch.rand(1, 3, 16, 16)
    expected = _evaluate(net, x)
    with torch.no_grad():
        for other in (torch.jit.trace(net, x), torch.export.export(net, (x,)).module(),
                      torch.compile(net, backend='eager', fullgraph=True)):
            assert torch.allclose(other(x), expected, atol=1e-4)
        assert torch.allclose(torch.func.vmap(net)(x[None])[0], expected, atol=1e-4)
    with sdpa_kernel(SDPBackend.MATH):  # the fused one has no derivative forwards
        _, derivative = torch.func.jvp(net, (x,), (x,))
    assert derivative.isfinite().all() and derivative.abs().max() > 0


@compiled
@pytest.mark.parametrize('autocast', [None, torch.float16, torch.bfloat16])
def test_evaluation_takes_them_under_autocast_too(monkeypatch, autocast):
    """In float32, but for bfloat16 where the processor multiplies it."""
    monkeypatch.setattr(inference, 'has_bf16', lambda: False)
    net, x, calls, run_body = _network(), torch.rand(1, 3, 20, 30), [], inference.run_body
    exact = _of_the_modules(net, x, _evaluate)
    monkeypatch.setattr(inference, 'run_body', lambda *a: calls.append(1) or run_body(*a))
    with torch.autocast('cpu', autocast, autocast is not None):
        ours = _evaluate(net, x)
    assert calls == [1] and ours.dtype == torch.float32
    assert (ours - exact).abs().max() <= ROUNDING * (exact.max() - exact.min() + 1)


@compiled
@pytest.mark.parametrize('autocast', [False, True])
def test_what_is_not_a_number_reaches_what_it_reaches_without_them(autocast):
    net, x = _network(num_block=2), torch.rand(1, 3, 64, 64)
    x[0, 1, 20, 33], x[0, 0, 50, 5] = float('nan'), float('inf')
    exact = _evaluate(copy.deepcopy(net).double(), x.double())
    with torch.autocast('cpu', torch.bfloat16, autocast):
        ours = _evaluate(net, x)
    assert 0 < exact.isfinite().sum() < exact.numel()
    assert torch.equal(ours.isfinite(), exact.isfinite())


@compiled
def test_changed_weights_are_seen_even_through_data():
    net, x = _network(), torch.rand(1, 3, 20, 20)
    before = _evaluate(net, x)
    for parameter in net.body.parameters():
        parameter.data.mul_(1.1)
    net.body[0].gmsa[0].norm.running_var.data.mul_(2)
    after, exact = _evaluate(net, x), _of_the_modules(net, x, _evaluate)
    assert not torch.equal(before, after)
    assert (after - exact).abs().max() <= ROUNDING * (exact.max() - exact.min() + 1)


@compiled
def test_concurrent_calls_do_not_disturb_each_other():
    nets = [_network().eval(), _network(num_share=0).eval()]
    images = [torch.rand(1, 3, 30 + i, 40) for i in range(8)]
    expected = [_evaluate(nets[i % 2], image) for i, image in enumerate(images)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda i: _evaluate(nets[i % 2], images[i]), range(8)))
    assert all(map(torch.equal, results, expected))


@compiled
def test_concurrent_steps_do_not_disturb_each_other():
    images = [torch.rand(1, 3, 32, 32 + 16 * (i % 2)) for i in range(6)]
    expected = [step(_network().train(), image) for image in images]
    with ThreadPoolExecutor(3) as pool:
        nets = [_network().train() for _ in images]
        for ours, wanted in zip(pool.map(step, nets, images), expected, strict=True):
            assert all(torch.equal(value, wanted[name]) for name, value in ours.items())


@compiled
@pytest.mark.parametrize('use_checkpoint', [False, True])
@pytest.mark.parametrize('num_share, windows, feat', [(0, (4, 8, 16), 30), (1, (4, 8, 16), 60), (3, (8, 12), 20),
                                                      (1, (16,), 15)])
def test_gradients_and_statistics_are_what_the_modules_give(num_share, windows, feat, use_checkpoint):
    net = _network(num_share=num_share, window_sizes=windows, num_feat=feat, use_checkpoint=use_checkpoint).train()
    x = torch.rand(2, 3, 19, 48 if 12 in windows else 33)
    exact = _of_the_modules(net, x, step)
    _assert_near(step(net, x), exact)


@compiled
@pytest.mark.parametrize('inside', [False, True])
def test_training_takes_them_under_autocast_too(monkeypatch, inside):
    net, x, calls = _network().train(), torch.rand(1, 3, 32, 32), []
    exact = _of_the_modules(net, x, step)
    run_block = training.run_block
    monkeypatch.setattr(training, 'run_block', lambda *a: calls.append(1) or run_block(*a))
    with torch.autocast('cpu', torch.bfloat16):
        y = net(x)
        loss = (y * weights_like(y)).sum()
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    assert calls == [1] * len(net.body)
    _assert_near({name: p.grad for name, p in net.body.named_parameters()},
                 {name.removeprefix('body.'): exact[name] for name, _ in net.named_parameters()
                  if name.startswith('body.')})


@compiled
@pytest.mark.parametrize('count', [1, 2, 3])
def test_a_step_repeats_bit_by_bit(threads, count):
    threads(count)
    x = torch.rand(2, 3, 32, 48)
    first, second = (step(_network().train(), x) for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@compiled
def test_a_backward_pass_that_ends_early_leaves_nothing_behind():
    net, x = _network().train(), torch.rand(1, 3, 16, 32)
    exact = _of_the_modules(net, x, step)
    y = net(x)
    last = net.body[-1].gmsa[-1].project_in.weight  # the block's first module, which ends its attention, is not reached
    torch.autograd.grad(y.sum(), last, retain_graph=True)
    for _ in range(2):  # nor does one that does reach it
        net.zero_grad()
        (y * weights_like(y)).sum().backward(retain_graph=True)
        _assert_near({name: p.grad for name, p in net.named_parameters()},
                     {name: exact[name] for name, _ in net.named_parameters()})


@compiled
@pytest.mark.parametrize('use_checkpoint', [False, True])
def test_gradients_of_gradients_are_what_the_modules_give(use_checkpoint):
    def penalty(net, x):
        x = x.clone().requires_grad_()
        y = net(x)
        gradient, = torch.autograd.grad((y * weights_like(y)).sum(), x, create_graph=True)
        gradient.square().sum().backward()
        return {name: p.grad for name, p in net.named_parameters() if p.grad is not None and p.grad.any()} | {
            name: buffer.clone() for name, buffer in net.named_buffers()}

    net, x = _network(use_checkpoint=use_checkpoint).train(), torch.rand(1, 3, 32, 32)
    net.body[0].lfe[0].conv0.weight.requires_grad_(False)
    with sdpa_kernel(SDPBackend.MATH):  # the fused one has no second derivative
        exact = _of_the_modules(net, x, penalty)
    ours = penalty(net, x)
    for name, wanted in exact.items():
        if not name.endswith('project_in.bias'):
            wanted = wanted.double()
            assert (ours[name].double() - wanted).norm() <= 20 * GRADIENT_ROUNDING * max(wanted.norm(), 1e-3), name


@compiled
@pytest.mark.parametrize('mean', [1, 100])
def test_gradients_through_batchnorm_keep_their_digits_on_maps_with_large_means(mean):
    """float32 against float64; torch's own convolution and BatchNorm are off by 1e-2 at a mean of 100 deviations.

    Without attention, which amplifies what float32 rounds. The other gradients do not depend on the mean.
    """
    torch.manual_seed(0)
    x, grad = torch.randn(2, 30, 16, 16) + mean * torch.randn(30, 1, 1), torch.randn(2, 60, 16, 16)
    conv, norm = torch.nn.Conv2d(30, 60, 1).requires_grad_(False), torch.nn.BatchNorm2d(60).requires_grad_(False)
    lines, grad_lines = x.transpose(1, 2).contiguous(), grad.transpose(1, 2).contiguous()
    no_features = (torch.zeros(shape) for shape in ((60, 30, 1, 1), (60,), (30, 60, 1, 1), (30,)))
    lines, centre = training._Features.apply(lines, *no_features)
    z, rstd = training._project(lines, centre, conv.weight.flatten(1), conv.bias, copy.deepcopy(norm))
    of_scale, of_offset = (grad_lines * z).sum((0, 1, 3)) * rstd, grad_lines.sum((0, 1, 3))
    of_x, of_weight = training._norm_back(grad_lines, z, norm.weight * rstd, of_scale, of_offset,
                                          torch.zeros_like(lines), lines, centre, rstd, conv.weight)
    x = x.double().requires_grad_()
    conv, norm = conv.double().requires_grad_(), norm.double().requires_grad_()
    exact = torch.autograd.grad(norm(conv(x)), (x, conv.weight, norm.weight), grad.double())
    for name, one, other in zip(('x', 'weight', 'scale'), (of_x.transpose(1, 2), of_weight, of_scale), exact,
                                strict=True):
        assert (one - other).abs().max() / other.abs().max().clamp_min(1) < 5e-5, name


@compiled
def test_a_run_leaves_nothing_in_the_network():
    net, x = _network(), torch.rand(1, 3, 32, 32)

    def held():
        return list(net.state_dict()), set(vars(net)), len(pickle.dumps(net))

    before = held()
    _evaluate(net, x)
    step(net.train(), x)
    net.zero_grad()
    assert held() == before
    copy.deepcopy(net)


@compiled
def test_less_is_saved_for_the_backward_pass():
    """Neither attention maps nor tokens are kept, nor the maps between a shift and its ReLU."""
    net, x, sizes = _network().train(), torch.rand(1, 3, 32, 32), []
    for take in (step, lambda net, x: _of_the_modules(net, x, lambda net, x: step(net.float(), x.float()))):
        saved: dict[int, int] = {}

        def note(tensor, saved=saved):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            take(net, x)
        sizes.append(sum(saved.values()))
    assert sizes[0] < 0.8 * sizes[1]


@pytest.mark.parametrize('case', ['turned off', 'not there', 'not a library', 'older than its sources'])
def test_without_them_the_network_is_slower_and_the_same(case, tmp_path, monkeypatch, recwarn):
    net, x = _network(), torch.rand(1, 3, 20, 30)
    expected = _evaluate(net, x)
    monkeypatch.delenv('ELAN_KERNELS', raising=False)
    monkeypatch.setattr(library, '__file__', str(tmp_path / 'library.py'))
    file = tmp_path / '_kernels.abi3.so'
    if case == 'turned off':
        monkeypatch.undo()
        monkeypatch.setenv('ELAN_KERNELS', '0')
    elif case == 'not a library':
        file.write_bytes(b'not a library')
    elif case == 'older than its sources':
        own = Path(cpu.__file__).with_name('_kernels.abi3.so')
        if not own.exists():
            pytest.skip('no kernels were compiled')
        shutil.copy(own, file)
        shutil.copytree(Path(cpu.__file__).parent / 'kernels', tmp_path / 'kernels')
        (tmp_path / 'kernels' / 'tiles.h').write_text('// other\n')
    library.library.cache_clear()
    try:
        assert library.library() is None
        assert torch.allclose(_evaluate(net, x), expected, rtol=0, atol=1e-4)
        assert step(net.train(), x)['x'].isfinite().all()
    finally:
        monkeypatch.undo()
        library.library.cache_clear()
    warned = any('install the package again' in str(warning.message) for warning in recwarn)
    assert warned == (case == 'older than its sources')
