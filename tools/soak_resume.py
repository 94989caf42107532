"""Kill a training of two processes at random moments, resume it each time, and compare it with an undisturbed one.

    python tools/soak_resume.py                              # SIGKILL, 20 times
    python tools/soak_resume.py --signal TERM --times 10     # SIGTERM to torchrun, 10 times

Every second moment is one at which a checkpoint is being written. SIGKILL goes to both processes or to one of them, and
then the other has to end by itself. After each kill the first checkpoint that the resumed run writes is compared with
the undisturbed run's of that iteration, and at the end the last one: weights, EMA, optimizer, scheduler, bit for bit.
The last line is how many times all were equal; the exit code is 0 if always.
"""
from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import skimage.data
import torch
import yaml

from elan_basicsr.data.prepare import build

SAVE_EVERY = 5
ENDS_WITHIN = 60  # seconds for a process to end by itself once the other is gone


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--signal', choices=['KILL', 'TERM'], default='KILL')
    parser.add_argument('--times', type=int, default=20)
    parser.add_argument('--processes', type=int, default=2)
    parser.add_argument('--workers', type=int, default=1, help='loader workers of each process')
    parser.add_argument('--seed', type=int, default=0, help='of the moments')
    args = parser.parse_args()
    random.seed(args.seed)
    folder = Path(tempfile.mkdtemp(prefix='soak_'))
    try:
        survived = soak(folder, args)
    finally:
        shutil.rmtree(folder)
    print(f'{survived} of {args.times}: SIG{args.signal}, {args.processes} processes, resumed bit for bit')
    return 0 if survived == args.times else 1


