"""The inference path computes what the modules compute, for every size, and leaves no trace."""
import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elan_basicsr.archs import elan_arch, elan_fast, elan_native
from elan_basicsr.archs.elan_arch import ELAN


@pytest.fixture(scope='module', autouse=True)
def without_kernels():
    """Compiled kernels would take most of what comes in float32."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(elan_native, 'serves', lambda *_: False)
        yield


def _network(**arguments) -> ELAN:
    """A small network in float64 whose BatchNorms hold the statistics of what passes through them."""
    torch.manual_seed(0)
    net = ELAN(**{**dict(num_feat=30, num_block=4, num_share=1), **arguments}).double()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        net.train()(torch.rand(4, net.head.in_channels, 32, 32, dtype=torch.float64))
    return net.eval()


def _plain(net: ELAN, x: torch.Tensor) -> torch.Tensor:
    """What the modules themselves compute."""
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(elan_fast, 'serves', lambda *_: False)
        return net(x)


@settings(max_examples=10, deadline=None)
@given(h=st.integers(1, 70), w=st.integers(1, 70), batch=st.integers(1, 2), num_share=st.sampled_from([0, 1]),
       windows=st.sampled_from([(4, 8, 16), (2, 6), (8,)]))
def test_it_agrees_with_the_modules(h, w, batch, num_share, windows):
    net = _network(num_share=num_share, window_sizes=windows)
    x = torch.rand(batch, 3, h, w, dtype=torch.float64)
    before = x.clone()
    with torch.no_grad():
        fast = net(x)
    plain = _plain(net, x)
    assert torch.allclose(fast, plain, rtol=0, atol=1e-9 * float(plain.max() - plain.min() + 1))
    assert torch.equal(x, before)


def test_bands_meet_without_a_seam(monkeypatch):
    net = _network()
    x = torch.rand(1, 3, 100, 40, dtype=torch.float64)
    monkeypatch.setattr(elan_fast, 'BAND_PIXELS', 1)
    with torch.no_grad():
        assert torch.allclose(net(x), _plain(net, x), rtol=0, atol=1e-9)


def test_changed_weights_are_seen_even_through_data():
    net = _network()
    x = torch.rand(1, 3, 20, 20, dtype=torch.float64)
    with torch.no_grad():
        before = net(x)
        for parameter in net.body.parameters():
            parameter.data.mul_(1.1)
        net.body[0].gmsa[0].norm.running_var.data.mul_(2)
        after = net(x)
    assert not torch.equal(before, after)
    assert torch.allclose(after, _plain(net, x), rtol=0, atol=1e-9)


def test_concurrent_calls_do_not_disturb_each_other():
    net = _network()
    images = [torch.rand(1, 3, 30 + i, 40, dtype=torch.float64) for i in range(6)]
    with ThreadPoolExecutor(3) as pool, torch.no_grad():
        expected = [net(image) for image in images]

        def run(image):
            with torch.no_grad():
                return net(image)
        for result, want in zip(pool.map(run, images), expected, strict=True):
            assert torch.allclose(result, want, rtol=0, atol=1e-9)


def test_a_run_leaves_nothing_in_the_network():
    net = _network()
    keys, attributes, size = list(net.state_dict()), set(vars(net)), len(pickle.dumps(net))
    with torch.no_grad():
        net(torch.rand(1, 3, 20, 20, dtype=torch.float64))
    assert (list(net.state_dict()), set(vars(net)), len(pickle.dumps(net))) == (keys, attributes, size)
    copy.deepcopy(net)


@pytest.mark.parametrize('case', ['gradients', 'training', 'hook', 'odd windows', 'autocast', 'bfloat16', 'no grad'])
def test_it_serves_evaluation_of_plain_modules_only(case, monkeypatch):
    net = _network(window_sizes=(3, 5)) if case == 'odd windows' else _network()
    net = net.bfloat16() if case == 'bfloat16' else net.float()
    if case == 'training':
        net.train()
    if case == 'hook':
        net.body[0].lfe[0].register_forward_hook(lambda *_: None)
    calls = []
    run_body = elan_fast.run_body
    monkeypatch.setattr(elan_fast, 'run_body', lambda *a: calls.append(1) or run_body(*a))
    dtype = next(net.parameters()).dtype
    with torch.set_grad_enabled(case == 'gradients'), torch.autocast('cpu', torch.bfloat16, case == 'autocast'):
        net(torch.rand(1, 3, 16, 16, dtype=dtype))
    assert bool(calls) == (case in ('no grad', 'autocast'))


def test_export_traces_the_modules():
    net = _network().float()
    x = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        traced = torch.jit.trace(net, x, check_trace=False)
        assert torch.allclose(traced(x), net(x), atol=1e-4)
        exported = torch.export.export(net, (x,)).module()
        assert torch.allclose(exported(x), net(x), atol=1e-4)


def test_bfloat16_is_no_further_off_than_the_modules_under_autocast():
    net = _network().float()
    x = torch.rand(1, 3, 40, 50)
    with torch.no_grad():
        exact = net(x)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            assert elan_fast.serves(net.body, torch.rand(1, 30, 16, 16), net.window_sizes, elan_arch._FAST_TYPES)
            fast = net(x)
            plain = _plain(net, x)
    assert fast.dtype == torch.float32
    assert 0 < (fast - exact).abs().mean() <= 1.1 * (plain - exact).abs().mean()
