"""The field's figures, drawn with matplotlib: bubbles of PSNR against cost, training curves, strips of crops, maps."""
from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from elan_basicsr.errors import UserError

# Okabe and Ito's colours, which the colour-blind can tell apart.
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000', '#F0E442')
LARGEST_BUBBLE = 1600
"""Area of the largest bubble in square points; the others are in proportion to their parameters."""
AXES = {'latency': ('latency in seconds', 1.), 'macs': ('multiply-adds (MACs) in G', 1e-9)}


def new_figure(width: float, height: float):
    """A matplotlib figure of that many inches. It belongs to no window, so nothing has to be closed.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("figures need matplotlib, which is not installed; pip install 'elan-basicsr[report]'") from None
    return Figure(figsize=(width, height), dpi=150, layout='constrained')


def colour(index: int) -> str:
    """The colour of the network at a position, the same in every figure."""
    return COLOURS[index % len(COLOURS)]


def save(figure, path: str | os.PathLike) -> None:
    """Write a figure as the file's extension says.

    Raises:
        UserError: The file cannot be written, or its extension is none that matplotlib knows.
    """
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, 'strerror', None) or ' '.join(str(error).split())
        raise UserError(f'{path}: the figure cannot be written ({reason}); name another with -o or --figure') from None


def check_name(path: str | os.PathLike) -> None:
    """Raise a UserError where matplotlib is missing or could not write a file of that name, before it is drawn."""
    if Path(path).suffix.lower().lstrip('.') not in new_figure(1, 1).canvas.get_supported_filetypes():
        raise UserError(f'{path}: no figure has such a name; expected one that ends with .png, .pdf or .svg')


# ---------------------------------------------------------------------------------------------------------- bubbles

def bubble_chart(rows: Sequence[Mapping], x: str, path: str | os.PathLike) -> None:
    """Draw one bubble per network: PSNR against latency or MACs, the area in proportion to the parameters.

    Args:
        rows: Networks as mappings with `name`, `parameters`, and any of `psnr` (dB), `latency` (seconds) and `macs`.
            Without any PSNR, latency and MACs are drawn against each other. A row with PSNR but without cost, such as
            bicubic, is a dashed line.
        x: `latency` or `macs`, the horizontal axis; logarithmic when its largest value is over four times the smallest.
        path: The file, `.png`, `.pdf` or `.svg`.

    Raises:
        UserError: matplotlib is missing, there is nothing to draw, or the file cannot be written.
    """
    with_psnr = any(row.get('psnr') is not None for row in rows)
    y = 'psnr' if with_psnr else 'macs' if x == 'latency' else 'latency'
    bubbles = [(i, row) for i, row in enumerate(rows) if row.get(x) and row.get(y) is not None]
    if not bubbles:
        raise UserError(f'{path}: nothing to draw: no network has both {x} and {y}')
    figure = new_figure(7, 5)
    axes = figure.add_subplot()
    largest = max(row['parameters'] for _, row in bubbles) or 1
    points = []
    for i, row in sorted(bubbles, key=lambda pair: -pair[1]['parameters']):  # small ones lie on top
        at = (row[x] * AXES[x][1], row[y] * AXES[y][1] if y in AXES else row[y])
        area = LARGEST_BUBBLE * row['parameters'] / largest
        axes.scatter(*at, s=area, color=colour(i), alpha=0.75, linewidths=1, edgecolors='white', zorder=3)
        points.append((at, (area / np.pi) ** 0.5, f'{row["name"]}\n{si(row["parameters"])} parameters'))
    for i, row in enumerate(rows):
        if with_psnr and not row.get(x) and row.get('psnr') is not None:
            axes.axhline(row['psnr'], color=colour(i), linestyle='--', linewidth=1)
            axes.annotate(row['name'], (0.01, row['psnr']), xycoords=('axes fraction', 'data'), xytext=(0, 3),
                          textcoords='offset points', color=colour(i), fontsize=9)
    _scale_axes(axes, x, y, [at for at, _, _ in points])
    _place_labels(figure, axes, points)
    axes.grid(True, which='major', color='0.9', zorder=0)
    save(figure, path)


def si(value: float) -> str:
    """A count with three digits and a prefix: 601488 is 601K, 43.2e9 is 43.2G."""
    for prefix, size in (('T', 1e12), ('G', 1e9), ('M', 1e6), ('K', 1e3)):
        if value >= 0.9995 * size:
            return f'{value / size:.3g}{prefix}'
    return f'{value:.3g}'


def _scale_axes(axes, x: str, y: str, points: Sequence[tuple[float, float]]) -> None:
    """Labels, logarithms where values are apart, round ticks, and room for bubbles and labels at the edges."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
    for axis, name, values in ((axes.xaxis, x, [p[0] for p in points]), (axes.yaxis, y, [p[1] for p in points])):
        side = axis.axis_name
        axis.set_label_text(AXES[name][0] if name in AXES else 'PSNR in dB')
        if name in AXES and max(values) > 4 * min(values) > 0:
            getattr(axes, f'set_{side}scale')('log')
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:g}'))
            axis.set_minor_formatter(NullFormatter())
    axes.margins(0.2, 0.25)


