"""`basicsr compare`: several networks on the same images, in figures, tables and pictures.

The way through: contenders are loaded, data sets paired, every image restored by each and measured, costs counted, and
all of it written to one folder: `report.html` (self-contained), `per_image.csv`, `comparison.json`, `figures/` and the
restored images.
"""
from __future__ import annotations

import csv
import ctypes
import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from elan_basicsr import inference
from elan_basicsr.data.images import read_bgr
from elan_basicsr.data.resize import imresize
from elan_basicsr.engine.run import on_terminal
from elan_basicsr.errors import UserError
from elan_basicsr.interop.networks import Network, load_network, load_option_file
from elan_basicsr.report import figures
from elan_basicsr.report.complexity import count
from elan_basicsr.report.html import ODD_NAMES, Picture, show, write_html
from elan_basicsr.report.measure import (
    METRICS,
    all_differences,
    left_out,
    mean,
    measure,
    perceptual_metrics,
    told,
    without,
)
from elan_basicsr.report.pairs import Pair, read_pairs
from elan_basicsr.report.timing import Timing, inference_call, time_interleaved
from elan_basicsr.report.training_log import Curves, read_run
from elan_basicsr.version import __version__

from basicsr.metrics import calculate_psnr
from basicsr.utils import img2tensor, tensor2img

BICUBIC = 'bicubic'
COST_SIZE = (720, 1280)
"""HR height and width at which papers count MACs."""
COST_NOTE = (f'For an output of {COST_SIZE[1]}x{COST_SIZE[0]} pixels: multiply-adds (MACs) as torch counts them and as '
             'the ELAN paper does, the median latency of five rounds in each of which every network ran once (fewer '
             'where they take more than a minute), with the shortest and the longest, and the memory of a run at its '
             'peak beside what the network holds.')
ROUNDS = 5
SHOWN = 5
SMALLEST_CROP = 24
DIFFERENCES_OF = ('psnr_y', 'ssim_y')


@dataclass
class Contender:
    """A network under comparison, or bicubic.

    Attributes:
        name: As it stands in tables.
        network: What `load_network` returned, or None for bicubic.
    """
    name: str
    network: Network | None

    def restore(self, lr: np.ndarray, scale: int, device: str, tile: int = 0) -> np.ndarray:
        """Enlarge an image, (H, W, 3) BGR uint8, as `basicsr test` does; bicubic is MATLAB's."""
        if self.network is None:
            return imresize(lr, scale)
        x = img2tensor(lr.astype(np.float32) / 255)[None].to(device)
        with torch.no_grad():
            y = inference.forward(self.network.net, x, scale=scale, tile=tile)
        return tensor2img([y])


def compare(files: Sequence[str], *, out: str | os.PathLike, data: Sequence[str] = (), opt: str | None = None,
            logs: Sequence[str] = (), images: Sequence[str] = (), crop: tuple[int, int, int] | None = None,
            device: str | None = None, tile: int = 0, overwrite: bool = False) -> int:
    """Compare networks and write the report to the folder `out`.

    Args:
        files: Checkpoints, option files and `bicubic`; `NAME=FILE` gives one a name.
        out: Folder of the report.
        data: Folders with HR and LR images as `basicsr data benchmark` lays them out, or of HR images alone, whose LR
            images are made by MATLAB's bicubic.
        opt: An option file whose test (or validation) sets are used, in place of or beside `data`.
        logs: Log files or run folders, whose training curves are drawn.
        images: Names of the images shown; up to five if not given, those on which the networks differ most.
        crop: Left, top and edge in HR pixels of the square shown of each; where the networks differ most if not given.
        device: `cpu` or `cuda`; a GPU if there is one when not given.
        tile: LR pixels; restore large images in tiles.
        overwrite: Whether files of an earlier report may be replaced.

    Raises:
        UserError: A file, folder or name is wrong, or `out` holds something already.
    """
    out = Path(out)
    _refuse_to_overwrite(out, overwrite)
    device = device or ('cuda' if torch.cuda.is_available() else 'cpu')
    runs = _named_runs(logs)
    contenders = load_contenders(files, device)
    scale = _common_scale(contenders)
    pairs = list(read_pairs(data, opt, scale))
    _check_choice(pairs, images, crop)
    perceptual, notes = perceptual_metrics(device)
    rows = list(_restore_and_measure(contenders, pairs, scale, device, tile, perceptual, out))
    left = left_out(rows)
    same = without(rows, left)
    result = {
        'version': __version__, 'scale': scale, 'crop_border': scale, 'device': device, 'cost_note': COST_NOTE,
        'threads': torch.get_num_threads(), 'notes': [*notes, *map(told, left)],
        'networks': costs(contenders, scale, device),
        'images': rows, 'means': _means(same), 'left_out': left, 'differences': all_differences(
            same, [contender.name for contender in contenders], DIFFERENCES_OF),
    }
    _write_tables(result, out)
    pictures = _draw_strips(_shown(pairs, rows, images), contenders, crop, out)
    write_html(result, pictures, _draw(result, runs, out), out / 'report.html')
    _print_summary(result, out)
    return 0


