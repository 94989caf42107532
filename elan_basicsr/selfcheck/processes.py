"""Several processes under torchrun, one for each GPU, or two on a CPU: against one, and when one is killed."""
from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import elan_basicsr
from elan_basicsr.engine.test import test
from elan_basicsr.selfcheck.checks import Check, Machine, Outcome, within
from elan_basicsr.selfcheck.network import relative_deviations
from elan_basicsr.selfcheck.training import checkpoint, quiet, run, write_options

SECONDS = 180  # for a run of a few iterations, or for one to end
LIMIT = 1e-3
"""Largest deviation of a gradient: sums in another order give 1e-6, statistics of one process alone 1e-1."""
ONE_STEP = ['train.optim_g={type: SGD, lr: 1.0}', 'train.scheduler.milestones=[9]', 'train.accumulate=1',
            'train.grad_clip=~', 'train.total_iter=1', 'val.val_freq=1', 'sync_bn=true', 'deterministic=true']


def checks(machine: Machine) -> Iterator[Check]:
    """What several processes promise: the gradients of one, the figures of one, and an end."""
    number = torch.cuda.device_count() if machine.on_gpu else 2
    yield Check('processes', f'{number} under torchrun, gradients', partial(gradients_agree, machine, number))
    yield Check('processes', 'validation shared among them', partial(figures_agree, machine))
    if number > 1 and not machine.quick:
        yield Check('processes', 'one is killed', partial(ends, machine, number))


def gradients_agree(machine: Machine, number: int) -> Outcome:
    """Gradients and statistics of a step with `sync_bn` are those of one process with the whole batch."""
    patches = [f'datasets.train.batch_size_per_gpu={number}']
    run(machine, 'start', [*ONE_STEP, *patches, 'train.optim_g.lr=1e-30'])
    run(machine, 'one', [*ONE_STEP, *patches])
    TorchRun(machine, number, 'several', [*ONE_STEP, 'datasets.train.batch_size_per_gpu=1']).finish()
    start, one, several = (checkpoint(machine, name, 1) for name in ('start', 'one', 'several'))
    deviations = relative_deviations(_step(start, several), _step(start, one))
    name, value = max(deviations.items(), key=lambda item: item[1])
    return within(value, LIMIT, name)


def _step(start: dict[str, Tensor], end: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients, which a step of SGD at a rate of 1 has subtracted from the weights, and the statistics."""
    network = {name: value.double() for name, value in end.items()
               if name.startswith('params.') and value.is_floating_point()}
    return {f'statistic {name}' if '.running_' in name else f'gradient of {name}':
            value if '.running_' in name else value - start[name] for name, value in network.items()}


def figures_agree(machine: Machine) -> Outcome:
    """One process measures of the network that several have saved what they measured, to the last digit logged."""
    options = json.loads(write_options(machine).read_text(encoding='utf-8'))
    shared = {key: options[key] for key in ('model_type', 'scale', 'num_gpu', 'manual_seed', 'network_g', 'val')}
    file = machine.folder / 'test.json'
    weights = machine.folder / 'experiments' / 'several' / 'models' / 'net_g_1.pth'
    file.write_text(json.dumps({**shared, 'name': 'alone', 'datasets': {'test_1': options['datasets']['val']}, 'path': {
        'pretrain_network_g': str(weights), 'param_key_g': 'params_ema'}}), encoding='utf-8')
    with quiet():
        test(str(file), root=str(machine.folder), launcher='none')
    together, alone = (re.findall(r'# psnr: ([\d.]+)', _log(machine.folder / folder))
                       for folder in ('experiments/several', 'results/alone'))
    return Outcome(bool(alone) and together[:1] == alone[:1], ' '.join(together[:1]), note=f'one process has {alone}')


def ends(machine: Machine, number: int) -> Outcome:
    """All processes end, with an exit code that is not 0, when one of them is killed."""
    started = TorchRun(machine, number, 'killed', ['train.total_iter=100000', 'val.val_freq=100000'])
    try:
        started.wait_for('iter:       3')
        started.kill_one()
        start = time.monotonic()
        code = started.process.wait(SECONDS)
        return Outcome(code != 0, f'{time.monotonic() - start:.0f} s', f'{SECONDS} s', f'exit code {code}')
    except subprocess.TimeoutExpired:
        return Outcome(False, f'{SECONDS} s', note='they have not ended')
    finally:
        started.stop()


def _log(folder: Path) -> str:
    return '\n'.join(log.read_text(encoding='utf-8') for log in sorted(folder.glob('*.log')))


class TorchRun:
    """A training under torchrun, in a session of its own, with its output in a file.

    Args:
        machine: Where.
        number: Processes.
        name: Of the run.
        overrides: As for `--set`.
    """

    def __init__(self, machine: Machine, number: int, name: str, overrides: list[str]):
        package = str(Path(elan_basicsr.__file__).parents[1])  # which may be on the path by this process's folder alone
        path = os.pathsep.join(filter(None, [package, os.environ.get('PYTHONPATH')]))
        self.folder, self.output = machine.folder / 'experiments' / name, machine.folder / f'{name}.txt'
        with open(self.output, 'wb') as output:
            self.process = subprocess.Popen(
                [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(number), '-m',
                 'elan_basicsr', 'train', '-opt', str(write_options(machine)), '--set', f'name={name}', *overrides],
                cwd=machine.folder, env={**os.environ, 'PYTHONPATH': path}, stdout=output, stderr=output,
                start_new_session=True)

    def finish(self) -> None:
        """Wait for its end.

        Raises:
            RuntimeError: It failed, or takes too long.
        """
        try:
            code = self.process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f'not ended after {SECONDS} s; {self.last_words()}') from None
        finally:
            self.stop()
        if code:
            raise RuntimeError(f'exit code {code}; {self.last_words()}')

    def last_words(self) -> str:
        """The line of its output that tells most."""
        lines = self.output.read_text(encoding='utf-8', errors='replace').splitlines() or ['no output']
        return next((line for line in lines if 'error' in line.lower()), lines[-1])

    def wait_for(self, text: str) -> None:
        """Until the run's log holds a text."""
        end = time.monotonic() + SECONDS
        while text not in _log(self.folder):
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f'no sign of its iterations; {self.last_words()}')
            time.sleep(0.1)

    def kill_one(self) -> None:
        """Kill the last process that torchrun has started, as a system out of memory would."""
        children = Path(f'/proc/{self.process.pid}/task/{self.process.pid}/children').read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)

    def stop(self) -> None:
        """End what is left of it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
