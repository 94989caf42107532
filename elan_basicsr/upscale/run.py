"""`basicsr upscale`: files in, larger files out; what cannot be read is reported, and the rest goes on."""
from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from elan_basicsr.data.images import Changes, counted
from elan_basicsr.data.pictures import Picture, read_picture, read_size
from elan_basicsr.errors import RunLost, UserError
from elan_basicsr.inference import too_large
from elan_basicsr.interop.networks import load_network
from elan_basicsr.interop.weights import fitting
from elan_basicsr.upscale import video
from elan_basicsr.upscale.enlarge import DTYPES, LEAST_SCALE, Enlarger
from elan_basicsr.upscale.image_files import (
    FORMATS,
    LOSSLESS,
    QUALITY,
    WITH_QUALITY,
    check_target,
    holds_16_bits,
    lost,
    write_picture,
)
from elan_basicsr.upscale.plan import Job, plan

SCALE = 4
"""Where neither weights nor a scale are given."""
MAX_PIXELS = 64_000_000
"""Of one input image, unless the user allows more: at x4 the result of this many takes 3 GB."""
EXIT_SOME_FAILED = 1
_LARGE = 2**27  # bytes of a result beyond which the next image waits until it is written


def upscale(inputs: Sequence[str], *, out: str, weights: str | None, scale: float | None = None,
            format_: str | None = None, tile: int | None = None, tile_overlap: int | None = None,
            self_ensemble: bool = False, dtype: str = 'float32', device: str | None = None,
            max_pixels: int = MAX_PIXELS, quality: str | None = None, overwrite: bool = False) -> int:
    """Enlarge images and videos.

    Args:
        inputs, out, format_: See `plan.plan`.
        weights: A checkpoint of any form `load_network` knows, or a name of the table; what fits the scale when None.
        scale, tile, tile_overlap, self_ensemble, dtype: See `enlarge.Enlarger`.
        device: Such as `cuda:0` or `cpu`; the best there is when None.
        max_pixels: Largest input, checked from its header.
        quality: Of JPEG, WebP and AVIF, 1 to 100; or `lossless`, which WebP can be.
        overwrite: Whether to make outputs anew that are there; they are left alone otherwise.

    Returns:
        The exit code: 0, or 1 if a file could not be read, enlarged or written.

    Raises:
        UserError: Nothing could be started; see `plan.plan` and `load_network`.
        RunLost: The device is lost to this process; what is done stands.
    """
    _check_arguments(scale, format_, tile, tile_overlap, dtype, max_pixels)
    if weights is None:
        scale = SCALE if scale is None else scale
        weights = fitting(scale)
    jobs, passed_over = plan(inputs, out, format_)
    how_well = _quality(quality, jobs)
    waiting = [job for job in jobs if overwrite or not job.target.exists()]
    report = _Report(len(jobs), there=len(jobs) - len(waiting), passed_over=passed_over)
    if waiting:
        where = _device(device)
        enlarger = Enlarger(load_network(weights, where), device=where, dtype=dtype, tile=tile, overlap=tile_overlap,
                            self_ensemble=self_ensemble, scale=scale)
        with _progress() as progress:
            _Run(enlarger, progress, report, max_pixels, how_well).all(waiting)
    for line in report.changes.lines():
        sys.stderr.write(f'basicsr: {line}\n')
    print(report.summary(out))
    return EXIT_SOME_FAILED if report.failed else 0


def _check_arguments(scale, format_, tile, tile_overlap, dtype, max_pixels) -> None:
    if scale is not None and not scale >= LEAST_SCALE:  # false for NaN, too
        raise UserError(f'--scale {scale}: expected a number from {LEAST_SCALE}')
    for name, value, lowest in (('--tile', tile, 0), ('--tile-overlap', tile_overlap, 0),
                                ('--max-pixels', max_pixels, 1)):
        if value is not None and value < lowest:
            raise UserError(f'{name} {value}: expected an integer from {lowest}')
    if format_ is not None and f'.{format_}' not in FORMATS:
        raise UserError(f'--format {format_}: expected {", ".join(name[1:] for name in FORMATS)}')
    if dtype not in DTYPES:
        raise UserError(f'--dtype {dtype}: expected {", ".join(DTYPES)}')


def _quality(given: str | None, jobs: Sequence[Job]) -> int | str:
    """The quality for `write_picture`; raise UserError for one that no output, or not every output, can have."""
    if given is None:
        return QUALITY
    kinds = {FORMATS[job.target.suffix.lower()]: job for job in jobs if not job.is_video}
    if given == LOSSLESS:
        lossy = next((job for kind, job in kinds.items() if kind in WITH_QUALITY and kind != 'WEBP'), None)
        if lossy:
            raise UserError(f'--quality {LOSSLESS}: {lossy.target} cannot be; expected WebP, PNG, TIFF or BMP, such as '
                            'by --format webp')
        return LOSSLESS
    if not given.isdecimal() or not 1 <= int(given) <= 100:
        raise UserError(f'--quality {given}: expected 1 to 100, or {LOSSLESS} for WebP')
    if not any(kind in WITH_QUALITY for kind in kinds):
        raise UserError(f'--quality {given}: no output is JPEG, WebP or AVIF; leave it out, or add --format webp')
    return int(given)