# ------------------------------------------------------------------------------------------------ what goes in

def _refuse_to_overwrite(out: Path, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f'{out}: is a file, expected a folder for the report')
    if not overwrite and out.is_dir() and any(out.iterdir()):
        raise UserError(f'{out}: holds files already, and nothing is overwritten unasked; choose another folder with '
                        '-o, or give --overwrite')


def _named_runs(logs: Sequence[str]) -> dict[str, Curves]:
    runs: dict[str, Curves] = {}
    for log in logs:
        path = Path(log)
        name = _free(path.resolve().name if path.is_dir() else path.stem, {_file_name(name).lower() for name in runs})
        runs[name] = read_run(path)
    return runs


def load_contenders(files: Sequence[str], device: str) -> list[Contender]:
    """The networks of `FILE`, `NAME=FILE` or `bicubic`, in that order, each under a name of its own.

    Raises:
        UserError: A file holds no network for colour images, or one name is given twice.
    """
    found: dict[str, Contender] = {}
    taken = {'hr'}  # names of files, without regard to case
    for text in files:
        given, file = ('', text) if Path(text).exists() or '=' not in text else text.split('=', 1)
        if _file_name(given).lower() in taken:
            raise UserError(f'{text}: the name {given} is taken; expected another')
        name = given or _free(_default_name(file), taken)
        taken.add(_file_name(name).lower())
        found[name] = Contender(name, None if file == BICUBIC else open_network(file, device))
    return list(found.values())


def open_network(file: str, device: str) -> Network:
    """The network in a checkpoint or of an option file; see `elan_basicsr.interop.networks`."""
    load = load_option_file if file.lower().endswith(('.yml', '.yaml')) else load_network
    network = load(file, device)
    if network.channels != (3, 3):
        raise UserError(f'{file}: the network has {network.channels[0]} channels in and {network.channels[1]} out; '
                        'expected one for colour images')
    return network


def _default_name(file: str) -> str:
    """The file's name, or the run's for a checkpoint that a training wrote: experiments/RUN/models/net_g_5000.pth."""
    path = Path(file)
    if path.stem.startswith('net_g_') and path.resolve().parent.name == 'models':
        return path.resolve().parents[1].name
    return path.stem


def _free(name: str, taken: Collection[str]) -> str:
    """The name, with a number when it is taken."""
    candidates = [name, *(f'{name}-{number}' for number in range(2, len(taken) + 3))]
    return next(candidate for candidate in candidates if _file_name(candidate).lower() not in taken)


def _common_scale(contenders: Sequence[Contender]) -> int:
    scales = {contender.name: contender.network.scale for contender in contenders if contender.network is not None}
    if not scales:
        raise UserError('compare: nothing but bicubic; expected the checkpoint or option file of a network')
    if len(set(scales.values())) > 1:
        found = ', '.join(f'{name} is x{scale}' for name, scale in scales.items())
        raise UserError(f'compare: {found}; expected networks of one scale')
    return next(iter(scales.values()))


def _check_choice(pairs: Sequence[Pair], names: Sequence[str], crop: tuple[int, int, int] | None) -> None:
    """Refuse names and squares that are not there before hours are spent."""
    seen = set()
    for pair in pairs:
        if (pair.dataset, pair.name) in seen:
            raise UserError(f'{pair.dataset}: has two images {pair.name}; expected each set and image once')
        seen.add((pair.dataset, pair.name))
    for name in names:
        if name not in {pair.name for pair in pairs}:
            raise UserError(f'--images {name}: no such image in the data; expected names such as '
                            f'{", ".join(pair.name for pair in pairs[:5])}')
    if crop is None:
        return
    left, top, edge = crop
    for pair in pairs:
        height, width = pair.hr.shape[:2]
        if (not names or pair.name in names) and not (
                edge > 0 <= min(left, top) and left + edge <= width and top + edge <= height):
            raise UserError(f'--crop {left} {top} {edge}: is not inside {pair.name}, which has {width}x{height} HR '
                            'pixels; expected left, top and edge of a square')


# ----------------------------------------------------------------------------------------------- what is done

