"""Which files become which: inputs as a person names them, one output for each, checked before anything is read."""
from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from elan_basicsr.data.images import counted, walk_files
from elan_basicsr.errors import UserError
from elan_basicsr.upscale.image_files import FORMATS, READABLE

VIDEOS = ('.mp4', '.mkv', '.mov', '.m4v', '.avi', '.webm')


@dataclass(frozen=True)
class Job:
    """One file to enlarge and where the result goes."""
    source: Path
    target: Path

    @property
    def is_video(self) -> bool:
        return self.source.suffix.lower() in VIDEOS


def plan(inputs: Sequence[str], out: str, format_: str | None = None) -> tuple[list[Job], list[Path]]:
    """One job per file, in the order of the inputs, and the files that folders and patterns hold beside them.

    Args:
        inputs: Files, folders (searched for images, recursively) and glob patterns, for shells that do not expand them.
        out: A folder, which keeps the structure below an input folder or before a pattern's first wildcard; or, for a
            single input with an image's or video's suffix, a file.
        format_: Suffix of the output images without the dot; the input's when not given, PNG for GIF.

    Raises:
        UserError: An input is not there or holds no images, two would become one file, or an output is an input.
    """
    if not inputs:
        raise UserError('upscale: nothing to enlarge; expected files or folders')
    out_path = Path(out)
    passed_over: list[Path] = []
    found = [pair for name in inputs for pair in _expand(name, out_path, passed_over)]
    found = list(dict.fromkeys(found))  # the same file named twice is one job
    if _names_a_file(out_path):
        if len(found) > 1:
            raise UserError(f'{out}: names one file, but there are {len(found)} inputs; name a folder')
        jobs = [Job(found[0][0], out_path)]
        if jobs[0].is_video != (out_path.suffix.lower() in VIDEOS):
            raise UserError(f'{out}: {found[0][0]} cannot become a file of this kind; images stay images, and videos '
                            'videos')
    else:
        jobs = [Job(source, out_path / _renamed(relative, format_)) for source, relative in found]
    _check(jobs)
    _check_folder(out_path.parent if _names_a_file(out_path) else out_path)
    return jobs, sorted({*passed_over} - {job.source for job in jobs})


def _names_a_file(out: Path) -> bool:
    return out.suffix.lower() in (*FORMATS, *VIDEOS) and not out.is_dir()


def _expand(name: str, out: Path, passed_over: list[Path]) -> Iterator[tuple[Path, Path]]:
    """Every file an input stands for, with its path below the output folder."""
    path = Path(name)
    if path.is_dir():
        yield from _in_folder(path, out, passed_over)
    elif path.exists():
        yield path, Path(path.name)
    elif glob.has_magic(name):
        parts = path.parts
        fixed = Path(*parts[:next(i for i, part in enumerate(parts) if glob.has_magic(part))])
        matches = [Path(match) for match in sorted(glob.glob(name, recursive=True))]
        files = [match for match in matches if match.is_file() and not _is_result(match, out, fixed)]
        if not files:
            raise UserError(f'{name}: no file matches this pattern')
        for match in files:
            if match.suffix.lower() in (*READABLE, *VIDEOS):
                yield match, match.relative_to(fixed)
            else:
                passed_over.append(match)
    else:
        raise UserError(f'{name}: no such file or folder')


def _in_folder(folder: Path, out: Path, passed_over: list[Path]) -> Iterator[tuple[Path, Path]]:
    files = [path for path in walk_files(folder)
             if not path.name.startswith('.') and not _is_result(path, out, folder)]
    images = sorted(path for path in files if path.suffix.lower() in READABLE)
    others = [path for path in files if path.suffix.lower() not in READABLE]
    if not images:
        raise UserError(f'{folder}: holds no images ({", ".join(READABLE)})'
                        + (f', but {counted(others)}' if others else ''))
    passed_over += others
    for path in images:
        yield path, path.relative_to(folder)


def _is_result(path: Path, out: Path, searched: Path) -> bool:
    """Whether a file found lies in an output folder inside the folder searched: the result of an earlier run."""
    real = Path(os.path.realpath(out))
    return Path(os.path.realpath(searched)) in real.parents and real in Path(os.path.realpath(path)).parents


def _renamed(relative: Path, format_: str | None) -> Path:
    suffix = relative.suffix.lower()
    if suffix in VIDEOS:
        return relative
    if format_:
        return relative.with_suffix('.' + format_)
    if suffix == '.gif':
        return relative.with_suffix('.png')
    return relative


def _check(jobs: Sequence[Job]) -> None:
    sources = {os.path.realpath(job.source): job.source for job in jobs}
    targets: dict[str, Job] = {}
    for job in jobs:
        if job.source.suffix.lower() not in (*READABLE, *VIDEOS):
            raise UserError(f'{job.source}: has no suffix of an image or video; expected {", ".join(READABLE)} or '
                            f'{", ".join(VIDEOS)}')
        real = os.path.realpath(job.target)
        if real in sources:
            raise UserError(f'{job.target}: is the input {sources[real]}, which would be written over; name another '
                            'output')
        # Compared without case: the two would be one file on Windows and macOS.
        other = targets.setdefault(real.lower(), job)
        if other is not job:
            raise UserError(f'{job.source}: would become {job.target}, as would {other.source}; name another output '
                            'for one of them')


def _check_folder(folder: Path) -> None:
    for path in (folder, *folder.parents):
        if path.exists():
            if not path.is_dir():
                raise UserError(f'{path}: is a file, expected a folder for the results')
            if not os.access(path, os.W_OK):
                raise UserError(f'{path}: cannot be written to; name another output folder')
            return
