"""The network computes the authors' function, takes any size, and refuses what cannot work."""
import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elan_basicsr.archs import cpu, elan_arch
from elan_basicsr.archs.elan_arch import ELAN
from elan_basicsr.checkpoint import load_elan
from elan_basicsr.config.checks import COMPILES_CHECKPOINTS
from tests.conftest import compiler

from .golden import GOLDEN, load_golden
from .steps import step

SMALL = dict(num_feat=15, num_block=2)


@pytest.mark.parametrize('name', GOLDEN)
def test_eval_agrees_with_the_official_network(name):
    golden = load_golden(name)
    expected = golden.tensor('output')
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        net = load_elan(golden.checkpoint).to(dtype)
        with torch.no_grad():
            output = net(golden.tensor('input').to(dtype) / 255).double() * 255
        assert (output - expected).abs().max() <= tolerance * (expected.max() - expected.min())


@pytest.mark.parametrize('name', [name for name in GOLDEN if name.startswith('tiny')])
@pytest.mark.parametrize('use_checkpoint', [False, True])
def test_training_agrees_with_the_official_network(name, use_checkpoint):
    golden = load_golden(name)
    net = load_elan(golden.checkpoint, use_checkpoint=use_checkpoint).double().train()
    output = net(golden.tensor('train_input').double() / 255) * 255
    loss = (output - golden.tensor('train_target')).abs().mean()
    loss.backward()
    assert loss.item() == pytest.approx(float(golden.arrays['train_loss']), rel=1e-9)
    expected = golden.native('grad')
    largest = max(gradient.abs().max() for gradient in expected.values())
    assert expected.keys() == dict(net.named_parameters()).keys()
    for key, parameter in net.named_parameters():
        assert torch.allclose(parameter.grad, expected[key], rtol=1e-9, atol=1e-9 * largest), key
    statistics = golden.native('after_step')
    assert len(statistics) > 0
    for key, value in statistics.items():
        assert torch.allclose(net.state_dict()[key].double(), value.double(), rtol=1e-9), key


@settings(max_examples=25, deadline=None)
@given(h=st.integers(1, 40), w=st.integers(1, 40), upscale=st.integers(1, 4), channels=st.sampled_from([1, 3]))
def test_any_size_gives_exactly_upscale_times_it(h, w, upscale, channels):
    net = ELAN(upscale=upscale, num_in_ch=channels, num_out_ch=channels, **SMALL).eval()
    with torch.no_grad():
        output = net(torch.rand(1, channels, h, w))
    assert output.shape == (1, channels, h * upscale, w * upscale)
    assert output.isfinite().all()


@pytest.mark.parametrize('arguments, count', [
    (dict(upscale=2), 582_012), (dict(upscale=3), 590_127), (dict(upscale=4), 601_488),
    (dict(upscale=2, num_feat=180, num_block=36, num_share=0), 8_254_092),
    (dict(upscale=4, num_feat=180, num_block=36, num_share=0), 8_312_448),
])
def test_parameter_counts_are_the_published_ones(arguments, count):
    with torch.device('meta'):
        net = ELAN(**arguments)
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == count


@pytest.mark.parametrize('name, value', [
    ('upscale', 0), ('upscale', 2.0), ('upscale', True), ('num_in_ch', 0), ('num_feat', 61), ('num_feat', 0),
    ('num_feat', '60'), ('num_block', 5), ('num_block', 0), ('num_share', -1), ('expansion', 0), ('window_sizes', []),
    ('window_sizes', [4, 8.0, 16]), ('window_sizes', [4, 0, 16]), ('window_sizes', '4'), ('window_sizes', 8),
    ('window_sizes', None), ('img_range', 0), ('img_range', float('nan')), ('rgb_mean', (0.5, 0.5)),
    ('rgb_mean', ('a', 'b', 'c')), ('rgb_mean', None),
])
def test_impossible_hyperparameters_are_named(name, value):
    with pytest.raises(ValueError, match=rf'^ELAN: {name} is .*; it must be ') as caught:
        ELAN(**{**SMALL, name: value})
    assert '\n' not in str(caught.value)


def test_half_precision_keeps_the_logits_exact(monkeypatch):
    """Under bf16 autocast the attention stays in float32: within 0.5 % of the range of the float32 result."""
    monkeypatch.setattr(cpu, 'stand_in', lambda *_: None)  # which would round nothing to bf16
    golden = load_golden('tiny_shared_x2')
    net = load_elan(golden.checkpoint)
    x = golden.tensor('input').float() / 255
    with torch.no_grad():
        exact = net(x)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            rounded = net(x)
    assert (rounded.float() - exact).abs().max() <= 5e-3 * (exact.max() - exact.min())


