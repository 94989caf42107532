"""What ELANModel promises beyond SRModel."""
import copy
import multiprocessing
import warnings
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
import yaml
from torch.utils._python_dispatch import TorchDispatchMode

from elan_basicsr.checkpoint import load_elan
from elan_basicsr.config.options import load_options
from elan_basicsr.data.loader import to_float
from elan_basicsr.data.sampling import seed_all
from elan_basicsr.engine.launch import Processes, process_group
from elan_basicsr.engine.run import build_checked_dataset, build_validation_loaders, join_run
from elan_basicsr.errors import UserError
from elan_basicsr.models import cuda_graphs
from elan_basicsr.models.real_elan_model import RealELANNetModel
from tests.conftest import compiler
from tests.engine.test_distributed import environment, free_port

from basicsr.models import build_model
from basicsr.models.sr_model import SRModel


@pytest.fixture
def make(options, tmp_path):
    """Build the model of the options with some changed: make({'train.amp': 'bf16'})."""
    def build(changes=None, cls=None, processes=None):
        opt = copy.deepcopy(options)
        if cls is SRModel:
            opt['model_type'] = 'SRModel'
        (tmp_path / 'run.yml').write_text(yaml.safe_dump(opt))
        opt = load_options(tmp_path / 'run.yml', is_train=True,
                           overrides=[f'{key}={value}' for key, value in (changes or {}).items()])
        join_run(opt, processes or Processes())
        torch.manual_seed(0)
        return build_model(opt)
    return build


def batch(size=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {'lq': torch.rand(size, 3, 16, 16, generator=generator), 'lq_path': [f'key{i}' for i in range(size)],
            'gt': torch.rand(size, 3, 32, 32, generator=generator)}


def steps(model, number, size=4):
    for i in range(1, number + 1):
        model.update_learning_rate(i)
        model.feed_data(batch(size, i))
        model.optimize_parameters(i)
    return model


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.net_g.parameters()])


def test_by_default_it_steps_as_srmodel_does(make):
    ours, theirs = steps(make(), 3), steps(make(cls=SRModel), 3)
    assert torch.equal(weights(ours), weights(theirs))
    assert ours.get_current_log() == theirs.get_current_log()


@pytest.mark.parametrize('use_checkpoint', [False, True])
@pytest.mark.parametrize('processes', ['one', 'DistributedDataParallel'])
def test_a_fused_optimizer_steps_as_one_that_is_not(make, monkeypatch, processes, use_checkpoint):
    """On a CPU PyTorch's takes gradients by their place in memory: in another order than their parameter's they would
    go to other weights, and nothing would say so."""
    changes, seen = {'network_g.use_checkpoint': use_checkpoint, 'train.accumulate': 2}, []
    with nullcontext() if processes == 'one' else one_process(monkeypatch) as group:
        expected = weights(steps(make(changes, processes=group), 3))
        ours = make({**changes, 'train.optim_g.fused': True}, processes=group)
        ours.optimizer_g.register_step_pre_hook(lambda optimizer, *_: seen.extend(
            parameter.grad.is_contiguous() for group in optimizer.param_groups for parameter in group['params']))
        assert (weights(steps(ours, 3)) - expected).norm() < 1e-6 * expected.norm()
        assert len(seen) == 3 * len(list(ours.net_g.parameters())) and all(seen)
        del ours