def soak(folder: Path, args) -> int:
    total = args.times * 4 * SAVE_EVERY
    options = write_options(folder, total, args.workers)
    calm = Run(folder / 'calm', options, args)
    print(f'undisturbed: {total} iterations', flush=True)
    calm.start()
    calm.wait(0)
    run = Run(folder / 'disturbed', options, args)
    survived = 0
    for number in range(1, args.times + 1):
        before = run.newest()
        first = (before // SAVE_EVERY + 1) * SAVE_EVERY
        run.start()
        if number % 2:
            moment = f'iteration {run.reach(first + random.randint(1, 2 * SAVE_EVERY))}'
        else:
            run.reach(first + 1)
            moment = f'writing {run.wait_for_writing()}'
        victims = run.stop()
        alike = first in run.whole() and equal(calm, run, first)
        survived += alike
        print(f'{number:3}: from {before}, {victims} at {moment}; checkpoint {first} '
              f'{"equal" if alike else "DIFFERS"}, newest {run.newest()}', flush=True)
    run.start()
    run.wait(0)
    if not equal(calm, run, total):
        print(f'checkpoint {total}, the last: DIFFERS')
        return 0
    return survived


def write_options(folder: Path, total: int, workers: int) -> Path:
    """A small training set of real photographs and the option file of a training on it."""
    (folder / 'photographs').mkdir()
    for name in ('astronaut', 'chelsea', 'coffee', 'rocket'):
        cv2.imwrite(str(folder / 'photographs' / f'{name}.png'), getattr(skimage.data, name)()[100:260, 100:260, ::-1])
    build(hr=folder / 'photographs', out=folder, scales=[2])
    options = {
        'name': 'run', 'model_type': 'ELANModel', 'scale': 2, 'num_gpu': 0, 'manual_seed': 3,
        'datasets': {'train': {
            'name': 'photographs', 'type': 'PairedRawLmdbDataset', 'io_backend': {'type': 'lmdb'},
            'dataroot_gt': str(folder / 'HR_raw.lmdb'), 'dataroot_lq': str(folder / 'LR_bicubic_X2_raw.lmdb'),
            'gt_size': 32, 'use_hflip': True, 'use_rot': True, 'num_worker_per_gpu': workers, 'batch_size_per_gpu': 4}},
        'network_g': {'type': 'ELAN', 'upscale': 2, 'num_feat': 15, 'num_block': 2, 'num_share': 1},
        'path': {'pretrain_network_g': None},
        'train': {'optim_g': {'type': 'Adam', 'lr': 1e-3}, 'total_iter': total, 'ema_decay': 0.99, 'accumulate': 2,
                  'scheduler': {'type': 'MultiStepLR', 'milestones': [total // 2], 'gamma': 0.5},
                  'pixel_opt': {'type': 'L1Loss'}},
        'logger': {'print_freq': 1, 'save_checkpoint_freq': SAVE_EVERY, 'use_tb_logger': False},
        'dist_params': {'timeout': ENDS_WITHIN / 2},
    }
    path = folder / 'run.yml'
    path.write_text(yaml.safe_dump(options))
    return path


class Run:
    """A training in a folder of its own, started, watched and stopped."""

    def __init__(self, folder: Path, options: Path, args):
        folder.mkdir()
        self.folder, self.options, self.args = folder, options, args
        self.processes: list[subprocess.Popen] = []

    def start(self) -> None:
        command = ['-m', 'elan_basicsr', 'train', '-opt', str(self.options), '--auto_resume', '--launcher', 'pytorch']
        environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'MASTER_ADDR': '127.0.0.1',
                       'MASTER_PORT': str(free_port())}
        size = self.args.processes
        if self.args.signal == 'TERM':
            commands = [(['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(size), *command], {})]
        else:
            commands = [(command, {'RANK': str(rank), 'LOCAL_RANK': str(rank), 'WORLD_SIZE': str(size)})
                        for rank in range(size)]
        self.log = open(self.folder / 'output', 'w')
        self.processes = [
            subprocess.Popen([sys.executable, *words], env={**environment, **more}, cwd=self.folder, stdout=self.log,
                             stderr=self.log, start_new_session=True) for words, more in commands]

    def stop(self) -> str:
        """Send the signal, wait for the end, and tell to whom it was sent."""
        if self.args.signal == 'TERM':
            self.processes[0].terminate()
            self.wait()
            if f'stopped and saved at iteration {self.newest()}' not in self.output():
                self.fail('SIGTERM did not lead to a checkpoint')
            return 'torchrun'
        chosen = random.choice([*range(len(self.processes)), None])
        for rank, process in enumerate(self.processes):
            if chosen in (rank, None):
                process.kill()
        self.wait()
        return 'all' if chosen is None else f'process {chosen}'

    def wait(self, code: int | None = None) -> None:
        for process in self.processes:
            try:
                process.wait(None if code == 0 else ENDS_WITHIN)
            except subprocess.TimeoutExpired:
                self.fail(f'a process did not end within {ENDS_WITHIN} s')
            if code is not None and process.returncode != code:
                self.fail(f'exit code {process.returncode}')
        self.log.close()

    def reach(self, iteration: int) -> int:
        while (now := self.iteration()) < iteration:
            self.check_alive()
            time.sleep(0.005)
        time.sleep(random.uniform(0, 0.05))
        return now

    def wait_for_writing(self) -> str:
        """Until a temporary file stands in one of the folders of checkpoints, and then somewhat longer."""
        while True:
            for name in ('models', 'training_states'):
                for path in (self.folder / 'experiments' / 'run' / name).glob('.*.tmp'):
                    time.sleep(random.uniform(0, 0.01))
                    return path.name.split('.')[1]
            self.check_alive()

    def iteration(self) -> int:
        return max(map(int, re.findall(r'iter:\s*(\d+)', self.output().replace(',', ''))), default=0)

    def output(self) -> str:
        return (self.folder / 'output').read_text(errors='replace')

    def check_alive(self) -> None:
        if any(process.poll() is not None for process in self.processes):
            self.fail('it ended by itself')

    def whole(self) -> set[int]:
        return {int(path.stem) for path in (self.folder / 'experiments' / 'run' / 'training_states').glob('*.state')}

    def newest(self) -> int:
        return max(self.whole(), default=0)

    def fail(self, what: str) -> None:
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        print(self.output()[-3000:])
        raise SystemExit(f'{self.folder.name}: {what}')


def equal(a: Run, b: Run, iteration: int) -> bool:
    """Whether two runs have the same checkpoint and training state, bit for bit."""
    names = f'models/net_g_{iteration}.pth', f'training_states/{iteration}.state'
    return all(same(*(torch.load(run.folder / 'experiments' / 'run' / name, weights_only=True) for run in (a, b)))
               for name in names)


def same(a, b) -> bool:
    if isinstance(a, dict):
        # A file's checksum covers its modification: the content is compared instead.
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a if key != 'files')
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def free_port() -> int:
    with socket.socket() as connection:
        connection.bind(('127.0.0.1', 0))
        return connection.getsockname()[1]


if __name__ == '__main__':
    sys.exit(main())
