"""`basicsr benchmark --table`: ELAN here against the authors' code and SwinIR, each as a ratio with a target."""
from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass

import rich.box
import torch
from rich.console import Console

from elan_basicsr.archs.cpu.library import vector_lanes
from elan_basicsr.data.images import eight_bit, read_bgr
from elan_basicsr.errors import UserError
from elan_basicsr.report.benchmark import (
    check_files,
    check_machine,
    make_call,
    memory_of,
    new_table,
    ratios,
    write_json,
)
from elan_basicsr.report.subjects import COLOURS, OFFICIAL, Subject
from elan_basicsr.report.timing import Timing, inference_call, time_interleaved

SCALE = 4
PATCH = 64
AVX512_LANES = 16
SHARE_OF_PIXELS = 0.999


@dataclass(frozen=True)
class Target:
    """A row: how much ours may take of what theirs takes, by `work` in `memory` or else in time.

    `narrow` is the limit where vectors are narrower than AVX-512's, if it is another one there. `shape` is (batch,
    height, width) of the LR images; `dtype` is ours, theirs is float32; `timing.takes_tf32` tells what that is on a
    GPU.
    """
    key: str
    text: str
    ours: str
    theirs: str
    limit: float
    shape: tuple[int, int, int] = (1, 180, 320)
    work: str = 'inference'
    memory: bool = False
    dtype: str = 'float32'
    narrow: float | None = None

    def limit_here(self) -> float:
        return self.limit if self.narrow is None or vector_lanes() >= AVX512_LANES else self.narrow


def _steps(memory: bool) -> list[Target]:
    kind, what = ('memory', 'peak memory of the training step') if memory else ('step', 'training step')
    return [Target(f'{kind}-{size}', f'{ours}, {what}, {batch} x 64x64: ours / official', ours, theirs,
                   0.50 if memory else limit, (batch, PATCH, PATCH), 'training step', memory,
                   narrow=None if memory else narrow)
            for size, ours, theirs, batch, limit, narrow in (('light', 'ELAN-light', 'official-light', 4, 0.42, 0.55),
                                                             ('classic', 'ELAN', 'official', 2, 0.50, 0.65))]


def _checkpointed(target: Target) -> Target:
    return Target(f'{target.key}-checkpoint', f'{target.text}, use_checkpoint', f'{target.ours}:use_checkpoint=true',
                  target.theirs, 0.25, target.shape, target.work, target.memory)


TARGETS = [
    Target('light', 'ELAN-light, 320x180: ours / official', 'ELAN-light', 'official-light', 0.20, narrow=0.28),
    Target('swinir', 'ELAN-light / SwinIR-light, 320x184', 'ELAN-light', 'SwinIR-light', 0.22, (1, 184, 320)),
    Target('bf16', 'ELAN-light in bf16 / SwinIR-light in float32, 320x184', 'ELAN-light', 'SwinIR-light', 0.085,
           (1, 184, 320), dtype='bf16'),
    Target('classic', 'ELAN, 320x180: ours / official', 'ELAN', 'official', 0.20, narrow=0.28),
    *_steps(memory=False),
    *_steps(memory=True),
    *map(_checkpointed, _steps(memory=True)),
    Target('memory-image', 'ELAN-light, peak memory at 1280x720: ours / official', 'ELAN-light', 'official-light',
           0.40, (1, 720, 1280), memory=True),
]


@dataclass
class Result:
    """A row's figures, in seconds or bytes; the spread is of the single rounds' ratios."""
    key: str
    text: str
    limit: float
    ours: float | None
    theirs: float | None
    ratio: float | None
    spread: tuple[float, float] | None
    grey_levels: float | None = None


def benchmark_table(keys: Sequence[str], *, official: str | None, runs: int = 5, device: str = 'cpu',
                    threads: int | None = None, trained: Sequence[str] = (), json_file: str | None = None) -> int:
    """Measure the rows of the table, all when `keys` is empty, and print them beside their targets.

    Args:
        keys: `key` of the rows.
        official: The checkout of the authors' repository; without it the rows that need it are left out.
        runs: Rounds per row.
        device: Where.
        threads: Of the CPU; torch's default when not given.
        trained: A checkpoint of a trained ELAN-light x4 and LR images, on which the error of bf16 is stated.
        json_file: Where the figures go.

    Returns:
        The exit code, 0.

    Raises:
        UserError: A row, file or device is not there.
    """
    known = {target.key: target for target in TARGETS}
    for key in keys:
        if key not in known:
            raise UserError(f'--table {key}: is no row; expected some of {", ".join(known)}')
    chosen = [known[key] for key in keys] or [target for target in TARGETS
                                              if official or target.theirs not in OFFICIAL]
    check_machine([device])
    check_files(json_file)
    for target in chosen:
        _subjects(target, official)[1].build()
    threads = threads or torch.get_num_threads()
    error = grey_level_error(trained[0], trained[1:], device) if trained else None
    results = []
    for target in chosen:
        results.append(_measure(target, official, runs, device, threads))
        if target.dtype == 'bf16':
            results[-1].grey_levels = error
        sys.stderr.write(f'{target.key}: {_ratio(results[-1])}\n')
    _print(results, f'{device}, {threads} threads, {runs} runs')
    if json_file:
        write_json({'device': device, 'threads': threads, 'runs': runs,
                    'table': [asdict(result) for result in results]}, json_file)
    return 0


