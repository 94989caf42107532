"""Training by CUDA graphs is training: what is recorded and what is not, and on a GPU the same bits."""
import copy
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from elan_basicsr.engine.launch import process_group
from elan_basicsr.errors import UserError
from elan_basicsr.models import cuda_graphs
from elan_basicsr.models.real_elan_model import RealELANNetModel
from tests.engine.test_distributed import environment, free_port

from .conftest import GPU, batch, steps, weights


def test_without_a_gpu_graphs_change_nothing(make):
    ours, theirs = steps(make({'cuda_graphs': True}), 3), steps(make(), 3)
    assert torch.equal(weights(ours), weights(theirs)) and 'forward' not in vars(ours.net_g)


def record_on_a_cpu(monkeypatch, net, **options):
    """`record` with what stands in for torch's recording; gives the calls of what it recorded, and the log's lines."""
    calls, lines = [], []

    def stand_in(net, args):
        eager = net.forward
        for _ in range(3):
            autocast = torch.is_autocast_enabled('cpu')
            y = net(*args)
            torch.autograd.grad(y, list(net.parameters()), torch.ones_like(y))
        assert not autocast  # nor is it on in the backward pass
        net.forward = lambda x: calls.append(x.shape) or eager(x)

    monkeypatch.setattr(torch.cuda, 'make_graphed_callables', stand_in)
    monkeypatch.setattr(cuda_graphs, 'get_root_logger', lambda: SimpleNamespace(warning=lines.append))
    cuda_graphs.record(net, **{'shape': (4, 3, 16, 16), 'dtype': None, 'accumulates': False, **options})
    return calls, lines


@pytest.mark.parametrize('dtype', [None, torch.bfloat16])
def test_recording_leaves_weights_and_statistics_as_they_were(make, monkeypatch, dtype):
    net = make().net_g
    before = copy.deepcopy(net.state_dict())
    record_on_a_cpu(monkeypatch, net, dtype=dtype)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.state_dict().keys() == before.keys() and all(p.grad is None for p in net.parameters())


def test_what_was_not_recorded_runs_as_before(make, monkeypatch):
    """Other batches, with one warning that names both shapes; eval mode; and whatever takes no gradients."""
    net = make().net_g
    calls, lines = record_on_a_cpu(monkeypatch, net)
    whole, part = batch()['lq'], batch(2)['lq']
    net(whole)
    assert len(calls) == 1
    for _ in range(2):
        assert net(part).requires_grad
    with torch.no_grad():
        net(whole)
    net.eval()(whole)
    assert len(calls) == 1 and len(lines) == 1 and '(2, 3, 16, 16) and not (4, 3, 16, 16)' in lines[0]


def test_gradients_that_are_added_up_are_copies(make, monkeypatch):
    """Otherwise a first one would lie where the next replay puts its own."""
    for accumulates in (False, True):
        net = make().net_g
        record_on_a_cpu(monkeypatch, net, accumulates=accumulates)
        static = [torch.ones_like(p) for p in net.parameters()]
        torch.autograd.backward(list(net.parameters()), static)
        assert all(torch.equal(p.grad, own) for p, own in zip(net.parameters(), static, strict=True))
        shared = [p.grad.data_ptr() == own.data_ptr() for p, own in zip(net.parameters(), static, strict=True)]
        assert not (accumulates and any(shared))


def test_a_recording_that_fails_is_one_line(make, monkeypatch):
    def fail(net, args):
        try:
            raise RuntimeError('CUDA error: operation not permitted when stream is capturing\nCompile with ...')
        finally:
            raise RuntimeError('CUDA error: operation failed due to a previous error during capture')

    net = make().net_g
    monkeypatch.setattr(torch.cuda, 'make_graphed_callables', fail)
    with pytest.raises(UserError, match=r'^cuda_graphs: the passes of ELAN cannot be recorded \(CUDA error: operation '
                                        r'not permitted when stream is capturing\); leave the key out$'):
        cuda_graphs.record(net, (4, 3, 16, 16), None, False)


def test_a_recording_for_which_memory_does_not_suffice_says_so(make, monkeypatch):
    def fail(net, args):
        try:
            raise torch.OutOfMemoryError('CUDA out of memory.')
        finally:
            raise RuntimeError('CUDA error: operation failed due to a previous error during capture')

    net = make().net_g
    monkeypatch.setattr(torch.cuda, 'make_graphed_callables', fail)
    with pytest.raises(torch.OutOfMemoryError):
        cuda_graphs.record(net, (4, 3, 16, 16), None, False)


