"""Boxes on images."""

# H x W an image, n its boxes

import math
from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from tract_transfer.visualize.plots import BOX, STYLE

ArrayLike = Tensor | npt.NDArray[np.generic]

_CAPTION_IN = 0.24


def draw_detections(
    image: ArrayLike,
    boxes_xyxy: ArrayLike | Sequence[Sequence[float]],
    labels: Sequence[str],
    scores: Sequence[float] | None = None,
    *,
    truth_boxes_xyxy: ArrayLike | Sequence[Sequence[float]] | None = None,
    truth_labels: Sequence[str] | None = None,
    color: str = BOX,
    width_in: float = 4.0,
) -> Figure:
    """Draw an image with its detections in full lines and the true boxes in dashes.

    Args:
        image: (3, H, W) uint8, RGB.
        boxes_xyxy: (n, 4) in pixels, x2 and y2 exclusive, like `truth_boxes_xyxy` (m, 4).
        labels: n class names.
        scores: n scores in [0, 1], written after the names.
        truth_labels: m class names, written below the true boxes.
        width_in: width of the figure in inches; the height follows the image.

    Raises:
        ValueError: the image is not (3, H, W) uint8, or boxes, labels and scores differ in number.
    """
    pixels = _pixels(image)
    found, truth = _boxes(boxes_xyxy), _boxes([] if truth_boxes_xyxy is None else truth_boxes_xyxy)
    names = [""] * len(truth) if truth_labels is None else list(truth_labels)
    if len(found) != len(labels) or (scores is not None and len(scores) != len(labels)):
        raise ValueError(
            f"Every box needs one label and, if any, one score: {len(found)} boxes, {len(labels)} "
            f"labels, {'no' if scores is None else len(scores)} scores."
        )
    if len(truth) != len(names):
        raise ValueError(f"{len(truth)} true boxes came with {len(names)} labels.")
    height, width = pixels.shape[1:]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width_in, width_in * height / width))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.imshow(pixels.transpose(1, 2, 0), interpolation="none", extent=(0, width, height, 0))
        axes.autoscale(False)
        axes.set_axis_off()
        for box, name in zip(truth, names, strict=True):
            _draw_box(axes, box, name, "white", dashed=True)
        for i, (box, label) in enumerate(zip(found, labels, strict=True)):
            _draw_box(axes, box, label if scores is None else f"{label} {scores[i]:.2f}", color)
    return figure


def draw_samples(
    images: Sequence[ArrayLike],
    captions: Sequence[str],
    targets: Sequence[Sequence[tuple[Sequence[float], str, bool]]] | None = None,
    *,
    columns: int | None = None,
    tile_in: float = 2.2,
) -> Figure:
    """Draw images of any size in a grid, each with its boxes and its caption below.

    Args:
        images: each (3, H, W) uint8, RGB.
        captions: one an image, written below it.
        targets: for each image its boxes: (x1, y1, x2, y2) in pixels, the class name, and whether
            to draw it in dashes.
        columns: images a row; None makes the grid about square.
        tile_in: width of a column in inches, and the height that a row has at most.

    Raises:
        ValueError: no image, or one that is not (3, H, W) uint8.
    """
    if not images:
        raise ValueError("draw_samples needs an image at least.")
    columns = columns or math.ceil(math.sqrt(len(images)))
    sides = [_pixels(image).shape[1:] for image in images]
    shapes = [min(1.0, height / width) for height, width in sides]
    rows_in = [
        tile_in * max(shapes[i : i + columns]) + _CAPTION_IN for i in range(0, len(images), columns)
    ]
    height_in = sum(rows_in)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(columns * tile_in, height_in))
        for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
            left, row = i % columns / columns, i // columns
            bottom = 1 - sum(rows_in[: row + 1]) / height_in + _CAPTION_IN / height_in
            share = (rows_in[row] - _CAPTION_IN) / height_in
            axes = figure.add_axes((left, bottom, 0.98 / columns, 0.99 * share), anchor="S")
            height, width = sides[i]
            axes.imshow(_pixels(image).transpose(1, 2, 0), extent=(0, width, height, 0))
            axes.autoscale(False)
            axes.set_axis_off()
            for box, name, dashed in targets[i] if targets is not None else []:
                corners = np.asarray(box, np.float64)
                _draw_box(axes, corners, name, "white" if dashed else BOX, dashed, font_pt=5.5)
            middle, below = left + 0.49 / columns, bottom - 0.04 / height_in
            figure.text(middle, below, caption, ha="center", va="top", fontsize=7.0)
    return figure


def _pixels(image: ArrayLike) -> npt.NDArray[np.generic]:
    pixels = np.asarray(image)
    if pixels.ndim != 3 or pixels.shape[0] != 3 or pixels.dtype != np.uint8:
        raise ValueError(f"image must be (3, H, W) uint8, not {pixels.shape} {pixels.dtype}.")
    return pixels


def _boxes(boxes_xyxy: ArrayLike | Sequence[Sequence[float]]) -> npt.NDArray[np.float64]:
    boxes = np.asarray(boxes_xyxy, dtype=np.float64)
    if boxes.size and (boxes.ndim != 2 or boxes.shape[1] != 4):
        raise ValueError(f"boxes must be (n, 4) as x1, y1, x2, y2, not {boxes.shape}.")
    return boxes.reshape(-1, 4)


def _draw_box(
    axes: Axes,
    box: npt.NDArray[np.float64],
    text: str,
    color: str,
    dashed: bool = False,
    font_pt: float = 7.5,
) -> None:
    x1, y1, x2, y2 = (float(value) for value in box)
    width, height = axes.get_xlim()[1], axes.get_ylim()[0]
    # A rim of the opposite tone keeps the line visible on any photograph.
    outline, line = ("black", 0.15 * font_pt) if dashed else ("white", 0.21 * font_pt)
    corners = [x1, x2, x2, x1, x1], [y1, y1, y2, y2, y1]
    axes.plot(*corners, color=outline, linewidth=line + 0.19 * font_pt, alpha=0.75)
    axes.plot(*corners, color=color, linewidth=line, linestyle=(0, (3, 2)) if dashed else "-")
    if not text:
        return
    right = x1 > 0.6 * width
    x = min(x2, 0.995 * width) if right else max(x1, 0.005 * width)
    if dashed:
        y, place = (y2, "bottom") if y2 > 0.94 * height else (y2, "top")
    else:
        y, place = (y1, "top") if y1 < 0.06 * height else (y1, "bottom")
    label_box = {"fc": color, "linewidth": 0, "pad": 0.16 * font_pt}
    axes.text(
        x, y, text, ha="right" if right else "left", va=place, fontsize=font_pt, clip_on=True,
        color=outline if dashed else "white", bbox=label_box,
    )  # fmt: skip