def _subjects(target: Target, official: str | None) -> tuple[Subject, Subject]:
    return Subject(target.ours, SCALE), Subject(target.theirs, SCALE, official)


def _measure(target: Target, official: str | None, runs: int, device: str, threads: int) -> Result:
    batch, height, width = target.shape
    shape = (batch, COLOURS, height, width)
    pair = list(zip(('ours', 'theirs'), _subjects(target, official), (target.dtype, 'float32'), strict=True))
    if target.memory:
        ours, theirs = (memory_of(subject, target.work, shape, device, dtype, threads) for _, subject, dtype in pair)
        ratio = ours / theirs if ours and theirs else None
        return Result(target.key, target.text, target.limit_here(), ours, theirs, ratio, None)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context('spawn')) as pool:
        try:
            timings = pool.submit(_time, pair, target.work, shape, runs, device, threads).result()
        except BrokenProcessPool:
            raise UserError(f'--table {target.key}: its process was killed; expected more memory') from None
    ratio, low, high = ratios(timings['ours'], timings['theirs'])
    return Result(target.key, target.text, target.limit_here(), timings['ours'].median, timings['theirs'].median, ratio,
                  (low, high))


def _time(pair, work: str, shape, runs: int, device: str, threads: int) -> dict[str, Timing]:
    """In a process for each row: what earlier rows freed changes how the C library serves large tensors."""
    torch.set_num_threads(threads)
    return time_interleaved({side: make_call(subject, work, shape, device, dtype) for side, subject, dtype in pair},
                            runs, device)


def grey_level_error(checkpoint: str, images: Sequence[str], device: str = 'cpu') -> float:
    """By how many grey levels of 255 bf16 is off from float32 at 99.9 % of the pixels of all images, or less.

    On a GPU both round the factors of the convolutions that autocast leaves alone to TF32, by torch's defaults.

    Args:
        checkpoint: Of a trained network.
        images: LR images.
        device: Where.

    Raises:
        UserError: A file cannot be read.
    """
    if not images:
        raise UserError('--trained: has no images; expected a checkpoint and LR images after it')
    net = Subject(checkpoint, SCALE).build().to(device)
    errors = []
    for file in images:
        image = eight_bit(read_bgr(file))
        x = torch.from_numpy(image[..., ::-1].copy()).permute(2, 0, 1)[None].to(device).float() / 255
        exact, rough = (inference_call(net, x, dtype)() for dtype in (torch.float32, torch.bfloat16))
        errors.append((rough.float() - exact).abs().flatten().cpu() * 255)
        if not errors[-1].isfinite().all():
            raise UserError(f'--trained {checkpoint}: gives values that are not finite on {file}; expected trained '
                            'weights')
    every = torch.cat(errors)
    return every.kthvalue(max(round(SHARE_OF_PIXELS * len(every)), 1)).values.item()


def _print(results: Sequence[Result], setting: str) -> None:
    table = new_table(setting, ['x4', 'ratio', 'at most', 'single rounds', 'ours', 'theirs'], box=rich.box.MARKDOWN)
    for result in results:
        ours, theirs = (_show(value, in_seconds=result.spread is not None) for value in (result.ours, result.theirs))
        note = f' (off by {result.grey_levels:.2f} grey levels)' if result.grey_levels is not None else ''
        table.add_row(result.text + note, _ratio(result), f'{result.limit:.3g}',
                      '{:.3f}–{:.3f}'.format(*result.spread) if result.spread else '', ours, theirs)
    Console(highlight=False, width=200).print(table)


def _ratio(result: Result) -> str:
    return '–' if result.ratio is None else f'{result.ratio:.3f}'


def _show(value: float | None, in_seconds: bool) -> str:
    if value is None:
        return 'out of memory'
    return f'{value:.3g} s' if in_seconds else f'{value / 2**20:,.0f} MiB'