def _device(name: str | None) -> torch.device:
    name = name or ('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # a build without CUDA asserts
        if too_large(error):
            raise UserError(f'--device {name}: has no memory free; close other programs, or use --device cpu') from None
        raise UserError(f'--device {name}: there is none here; expected cpu, or cuda or cuda:N with a GPU') from None
    return device


@dataclass
class _Report:
    jobs: int
    there: int
    passed_over: list[Path] = field(default_factory=list)
    changes: Changes = field(default_factory=Changes)
    done: int = 0
    failed: int = 0
    pixels: int = 0  # of the results
    start: float = field(default_factory=time.monotonic)

    def summary(self, out: str) -> str:
        seconds = time.monotonic() - self.start
        text = f'{out}: {self.done} of {self.jobs} done'
        if self.done:
            text += f' in {seconds:.1f} s, {self.pixels / 1e6 / seconds:.2f} megapixels/s'
        if self.there:
            text += f'; {self.there} already there (--overwrite makes them anew)'
        if self.failed:
            text += f'; {self.failed} failed'
        return text + (f'; {counted(self.passed_over)} passed over' if self.passed_over else '')


class _Run:
    """The way of the files: one thread reads the next image and one writes the last while the network works."""

    def __init__(self, enlarger: Enlarger, progress: Progress, report: _Report, max_pixels: int, quality: int | str):
        self.enlarger, self.progress, self.report, self.max_pixels = enlarger, progress, report, max_pixels
        self.quality = quality
        self.area = float(enlarger.scale) ** 2
        enlarger.say = self._say

    def all(self, jobs: Sequence[Job]) -> None:
        sizes = [self._work(job) for job in jobs]
        self.task = self.progress.add_task('', total=sum(sizes), area=self.area, files='')
        before = 0
        with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
            ahead, writing = reader.submit(self._read, jobs[0]), None
            for i, (job, size) in enumerate(zip(jobs, sizes, strict=True)):
                self.progress.update(self.task, description=job.source.name, files=f'{i + 1}/{len(jobs)}')
                reading = ahead
                if i + 1 < len(jobs):
                    ahead = reader.submit(self._read, jobs[i + 1])
                try:
                    writing = self._one(job, reading, writer, writing)
                except RunLost:
                    raise
                except UserError as error:
                    self._fail(error)
                except MemoryError:
                    self._fail(UserError(f'{job.source}: there is not enough memory for its result'))
                before += size
                self.progress.update(self.task, completed=before)  # one that failed is over, too
            if writing is not None:
                writing.result()

    def _one(self, job: Job, reading: Future, writer: ThreadPoolExecutor, writing: Future | None) -> Future | None:
        """Enlarge a file, hand the result to the writer, and return what the writer is then busy with."""
        picture = reading.result()
        if job.is_video:
            self._done(video.enlarge(job.source, job.target, self.enlarger, self.max_pixels, self._advance))
            return writing
        height, width = picture.colour.shape[:2]
        check_target(job.target, self.enlarger.size(width, height), picture.alpha is not None)
        self.report.changes.note(job.source, lost(picture, job.target))
        dtype = picture.colour.dtype.type if holds_16_bits(job.target) else np.uint8
        result = self.enlarger.picture(picture, dtype, self._advance)
        if writing is not None:
            writing.result()
        writing = writer.submit(self._write, result, job)
        if result.colour.nbytes > _LARGE:
            writing.result()
        return writing

    def _read(self, job: Job) -> Picture | None:
        return None if job.is_video else read_picture(job.source, self.max_pixels)

    def _write(self, picture: Picture, job: Job) -> None:
        try:
            write_picture(picture, job.target, self.quality)
        except UserError as error:
            self._fail(error)
        else:
            self._done(picture.colour.shape[0] * picture.colour.shape[1])

    def _work(self, job: Job) -> int:
        """Input pixels of a file, for the progress; 0 where that cannot be told."""
        if job.is_video:
            return video.pixels(job.source)
        width, height = read_size(job.source)
        return width * height if width * height <= self.max_pixels else 0

    def _advance(self, pixels: int) -> None:
        self.progress.advance(self.task, pixels)

    def _done(self, pixels: int) -> None:
        self.report.done += 1
        self.report.pixels += pixels

    def _fail(self, error: UserError) -> None:
        self.report.failed += 1
        self._say(str(error))

    def _say(self, line: str) -> None:
        self.progress.console.print(f'basicsr: {line}', markup=False, highlight=False, soft_wrap=True)


class _Rate(ProgressColumn):
    """Megapixels of results per second."""

    def render(self, task: Task) -> Text:
        return Text(f'{task.speed * task.fields["area"] / 1e6:.2f} MP/s' if task.speed else '')


def _progress() -> Progress:
    console = Console(stderr=True)
    return Progress(TextColumn('{task.fields[files]} {task.description}', markup=False,
                               table_column=Column(no_wrap=True, overflow='ellipsis', ratio=1)),
                    BarColumn(20), TaskProgressColumn(), _Rate(), TimeRemainingColumn(), console=console,
                    expand=True, disable=not console.is_terminal, speed_estimate_period=60)