@pytest.mark.parametrize('inside', [False, True])
def test_gradients_in_half_precision_stay_near(monkeypatch, inside):
    """Mixed precision, its backward pass outside autocast, as it should be, or inside."""
    monkeypatch.setattr(cpu, 'stand_in', lambda *_: None)
    torch.manual_seed(0)
    net, x = ELAN(upscale=2, num_feat=30, num_block=6).train(), torch.rand(1, 3, 32, 32)
    exact = copy.deepcopy(net)
    exact(x).sum().backward()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        y = net(x)
        if inside:
            y.sum().backward()
    if not inside:
        y.sum().backward()
    for (name, p), q in zip(net.named_parameters(), exact.parameters(), strict=True):
        if not name.endswith('project_in.bias'):  # before BatchNorm a bias has no gradient but rounding
            assert p.grad.dtype == torch.float32
            assert torch.cosine_similarity(p.grad.flatten(), q.grad.flatten(), 0) > 0.95, name


@pytest.mark.parametrize('limit', [1, 7])
def test_attention_in_parts_is_that_of_the_whole_to_the_bit(monkeypatch, limit):
    """CUDA refuses more windows at once than fit 16 bits."""
    monkeypatch.setattr(cpu, 'stand_in', lambda *_: None)
    net, x = ELAN(**SMALL, num_share=1).train(), torch.rand(2, 3, 19, 33)
    fused, given = torch.nn.functional.scaled_dot_product_attention, []

    def attention(q, k, v, **options):
        given.append(len(q))
        return fused(q, k, v, **options)

    monkeypatch.setattr(torch.nn.functional, 'scaled_dot_product_attention', attention)
    whole = step(copy.deepcopy(net), x)
    assert max(given) > limit
    monkeypatch.setattr(elan_arch, 'MOST_WINDOWS', limit)
    given.clear()
    parts = step(net, x)
    assert max(given) == limit
    assert not [name for name, value in parts.items() if not torch.equal(value, whole[name])]


@pytest.mark.skipif(torch.__version__ < COMPILES_CHECKPOINTS, reason='an option file that asks for it is refused')
@pytest.mark.parametrize('backend, breaks', [
    pytest.param('inductor', False, marks=[pytest.mark.slow, compiler]), ('aot_eager', False), ('aot_eager', True)])
def test_a_compiled_step_with_use_checkpoint_is_the_step_without(monkeypatch, backend, breaks):
    """Statistics, output and gradients, also where the compiler leaves the blocks to Python."""
    monkeypatch.setattr(cpu, 'stand_in', lambda *_: None)
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = ELAN(upscale=2, num_feat=5, num_block=2, num_share=0, window_sizes=[4]).double().train()
    exact, x, seen = copy.deepcopy(net), torch.rand(2, 3, 8, 8, dtype=torch.float64), []
    if breaks:
        net.body[1].lfe[0].register_forward_hook(lambda *_: seen.append(1) or torch._dynamo.graph_break())
    net.use_checkpoint = True
    net.compile(backend=backend)
    for _ in range(2):
        expected, found = step(exact, x), step(net, x)
        steepest = max(float(expected[name].abs().max()) for name, _ in net.named_parameters())
        for name, value in found.items():
            assert torch.allclose(value, expected[name], rtol=1e-9, atol=1e-9 * steepest), name
    assert int(found['body.1.gmsa.0.norm.num_batches_tracked']) == 2
    assert len(seen) == (4 if breaks else 0)  # in each step once forward and once for the backward pass


def test_the_output_is_laid_out_as_any_networks():
    """The toolbox's discriminators call `view` on what comes from it."""
    for dtype in (torch.float32, torch.float64):
        assert ELAN(upscale=2, **SMALL).to(dtype)(torch.rand(2, 3, 16, 16, dtype=dtype)).is_contiguous()


def test_a_copy_is_independent():
    net = ELAN(**SMALL).eval()
    twin = copy.deepcopy(net)
    x = torch.rand(1, 3, 20, 20)
    with torch.no_grad():
        before = twin(x)
        net.head.weight.zero_()
        assert torch.equal(twin(x), before)
        assert not torch.equal(net(x), before)


@pytest.mark.gpu
def test_the_gpu_agrees_with_the_cpu(monkeypatch):
    """The same network gives the same image, where convolutions are in float32."""
    golden = load_golden('tiny_shared_x2')
    net = load_elan(golden.checkpoint)
    x = golden.tensor('input').float() / 255
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    with torch.no_grad():
        assert torch.allclose(net.cuda()(x.cuda()).cpu(), net.cpu()(x), atol=1e-4)