@pytest.mark.slow
def test_ema_validates_as_well_as_the_network_where_srmodel_fails(make):
    """The averaged network needs BatchNorm's statistics too; upstream leaves them at their initial values."""
    changes = {'train.ema_decay': 0.999, 'train.optim_g.lr': 1e-3, 'train.scheduler.milestones': [100],
               'train.scheduler.gamma': 0.1, 'network_g.num_feat': 30, 'network_g.num_block': 4}
    psnr = {}
    for name, cls in (('ours', None), ('stock', SRModel)):
        model = make(changes, cls)
        loaders = build_validation_loaders(model.opt, ('val',))
        dataset = build_checked_dataset(model.opt, 'train')
        seed_all(1)
        loader = torch.utils.data.DataLoader(dataset, batch_size=4, shuffle=True)
        iteration = 0
        while iteration < 150:
            for data in loader:
                iteration += 1
                model.update_learning_rate(iteration)  # at a high rate the network alone is good or bad by chance
                model.feed_data(data)
                model.optimize_parameters(iteration)
        for key in ('params_ema', 'params'):
            if key == 'params':
                del model.net_g_ema
            model.validation(loaders['val'], iteration, None, False)
            psnr[name, key] = model.metric_results['psnr']
    assert psnr['ours', 'params_ema'] > psnr['ours', 'params'] - 0.5
    assert psnr['stock', 'params_ema'] < psnr['stock', 'params'] - 0.5
    assert psnr['ours', 'params_ema'] > psnr['stock', 'params_ema'] + 0.5


def test_the_average_holds_the_buffers(make):
    model = steps(make(), 3)
    for name, buffer in model.net_g.named_buffers():
        assert torch.equal(dict(model.net_g_ema.named_buffers())[name], buffer), name
    assert not torch.equal(model.net_g_ema.head.weight, model.net_g.head.weight)


def test_parts_of_a_batch_give_the_gradient_of_the_whole(make):
    """BatchNorm apart: its statistics are those of a part, so it is frozen here."""
    results = []
    for parts in (1, 2):
        model = make({'train.accumulate': parts, 'train.ema_decay': 0})
        for module in model.net_g.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
        model.feed_data(batch())
        model.optimize_parameters(1)
        results.append((weights(model), model.get_current_log()['l_pix']))
    assert torch.allclose(results[0][0], results[1][0], atol=1e-5)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-6)


def test_the_gradient_is_clipped(make):
    model = make({'train.grad_clip': 1e-3})
    seen = []
    step = model.optimizer_g.step
    model.optimizer_g.step = lambda *args, **kwargs: (
        seen.append(torch.nn.utils.get_total_norm([p.grad for p in model.net_g.parameters()])), step(*args, **kwargs))
    steps(model, 1)
    assert seen[0] == pytest.approx(1e-3, rel=1e-3)


def test_bf16_trains_close_to_float32(make):
    exact, rounded = steps(make(), 3), steps(make({'train.amp': 'bf16'}), 3)
    assert rounded.get_current_log()['l_pix'] == pytest.approx(exact.get_current_log()['l_pix'], rel=0.05)
    assert {p.dtype for p in rounded.net_g.parameters()} == {torch.float32}


@pytest.mark.parametrize('optimizer', ['AdamW', 'RMSprop', 'Adamax', 'NAdam', 'RAdam'])
def test_optimizers_go_by_their_name_in_torch(make, options, optimizer):
    options['train']['optim_g'] = {'type': optimizer, 'lr': 1e-3, 'weight_decay': 0}
    model = steps(make(), 1)
    assert type(model.optimizer_g) is getattr(torch.optim, optimizer)


def test_a_loss_that_is_no_number_stops_the_run(make):
    model = make()
    data = batch()
    data['lq'][1] = float('nan')
    model.feed_data(data)
    before = weights(model).clone()
    expected = r'iteration 7: the loss is nan at learning rate 1\.000e-03.*key0, key1'
    with pytest.raises(UserError, match=expected) as caught:
        model.optimize_parameters(7)
    assert '\n' not in str(caught.value)
    assert torch.equal(weights(model), before)


def test_tiles_and_self_ensemble_are_used_in_validation(make):
    plain, tiled, ensemble = (make(changes) for changes in ({}, {'val.tile': 16, 'val.tile_overlap': 16},
                                                            {'val.self_ensemble': True}))
    outputs = []
    for model in (plain, tiled, ensemble):
        model.feed_data({'lq': torch.rand(1, 3, 40, 36, generator=torch.Generator().manual_seed(1))})
        model.test()
        outputs.append(model.output)
    assert outputs[0].shape == outputs[1].shape == outputs[2].shape == (1, 3, 80, 72)
    assert not torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])


@compiler
def test_compiled_training_saves_plain_names(make):
    model = make({'compile': True})
    assert all(not key.startswith('_orig_mod') for key in model.get_bare_model(model.net_g).state_dict())


