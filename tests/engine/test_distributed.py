"""Several processes on gloo: the same figures, samples and checkpoints as one, and no hanging when one is lost."""
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from elan_basicsr.cli import main
from elan_basicsr.config.options import load_options
from elan_basicsr.engine.interrupt import EXIT_STOPPED
from elan_basicsr.engine.launch import process_group, read_environment
from elan_basicsr.engine.resume import _own_state
from elan_basicsr.engine.run import join_run, meeting
from elan_basicsr.errors import UserError
from tests.conftest import ROOT, with_checkout
from tests.engine.test_train import assert_same_run, write

from basicsr.models import build_model


def free_port() -> str:
    with socket.socket() as connection:
        connection.bind(('127.0.0.1', 0))
        return str(connection.getsockname()[1])


def environment(rank: int, size: int, port: str) -> dict[str, str]:
    return {'RANK': str(rank), 'LOCAL_RANK': str(rank), 'WORLD_SIZE': str(size), 'MASTER_ADDR': '127.0.0.1',
            'MASTER_PORT': port, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': with_checkout(), 'PYTHONFAULTHANDLER': '1'}


def start(size: int, *arguments: str, program: tuple[str, ...] = ('-m', 'elan_basicsr')) -> list[subprocess.Popen]:
    """`basicsr ARGUMENTS` in processes of sessions of their own, each with its output in `output.RANK`."""
    port = free_port()
    processes = []
    for rank in range(size):
        with open(f'output.{rank}', 'w') as log:
            processes.append(subprocess.Popen(
                [sys.executable, *program, *arguments], env={**os.environ, **environment(rank, size, port)},
                stdout=log, stderr=log, start_new_session=True))
    return processes


def finish(processes: list[subprocess.Popen], seconds: float = 120) -> list[int]:
    """Their exit codes; if one takes longer than so many seconds, each that still runs says where it is."""
    end = time.time() + seconds
    try:
        return [process.wait(max(end - time.time(), 0.1)) for process in processes]
    except subprocess.TimeoutExpired:
        late = [rank for rank, process in enumerate(processes) if process.poll() is None]
        for rank in late:
            os.killpg(processes[rank].pid, signal.SIGABRT)  # faulthandler's: the stacks of all threads
        time.sleep(2)
        raise AssertionError(f'{late} still run after {seconds} s\n{outputs(len(processes))}') from None
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def outputs(size: int) -> str:
    return '\n'.join(Path(f'output.{rank}').read_text()[-6000:] for rank in range(size))


def until(processes, text: str) -> None:
    end = time.time() + 120
    while text not in Path('output.0').read_text():
        assert all(process.poll() is None for process in processes) and time.time() < end
        time.sleep(0.02)


def endless(options) -> str:
    options['train']['total_iter'] = 100_000
    options['logger'].update(print_freq=1, save_checkpoint_freq=100_000)
    options['val']['val_freq'] = 100_000
    options['datasets']['train']['num_worker_per_gpu'] = 1
    return write(options, dist_params={'timeout': 60})  # more than a busy disk takes to keep a file


def write_test(options) -> str:
    """The options of a test with the network and the images of the training."""
    keys = ('model_type', 'scale', 'num_gpu', 'manual_seed', 'network_g', 'path', 'dist_params')
    test = {key: options[key] for key in keys if key in options}
    test.update(name='check', datasets={'test_1': options['datasets']['val']}, val={**options['val'], 'save_img': True})
    return write(test, 'test.yml')


@pytest.mark.slow
def test_three_processes_measure_what_one_does(options):
    """Three images on two processes do not divide evenly."""
    file = write_test(options)
    seen = {}
    for size in (1, 2, 3):
        assert finish(start(size, 'test', '-opt', file)) == [0] * size
        images = {path.name: path.read_bytes() for path in Path('results/check/visualization').rglob('*.png')}
        figures = re.findall(r'# (\w+: [\d.]+)', next(Path('results/check').glob('*.log')).read_text())
        seen[size] = images, figures
        shutil.rmtree('results')
    assert len(seen[1][0]) == 3 and len(seen[1][1]) == 2
    assert seen[2] == seen[1] and seen[3] == seen[1]


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others_with_one_line(options):
    processes = start(2, 'train', '-opt', endless(options))
    until(processes, 'iter:       3')
    processes[1].kill()
    assert finish(processes, seconds=40) == [1, -signal.SIGKILL]
    errors = [line for line in Path('output.0').read_text().splitlines() if line.startswith('basicsr: error:')]
    assert len(errors) == 1
    assert 'process 0 of 2 lost the others: no answer from 1' in errors[0] and '--auto_resume' in errors[0]


LEAVING = """
import sys, weakref
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as Parallel
made, places, build, destroy = [], set(), Parallel.__init__, dist.destroy_process_group
def noting(self, *args, **kwargs):
    build(self, *args, **kwargs)
    made.extend([weakref.ref(self), weakref.ref(self.reducer)])
    places.update(each.device.type for each in self.parameters())
def telling():
    left = [type(each()).__name__ for each in made if each()]
    print(f'{dist.get_backend()} on {places}: {len(made)} made, left: {left}', flush=True)
    destroy()
Parallel.__init__, dist.destroy_process_group = noting, telling
from elan_basicsr.cli import main
sys.exit(main())
"""


@pytest.mark.slow
@pytest.mark.parametrize('end, codes', [
    ('test', [0, 0]), ('train', [0, 0]), ('signal', [EXIT_STOPPED] * 2), ('error', [2, 2]),
    ('death', [1, -signal.SIGKILL])])
def test_nothing_refers_to_the_processes_when_they_are_left(options, end, codes):
    """Whoever holds the last reference in C++ waits with the interpreter's lock for threads that need it."""
    Path('leaving.py').write_text(LEAVING)
    if end == 'error':
        options['train']['optim_g']['lr'] = 1e30
    file = write_test(options) if end == 'test' else endless(options) if end in ('signal', 'death') else write(options)
    processes = start(2, 'test' if end == 'test' else 'train', '-opt', file, program=('leaving.py',))
    if end in ('signal', 'death'):
        until(processes, 'iter:       3')
        for process in processes[1:] if end == 'death' else processes:
            process.send_signal(signal.SIGKILL if end == 'death' else signal.SIGTERM)
    assert finish(processes, seconds=60) == codes, outputs(2)
    for rank in range(1 if end == 'death' else 2):
        output = Path(f'output.{rank}').read_text()
        assert "gloo on {'cpu'}: 2 made, left: []" in output, output


MEANWHILE = """
import itertools, os, signal, sys
import torch.distributed as dist
asked, all_reduce = itertools.count(), dist.all_reduce
def signalled(*args, **kwargs):
    all_reduce(*args, **kwargs)
    if kwargs.get('op') == dist.ReduceOp.MAX and os.environ['RANK'] == '1' and next(asked) == 2:
        os.kill(os.getpid(), signal.SIGTERM)
dist.all_reduce = signalled
from elan_basicsr.cli import main
sys.exit(main())
"""


@pytest.mark.slow
def test_a_signal_while_the_processes_ask_each_other_stops_all_after_the_same_iteration(options):
    """One that took its own answer for that of all would wait for a process that goes on."""
    Path('meanwhile.py').write_text(MEANWHILE)
    processes = start(2, 'train', '-opt', endless(options), program=('meanwhile.py',))
    assert finish(processes, seconds=90) == [EXIT_STOPPED] * 2, outputs(2)
    assert 'a signal to another process: stopped and saved at iteration 4' in Path('output.0').read_text()


LATE = """
import contextlib, time
import torch
import torch.distributed as dist
from elan_basicsr.engine.launch import process_group
from elan_basicsr.errors import RunLost
def meet(rank):
    if rank == 1:
        time.sleep(10)
    with contextlib.suppress(RuntimeError):
        dist.all_reduce(torch.ones(1))
    dist.all_reduce(torch.ones(1))
try:
    with process_group(timeout=2) as processes:
        meet(processes.rank)
except RunLost as error:
    print(error)
"""


@pytest.mark.slow
def test_work_that_a_timeout_elsewhere_ended_is_a_loss_too(options):
    """Two buckets of gradients are under way, and one of them is told of the other's end only."""
    Path('late.py').write_text(LATE)
    assert finish(start(2, program=('late.py',)))[0] == 0, outputs(2)
    assert 'process 0 of 2 lost the others: no answer from 1' in Path('output.0').read_text()


UNTOUCHED = """
import sys
import torch
def untouchable(name):
    def touched(*args, **kwargs):
        raise AssertionError(f'torch.cuda.{name} was called')
    return touched
torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1
for name in ('set_device', 'current_device', '_lazy_init'):
    setattr(torch.cuda, name, untouchable(name))
from elan_basicsr.cli import main
sys.exit(main())
"""


@pytest.mark.slow
def test_on_a_host_with_a_gpu_num_gpu_0_touches_none(options):
    """Two processes, and one GPU that fails whoever asks for it; torch's Adam does on its own, and so is not used."""
    options['train']['optim_g'] = {'type': 'SGD', 'lr': 1e-3}
    for command, file in (('train', write(options)), ('test', write_test(options))):
        processes = start(2, command, '-opt', file, program=('-c', UNTOUCHED))
        assert finish(processes) == [0, 0], Path('output.0').read_text()


def torchrun(size: int, *arguments: str) -> list[subprocess.Popen]:
    """LEAVING's `basicsr ARGUMENTS` in so many processes of torchrun, which alone is returned."""
    Path('leaving.py').write_text(LEAVING)
    return start(1, *arguments, program=('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(size),
                                         'leaving.py'))


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize('size, backend, graphs', [
    ('one', 'nccl', False), ('one', 'gloo', False), ('all', 'nccl', False), ('one', 'nccl', True)])
def test_gpus_train_and_measure_under_torchrun(options, size, backend, graphs):
    """A GPU for each process trains by NCCL or gloo, and the trained network's figures are those of one process."""
    processes = torch.cuda.device_count() if size == 'all' else 1
    options.update(num_gpu='auto', dist_params={'backend': backend}, cuda_graphs=graphs)
    assert finish(torchrun(processes, 'train', '-opt', write(options)), 300) == [0], Path('output.0').read_text()
    assert Path('output.0').read_text().count(f"{backend} on {{'cuda'}}: 2 made, left: []") == processes
    options['path']['pretrain_network_g'] = 'experiments/run/models/net_g_8.pth'
    command = 'test', '-opt', write_test(options), '--set', 'deterministic=true'
    figures = []
    for begin in (lambda: start(1, *command, '--launcher', 'none'), lambda: torchrun(processes, *command)):
        assert finish(begin(), 300) == [0], Path('output.0').read_text()
        figures.append(re.findall(r'# (\w+: [\d.]+)', Path('output.0').read_text()))
    assert len(figures[0]) == 2 and figures[0] == figures[1]


@pytest.mark.gpu
@pytest.mark.slow
def test_a_signal_to_torchrun_saves_what_gpus_have_trained(options):
    """The processes agree by NCCL to stop, save, and go on from there."""
    options['num_gpu'] = 'auto'
    file, size = endless(options), torch.cuda.device_count()
    processes = torchrun(size, 'train', '-opt', file)
    until(processes, 'iter:       3')
    processes[0].terminate()
    assert finish(processes, seconds=60) == [1]
    stopped = re.search(r'SIGTERM: stopped and saved at iteration (\d+)', Path('output.0').read_text())
    assert stopped and Path('output.0').read_text().count("nccl on {'cuda'}: 2 made, left: []") == size
    total = f'train.total_iter={int(stopped[1]) + 1}'
    assert finish(torchrun(size, 'train', '-opt', file, '--auto_resume', '--set', total), 300) == [0]
    assert f'iter: {stopped[1]}' in Path('output.0').read_text()


@pytest.mark.gpu
@pytest.mark.slow
def test_torchrun_ends_all_when_a_process_with_a_gpu_dies(options):
    """Those that wait for it in NCCL answer no signal: torchrun kills them, and exits with 1."""
    options['num_gpu'] = 'auto'
    processes = torchrun(torch.cuda.device_count(), 'train', '-opt', endless(options))
    until(processes, 'iter:       3')
    agent = processes[0].pid
    workers = [int(pid) for pid in Path(f'/proc/{agent}/task/{agent}/children').read_text().split()]
    os.kill(workers[-1], signal.SIGKILL)
    assert finish(processes, seconds=100) == [1]
    assert not any(Path(f'/proc/{worker}').exists() for worker in workers)


@pytest.mark.slow
def test_a_loader_worker_that_dies_is_named(options):
    file = endless(options)
    process = start(1, 'train', '-opt', file, '--launcher', 'none')[0]
    until([process], 'iter:       3')
    # The latest child: from Python 3.14 on, multiprocessing has a helper of its own before it.
    worker = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()[-1]
    os.kill(int(worker), signal.SIGKILL)
    assert finish([process], seconds=40) == [1]
    error = Path('output.0').read_text().splitlines()[-1]
    assert error.startswith('basicsr: error: DataLoader worker (pid') and 'num_worker_per_gpu' in error


@pytest.mark.slow
def test_a_signal_to_whole_groups_saves_and_all_resume_on_one(options):
    """torchrun and schedulers signal loader workers as well, and often twice."""
    file = endless(options)
    processes = start(2, 'train', '-opt', file)
    until(processes, 'iter:       3')
    for _ in range(2):
        for process in processes:
            os.killpg(process.pid, signal.SIGTERM)
        time.sleep(0.02)
    assert finish(processes, seconds=60) == [EXIT_STOPPED] * 2
    state = max(Path('experiments/run/training_states').glob('*.state'), key=lambda path: int(path.stem))
    assert f'SIGTERM: stopped and saved at iteration {state.stem}' in Path('output.0').read_text()
    total = f'train.total_iter={int(state.stem) + 1}'
    assert main(['train', '-opt', file, '--auto_resume', '--set', total, 'dist_params=null']) == 0


@pytest.mark.slow
def test_every_process_resumes_with_its_own_pool(options):
    """The pool of Real-ESRGAN's training holds degraded images of earlier batches, others on each process."""
    options.update(write_real(options))
    file = write(options)
    assert finish(start(2, 'train', '-opt', file, '--set', 'train.total_iter=6')) == [0, 0]
    run = Path('experiments/run')
    shutil.copytree(run, 'calm')
    for name in ('6.state', '6.rank1.state'):
        (run / 'training_states' / name).unlink()
    assert finish(start(2, 'train', '-opt', file, '--auto_resume', '--set', 'train.total_iter=6')) == [0, 0]
    assert 'Start training from epoch: 4, iter: 4' in Path('output.0').read_text()
    assert_same_run(Path('calm'), run, 6)
    one, two = (torch.load(run / 'training_states' / name, weights_only=True)['pool']['queue_lr']
                for name in ('6.state', '6.rank1.state'))
    assert not torch.equal(one, two)
    (run / 'training_states' / '6.rank1.state').write_bytes(b'')
    assert main(['train', '-opt', file, '--auto_resume', '--set', 'train.total_iter=5']) == 0  # from 4


def test_a_process_that_was_not_there_starts_with_an_empty_pool(tmp_path):
    notices = []
    state = {'pool': {'queue_ptr': 1}, 'files': {'4.rank1.state': ''}}
    assert _own_state({'rank': 2, 'world_size': 4}, state, tmp_path / '4.state', notices) == {'pool': {}}
    assert notices == ["4.state was saved by 2 of today's 4 processes; the training pools of the others start empty"]


def write_real(options) -> dict:
    """What turns the options into those of RealELANNet on the same photographs."""
    real = yaml.safe_load((ROOT / 'options' / 'train_RealELANNet_x4.yml').read_text())
    photographs = Path(options['datasets']['train']['dataroot_gt']).parents[1] / 'photographs'
    names = sorted(path.name for path in photographs.iterdir())
    Path('names.txt').write_text('\n'.join(names))
    train = {**real['datasets']['train'], 'dataroot_gt': str(photographs), 'meta_info': 'names.txt', 'gt_size': 64,
             'io_backend': {'type': 'disk'}, 'num_worker_per_gpu': 0, 'batch_size_per_gpu': 2}
    keys = [key for key in real if key not in ('name', 'path', 'train', 'val', 'logger', 'datasets', 'dist_params')]
    return {**{key: real[key] for key in keys}, 'num_gpu': 0, 'queue_size': 4, 'gt_size': 64,
            'datasets': {'train': train}, 'val': None, 'manual_seed': 5,
            'network_g': {'type': 'ELAN', 'upscale': 4, 'num_feat': 15, 'num_block': 2}, 'logger': {
                'print_freq': 1, 'save_checkpoint_freq': 2, 'use_tb_logger': False}}


@pytest.mark.parametrize('parts', [1, 4])
def test_accumulation_synchronises_once(options, monkeypatch, parts):
    """Gradients travel with the last part of a batch only: as often as without accumulation."""
    for name, value in environment(0, 1, free_port()).items():
        monkeypatch.setenv(name, value)
    opt = load_options(write(options), is_train=True, overrides=[f'train.accumulate={parts}'])
    with process_group('pytorch') as processes:
        join_run(opt, processes)
        assert _travels(opt) == [1, 1, 1]


def _travels(opt: dict) -> list[int]:
    """How often the first bucket of gradients travels in each of three iterations."""
    model = build_model(opt)
    travelled = []

    def hook(seen, bucket):
        seen.append(bucket.index())
        return allreduce_hook(None, bucket)

    model.net_g.register_comm_hook(travelled, hook)
    counts = []
    for step in range(1, 4):
        model.feed_data({'lq': torch.rand(4, 3, 16, 16), 'gt': torch.rand(4, 3, 32, 32), 'lq_path': ['a'] * 4})
        travelled.clear()
        model.optimize_parameters(step)
        counts.append(travelled.count(0))
    return counts


def test_a_process_takes_the_gpu_of_its_number(monkeypatch):
    """On NCCL the group is told which, so that none has to be guessed; with gloo it is the process's all the same."""
    for name, value in environment(1, 2, free_port()).items():
        monkeypatch.setenv(name, value)
    taken, met = [], []
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setattr(torch.cuda, 'set_device', taken.append)
    monkeypatch.setattr(torch.distributed, 'init_process_group', lambda backend, timeout, device_id: met.append(
        (backend, device_id)))
    monkeypatch.setattr(torch.distributed, 'destroy_process_group', lambda: None)
    for chosen in ({}, {'backend': None}, {'backend': 'gloo'}):
        with process_group('pytorch', **meeting({'num_gpu': 2, 'dist_params': chosen})):
            pass
    assert met == [('nccl', torch.device('cuda', 1))] * 2 + [('gloo', None)] and taken == [1, 1, 1]


@pytest.mark.parametrize('launcher, variables, message', [
    ('pytorch', {'RANK': '0', 'WORLD_SIZE': '2'}, 'LOCAL_RANK is not set'),
    ('pytorch', {'RANK': 'a', 'WORLD_SIZE': '2', 'LOCAL_RANK': '0'}, "RANK is 'a', expected an integer"),
    ('pytorch', {'RANK': '2', 'WORLD_SIZE': '2', 'LOCAL_RANK': '0'}, 'ranks count from 0'),
    ('pytorch', {'RANK': '0', 'WORLD_SIZE': '2', 'LOCAL_RANK': '0'}, 'MASTER_ADDR is not set'),
    ('slurm', {}, 'SLURM_PROCID is not set, .* start the command with srun'),
    ('mpi', {}, 'RANK is not set, .* start the command with mpirun'),
])
def test_a_wrong_environment_is_one_line(launcher, variables, message, monkeypatch):
    for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT', 'TORCHELASTIC_RUN_ID'):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message) as caught:
        read_environment(launcher)
    assert '\n' not in str(caught.value)
