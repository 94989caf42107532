"""Device and process group, worked out from the environment the launcher left."""
from __future__ import annotations

import datetime
import gc
import os
import socket
import subprocess
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from elan_basicsr.errors import RunLost, UserError

# Names under which each launcher tells rank, number of processes and rank on this host.
_VARIABLES = {
    'pytorch': ('RANK', 'WORLD_SIZE', 'LOCAL_RANK'),
    'slurm': ('SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_LOCALID'),
    'mpi': ('OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_SIZE', 'OMPI_COMM_WORLD_LOCAL_RANK'),
}
_HYDRA_VARIABLES = ('PMI_RANK', 'PMI_SIZE', 'MPI_LOCALRANKID')  # MPICH and Intel MPI
_STARTED_BY = {'pytorch': 'torchrun', 'slurm': 'srun', 'mpi': 'mpirun'}
_DEFAULT_PORT = '29500'  # torch.distributed's own
TIMEOUT = 600
"""Seconds that a process waits for the others; `dist_params.timeout` overrides it."""
_NOTICE = 5  # seconds for all processes to notice that one is lost, and for a process to leave the others


@dataclass(frozen=True)
class Processes:
    """This process among those of the run."""
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    launcher: str = 'none'

    @property
    def distributed(self) -> bool:
        return self.launcher != 'none'


def detect_launcher() -> str:
    """The launcher that started this process: 'pytorch', 'slurm', 'mpi', or 'none'."""
    if 'TORCHELASTIC_RUN_ID' in os.environ or {'RANK', 'WORLD_SIZE'} <= os.environ.keys():
        return 'pytorch'
    # sbatch sets SLURM_NTASKS too; only a step started by srun has more than the batch script itself.
    if os.environ.get('SLURM_STEP_ID', '').isdigit() and int(os.environ.get('SLURM_NTASKS', '1')) > 1:
        return 'slurm'
    if 'OMPI_COMM_WORLD_SIZE' in os.environ or {'PMI_SIZE', 'MPI_LOCALRANKID'} <= os.environ.keys():
        return 'mpi'
    return 'none'


def launched(launcher: str | None = None) -> bool:
    """Whether a launcher starts the run's processes, one for each GPU; `launcher` is the one that was named, if any."""
    return (launcher or detect_launcher()) != 'none'


def read_environment(launcher: str | None = None) -> Processes:
    """Rank and size from the launcher's variables, also written to the ones torch.distributed reads.

    Raises:
        UserError: The environment of the launcher is missing, incomplete or contradictory.
    """
    launcher = launcher or detect_launcher()
    if launcher == 'none':
        return Processes()
    names = _VARIABLES[launcher]
    if launcher == 'mpi' and names[0] not in os.environ:
        names = _HYDRA_VARIABLES
    values = []
    for name in names:
        text = os.environ.get(name)
        if text is None or not text.isdigit():
            raise UserError(f'--launcher {launcher}: environment variable {name} is '
                            f'{"not set" if text is None else repr(text)}, expected an integer; start the command with '
                            f'{_STARTED_BY[launcher]}, or use --launcher none')
        values.append(int(text))
    rank, world_size, local_rank = values
    if not rank < world_size:
        raise UserError(f'--launcher {launcher}: {names[0]} is {rank} but {names[1]} is {world_size}; '
                        f'ranks count from 0')
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(local_rank))
    os.environ.setdefault('MASTER_PORT', _DEFAULT_PORT)
    if 'MASTER_ADDR' not in os.environ:
        os.environ['MASTER_ADDR'] = _first_host(launcher, world_size)
    return Processes(rank, world_size, local_rank, launcher)


def _first_host(launcher: str, world_size: int) -> str:
    """The host of rank 0, which the others meet at."""
    if launcher == 'slurm':
        nodes = os.environ.get('SLURM_STEP_NODELIST') or os.environ.get('SLURM_NODELIST', '')
        try:
            shown = subprocess.run(['scontrol', 'show', 'hostnames', nodes], capture_output=True, text=True,
                                   check=True, timeout=30)
            return shown.stdout.split()[0]
        except (OSError, subprocess.SubprocessError, IndexError) as error:
            raise UserError(f'--launcher slurm: `scontrol show hostnames {nodes}` failed ({error}); set MASTER_ADDR '
                            'to the host of the first task') from error
    local_size = os.environ.get('OMPI_COMM_WORLD_LOCAL_SIZE') or os.environ.get('LOCAL_WORLD_SIZE')
    if launcher == 'mpi' and local_size == str(world_size):
        return socket.gethostname()
    raise UserError(f'--launcher {launcher}: MASTER_ADDR is not set; set it to the host of rank 0 '
                    '(torchrun does so by itself)')


