"""How much memory a network takes: the peak in a process of its own, above what that process has when idle."""
from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch
from torch import nn

from elan_basicsr.inference import too_large
from elan_basicsr.interop.plugins import import_modules, imported
from elan_basicsr.report.timing import inference_call, training_step

STATUS, CLEAR_REFS = Path('/proc/self/status'), Path('/proc/self/clear_refs')
TRAINING_STEPS = 2  # Adam's moments are there from the second on


def peak_memory(build: Callable[[], nn.Module], shape: tuple[int, int, int, int], *, scale: int | None = None,
                value_range: float = 1., device: str = 'cpu', dtype: torch.dtype = torch.float32,
                threads: int | None = None) -> int | None:
    """The peak in bytes of building a network and running it, measured in a new process.

    Args:
        build: Makes the network; picklable, such as `functools.partial(ELAN, upscale=4)`.
        shape: Of the input, (B, C, h, w).
        scale: The network's enlargement, to measure training steps; None to measure inference.
        value_range: What stands for white in the network's images.
        device: The process's resident set on a CPU, above what it has with torch loaded; else what torch allocates.
        dtype: float32, or mixed precision by autocast.
        threads: Of the CPU; torch's default when not given.

    Returns:
        Bytes; None where the process was killed or the device ran out of memory.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context('spawn'), import_modules, (imported(),)) as pool:
        try:
            return pool.submit(_measure, build, shape, scale, value_range, device, dtype, threads).result()
        except Exception as error:
            if isinstance(error, BrokenProcessPool) or too_large(error):
                return None
            raise


def _measure(build, shape, scale, value_range, device, dtype, threads) -> int:
    if threads:
        torch.set_num_threads(threads)
    torch.ones(256, 256, device=device) @ torch.ones(256, 256, device=device)  # threads and handles are there
    idle = _start(device)
    net = build().to(device)
    x = torch.rand(shape, device=device) * value_range
    if scale is None:
        inference_call(net, x, dtype)()
    else:
        y = torch.rand(*shape[:2], shape[2] * scale, shape[3] * scale, device=device) * value_range
        step = training_step(net, x, y, dtype)
        for _ in range(TRAINING_STEPS):
            step()
    return _peak(device) - idle


def _start(device: str) -> int:
    """Forget earlier peaks; what is taken now."""
    if torch.device(device).type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if CLEAR_REFS.exists():
        CLEAR_REFS.write_text('5', encoding='ascii')  # the kernel's word for: the peak starts from here
    return _peak(device)


def _peak(device: str) -> int:
    if torch.device(device).type == 'cuda':
        return torch.cuda.max_memory_allocated(device)
    if STATUS.exists():
        line = next(line for line in STATUS.read_text(encoding='ascii').splitlines() if line.startswith('VmHWM:'))
        return int(line.split()[1]) << 10
    import resource  # macOS, which counts bytes where other systems count KiB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == 'darwin' else peak << 10
