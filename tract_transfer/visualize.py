"""Pictures of boxes, filters and curves, as matplotlib figures that no global state touches.

Figures have no background. Their text and axes are drawn in `INK`, rims in `PAPER` and series in
`PALETTE`; `figure_svg` turns these colours into `currentColor`, `var(--paper)` and
`var(--series-0)` onwards, so that the page an SVG is put into decides how they look, in the light
and in the dark. What lies on a photograph keeps its colours: so does the photograph.
"""

# O outputs (filters), H x W an image or grid, kh x kw a filter

import base64
import hashlib
import io
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

INK = "#15181d"
PAPER = "#fefefd"
# Okabe and Ito's colours, told apart by every kind of colour vision, after a neutral first.
PALETTE = ("#6b7280", "#0072b2", "#d55e00", "#009e73", "#b3588f", "#c98a00")
BOX = "#0a64a4"
MARKERS = ("s", "o", "^", "D", "v", "P")

Curve = tuple[Sequence[float], Sequence[float]]
ArrayLike = Tensor | npt.NDArray[np.generic]

_STYLE = {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 8.0,
    "legend.frameon": False,
    "text.color": INK,
    "text.parse_math": False,  # a class called "$x$" is a name, not a formula
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.fonttype": "none",
    "svg.hashsalt": "tract_transfer",
}
_MAX_BAND_LINES = 3  # up to this many seeds are drawn one by one, more as a band
_MAX_MARKED_POINTS = 30
_PIXELATED_TO_PX = 200  # a narrower image is shown with square pixels
_JPEG_FROM_BYTES = 30_000  # a photograph past this is embedded as JPEG, a tenth of the size


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
    pixels = np.asarray(image)
    if pixels.ndim != 3 or pixels.shape[0] != 3 or pixels.dtype != np.uint8:
        raise ValueError(f"image must be (3, H, W) uint8, not {pixels.shape} {pixels.dtype}.")
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
    with mpl.rc_context(_STYLE):
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


def _boxes(boxes_xyxy: ArrayLike | Sequence[Sequence[float]]) -> npt.NDArray[np.float64]:
    boxes = np.asarray(boxes_xyxy, dtype=np.float64)
    if boxes.size and (boxes.ndim != 2 or boxes.shape[1] != 4):
        raise ValueError(f"boxes must be (n, 4) as x1, y1, x2, y2, not {boxes.shape}.")
    return boxes.reshape(-1, 4)


def _draw_box(
    axes: Axes, box: npt.NDArray[np.float64], text: str, color: str, dashed: bool = False
) -> None:
    x1, y1, x2, y2 = (float(value) for value in box)
    width, height = axes.get_xlim()[1], axes.get_ylim()[0]
    # A rim of the opposite tone keeps the line visible on any photograph.
    outline, line = ("black", 1.1) if dashed else ("white", 1.6)
    corners = [x1, x2, x2, x1, x1], [y1, y1, y2, y2, y1]
    axes.plot(*corners, color=outline, linewidth=line + 1.4, alpha=0.75)
    axes.plot(*corners, color=color, linewidth=line, linestyle=(0, (3, 2)) if dashed else "-")
    if not text:
        return
    right = x1 > 0.6 * width
    x = min(x2, 0.995 * width) if right else max(x1, 0.005 * width)
    if dashed:
        y, place = (y2, "bottom") if y2 > 0.94 * height else (y2, "top")
    else:
        y, place = (y1, "top") if y1 < 0.06 * height else (y1, "bottom")
    axes.text(
        x, y, text, ha="right" if right else "left", va=place, fontsize=7.5, clip_on=True,
        color=outline if dashed else "white", bbox={"fc": color, "linewidth": 0, "pad": 1.2},
    )  # fmt: skip


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
    with mpl.rc_context(_STYLE):
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


def figure_svg(figure: Figure, name: str) -> str:
    """Return a figure as an `<svg>` element to put into a page, the same text at every call.

    Args:
        name: what the figure shows, for readers who cannot see it. Ids derive from it: give
            every figure of a page its own.

    It refers to nothing outside itself, and takes its font and colours from the page.
    """
    buffer = io.StringIO()
    with mpl.rc_context(_STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    root = ET.fromstring(buffer.getvalue())
    prefix = "f" + hashlib.sha256(name.encode()).hexdigest()[:10] + "-"
    referenced = set(re.findall(r'(?:url\(#|href="#)([^")]+)', buffer.getvalue()))
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for key, value in list(element.attrib.items()):
            del element.attrib[key]
            if key != "id" or value in referenced:
                bare = key.rpartition("}")[2]
                element.set(bare, _inline(bare, value, prefix))
        if element.tag == "image" and int(element.get("width", "0")) > _PIXELATED_TO_PX:
            element.attrib.pop("style", None)
    for parent in list(root.iter()):  # matplotlib's style sheet would apply to the whole page
        for child in [c for c in parent if c.tag in ("metadata", "style")]:
            parent.remove(child)
    root.set("xmlns", "http://www.w3.org/2000/svg")
    root.set("role", "img")
    root.set("aria-label", name)
    root.set("style", "stroke-linejoin: round; stroke-linecap: butt")
    return ET.tostring(root, encoding="unicode")


def _inline(attribute: str, value: str, prefix: str) -> str:
    """Return an attribute's value as it stands in a page."""
    if attribute == "id":
        return prefix + value
    if attribute == "href":
        return f"#{prefix}{value[1:]}" if value.startswith("#") else _lighter(value)
    if attribute == "style":
        value = re.sub(r"font: [^;]*?([\d.]+px)[^;]*", r"font-size: \1", value)
        value = re.sub(r"font-family: [^;]*;? ?", "", value)
        value = value.replace(INK, "currentColor").replace(PAPER, f"var(--paper, {PAPER})")
        for i, color in enumerate(PALETTE):
            value = value.replace(color, f"var(--series-{i}, {color})")
    return value.replace("url(#", f"url(#{prefix}")


def _lighter(uri: str) -> str:
    """Return a PNG data URI without line breaks, as JPEG where it holds a large photograph."""
    head, _, payload = uri.partition(",")
    data = base64.b64decode(payload)
    if len(data) < _JPEG_FROM_BYTES:
        return f"{head},{base64.b64encode(data).decode()}"
    buffer = io.BytesIO()
    Image.open(io.BytesIO(data)).convert("RGB").save(buffer, format="JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def figure_png_data_uri(figure: Figure, dots_per_inch: float = 150) -> str:
    """Return a figure as a PNG in a `data:` address, its background clear."""
    buffer = io.BytesIO()
    with mpl.rc_context(_STYLE):
        figure.savefig(
            buffer, format="png", dpi=dots_per_inch, transparent=True, metadata={"Software": None}
        )
    return _png_uri(buffer)


def array_png_data_uri(pixels: npt.NDArray[np.uint8]) -> str:
    """Return an (H, W, 3) RGB or (H, W, 4) RGBA uint8 array as a PNG in a `data:` address."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return _png_uri(buffer)


def _png_uri(buffer: io.BytesIO) -> str:
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