@contextmanager
def process_group(launcher: str | None = None, *, backend: str = 'gloo', gpu: bool = False,
                  timeout: float = TIMEOUT) -> Iterator[Processes]:
    """Join the run's processes, and leave them at the end.

    The body is one call: what refers to the group, as DistributedDataParallel does, has to be local to the function
    that is called. It is gone then before the group is left, which otherwise may wait for ever: a reference in C++ that
    is the last one waits for the group's threads with the interpreter's lock, which they need.

    Args:
        launcher: See `read_environment`.
        backend: `nccl` or `gloo`.
        gpu: Whether each process has a GPU, by its number on this host; otherwise none is looked at.
        timeout: Seconds after which a process that waits for the others gives up.

    Raises:
        UserError: The environment is wrong, or the processes do not meet.
        RunLost: Another process died, or kept the others waiting for too long.
    """
    processes = read_environment(launcher)
    if not processes.distributed:
        yield processes
        return
    _meet(processes, backend, gpu, timeout)
    try:
        yield processes
    except BaseException as error:
        lost = is_loss(error)
        missing = _who_is_missing(processes) if lost else ''
        _clear_frames(error)
        gc.collect()
        # Leaving waits for what is under way with processes that may be gone, so not for long; if it were not begun,
        # the interpreter would do it at its end, when the group's threads no longer get its lock.
        leaving = threading.Thread(target=dist.destroy_process_group, daemon=True)
        leaving.start()
        leaving.join(_NOTICE)
        if not lost:
            raise
        raise RunLost(f'process {processes.rank} of {processes.world_size} lost the others: {missing} (waits end after '
                      f'{timeout:g} s, dist_params.timeout; resume with --auto_resume)') from error
    gc.collect()  # a network in DistributedDataParallel is part of a cycle
    dist.destroy_process_group()


def is_loss(error: BaseException) -> bool:
    """Whether an error says that other processes of the run are gone or do not answer."""
    # gloo's messages begin with the place in its source, but for that of work which a timeout elsewhere ended.
    return isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or 'gloo' in str(error)
                                                or 'Application timeout caused pair closure' in str(error))


def _meet(processes: Processes, backend: str, gpu: bool, timeout: float) -> None:
    if gpu:
        if processes.local_rank >= torch.cuda.device_count():
            raise UserError(f'local rank {processes.local_rank} has no GPU of its own: {torch.cuda.device_count()} on '
                            'this host; start one process per GPU')
        torch.cuda.set_device(processes.local_rank)
    try:
        dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout),
                                device_id=torch.device('cuda', processes.local_rank) if backend == 'nccl' else None)
    except (ValueError, RuntimeError) as error:
        raise UserError(f'the {processes.world_size} processes could not meet at {os.environ["MASTER_ADDR"]}:'
                        f'{os.environ["MASTER_PORT"]}: {str(error).splitlines()[0]}; expected a host that all of them '
                        'reach and a free port (MASTER_ADDR, MASTER_PORT), and as many processes as were announced'
                        ) from error


def _clear_frames(error: BaseException | None) -> None:
    """Let go of the variables of the functions that an error came through, and those before it."""
    if error is not None:
        traceback.clear_frames(error.__traceback__)
        _clear_frames(error.__cause__)
        _clear_frames(error.__context__)


def _who_is_missing(processes: Processes) -> str:
    """Which processes do not say within five seconds that they have noticed, by the store that all of them reach."""
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set(f'lost/{processes.rank}', 'here')
        end = time.monotonic() + _NOTICE
        others = set(range(processes.world_size)) - {processes.rank}
        while others and time.monotonic() < end:
            others -= {rank for rank in others if store.check([f'lost/{rank}'])}
            time.sleep(0.1)
    except RuntimeError:
        return 'the process that all of them meet at ended; its own message tells why'
    if not others:
        return 'the connection between them broke'
    return f'no answer from {", ".join(map(str, sorted(others)))}, which ended (its message tells why) or hangs'
