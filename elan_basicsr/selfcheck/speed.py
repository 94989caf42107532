"""Time and peak memory of training steps and of inference, as `basicsr train` and `test` run them and otherwise."""
from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch

from elan_basicsr.archs import gpu
from elan_basicsr.archs.elan_arch import ELAN
from elan_basicsr.config.checks import has_compiler
from elan_basicsr.models import cuda_graphs
from elan_basicsr.report.timing import inference_call, synchronise, time_interleaved, training_step
from elan_basicsr.selfcheck.checks import Check, Machine, Outcome
from elan_basicsr.selfcheck.network import SIZES, leave_to_modules

RUNS = 5
SCALE = 4


class Work(NamedTuple):
    """What is timed: the network, whether it is trained, and the shape of its input."""
    network: str
    training: bool
    shape: tuple[int, int, int, int]

    @property
    def name(self) -> str:
        batch, _, height, width = self.shape
        size = f'{width}x{height}'
        return f'{self.network}, ' + (f'step, {batch} x {size}' if self.training else f'image, {size}')


GPU_WORK = (Work('ELAN-light', True, (64, 3, 64, 64)), Work('ELAN-light', True, (16, 3, 64, 64)),
            Work('ELAN', True, (32, 3, 48, 48)), Work('ELAN-light', False, (1, 3, 180, 320)),
            Work('ELAN-light', False, (1, 3, 1080, 1920)))
CPU_WORK = (Work('ELAN-light', True, (4, 3, 64, 64)), Work('ELAN-light', False, (1, 3, 180, 320)))
QUICK_WORK = (Work('ELAN-light', True, (1, 3, 64, 64)), Work('ELAN-light', False, (1, 3, 90, 160)))


def checks(machine: Machine) -> Iterator[Check]:
    """In float32, as option files have it that say nothing else, in bf16, without kernels, by CUDA graphs, compiled."""
    for work in GPU_WORK if machine.on_gpu else QUICK_WORK if machine.quick else CPU_WORK:
        yield Check(work.name, 'float32', partial(measure, machine, work, torch.float32))
        yield Check(work.name, 'bf16', partial(measure, machine, work, torch.bfloat16))
        if machine.on_gpu and gpu.usable(machine.device):
            yield Check(work.name, 'modules', partial(measure, machine, work, torch.float32, modules=True))
        if machine.on_gpu and work.training:
            yield Check(work.name, 'CUDA graphs', partial(measure, machine, work, torch.float32, graphs=True))
        if machine.on_gpu and not machine.quick:
            yield Check(work.name, 'compiled', partial(measure, machine, work, torch.float32, compiled=True))
            yield Check(work.name, 'bf16, compiled', partial(measure, machine, work, torch.bfloat16, compiled=True))


def measure(machine: Machine, work: Work, dtype: torch.dtype, modules: bool = False, compiled: bool = False,
            graphs: bool = False) -> Outcome:
    """The median of RUNS runs, and the peak of what a GPU's memory held."""
    if time.monotonic() > machine.deadline:
        return Outcome(None, note='no time was left')
    if compiled and not has_compiler():
        return Outcome(None, note='torch.compile needs a C++ compiler')
    net = ELAN(upscale=SCALE, **SIZES[work.network]).to(machine.device)
    if modules:
        leave_to_modules(net)
    if compiled:  # the modules, too
        net.compile()
    x = torch.rand(work.shape, device=machine.device)
    gt = torch.rand(*work.shape[:2], *(SCALE * edge for edge in work.shape[2:]), device=machine.device)
    call: Callable[[], object] = training_step(net, x, gt, dtype) if work.training else inference_call(net, x, dtype)
    try:
        if graphs:
            cuda_graphs.record(net, work.shape, None, accumulates=False)
        timing = time_interleaved({'': call}, RUNS, str(machine.device))['']
        if not machine.on_gpu:
            return Outcome(True, f'{1000 * timing.median:,.0f} ms')
        torch.cuda.reset_peak_memory_stats(machine.device)
        call()
        synchronise(str(machine.device))
        peak = torch.cuda.max_memory_allocated(machine.device)
        return Outcome(True, f'{1000 * timing.median:,.1f} ms', f'{peak / 2**30:.2f} GiB')
    except torch.OutOfMemoryError:
        return Outcome(None, note='does not fit into the memory')
    finally:
        if machine.on_gpu:
            torch.cuda.empty_cache()