def _restore_and_measure(contenders: Sequence[Contender], pairs: Sequence[Pair], scale: int, device: str, tile: int,
                         perceptual: dict[str, Callable], out: Path) -> Iterator[dict]:
    """One row per image and network; the restored images are written on the way."""
    work = [(pair, contender) for pair in pairs for contender in contenders]
    for pair, contender in tqdm(work, unit='image', disable=not on_terminal(), leave=False):
        restored = contender.restore(pair.lr, scale, device, tile)
        if restored.shape != pair.hr.shape:
            raise UserError(f'{pair.dataset}: image {pair.name}: {contender.name} gives {restored.shape[1]}x'
                            f'{restored.shape[0]} pixels, HR has {pair.hr.shape[1]}x{pair.hr.shape[0]}; expected LR '
                            f'images of 1/{scale} of the size')
        _write_image(image_path(out, pair, contender), restored)
        yield {'dataset': pair.dataset, 'image': pair.name, 'network': contender.name,
               **measure(restored, pair.hr, border=scale, perceptual=perceptual)}


def image_path(out: Path, pair: Pair, contender: Contender) -> Path:
    """Where an image restored by a network lies."""
    return out / 'images' / _file_name(pair.dataset) / f'{_file_name(pair.name)}_{_file_name(contender.name)}.png'


def _file_name(text: str) -> str:
    return re.sub(r'[^\w.()+-]+', '_', text)


def _write_image(path: Path, img: np.ndarray) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(cv2.imencode('.png', img)[1].tobytes())
    except OSError as error:
        raise UserError(f'{path}: cannot be written ({error.strerror}); expected a folder with space') from None