def _place_labels(figure, axes, points: Sequence[tuple]) -> None:
    """Write each label beside its bubble, on the first side where it covers no other label and stays inside."""
    taken: list = []
    for at, radius, text in points:
        gap = radius + 3
        for offset, horizontal, vertical in (((0, gap), 'center', 'bottom'), ((0, -gap), 'center', 'top'),
                                             ((gap, 0), 'left', 'center'), ((-gap, 0), 'right', 'center'),
                                             ((0, gap + 30), 'center', 'bottom'), ((0, -gap - 30), 'center', 'top')):
            label = axes.annotate(text, at, xytext=offset, textcoords='offset points', ha=horizontal, va=vertical,
                                  fontsize=8, zorder=4)
            figure.draw_without_rendering()
            box = label.get_window_extent()
            inside = axes.bbox.contains(box.x0, box.y0) and axes.bbox.contains(box.x1, box.y1)
            if (inside and not any(box.overlaps(other) for other in taken)) or offset == (0, -gap - 30):
                break
            label.remove()
        taken.append(box)


# ----------------------------------------------------------------------------------------------------------- curves

def training_curves(runs: Mapping[str, Mapping[str, Mapping[int, float]]], path: str | os.PathLike) -> None:
    """Draw the curves of several runs, one panel per quantity, every run on the same axis.

    Args:
        runs: For each run's name its quantities, each as values by iteration; see `training_log.read_run`.
        path: The file.

    Raises:
        UserError: matplotlib is missing, there is nothing to draw, or the file cannot be written.
    """
    panels = list(dict.fromkeys(quantity for run in runs.values() for quantity in run))
    if not panels:
        raise UserError(f'{path}: nothing to draw: the logs hold no iterations yet')
    figure = new_figure(7, 3.2 * len(panels))
    for quantity, axes in zip(panels, figure.subplots(len(panels), squeeze=False)[:, 0], strict=True):
        for i, (name, run) in enumerate(runs.items()):
            curve = run.get(quantity)
            if curve:
                few = len(curve) <= 40
                axes.plot(list(curve), list(curve.values()), label=name, color=colour(i), linewidth=1.2,
                          marker='o' if few else None, markersize=3)
        if quantity.startswith('l_'):
            axes.set_yscale('log')
        axes.set_ylabel(quantity)
        axes.grid(True, color='0.9')
        axes.legend(fontsize=8)
    axes.set_xlabel('iteration')
    save(figure, path)


# ------------------------------------------------------------------------------------------------------------ strips

