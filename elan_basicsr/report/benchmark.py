"""`basicsr benchmark`: networks beside each other in time, memory and multiply-adds; tables, JSON and the figure."""
from __future__ import annotations

import json
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import rich.box
import torch
from rich.console import Console
from rich.table import Table

from elan_basicsr.errors import UserError
from elan_basicsr.report.figures import bubble_chart, new_figure, si
from elan_basicsr.report.memory import peak_memory
from elan_basicsr.report.rivals import is_installed, rival
from elan_basicsr.report.subjects import COLOURS, Subject
from elan_basicsr.report.timing import (
    BusyLoops,
    Timing,
    gemm_call,
    inference_call,
    takes_tf32,
    time_interleaved,
    training_step,
)
from elan_basicsr.version import __version__

DTYPES = {'float32': torch.float32, 'bf16': torch.bfloat16}
GEMM = 'gemm', 'float32', 0


@dataclass(frozen=True)
class Settings:
    """What is measured, and how.

    `sizes` are width and height of the LR image, `batch` and `patch` of a training step, `threads` of the CPU, None for
    torch's default. With `busy` each is measured a second time with so many busy loops beside it.
    """
    sizes: Sequence[tuple[int, int]] = ((320, 180),)
    dtypes: Sequence[str] = ('float32',)
    devices: Sequence[str] = ('cpu',)
    threads: Sequence[int | None] = (None,)
    runs: int = 5
    train: bool = False
    batch: int = 4
    patch: int = 64
    memory: bool = False
    busy: int = 0


@dataclass
class Row:
    """One network in one setting. Seconds and bytes; ratios to the first row of the group, None where not measured.

    `busy` loops ran beside it, and `slowdown` is to the same without.
    """
    network: str
    dtype: str
    work: str
    device: str
    threads: int
    shape: tuple[int, int, int, int]
    seconds: tuple[float, ...]
    median: float
    min: float
    max: float
    ratio: float | None = None
    gemm_share: float | None = None  # of the rate of a 2048² product in `gemm_dtype`, measured alongside
    gemm_dtype: str = 'float32'
    memory: int | None = None
    memory_ratio: float | None = None
    busy: int = 0
    slowdown: float | None = None


def benchmark(subjects: Sequence[Subject], settings: Settings, psnr: Mapping[str, float] | None = None,
              json_file: str | None = None, figure: str | None = None, axis: str = 'latency') -> int:
    """Measure networks, print tables, write files.

    Args:
        subjects: The networks; ratios are to the first.
        settings: What is measured.
        psnr: In dB, by name of a network, for the figure.
        json_file: Where everything that was measured goes, the single runs included.
        figure: Where the figure goes: PSNR, if given, against `axis`, `latency` or `macs`.

    Returns:
        The exit code, 0.

    Raises:
        UserError: A network, device or file is not as expected; told before anything is measured.
    """
    psnr = dict(psnr or {})
    subjects = _without_missing(subjects)
    check_request(subjects, settings, psnr, json_file, figure)
    console = Console(highlight=False)
    networks = [{'name': subject.name, 'size': f'{width}x{height}', 'psnr': psnr.get(subject.name),
                 **asdict(subject.complexity(height, width))}
                for width, height in settings.sizes for subject in subjects]
    for table in _network_tables(networks):
        console.print(table)
    groups = []
    for group in measure_groups(subjects, settings):
        for table in _group_tables(group):
            console.print(table)
        groups.append(group)
    if json_file:
        write_json({'networks': networks, 'rows': [asdict(row) for group in groups for row in group]}, json_file)
    if figure:
        bubble_chart(_bubbles(networks[:len(subjects)], groups[0]), axis, figure)
    return 0


def check_request(subjects: Sequence[Subject], settings: Settings, psnr: Mapping[str, float],
                  json_file: str | None, figure: str | None) -> None:
    """Build everything once and try what is optional, before time is spent."""
    names = [subject.name for subject in subjects]
    if not names:
        raise UserError('benchmark: no network; expected names such as ELAN-light SwinIR-light, or --table')
    for name in names:
        if names.count(name) > 1:
            raise UserError(f'benchmark: {name} is given twice; expected networks of different names')
    for name in psnr:
        if name not in names:
            raise UserError(f'--psnr {name}: is none of the networks; expected one of {", ".join(names)}')
    check_machine(settings.devices)
    check_files(json_file, figure)
    for subject in subjects:
        subject.build()