def costs(contenders: Sequence[Contender], scale: int, device: str) -> list[dict]:
    """What networks cost at an output of 1280x720 pixels, timed beside each other.

    Returns:
        For each `parameters`, `macs` and `paper_macs` as `complexity.count` gives them, `latency`, `latency_min` and
        `latency_max` (seconds: the median of the rounds, the shortest, the longest) and `memory` (bytes at the peak of
        a run beyond what was held before it, on the GPU or, on Linux, resident); None where there is no figure.
    """
    x = torch.rand(1, 3, *(-(-edge // scale) for edge in COST_SIZE), device=device)
    timings = time_interleaved({contender.name: inference_call(contender.network.net, x) for contender in contenders
                                if contender.network is not None}, ROUNDS, device, longest=60)
    return [_cost(contender, timings.get(contender.name), x) for contender in contenders]


def _cost(contender: Contender, timing: Timing | None, x: torch.Tensor) -> dict:
    row = {'name': contender.name, 'architecture': BICUBIC, 'parameters': 0, 'macs': None, 'paper_macs': None,
           'latency': None, 'latency_min': None, 'latency_max': None, 'memory': None}
    if contender.network is not None and timing is not None:
        found = count(contender.network.net, *x.shape[1:])
        row.update(architecture=contender.network.name, parameters=found.parameters, macs=found.macs,
                   paper_macs=found.paper_macs, latency=timing.median, latency_min=timing.min, latency_max=timing.max,
                   memory=_peak_memory(contender.network.net, x))
    return row


@torch.no_grad()
def _peak_memory(net: torch.nn.Module, x: torch.Tensor) -> int | None:
    if x.device.type == 'cuda':
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        net(x)
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what earlier runs freed is resident still, and would be used unseen
        Path('/proc/self/clear_refs').write_text('5')  # sets the peak to what is resident now: proc(5)
        before = _resident('VmRSS')
        net(x)
        return max(_resident('VmHWM') - before, 0)
    except (OSError, AttributeError, IndexError):  # no Linux, a C library without malloc_trim, or no such figure
        return None


def _resident(key: str) -> int:
    status = Path('/proc/self/status').read_text()
    return int(re.findall(rf'{key}:\s+(\d+) kB', status)[0]) * 1024


def _means(rows: Sequence[dict]) -> list[dict]:
    groups = dict.fromkeys((row['dataset'], row['network']) for row in rows)
    found = []
    for dataset, network in groups:
        group = [row for row in rows if (row['dataset'], row['network']) == (dataset, network)]
        found.append({'dataset': dataset, 'network': network, 'images': len(group),
                      **{key: mean([row[key] for row in group]) for key in METRICS if key in group[0]}})
    return found


# ----------------------------------------------------------------------------------------------- what comes out

def _write_tables(result: dict, out: Path) -> None:
    rows = result['images']
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / 'comparison.json').write_text(json.dumps(
            result, indent=1, ensure_ascii=False, allow_nan=False) + '\n', encoding='utf-8', errors=ODD_NAMES)
        with open(out / 'per_image.csv', 'w', newline='', encoding='utf-8', errors=ODD_NAMES) as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        raise UserError(f'{out}: cannot be written ({error.strerror}); expected a folder with space') from None


def _draw(result: dict, runs: dict, out: Path) -> dict[str, Path]:
    """Draw bubbles of PSNR against latency and MACs, and the training curves; return the files by their captions."""
    drawn = {}
    first = result['means'][0]['dataset']
    psnr = {row['network']: row['psnr_y'] for row in result['means'] if row['dataset'] == first}
    rows = [{**row, 'psnr': psnr[row['name']]} for row in result['networks']]
    for x in figures.AXES:
        if any(row[x] and row['psnr'] is not None for row in rows):
            path = out / 'figures' / f'psnr_{x}.png'
            figures.bubble_chart(rows, x, path)
            drawn[f'PSNR on {first} against {figures.AXES[x][0]}; areas in proportion to parameters'] = path
    if runs:
        path = out / 'figures' / 'training_curves.png'
        figures.training_curves(runs, path)
        drawn['Training curves'] = path
    return drawn


def _shown(pairs: Sequence[Pair], rows: Sequence[dict], names: Sequence[str]) -> list[Pair]:
    """The pairs named, or those on which the networks' PSNR is furthest apart, in the order of the data."""
    if names:
        return [pair for pair in pairs if pair.name in names]

    def spread(pair: Pair) -> float:
        values = [row['psnr_y'] for row in rows
                  if (row['dataset'], row['image']) == (pair.dataset, pair.name) and row['psnr_y'] is not None]
        return max(values, default=0) - min(values, default=0)

    chosen = {id(pair) for pair in sorted(pairs, key=spread, reverse=True)[:SHOWN]}
    return [pair for pair in pairs if id(pair) in chosen]


def _draw_strips(shown: Sequence[Pair], contenders: Sequence[Contender], crop: tuple[int, int, int] | None,
                 out: Path) -> list[Picture]:
    """For each image draw the square of HR, bicubic and every network, with its PSNR on Y."""
    pictures = []
    for pair in shown:
        files = {contender.name: image_path(out, pair, contender) for contender in contenders}
        restored = {name: read_bgr(file) for name, file in files.items()}
        versions = {BICUBIC: imresize(pair.lr, Fraction(pair.hr.shape[0], pair.lr.shape[0])), **restored}
        box = crop or most_different_square(list((restored if len(restored) > 1 else versions).values()))
        left, top, edge = box
        part = np.s_[top:top + edge, left:left + edge]
        crops = [('HR', pair.hr[part])]
        for name, img in versions.items():
            psnr = calculate_psnr(img[part], pair.hr[part], crop_border=0, test_y_channel=True)
            crops.append((f'{name}\n{psnr:.2f} dB', img[part]))
        strip = out / 'figures' / f'strip_{_file_name(pair.dataset)}_{_file_name(pair.name)}.png'
        figures.strip(pair.hr, box, crops, strip)
        hr = out / 'images' / _file_name(pair.dataset) / f'{_file_name(pair.name)}_HR.png'
        _write_image(hr, pair.hr)
        pictures.append(Picture(f'{pair.dataset}: {pair.name}', strip, {'HR': hr, **files}))
    return pictures


def most_different_square(images: Sequence[np.ndarray]) -> tuple[int, int, int]:
    """Left, top and edge of the square in which images of one size differ most, by their summed variance.

    The edge is a fifth of the image's shorter one, at least 24 pixels.
    """
    height, width = images[0].shape[:2]
    edge = min(max(min(height, width) // 5, SMALLEST_CROP), height, width)
    variance = np.var(np.stack([cv2.cvtColor(img, cv2.COLOR_BGR2GRAY) for img in images]).astype(np.float64), axis=0)
    total = cv2.integral(variance)
    sums = total[edge:, edge:] - total[:-edge, edge:] - total[edge:, :-edge] + total[:-edge, :-edge]
    top, left = np.unravel_index(sums.argmax(), sums.shape)
    return int(left), int(top), edge


def _print_summary(result: dict, out: Path) -> None:
    keys = [key for key in METRICS if key in result['means'][0]]
    table = Table('set', 'network', *(METRICS[key].label for key in keys))
    for row in result['means']:
        table.add_row(row['dataset'], row['network'], *(show(row[key], METRICS[key].digits) for key in keys))
    console = Console()
    console.print(table)
    for note in result['notes']:
        console.print(note, highlight=False)
    console.print(f'Report: {out / "report.html"}', highlight=False, soft_wrap=True)
