"""What ELANModel promises beyond SRModel."""
import copy
import warnings
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from elan_basicsr.checkpoint import load_elan
from elan_basicsr.data.loader import to_float
from elan_basicsr.data.sampling import seed_all
from elan_basicsr.engine.launch import process_group
from elan_basicsr.engine.run import build_checked_dataset, build_validation_loaders
from elan_basicsr.errors import UserError
from tests.conftest import compiler
from tests.engine.test_distributed import environment, free_port

from .conftest import GPU, batch, steps, weights
from basicsr.models.sr_model import SRModel


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


# ------------------------------------------------------------------------------------------------------------ on a GPU

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
