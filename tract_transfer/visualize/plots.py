"""Filters as pixels, and curves over seeds."""

# O outputs (filters), H x W a grid, kh x kw a filter

import math
from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from tract_transfer.visualize.style import INK, MARKERS, PALETTE, PAPER, STYLE

Curve = tuple[Sequence[float], Sequence[float]]
ArrayLike = Tensor | npt.NDArray[np.generic]

_MAX_BAND_LINES = 3  # up to this many seeds are drawn one by one, more as a band
_MAX_MARKED_POINTS = 30


def filter_grid(weight: ArrayLike, columns: int | None = None) -> npt.NDArray[np.uint8]:
    """Lay first-layer filters out in a grid, one pixel a weight, a clear pixel between filters.

    Each filter is scaled by its own largest weight: grey is 0, and channels are red, green, blue.

    Args:
        weight: (O, 3, kh, kw), finite.
        columns: filters a row; None makes the grid about square.

    Returns:
        (H, W, 4) uint8, RGBA.
    """
    filters = np.asarray(weight, dtype=np.float64)
    if filters.ndim != 4 or filters.shape[1] != 3 or 0 in filters.shape:
        raise ValueError(f"filters must be (O, 3, kh, kw), not {filters.shape}.")
    if not np.isfinite(filters).all():
        raise ValueError("filters hold a NaN or an infinity.")
    O, _, kh, kw = filters.shape  # noqa: E741
    columns = columns or math.ceil(math.sqrt(O))
    rows = math.ceil(O / columns)
    largest = np.abs(filters).max(axis=(1, 2, 3), keepdims=True)
    tiles = np.rint(127.5 + 127.5 * filters / np.where(largest > 0, largest, 1)).astype(np.uint8)
    grid = np.zeros((rows * (kh + 1) - 1, columns * (kw + 1) - 1, 4), np.uint8)
    for i, tile in enumerate(tiles):
        y, x = (i // columns) * (kh + 1), (i % columns) * (kw + 1)
        grid[y : y + kh, x : x + kw, :3] = tile.transpose(1, 2, 0)
        grid[y : y + kh, x : x + kw, 3] = 255
    return grid


def curves(
    series: Mapping[str, Sequence[Curve]],
    *,
    x_label: str,
    y_label: str,
    size_in: tuple[float, float] = (4.4, 2.7),
) -> Figure:
    """Draw one bold mean line a series over its seeds: thin lines up to three, else min to max.

    Args:
        series: name -> one (x, y) a seed. A series without any keeps its colour and is not drawn.

    The mean is drawn where every seed of the series has a value.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=size_in, layout="constrained")
        axes = figure.add_subplot()
        for i, (name, lines) in enumerate(series.items()):
            if lines:
                _draw_series(axes, name, lines, PALETTE[i % len(PALETTE)], MARKERS[i % 6])
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.6)
        axes.tick_params(length=2.5, width=0.6)
        axes.margins(x=0.02)
        if any(series.values()):
            figure.legend(loc="outside upper left", ncols=3, handlelength=1.6, borderaxespad=0.2)
    return figure


def _draw_series(axes: Axes, name: str, lines: Sequence[Curve], color: str, marker: str) -> None:
    values = [dict(zip(map(float, x), map(float, y), strict=True)) for x, y in lines]
    shared = sorted(set.intersection(*(set(line) for line in values)))
    stack = np.array([[line[x] for x in shared] for line in values])
    stack = np.where(np.isfinite(stack), stack, np.nan)
    if 1 < len(values) <= _MAX_BAND_LINES or not shared:
        for line in values:
            y = [value if math.isfinite(value) else math.nan for value in line.values()]
            axes.plot(list(line), y, color=color, linewidth=0.7, alpha=0.5)
    elif len(values) > 1:
        axes.fill_between(
            shared, stack.min(axis=0), stack.max(axis=0), color=color, alpha=0.18, linewidth=0
        )
    marked = marker if len(shared) <= _MAX_MARKED_POINTS else None
    halo = [patheffects.withStroke(linewidth=3, foreground=PAPER)]
    axes.plot(
        shared, stack.mean(axis=0), color=color, linewidth=1.7, marker=marked, markersize=3.0,
        label=name, path_effects=halo, solid_joinstyle="round",
    )  # fmt: skip