def _without_missing(subjects: Sequence[Subject]) -> list[Subject]:
    """Those whose program is installed; a line on each of the others."""
    there = []
    for subject in subjects:
        program = (rival(subject.spec) or ('',))[0]
        if program and not is_installed(program):
            print(f'basicsr: {subject.name} is left out: pip install {program}', file=sys.stderr)
        else:
            there.append(subject)
    return there


def check_machine(devices: Sequence[str]) -> None:
    """Refuse devices that are not there."""
    for name in devices:
        try:
            torch.empty(1, device=name)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f'--device {name}: cannot be used ({str(error).splitlines()[0]}); expected cpu or one that '
                            '`basicsr doctor` lists') from None


def check_files(json_file: str | None, figure: str | None = None) -> None:
    """Refuse files that could not be written afterwards."""
    for option, file, suffixes in (('--json', json_file, ('.json',)), ('--figure', figure, ('.png', '.pdf', '.svg'))):
        if file is None:
            continue
        if Path(file).suffix.lower() not in suffixes:
            raise UserError(f'{option} {file}: expected a name that ends with {" or ".join(suffixes)}')
        folder = Path(file).resolve().parent
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise UserError(f'{option} {file}: {folder} is no folder that can be written to; make it first')
    if figure:
        new_figure(1, 1)


# ---------------------------------------------------------------------------------------------------------- measuring

def measure_groups(subjects: Sequence[Subject], settings: Settings) -> Iterator[list[Row]]:
    """Inference at each size, then a training step; in each group every network and dtype beside each other."""
    before = torch.get_num_threads()
    work = [('inference', (1, COLOURS, height, width)) for width, height in settings.sizes]
    if settings.train:
        work.append(('training step', (settings.batch, COLOURS, settings.patch, settings.patch)))
    try:
        for (kind, shape), device, threads in product(work, settings.devices, settings.threads):
            threads = threads or before
            torch.set_num_threads(threads)
            rows, busy = _measure_times(subjects, settings, kind, shape, device, threads)
            if settings.memory:
                for row, (subject, _) in zip(rows, product(subjects, settings.dtypes), strict=True):
                    row.memory = memory_of(subject, kind, shape, device, row.dtype, threads)
            for row in rows:
                row.ratio = row.median / rows[0].median
                row.memory_ratio = row.memory / rows[0].memory if row.memory and rows[0].memory else None
            for row, quiet in zip(busy, rows, strict=bool(busy)):
                row.ratio, row.slowdown = row.median / busy[0].median, row.median / quiet.median
            yield rows + busy
    finally:
        torch.set_num_threads(before)


def _measure_times(subjects, settings, kind: str, shape, device: str, threads: int) -> tuple[list[Row], list[Row]]:
    """Rows as it is, and rows with busy loops beside."""
    calls = {(subject.name, dtype): make_call(subject, kind, shape, device, dtype)
             for subject, dtype in product(subjects, settings.dtypes)}
    gemm, gemm_macs = gemm_call(device)
    with BusyLoops(settings.busy) as loops:
        busy = {(*key, settings.busy): loops.beside(call) for key, call in calls.items()} if settings.busy else {}
        timings = time_interleaved({**{(*key, 0): call for key, call in calls.items()}, GEMM: gemm, **busy},
                                   settings.runs, device)
    rate = gemm_macs / timings.pop(GEMM).median
    macs = {subject.name: subject.complexity(*shape[2:]).macs for subject in subjects if kind == 'inference'}
    rows = [Row(name, dtype, kind, device, threads, shape, timing.seconds, timing.median, timing.min, timing.max,
                gemm_share=macs[name] / timing.median / rate if macs.get(name) else None,
                gemm_dtype='TF32' if takes_tf32(device) else 'float32', busy=busy)
            for (name, dtype, busy), timing in timings.items()]
    return [row for row in rows if not row.busy], [row for row in rows if row.busy]


def make_call(subject: Subject, kind: str, shape: tuple[int, int, int, int], device: str,
              dtype: str) -> Callable[[], object]:
    """What is timed: `kind` is `inference` or `training step`, on random images."""
    net = subject.build().to(device)
    x = torch.rand(shape, device=device) * subject.value_range
    if kind == 'inference':
        return inference_call(net, x, DTYPES[dtype])
    y = torch.rand(*shape[:2], *(edge * subject.scale for edge in shape[2:]), device=device) * subject.value_range
    return training_step(net, x, y, DTYPES[dtype])