def strip(image: np.ndarray, box: tuple[int, int, int], crops: Sequence[tuple[str, np.ndarray]],
          path: str | os.PathLike) -> None:
    """Draw an image with a marked square, and beside it the square of the image and of each network, two to four a row.

    Args:
        image: HR, (H, W, 3) BGR, uint8.
        box: Left, top and edge of the square in pixels.
        crops: Caption and square, (edge, edge, 3) BGR, uint8, the first one HR's.
        path: The file.

    Raises:
        UserError: matplotlib is missing, or the file cannot be written.
    """
    from matplotlib.patches import Rectangle
    rows = 1 if len(crops) <= 3 else 2
    columns = -(-len(crops) // rows)
    side, caption = 1.9, 0.45
    height = rows * (side + caption)
    width = min(height * image.shape[1] / image.shape[0], 2.5 * height)
    figure = new_figure(width + columns * side, height)
    whole, grid = figure.subfigures(1, 2, width_ratios=[width, columns * side])
    axes = whole.subplots()
    axes.imshow(image[..., ::-1])
    left, top, edge = box
    axes.add_patch(Rectangle((left - 0.5, top - 0.5), edge, edge, fill=False, edgecolor='#D55E00', linewidth=1.5))
    axes.axis('off')
    places = grid.subplots(rows, columns, squeeze=False).ravel()
    for place in places:
        place.axis('off')
    for place, (text, crop) in zip(places, crops, strict=False):
        place.imshow(crop[..., ::-1], interpolation='nearest')
        place.set_title(text, fontsize=8)
    save(figure, path)


# -------------------------------------------------------------------------------------------------------------- maps

def attribution_figure(image: np.ndarray, box: tuple[int, int, int], columns: Sequence[Mapping],
                       path: str | os.PathLike) -> None:
    """Draw, for each network side by side, its result in a patch, its local attribution map and its receptive field.

    Args:
        image: The network's input, (H, W, 3) RGB in 0..1.
        box: Left, top and edge of the patch in its pixels.
        columns: For each network `name`, `patch` (the result there, RGB in 0..1), `attribution` (H, W), not negative,
            `diffusion_index`, `receptive_field` (K, K) and `reach`, the edge of the central square that holds 95 % of
            it.
        path: The file.

    Raises:
        UserError: matplotlib is missing, or the file cannot be written.
    """
    from matplotlib.patches import Rectangle
    figure = new_figure(2.4 * (1 + len(columns)), 7.4)
    axes = figure.subplots(3, 1 + len(columns), squeeze=False)
    for place in axes.ravel():
        place.set_xticks([])
        place.set_yticks([])
    left, top, edge = box
    axes[0, 0].imshow(image)
    axes[0, 0].add_patch(Rectangle((left - 0.5, top - 0.5), edge, edge, fill=False, edgecolor='#D55E00'))
    axes[0, 0].set_title('input and patch', fontsize=9)
    for place, text in ((axes[1, 0], 'local attribution:\nwhich pixels of the input\nthe patch is made from\n\n'
                                     'DI: diffusion index, larger\nwhere more pixels count'),
                        (axes[2, 0], 'effective receptive field:\nwhere a pixel of the output\nlooks, on the average\n'
                                     '(logarithmic)')):
        place.text(0.5, 0.5, text, ha='center', va='center', fontsize=8, transform=place.transAxes)
        place.axis('off')
    grey = image.mean(axis=2)
    for place, column in zip(axes[:, 1:].T, columns, strict=True):
        place[0].imshow(column['patch'].clip(0, 1), interpolation='nearest')
        place[0].set_title(column['name'], fontsize=9)
        place[1].imshow(0.5 + 0.5 * grey, cmap='gray', vmin=0, vmax=1)
        place[1].imshow(_red(column['attribution']))
        place[1].add_patch(Rectangle((left - 0.5, top - 0.5), edge, edge, fill=False, edgecolor='#0072B2'))
        place[1].set_title(f'DI {column["diffusion_index"]:.2f}', fontsize=9)
        field = column['receptive_field']
        place[2].imshow(np.log10(field / field.max() + 1e-4), cmap='magma', vmin=-4, vmax=0)
        place[2].set_title(f'95 % within {column["reach"]}x{column["reach"]} pixels', fontsize=9)
    save(figure, path)


def _red(values: np.ndarray) -> np.ndarray:
    """Values as red whose opacity is the square root of their share of the largest, so that weak ones can be seen."""
    rgba = np.zeros((*values.shape, 4))
    rgba[..., 0] = 0.85
    rgba[..., 3] = np.sqrt(values / max(values.max(), np.finfo(float).tiny))
    return rgba
