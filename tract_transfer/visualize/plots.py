"""Draw filters as pixels and curves over seeds, and turn figures into SVG and PNG."""

import base64
import hashlib
import io
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

Curve = tuple[Sequence[float], Sequence[float]]
ArrayLike = Tensor | npt.NDArray[np.generic]

INK = "#15181d"
PAPER = "#fefefd"
# A neutral color, then those of Okabe and Ito, which color-blind readers can tell apart.
PALETTE = ("#6b7280", "#0072b2", "#d55e00", "#009e73", "#b3588f", "#c98a00")
MARKERS = ("s", "o", "^", "D", "v", "P")
STYLE: dict[str, Any] = {
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "text.color"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color"), INK),
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 8.0,
    "legend.frameon": False,
    "text.parse_math": False,  # a class called "$x$" is not a formula
    "svg.fonttype": "none",
    "svg.hashsalt": "tract_transfer",
}
MAX_LINES = 3  # up to this many seeds are drawn as lines, more as a band
MAX_MARKED_POINTS = 30
PIXELATED_TO_PX = 200  # narrower images are shown with square pixels
JPEG_FROM_BYTES = 30_000  # larger photographs are embedded as JPEG, a tenth of the size
# Control characters and halves of characters: a name may hold them, XML may not.
_NO_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")


