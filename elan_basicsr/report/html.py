"""The comparison as one HTML file that needs nothing beside itself: pictures, styles and script are inside."""
from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from elan_basicsr.errors import UserError
from elan_basicsr.report.figures import si
from elan_basicsr.report.measure import CONFIDENCE, METRICS

ABSENT = '–'
ODD_NAMES = 'backslashreplace'
"""How files hold names that are not UTF-8; what stands there then is JSON's own escape."""


@dataclass(frozen=True)
class Cell:
    """A table's cell: its text, what it is sorted by (None: last), and whether it is the best of its column."""
    text: str
    value: float | str | None = None
    best: bool = False


@dataclass(frozen=True)
class Picture:
    """An image that is shown: its title, its strip, and files of HR and of each network's result by name."""
    title: str
    strip: Path
    versions: Mapping[str, Path]


def show(value: float | None, digits: int) -> str:
    """A figure with that many decimals, or a dash."""
    return ABSENT if value is None else f'{value:.{digits}f}'


def write_html(result: Mapping, pictures: Sequence[Picture], drawn: Mapping[str, Path],
               path: str | os.PathLike) -> None:
    """Write the report of a comparison.

    Args:
        result: What `comparison.json` holds.
        pictures: The images shown.
        drawn: Other figures by their captions.
        path: The file.

    Raises:
        UserError: The file cannot be written.
    """
    environment = jinja2.Environment(loader=jinja2.PackageLoader('elan_basicsr.report', ''), autoescape=True,
                                     undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.policies['json.dumps_kwargs'] = {'sort_keys': False}  # the networks stay in their order
    text = environment.get_template('report.html.jinja').render(
        result=result, confidence=round(100 * CONFIDENCE),
        tables={'means': _means(result), 'costs': _costs(result), 'differences': _differences(result),
                'images': _images(result)},
        figures={caption: data_uri(file) for caption, file in drawn.items()},
        strips={picture.title: data_uri(picture.strip) for picture in pictures},
        pictures=[{'title': picture.title, 'versions': {name: data_uri(file) for name, file
                                                        in picture.versions.items()}} for picture in pictures])
    try:
        Path(path).write_text(text, encoding='utf-8', errors=ODD_NAMES)
    except OSError as error:
        raise UserError(f'{path}: cannot be written ({error.strerror})') from None


def data_uri(path: str | os.PathLike) -> str:
    """A PNG file as an address that holds it."""
    return 'data:image/png;base64,' + base64.b64encode(Path(path).read_bytes()).decode('ascii')


Table = tuple[list[str], list[list[Cell]]]
"""Headings and rows."""


def _metrics_of(row: Mapping) -> list[str]:
    return [key for key in METRICS if key in row]


def _figures(row: Mapping, keys: Sequence[str], best: Mapping[str, float | None]) -> list[Cell]:
    return [Cell(show(row[key], METRICS[key].digits), row[key], row[key] is not None and row[key] == best[key])
            for key in keys]


def _best(rows: Sequence[Mapping], keys: Sequence[str]) -> dict[str, float | None]:
    """The best value of each metric, None where there are no two to choose from."""
    found = {}
    for key in keys:
        values = [row[key] for row in rows if row[key] is not None]
        found[key] = (max if METRICS[key].higher_is_better else min)(values) if len(values) > 1 else None
    return found


def _means(result: Mapping) -> Table:
    rows = result['means']
    keys = _metrics_of(rows[0])
    cells = []
    for row in rows:
        best = _best([other for other in rows if other['dataset'] == row['dataset']], keys)
        cells.append([Cell(row['dataset'], row['dataset']), Cell(row['network'], row['network']),
                      Cell(str(row['images']), row['images']), *_figures(row, keys, best)])
    return ['set', 'network', 'images', *(METRICS[key].label for key in keys)], cells


def _images(result: Mapping) -> Table:
    rows = result['images']
    keys = _metrics_of(rows[0])
    by_image: dict[tuple, list] = {}
    for row in rows:
        by_image.setdefault((row['dataset'], row['image']), []).append(row)
    best = {image: _best(group, keys) for image, group in by_image.items()}
    cells = [[Cell(row['dataset'], row['dataset']), Cell(row['image'], row['image']),
              Cell(row['network'], row['network']), *_figures(row, keys, best[row['dataset'], row['image']])]
             for row in rows]
    return ['set', 'image', 'network', *(METRICS[key].label for key in keys)], cells


def _costs(result: Mapping) -> Table:
    cells = []
    for row in result['networks']:
        latency = row['latency']
        memory = None if row['memory'] is None else row['memory'] / 2**20
        cells.append([Cell(row['name'], row['name']), Cell(row['architecture'], row['architecture']),
                      Cell(f'{row["parameters"]:,}' if row['parameters'] else ABSENT, row['parameters']),
                      *(Cell(si(row[key]) if row[key] else ABSENT, row[key]) for key in ('macs', 'paper_macs')),
                      Cell(_latency(row), latency), Cell(show(memory, 0), memory)])
    headings = ['network', 'architecture', 'parameters', 'MACs', "MACs, paper's count", 'latency (ms)',
                'peak memory (MiB)']
    filled = [i for i in range(len(headings)) if any(row[i].text != ABSENT for row in cells)]
    return [headings[i] for i in filled], [[row[i] for i in filled] for row in cells]


def _latency(row: Mapping) -> str:
    """The median in milliseconds, and from the shortest to the longest round."""
    if row['latency'] is None:
        return ABSENT
    median, shortest, longest = (f'{row[key] * 1000:.1f}' for key in ('latency', 'latency_min', 'latency_max'))
    return f'{median} ({shortest}–{longest})'


def _differences(result: Mapping) -> Table:
    cells = []
    for row in result['differences']:
        digits = METRICS[row['metric']].digits + 1
        interval = ABSENT if row['low'] is None else f'{row["low"]:+.{digits}f} to {row["high"]:+.{digits}f}'
        apart = row['low'] is not None and (row['low'] > 0 or row['high'] < 0)
        cells.append([Cell(row['dataset'], row['dataset']), Cell(METRICS[row['metric']].label, row['metric']),
                      Cell(f'{row["first"]} − {row["second"]}', row['first']),
                      Cell(f'{row["mean"]:+.{digits}f}', row['mean'], apart), Cell(interval, row['low']),
                      Cell(f'{row["larger"]} of {row["images"]}', row['larger'] / row['images'])])
    return ['set', 'metric', 'networks', 'mean difference', f'{round(100 * CONFIDENCE)} % interval',
            'images on which the first is higher'], cells