def test_a_checkpoint_tells_what_its_weights_do_not(make, tmp_path):
    model = make({'network_g.img_range': 1, 'network_g.rgb_mean': '[0,0,0]', 'network_g.window_sizes': '[2,4,8]'})
    model.opt['path']['models'] = str(tmp_path)
    model.save_network(model.net_g, 'net_g', 4)
    net, x = load_elan(tmp_path / 'net_g_4.pth'), torch.rand(1, 3, 9, 9)
    with torch.no_grad():
        assert torch.equal(net(x), model.net_g.eval()(x))
    model = make()
    model.opt['path']['models'] = str(tmp_path)
    model.save_network(model.net_g, 'net_g', 5)
    assert torch.load(tmp_path / 'net_g_5.pth', weights_only=True).keys() == {'params'}


@pytest.mark.parametrize('parts', [1, 2])
def test_an_iteration_waits_for_its_losses_and_nothing_else(make, options, parts):
    """Every number that is asked of a device waits for it; the losses come as one list, which is no such question."""
    options['train']['optim_g'] = {'type': 'SGD', 'lr': 1e-3}  # Adam counts its steps on the CPU
    model = steps(make({'train.accumulate': parts, 'train.grad_clip': 1}), 1)
    asked, given = Asked(), []
    tolist = torch.Tensor.tolist
    with asked, pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, 'tolist', lambda tensor: given.append(tensor.shape) or tolist(tensor))
        steps(model, 1)
    assert asked.number == 0 and given == [(1,)]
    assert all(type(value) is float for value in model.get_current_log().values())


