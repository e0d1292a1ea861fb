"""Figures and arrays as SVG, PNG and pixels."""

# H x W an image

import base64
import hashlib
import io
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from tract_transfer.visualize.style import INK, PALETTE, PAPER, STYLE

# What a name may hold and XML may not: control characters, and halves of characters.
_NO_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
_PIXELATED_TO_PX = 200  # a narrower image is shown with square pixels
_JPEG_FROM_BYTES = 30_000  # a photograph past this is embedded as JPEG, a tenth of the size


def figure_svg(figure: Figure, name: str) -> str:
    """Return a figure as an `<svg>` element to put into a page, the same text at every call.

    Args:
        name: what the figure shows, for readers who cannot see it. Ids derive from it: give
            every figure of a page its own.

    It refers to nothing outside itself, and takes its font and colours from the page.
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


def figure_pixels(figure: Figure, width_px: int) -> npt.NDArray[np.uint8]:
    """Return a figure drawn on white, (H, W, 3) uint8 of W = `width_px`."""
    with mpl.rc_context(STYLE):
        figure.set_dpi(width_px / figure.get_figwidth())
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
    rgba = np.asarray(canvas.buffer_rgba(), dtype=np.float64) / 255
    alpha = rgba[..., 3:]
    return np.rint(255 * (rgba[..., :3] * alpha + 1 - alpha)).astype(np.uint8)


def save_pixels(pixels: npt.NDArray[np.uint8], path: Path) -> None:
    """Write an (H, W, 3) uint8 array as an image file; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def array_png_data_uri(pixels: npt.NDArray[np.uint8]) -> str:
    """Return an (H, W, 3) RGB or (H, W, 4) RGBA uint8 array as a PNG in a `data:` address."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