def filter_grid(weight: ArrayLike) -> npt.NDArray[np.uint8]:
    """Arrange filters (O, 3, kh, kw) in a grid that is about square, one pixel for each weight.

    Each filter is scaled by its largest weight: gray is 0, and channels are red, green, blue. The
    pixels between filters are transparent. Returns (H, W, 4) uint8, RGBA.
    """
    filters = np.asarray(weight, dtype=np.float64)
    if filters.ndim != 4 or filters.shape[1] != 3 or 0 in filters.shape:
        raise ValueError(f"filters must be (O, 3, kh, kw), not {filters.shape}.")
    if not np.isfinite(filters).all():
        raise ValueError("filters contain NaN or infinity.")
    O, _, kh, kw = filters.shape  # noqa: E741
    columns = math.ceil(math.sqrt(O))
    rows = math.ceil(O / columns)
    largest = np.abs(filters).max(axis=(1, 2, 3), keepdims=True)
    tiles = np.rint(127.5 + 127.5 * filters / np.where(largest > 0, largest, 1)).astype(np.uint8)
    grid = np.zeros((rows * (kh + 1) - 1, columns * (kw + 1) - 1, 4), np.uint8)
    for i, tile in enumerate(tiles):
        y, x = (i // columns) * (kh + 1), (i % columns) * (kw + 1)
        grid[y : y + kh, x : x + kw, :3] = tile.transpose(1, 2, 0)
        grid[y : y + kh, x : x + kw, 3] = 255
    return grid


def curves(series: Mapping[str, Sequence[Curve]], *, x_label: str, y_label: str) -> Figure:
    """Draw each series, one (x, y) a seed, as a bold mean line over its seeds.

    Up to three seeds are thin lines, more are a band from minimum to maximum. The mean is drawn
    where every seed has a value. A series without seeds is not drawn but keeps its color.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.4, 2.7), layout="constrained")
        axes = figure.add_subplot()
        for i, (name, lines) in enumerate(series.items()):
            if lines:
                _draw_series(axes, name, lines, PALETTE[i % 6], MARKERS[i % 6])
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.6)
        axes.tick_params(length=2.5, width=0.6)
        axes.margins(x=0.02)
        if any(series.values()):
            figure.legend(loc="outside upper left", ncols=3, handlelength=1.6, borderaxespad=0.2)
    return figure


def _draw_series(axes: Axes, name: str, lines: Sequence[Curve], color: str, marker: str) -> None:
    values = [dict(zip(map(float, x), map(float, y), strict=True)) for x, y in lines]
    shared = sorted(set.intersection(*map(set, values)))
    stack = np.array([[line[x] for x in shared] for line in values])
    stack = np.where(np.isfinite(stack), stack, np.nan)
    if 1 < len(values) <= MAX_LINES or not shared:
        for line in values:
            y = [value if math.isfinite(value) else math.nan for value in line.values()]
            axes.plot(list(line), y, color=color, linewidth=0.7, alpha=0.5)
    elif len(values) > 1:
        low, high = stack.min(axis=0), stack.max(axis=0)
        axes.fill_between(shared, low, high, color=color, alpha=0.18, linewidth=0)
    halo = [patheffects.withStroke(linewidth=3, foreground=PAPER)]
    axes.plot(
        shared, stack.mean(axis=0), color=color, linewidth=1.7, markersize=3.0, label=name,
        marker=marker if len(shared) <= MAX_MARKED_POINTS else None,
        path_effects=halo, solid_joinstyle="round",
    )  # fmt: skip


def figure_svg(figure: Figure, name: str) -> str:
    """Return a figure as an `<svg>` element, which is the same text at every call.

    It refers to nothing outside itself, and takes font and colors from the page around it. `name`
    is for screen readers. Ids derive from it, so each figure of a page needs its own.
    """
    buffer, name = io.StringIO(), _NO_XML.sub("\ufffd", name)
    with mpl.rc_context(STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    root = ET.fromstring(_NO_XML.sub("\ufffd", buffer.getvalue()))
    prefix = "f" + hashlib.sha256(name.encode()).hexdigest()[:10] + "-"
    referenced = set(re.findall(r'(?:url\(#|href="#)([^")]+)', buffer.getvalue()))
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for key, value in list(element.attrib.items()):
            del element.attrib[key]
            if key != "id" or value in referenced:
                bare = key.rpartition("}")[2]
                element.set(bare, _inline(bare, value, prefix))
        if element.tag == "image" and int(element.get("width", "0")) > PIXELATED_TO_PX:
            element.attrib.pop("style", None)
    for parent in list(root.iter()):  # matplotlib's style sheet would apply to the whole page
        for child in [c for c in parent if c.tag in ("metadata", "style")]:
            parent.remove(child)
    root.attrib |= {"xmlns": "http://www.w3.org/2000/svg", "role": "img", "aria-label": name}
    root.set("style", "stroke-linejoin: round; stroke-linecap: butt")
    return ET.tostring(root, encoding="unicode")


def _inline(attribute: str, value: str, prefix: str) -> str:
    """Adapt the value of an attribute to the page."""
    if attribute == "id":
        return prefix + value
    if attribute == "href":
        return f"#{prefix}{value[1:]}" if value.startswith("#") else _compressed(value)
    if attribute == "style":
        value = re.sub(r"font: [^;]*?([\d.]+px)[^;]*", r"font-size: \1", value)
        value = re.sub(r"font-family: [^;]*;? ?", "", value)
        value = value.replace(INK, "currentColor").replace(PAPER, f"var(--paper, {PAPER})")
        for i, color in enumerate(PALETTE):
            value = value.replace(color, f"var(--series-{i}, {color})")
    return value.replace("url(#", f"url(#{prefix}")


def _compressed(uri: str) -> str:
    """Return a PNG data URI without line breaks, or as JPEG if it holds a large photograph."""
    data = base64.b64decode(uri.partition(",")[2])
    if len(data) < JPEG_FROM_BYTES:
        return "".join(uri.split())
    return _data_uri(Image.open(io.BytesIO(data)).convert("RGB"), "jpeg", quality=88)


def _data_uri(image: Image.Image, kind: str, **options: int) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def figure_pixels(figure: Figure, width_px: int) -> npt.NDArray[np.uint8]:
    """Draw a figure on white, as (H, W, 3) uint8 with W = `width_px`."""
    with mpl.rc_context(STYLE):
        figure.set_dpi(width_px / figure.get_figwidth())
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
    return np.array(canvas.buffer_rgba(), np.uint8)[..., :3]


def save_pixels(pixels: npt.NDArray[np.uint8], path: Path) -> None:
    """Write an (H, W, 3) uint8 array as an image file, and create its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def array_png_data_uri(pixels: npt.NDArray[np.uint8]) -> str:
    """Return an (H, W, 3) RGB or (H, W, 4) RGBA uint8 array as the data URI of a PNG."""
    return _data_uri(Image.fromarray(pixels), "png")