def memory_of(subject: Subject, kind: str, shape: tuple[int, int, int, int], device: str, dtype: str,
              threads: int) -> int | None:
    """Peak memory in bytes, of a process of its own."""
    return peak_memory(subject.build, shape, scale=None if kind == 'inference' else subject.scale,
                       value_range=subject.value_range, device=device, dtype=DTYPES[dtype], threads=threads)


# ------------------------------------------------------------------------------------------------------------ showing

def machine() -> dict:
    """What the figures depend on."""
    names = re.findall(r'model name\s*:\s*(.+)', _text('/proc/cpuinfo')) or [platform.processor() or platform.machine()]
    return {'cpu': names[0], 'gpus': [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
            'torch': torch.__version__, 'elan_basicsr': __version__, 'python': platform.python_version()}


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding='utf-8', errors='replace')
    except OSError:
        return ''


def write_json(content: dict, file: str) -> None:
    """Write figures with the machine they are from."""
    text = json.dumps({'machine': machine(), **content}, indent=1, allow_nan=False)
    try:
        Path(file).write_text(text + '\n', encoding='utf-8')
    except OSError as error:
        raise UserError(f'--json {file}: cannot be written ({error.strerror})') from None


def new_table(title: str, columns: Sequence[str], box: rich.box.Box = rich.box.SIMPLE_HEAD) -> Table:
    """A table whose first column is text and the others figures."""
    table = Table(title=title, title_justify='left', box=box)
    for index, column in enumerate(columns):
        table.add_column(column, justify='right' if index else 'left', overflow='fold', no_wrap=index > 0,
                         min_width=0 if index else 16)
    return table


def mib(size: int | None) -> str:
    return '–' if size is None else f'{size / 2**20:,.0f}'


def _show(value: float | None, form: str) -> str:
    return '–' if value is None else format(value, form)


def _network_tables(networks: Sequence[dict]) -> Iterator[Table]:
    for size in dict.fromkeys(network['size'] for network in networks):
        table = new_table(f'{size} LR', ['network', 'parameters', 'MACs (torch)', 'MACs (paper)', 'PSNR'])
        for row in networks:
            if row['size'] == size:
                table.add_row(row['name'], _show(row['parameters'] or None, ',d'), *('–' if row[key] is None else si(
                    row[key]) for key in ('macs', 'paper_macs')), _show(row['psnr'], '.2f'))
        yield table


def _group_tables(rows: Sequence[Row]) -> Iterator[Table]:
    """Time, then that beside busy loops and memory if they were measured."""
    quiet, busy = ([row for row in rows if bool(row.busy) == wanted] for wanted in (False, True))
    first = rows[0]
    batch, _, height, width = first.shape
    where = f'{first.device}, {first.threads} threads' if first.device == 'cpu' else first.device
    what = f'{first.work}, {f"{batch} x " if batch > 1 else ""}{width}x{height}, {where}'
    table = new_table(f'{what}, {len(first.seconds)} runs, GEMM in {first.gemm_dtype}',
                      ['network', 'dtype', 'median s', 'min', 'max', 'ratio', 'of GEMM'])
    for row in quiet:
        table.add_row(*_times(row), _show(row.gemm_share, '.0%'))
    yield table
    if busy:
        table = new_table(f'{what}, {len(first.seconds)} runs, busy loops beside: {busy[0].busy}',
                          ['network', 'dtype', 'median s', 'min', 'max', 'ratio', 'of quiet'])
        for row in busy:
            table.add_row(*_times(row), _show(row.slowdown, '.2f'))
        yield table
    if any(row.memory is not None for row in rows):
        table = new_table(f'{what}, peak memory', ['network', 'dtype', 'MiB', 'ratio'])
        for row in quiet:
            table.add_row(row.network, row.dtype, mib(row.memory), _show(row.memory_ratio, '.3f'))
        yield table


def _times(row: Row) -> Iterator[str]:
    yield from (row.network, row.dtype, *(f'{value:.4g}' for value in (row.median, row.min, row.max)),
                f'{row.ratio:.3f}')


def _bubbles(networks: Sequence[dict], rows: Sequence[Row]) -> list[dict]:
    """The networks of the first group, each with its latency in the first dtype."""
    latency = {row.network: row.median for row in reversed(rows) if not row.busy}
    return [{**network, 'latency': latency[network['name']]} for network in networks]


def ratios(ours: Timing, theirs: Timing) -> tuple[float, float, float]:
    """The ratio of the medians, and the smallest and the largest of a single round."""
    rounds = [a / b for a, b in zip(ours.seconds, theirs.seconds, strict=True)]
    return ours.median / theirs.median, min(rounds), max(rounds)