def test_batches_of_real_esrgan_are_cut_by_its_own_size():
    model = object.__new__(RealELANNetModel)
    model.opt = {'scale': 4, 'gt_size': 64, 'datasets': {'train': {'gt_size': 128}}}
    assert model._lq_edge() == 16
    model.opt['high_order_degradation'] = False
    assert model._lq_edge() == 32


@pytest.fixture
def repeatable(monkeypatch):
    """Convolutions in float32 by algorithms that repeat themselves."""
    monkeypatch.setattr(torch.backends.cudnn, 'deterministic', True)
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)


@pytest.fixture
def replays(monkeypatch):
    """The graphs that are replayed, one by one."""
    seen, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, 'replay', lambda graph: seen.append(graph) or replay(graph))
    return seen


def assert_same_state(ours, theirs):
    for name in ('net_g', 'net_g_ema'):
        state, expected = (model.get_bare_model(getattr(model, name)).state_dict() for model in (ours, theirs))
        assert state.keys() == expected.keys()
        assert [key for key in state if not torch.equal(state[key], expected[key])] == []


@pytest.mark.gpu
@pytest.mark.parametrize('kernels, changes', [
    ('', {}), ('0', {}), ('', {'train.amp': 'bf16'}), ('', {'train.amp': 'fp16'}), ('', {'train.accumulate': 2}),
    ('', {'train.accumulate': 2, 'train.amp': 'fp16'}), ('', {'train.grad_clip': 1e-2}),
    ('', {'train.optim_g.fused': True}), ('0', {'train.amp': 'bf16', 'train.accumulate': 2})])
def test_graphs_train_as_without_them(make, changes, kernels, monkeypatch, repeatable, replays):
    """The same weights, statistics and average to the bit; building the model leaves all as it is."""
    monkeypatch.setenv('ELAN_KERNELS', kernels)
    theirs, ours = make({**GPU, **changes}), make({**GPU, **changes, 'cuda_graphs': True})
    assert_same_state(ours, theirs)
    assert all(parameter.grad is None for parameter in ours.net_g.parameters()) and not replays
    steps(theirs, 3)
    steps(ours, 3)
    assert len(replays) == 6 * changes.get('train.accumulate', 1)  # forward and backward, three times
    assert_same_state(ours, theirs)
    assert ours.get_current_log() == theirs.get_current_log()
    for model in (ours, theirs):
        model.feed_data({'lq': torch.rand(1, 3, 40, 36, generator=torch.Generator().manual_seed(1))})
        model.test()
    assert torch.equal(ours.output, theirs.output)


@pytest.mark.gpu
@pytest.mark.parametrize('parts', [1, 2])
def test_graphs_train_under_ddp_as_without_them(make, parts, monkeypatch, repeatable, replays):
    changes = {**GPU, 'train.accumulate': parts}
    for name, value in environment(0, 1, free_port()).items():
        monkeypatch.setenv(name, value)
    with process_group('pytorch', backend='nccl', gpu=True) as processes:
        theirs, ours = (steps(make({**changes, 'cuda_graphs': graphs}, processes=processes), 3)
                        for graphs in (False, True))
        assert len(replays) == 6 * parts
        assert_same_state(ours, theirs)
        del theirs, ours


@pytest.mark.gpu
def test_a_batch_of_another_size_is_trained_on_without_a_graph(make, monkeypatch, repeatable, replays):
    lines = []
    monkeypatch.setattr(cuda_graphs, 'get_root_logger', lambda: SimpleNamespace(warning=lines.append))
    theirs, ours = make(GPU), make({**GPU, 'cuda_graphs': True})
    for model in (theirs, ours):
        for size in (4, 2, 2, 4):
            steps(model, 1, size)
    assert len(replays) == 4 and len(lines) == 1 and '(2, 3, 16, 16) and not (4, 3, 16, 16)' in lines[0]
    assert_same_state(ours, theirs)


class Waiting(torch.nn.Conv2d):
    """A convolution that asks for a number that the GPU has yet to compute."""

    def forward(self, x):
        return super().forward(x) * float(x.sum() + 1)


def _record_what_waits() -> str:
    try:
        cuda_graphs.record(Waiting(3, 3, 1).cuda(), (1, 3, 8, 8), None, False)
    except Exception as error:
        return f'{type(error).__name__}: {error}'
    return 'nothing'


@pytest.mark.gpu
def test_a_network_that_waits_for_the_gpu_cannot_be_recorded():
    """In a process of its own, as a recording that failed may leave traces."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context('spawn')) as pool:
        said = pool.submit(_record_what_waits).result()
    assert said.startswith('UserError: cuda_graphs: the passes of Waiting cannot be recorded (') and 'captur' in said
