"""Draw images with their boxes."""

import math
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tract_transfer.visualize.plots import STYLE, ArrayLike

Box = Sequence[float]  # x1, y1, x2, y2 in pixels, x2 and y2 exclusive

BOX = "#0a64a4"
WIDTH_IN = 4.0  # of a figure of detections
TILE_IN, CAPTION_IN = 2.2, 0.24  # width of a column, which is a row's largest height; a caption


def draw_detections(
    image: ArrayLike,
    boxes_xyxy: Sequence[Box],
    labels: Sequence[str],
    scores: Sequence[float],
    *,
    truth_boxes_xyxy: Sequence[Box] = (),
) -> Figure:
    """Draw a (3, H, W) uint8 RGB image, n detections in solid lines, true boxes in dashed ones.

    Raises:
        ValueError: the image is another array, or boxes, labels and scores differ in number.
    """
    pixels = _checked(image)
    size_in = (WIDTH_IN, WIDTH_IN * pixels.shape[1] / pixels.shape[2])
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=size_in)
        axes = figure.add_axes((0, 0, 1, 1))
        _draw_image(axes, pixels, interpolation="none")
        for box in truth_boxes_xyxy:
            _draw_box(axes, box, "", "white", dashed=True)
        for box, label, score in zip(boxes_xyxy, labels, scores, strict=True):
            _draw_box(axes, box, f"{label} {score:.2f}", BOX)
    return figure


def draw_samples(
    images: Sequence[ArrayLike],
    captions: Sequence[str],
    targets: Sequence[Sequence[tuple[Box, str, bool]]],
) -> Figure:
    """Draw (3, H, W) uint8 RGB images of any size in a grid that is about square.

    Args:
        captions: one for each image, written below it.
        targets: for each image its boxes, each with its class name and whether it is dashed.
    """
    arrays = [_checked(image) for image in images]
    columns = math.ceil(math.sqrt(len(images)))
    shapes = [min(1.0, pixels.shape[1] / pixels.shape[2]) for pixels in arrays]
    rows_in = [
        TILE_IN * max(shapes[i : i + columns]) + CAPTION_IN for i in range(0, len(images), columns)
    ]
    height_in = sum(rows_in)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(columns * TILE_IN, height_in))
        for i, (pixels, caption, boxes) in enumerate(zip(arrays, captions, targets, strict=True)):
            left, row = i % columns / columns, i // columns
            bottom = 1 - sum(rows_in[: row + 1]) / height_in + CAPTION_IN / height_in
            share = (rows_in[row] - CAPTION_IN) / height_in
            axes = figure.add_axes((left, bottom, 0.98 / columns, 0.99 * share), anchor="S")
            _draw_image(axes, pixels)
            for box, name, dashed in boxes:
                _draw_box(axes, box, name, "white" if dashed else BOX, dashed, font_pt=5.5)
            middle, below = left + 0.49 / columns, bottom - 0.04 / height_in
            figure.text(middle, below, caption, ha="center", va="top", fontsize=7.0)
    return figure


def _checked(image: ArrayLike) -> npt.NDArray[Any]:
    pixels = np.asarray(image)
    if pixels.ndim != 3 or pixels.shape[0] != 3 or pixels.dtype != np.uint8:
        raise ValueError(f"image must be (3, H, W) uint8, not {pixels.shape} {pixels.dtype}.")
    return pixels


def _draw_image(axes: Axes, pixels: npt.NDArray[Any], interpolation: str | None = None) -> None:
    extent = (0, pixels.shape[2], pixels.shape[1], 0)
    axes.imshow(pixels.transpose(1, 2, 0), interpolation=interpolation, extent=extent)
    axes.autoscale(False)
    axes.set_axis_off()


def _draw_box(
    axes: Axes, box: Box, text: str, color: str, dashed: bool = False, font_pt: float = 7.5
) -> None:
    x1, y1, x2, y2 = map(float, box)
    width, height = axes.get_xlim()[1], axes.get_ylim()[0]
    # An outline in the opposite tone keeps the line visible on any photograph.
    outline, line = ("black", 0.15 * font_pt) if dashed else ("white", 0.21 * font_pt)
    corners = [x1, x2, x2, x1, x1], [y1, y1, y2, y2, y1]
    axes.plot(*corners, color=outline, linewidth=line + 0.19 * font_pt, alpha=0.75)
    axes.plot(*corners, color=color, linewidth=line, linestyle=(0, (3, 2)) if dashed else "-")
    if not text:
        return
    right = x1 > 0.6 * width
    x = min(x2, 0.995 * width) if right else max(x1, 0.005 * width)
    y, below = (y2, y2 <= 0.94 * height) if dashed else (y1, y1 < 0.06 * height)
    axes.text(
        x, y, text, ha="right" if right else "left", va="top" if below else "bottom",
        fontsize=font_pt, clip_on=True, color=outline if dashed else "white",
        bbox={"fc": color, "linewidth": 0, "pad": 0.16 * font_pt},
    )  # fmt: skip
