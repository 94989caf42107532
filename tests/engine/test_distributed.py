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
from elan_basicsr.engine.run import join_run
from elan_basicsr.errors import UserError
from tests.engine.test_train import assert_same_run, write

from basicsr.models import build_model


def free_port() -> str:
    with socket.socket() as connection:
        connection.bind(('127.0.0.1', 0))
        return str(connection.getsockname()[1])


def environment(rank: int, size: int, port: str) -> dict[str, str]:
    return {'RANK': str(rank), 'LOCAL_RANK': str(rank), 'WORLD_SIZE': str(size), 'MASTER_ADDR': '127.0.0.1',
            'MASTER_PORT': port, 'OMP_NUM_THREADS': '1'}


def start(size: int, *arguments: str) -> list[subprocess.Popen]:
    """`basicsr ARGUMENTS` in processes of sessions of their own, each with its output in `output.RANK`."""
    port = free_port()
    processes = []
    for rank in range(size):
        with open(f'output.{rank}', 'w') as log:
            processes.append(subprocess.Popen(
                [sys.executable, '-m', 'elan_basicsr', *arguments], env={**os.environ, **environment(rank, size, port)},
                stdout=log, stderr=log, start_new_session=True))
    return processes


def finish(processes: list[subprocess.Popen], seconds: float = 120) -> list[int]:
    """Their exit codes; none may take longer than so many seconds."""
    end = time.time() + seconds
    try:
        return [process.wait(max(end - time.time(), 0.1)) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


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
    return write(options, dist_params={'timeout': 10})


@pytest.mark.slow
def test_three_processes_measure_what_one_does(options):
    """Three images on two processes do not divide evenly."""
    test = {key: options[key] for key in ('model_type', 'scale', 'num_gpu', 'manual_seed', 'network_g', 'path')}
    test.update(name='check', datasets={'test_1': options['datasets']['val']}, val={**options['val'], 'save_img': True})
    file = write(test, 'test.yml')
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


@pytest.mark.slow
def test_a_loader_worker_that_dies_is_named(options):
    file = endless(options)
    process = start(1, 'train', '-opt', file, '--launcher', 'none')[0]
    until([process], 'iter:       3')
    worker = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()[0]
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
    from tests.conftest import ROOT
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


def test_accumulation_synchronises_once(options, monkeypatch):
    """Gradients travel with the last part of a batch only: as often as without accumulation."""
    for name, value in environment(0, 1, free_port()).items():
        monkeypatch.setenv(name, value)
    file = write(options)
    with process_group('pytorch') as processes:
        for parts in (1, 4):
            opt = load_options(file, is_train=True, overrides=[f'train.accumulate={parts}'])
            join_run(opt, processes)
            model = build_model(opt)
            travelled = []

            def hook(seen, bucket):
                seen.append(bucket.index())
                return allreduce_hook(None, bucket)

            model.net_g.register_comm_hook(travelled, hook)
            for step in range(1, 4):
                model.feed_data({'lq': torch.rand(4, 3, 16, 16), 'gt': torch.rand(4, 3, 32, 32), 'lq_path': ['a'] * 4})
                travelled.clear()
                model.optimize_parameters(step)
                assert travelled.count(0) == 1, (parts, step)


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
