"""With SyncBN a step on N processes is the step of one process with the whole batch."""
import os
import socket

import pytest
import torch
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from elan_basicsr.archs.elan_arch import ELAN
from elan_basicsr.engine.launch import process_group
from elan_basicsr.engine.run import meeting
from elan_basicsr.models.sync_bn import synchronise

BATCH = 4


def _network() -> ELAN:
    torch.manual_seed(0)
    return ELAN(upscale=2, num_feat=30, num_block=4, num_share=1).double().train()


def _step(net: torch.nn.Module, images: torch.Tensor) -> None:
    target = torch.linspace(0, 1, images.shape[0] * 3 * 32 * 32, dtype=images.dtype).view(-1, 3, 32, 32)
    (net(images) - target).square().mean().backward()


def _images() -> torch.Tensor:
    return torch.rand(BATCH, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def _worker(rank: int, world_size: int, port: int, folder: str, device: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR='127.0.0.1',
                      MASTER_PORT=str(port))
    with process_group('pytorch', **meeting({'num_gpu': int(device == 'cuda')})):
        _save_step(rank, world_size, folder, device)


def _save_step(rank: int, world_size: int, folder: str, device: str) -> None:
    net = DistributedDataParallel(synchronise(_network().to(device), torch.device(device)))
    images = _images().chunk(world_size)[rank].to(device)
    target = torch.linspace(0, 1, BATCH * 3 * 32 * 32, dtype=images.dtype).view(-1, 3, 32, 32).chunk(world_size)[rank]
    (net(images) - target.to(device)).square().mean().backward()
    result = {name: p.grad for name, p in net.module.named_parameters()} | dict(net.module.named_buffers())
    torch.save({name: value.cpu() for name, value in result.items()}, f'{folder}/{rank}.pt')


@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=pytest.mark.gpu)])
def test_a_step_on_two_processes_is_that_of_one(tmp_path, device, world_size=2):
    """On CPUs by gloo, on GPUs by NCCL and torch's own SyncBatchNorm; one process on the CPU says what is right."""
    if device == 'cuda' and torch.cuda.device_count() < world_size:
        pytest.skip('needs two GPUs')
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    mp.spawn(_worker, (world_size, port, str(tmp_path), device), nprocs=world_size)
    net = _network()
    _step(net, _images())
    expected = {name: p.grad for name, p in net.named_parameters()} | dict(net.named_buffers())
    steepest = max(float(p.grad.abs().max()) for p in net.parameters())
    for rank in range(world_size):
        ours = torch.load(tmp_path / f'{rank}.pt', weights_only=True)
        assert ours.keys() == expected.keys()
        for name, value in ours.items():
            largest = float(expected[name].double().abs().max()) if 'running' in name else steepest
            assert (value - expected[name]).double().abs().max() <= 1e-6 * largest, (rank, name)


def test_without_it_the_statistics_are_each_processs_own():
    """What the comparison above rests on: halves of the batch alone give another gradient."""
    whole, half = _network(), _network()
    _step(whole, _images())
    (half(_images()[:2]) - half(_images()[2:])).mean().backward()
    name = 'body.0.gmsa.0.project_in.weight'
    assert not torch.allclose(whole.get_parameter(name).grad, half.get_parameter(name).grad, rtol=1e-6)


def test_alone_and_in_evaluation_it_is_batchnorm():
    net, images = _network(), _images()
    synced = synchronise(_network(), torch.device('cpu'))
    assert net.state_dict().keys() == synced.state_dict().keys()
    assert torch.equal(net(images), synced(images))
    assert torch.equal(net.eval()(images), synced.eval()(images))