class Asked(TorchDispatchMode):
    """Counts the numbers that tensors are asked for."""
    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_weights_of_any_network_must_be_numbers(make, tmp_path):
    edsr = {'type': 'EDSR', 'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 8, 'num_block': 1, 'upscale': 2}
    state = make({'network_g': edsr}).net_g.state_dict()
    torch.save({'params': state}, tmp_path / 'sound.pth')
    state['conv_first.weight'][0, 0] = float('nan')
    torch.save({'params': state}, tmp_path / 'broken.pth')
    assert make({'network_g': edsr, 'path.pretrain_network_g': 'sound.pth'}).net_g
    with pytest.raises(UserError, match='broken.pth: .*conv_first.weight'):
        make({'network_g': edsr, 'path.pretrain_network_g': 'broken.pth'})


def test_a_part_that_is_no_number_changes_nothing(make):
    """The losses of all parts are looked at before the weights change."""
    for broken in (0, 3):
        model = make({'train.accumulate': 2})
        data = batch()
        data['lq'][broken] = float('nan')
        model.feed_data(data)
        before, average = weights(model).clone(), copy.deepcopy(model.net_g_ema.state_dict())
        with pytest.raises(UserError, match='the loss is nan'):
            model.optimize_parameters(7)
        assert torch.equal(weights(model), before)
        assert all(torch.equal(value, average[name]) for name, value in model.net_g_ema.state_dict().items())


def test_clipping_keeps_no_history(make):
    """Nothing that the optimizer holds on to grows with the number of updates."""
    model = steps(make({'train.grad_clip': 1}), 3)
    histories = model.optim_wrapper.message_hub.log_scalars
    assert not [name for name, values in histories.items() if len(values.data[0]) > 1]


@compiler
@pytest.mark.slow
@pytest.mark.parametrize('distributed', [False, True])
def test_what_is_compiled_is_the_training_step_and_nothing_else(make, distributed, monkeypatch):
    """Validation on images of several sizes, between steps and without an average, adds no compilation."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    torch._dynamo.reset()
    with one_process(monkeypatch) if distributed else nullcontext() as processes:
        model = make({'compile': True, 'train.ema_decay': 0, 'network_g.window_sizes': '[4]'}, processes=processes)
        with torch.compiler.set_stance(force_backend=backend):
            steps(model, 2)
            seen = len(compiled)
            assert seen > 0
            loader = build_validation_loaders(model.opt, ('val',))['val']
            model.validation(loader, 2, None, False)
            assert len(model.metric_results) == 2
            steps(model, 1)
        assert len(compiled) == seen
        del model


@contextmanager
def one_process(monkeypatch):
    """A process group of this process alone."""
    for name, value in environment(0, 1, free_port()).items():
        monkeypatch.setenv(name, value)
    with process_group('pytorch') as processes:
        yield processes


# --------------------------------------------------------------------------------------------------------- CUDA graphs

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


# ------------------------------------------------------------------------------------------------------------ on a GPU

GPU = {'num_gpu': 1}


@pytest.mark.gpu
@pytest.mark.parametrize('changes', [
    {}, {'train.amp': 'bf16'}, {'train.amp': 'fp16'}, {'train.accumulate': 2}, {'train.grad_clip': 1e-2},
    {'train.optim_g.fused': True}, {'train.optim_g.fused': True, 'train.amp': 'fp16', 'train.grad_clip': 1.},
    {'network_g.use_checkpoint': True}, {'compile': True}, {'compile': True, 'network_g.use_checkpoint': True},
    {'compile': True, 'network_g.use_checkpoint': True, 'train.accumulate': 2, 'train.amp': 'bf16'}])
def test_a_gpu_trains_as_the_cpu_does(make, changes, monkeypatch):
    """Three steps in every way of training end near those in float32 on the CPU, the average and its buffers too."""
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    torch._dynamo.reset()
    same = {key: value for key, value in changes.items() if key in ('train.accumulate', 'train.grad_clip')}
    theirs, ours = steps(make(same), 3), steps(make({**GPU, **changes}), 3)
    near = 0.5 if changes.get('train.amp') == 'fp16' else 0.1  # whose scaler may skip steps at first
    assert ours.output.device.type == 'cuda' and weights(ours).isfinite().all()
    assert ours.get_current_log()['l_pix'] == pytest.approx(theirs.get_current_log()['l_pix'], rel=near / 2)
    for name, buffer in ours.net_g_ema.named_buffers():
        expected = theirs.net_g_ema.get_buffer(name)
        assert torch.equal(buffer, dict(ours.net_g.named_buffers())[name]), name
        assert torch.allclose(buffer.cpu(), expected, rtol=near, atol=near * float(expected.abs().max())), name
    if changes.get('train.amp') == 'fp16':
        assert ours.extra_state()['loss_scaler']['scale'] > 0


@pytest.mark.gpu
def test_a_loss_that_is_no_number_stops_a_run_on_a_gpu(make):
    """The weights are those before the step."""
    model = make(GPU)
    data = batch()
    data['lq'][1] = float('nan')
    model.feed_data(data)
    before = weights(model).clone()
    with pytest.raises(UserError, match='the loss is nan'):
        model.optimize_parameters(7)
    assert torch.equal(weights(model), before)


@pytest.mark.gpu
def test_an_iteration_on_a_gpu_waits_once(make):
    """Of batches in pinned memory; the one wait is for the losses."""
    model = steps(make({**GPU, 'train.grad_clip': 1}), 2)
    data = batch()
    data = {**data, 'lq': (data['lq'] * 255).byte(), 'gt': (data['gt'] * 255).byte()}
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        torch.cuda.set_sync_debug_mode('warn')
        try:
            model.feed_data(to_float(data, model.device, pin_memory=True))
            model.optimize_parameters(3)
        finally:
            torch.cuda.set_sync_debug_mode('default')
    assert len([each for each in caught if 'synchronizing CUDA operation' in str(each.message)]) == 1


@pytest.mark.gpu
def test_validation_in_tiles_on_a_gpu(make, monkeypatch):
    """Tiles measure nearly what the whole images do."""
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    model = make({**GPU, 'val.tile': 16})
    loader = build_validation_loaders(model.opt, ('val',))['val']
    model.validation(loader, 1, None, False)
    tiled = model.metric_results
    model.opt['val']['tile'] = 0
    model.validation(loader, 1, None, False)
    assert tiled['psnr'] == pytest.approx(model.metric_results['psnr'], abs=1)


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
