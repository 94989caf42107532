"""Training blocks compute what the modules compute, and so do their gradients."""
import pytest
import torch

from elan_basicsr.archs import elan_grad, elan_native_grad
from elan_basicsr.archs.elan_arch import ELAN, cut_windows, paste_windows
from elan_basicsr.archs.elan_grad_attention import Attend, SharedAttention

from .steps import step, weights_like


@pytest.fixture(scope='module', autouse=True)
def without_kernels():
    """Compiled kernels would take most of what comes in float32."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(elan_native_grad, 'serves', lambda *_: False)
        yield


def _network(**arguments) -> ELAN:
    torch.manual_seed(0)
    return ELAN(**{**dict(upscale=2, num_feat=30, num_block=6, num_share=1), **arguments}).double().train()


def _of_the_modules(net: ELAN, x: torch.Tensor) -> dict[str, torch.Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(elan_grad, 'serves', lambda *_: False)
        return step(net, x)


def _assert_equal(one: dict, other: dict) -> None:
    largest = {name: max(float(value.double().abs().max()), 1.) for name, value in other.items()}
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert (value - other[name]).double().abs().max() <= 1e-9 * largest[name], name


@pytest.mark.parametrize('use_checkpoint', [False, True])
@pytest.mark.parametrize('num_share', [0, 1, 2])
def test_values_gradients_and_statistics_are_those_of_the_modules(num_share, use_checkpoint):
    x = torch.rand(2, 3, 19, 33, dtype=torch.float64)
    ours = step(_network(num_share=num_share, use_checkpoint=use_checkpoint), x)
    _assert_equal(ours, _of_the_modules(_network(num_share=num_share), x))


def test_a_backward_pass_that_ends_early_leaves_nothing_behind():
    x = torch.rand(1, 3, 16, 16, dtype=torch.float64)
    expected = _of_the_modules(_network(), x)
    net = _network()
    y = net(x)
    last = net.body[-1].gmsa[-1].project_in.weight  # the block's first module, which ends its attention, is not reached
    torch.autograd.grad(y.sum(), last, retain_graph=True)
    for _ in range(2):  # nor does one that does reach it
        net.zero_grad()
        (y * weights_like(y)).sum().backward(retain_graph=True)
        for name, p in net.named_parameters():
            assert torch.allclose(p.grad, expected[name], rtol=1e-8, atol=1e-8), name


def test_less_is_saved_for_the_backward_pass():
    """Attention maps are not kept, nor the maps between a shift and its ReLU."""
    x = torch.rand(1, 3, 32, 32, dtype=torch.float64)
    sizes = []
    for take in (step, _of_the_modules):
        saved: dict[int, int] = {}

        def note(tensor, saved=saved):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            take(_network(), x)
        sizes.append(sum(saved.values()))
    assert sizes[0] < 0.8 * sizes[1]


def test_a_network_that_is_watched_takes_the_plain_path():
    net, seen = _network(), []
    net.body[0].lfe[0].register_forward_hook(lambda *_: seen.append(1))
    net(torch.rand(1, 3, 16, 16, dtype=torch.float64)).sum().backward()
    assert seen


@pytest.mark.parametrize('shifted', [False, True])
@pytest.mark.parametrize('window_sizes', [(2, 4, 8), (3, 6, 12), (8,)])
def test_attention_without_maps_is_the_fused_one(window_sizes, shifted):
    torch.manual_seed(0)
    width, edge = 5 * len(window_sizes), 2 * max(window_sizes)
    inputs = [torch.rand(2, edge, edge, channels, dtype=torch.float64, requires_grad=True)
              for channels in (2 * width, width, width)]
    outcomes = []
    for attend in (Attend.apply, lambda x, shared: elan_grad._attend_fused(x, shared, cut_windows, paste_windows)):
        shared = SharedAttention(window_sizes, shifted)
        total = torch.zeros(2, edge, edge, width, dtype=torch.float64)
        first, *later = inputs
        for x in (first, *later):
            total = attend(x + total.mean(), shared) * (1 + total)  # each module rests on the one before, as in a block
        outcomes.append([total, *torch.autograd.grad((total**2).sum(), inputs)])
    for one, other in zip(*outcomes, strict=True):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('inside', [False, True])
def test_bfloat16_stays_near(inside):
    """Mixed precision, its backward pass outside autocast, as it should be, or inside."""
    x = torch.rand(1, 3, 32, 32)
    exact = _network().float()
    exact(x).sum().backward()
    net = _network().float()
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


@pytest.mark.parametrize('mean', [1, 100])
def test_gradients_through_batchnorm_keep_their_digits_on_maps_with_large_means(mean):
    """float32 against float64; torch's own convolution and BatchNorm are off by 1e-2 at a mean of 100 deviations."""
    torch.manual_seed(0)
    x, grad = torch.randn(2, 16, 16, 30) + mean * torch.randn(30), torch.randn(2, 16, 16, 60)
    conv, norm = torch.nn.Conv2d(30, 60, 1), torch.nn.BatchNorm2d(60)
    results = []
    for dtype in (torch.float32, torch.float64):
        conv.to(dtype), norm.to(dtype)
        inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in
                  (x, conv.weight, conv.bias, norm.weight, norm.bias)]
        results.append(torch.autograd.grad(elan_grad._LinearNorm.apply(*inputs, norm), inputs, grad.to(dtype)))
    for name, ours, exact in zip(('x', 'weight', 'bias', 'scale', 'offset'), *results, strict=True):
        error = (ours - exact).abs().max() / exact.abs().max().clamp_min(1)
        assert error < 5e-5, name


def test_the_output_is_laid_out_as_any_networks():
    """The toolbox's discriminators call `view` on what comes from it."""
    net = ELAN(upscale=2, num_feat=15, num_block=2)
    assert net(torch.rand(2, 3, 16, 16)).is_contiguous()
