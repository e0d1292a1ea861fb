"""Figures show the given numbers, and their SVG can be put into any page."""

import base64
import io
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
from PIL import Image

from tract_transfer.visualize.boxes import draw_detections, draw_samples
from tract_transfer.visualize.plots import (
    INK,
    PALETTE,
    array_png_data_uri,
    curves,
    figure_pixels,
    figure_svg,
    filter_grid,
    save_pixels,
)


def image(height: int = 40, width: int = 50) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, height, width), generator=generator).to(torch.uint8)


def decoded(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


def test_boxes_lie_where_their_pixels_lie():
    """Boxes are exclusive at x2 and y2, so edges fall between pixels, never on their centers."""
    drawn = figure_pixels(draw_detections(image(), [], [], []), width_px=50)
    assert np.array_equal(drawn, image().permute(1, 2, 0).numpy())
    truth, boxes = [[1, 2, 3, 4]], [[10, 5, 30, 25]]
    axes = draw_detections(image(), boxes, ["cat"], [0.5], truth_boxes_xyxy=truth).axes[0]
    for line, box in zip(axes.lines[1::2], (*truth, *boxes), strict=True):
        x, y = line.get_data()
        assert [min(x), min(y), max(x), max(y)] == box
    assert (axes.get_xlim(), axes.get_ylim()) == ((0, 50), (40, 0))
    assert [text.get_text() for text in axes.texts] == ["cat 0.50"]


BAD_INPUTS = {
    "fewer labels": (lambda: draw_detections(image(), [[0, 0, 1, 1]], [], [1.0]), "argument 2"),
    "fewer scores": (lambda: draw_detections(image(), [[0, 0, 1, 1]], ["a"], []), "argument 3"),
    "three corners": (lambda: draw_detections(image(), [[0, 0, 1]], ["a"], [1.0]), "expected 4"),
    "float image": (lambda: draw_detections(image() / 2, [], [], []), r"\(3, H, W\) uint8"),
    "nan filters": (lambda: filter_grid(torch.full((1, 3, 2, 2), torch.nan)), "NaN"),
    "gray filters": (lambda: filter_grid(torch.zeros(1, 1, 2, 2)), r"\(O, 3, kh, kw\)"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_is_refused(name):
    attempt, match = BAD_INPUTS[name]
    with pytest.raises(ValueError, match=match):
        attempt()


def test_filters_are_independent_of_scale_and_mirror_with_sign():
    weight = torch.randn(5, 3, 3, 4, generator=torch.Generator().manual_seed(0))
    scales = torch.tensor([0.25, 2.0, 8.0, 1.0, 4.0]).view(5, 1, 1, 1)
    grid = filter_grid(weight)
    assert np.array_equal(grid, filter_grid(scales * weight))
    opaque = grid[..., 3] == 255
    total = grid[opaque][:, :3].astype(int) + filter_grid(-weight)[opaque][:, :3]
    assert np.abs(total - 255).max() <= 1
    assert (filter_grid(torch.zeros(1, 3, 2, 2))[..., :3] == 128).all()


def test_filters_stand_in_reading_order_with_transparent_gaps():
    grid = filter_grid(torch.eye(3).view(3, 3, 1, 1))
    colors = [(255, 128, 128), (128, 255, 128), (128, 128, 255)]
    assert [tuple(grid[y, x, :3]) for y, x in ((0, 0), (0, 2), (2, 0))] == colors
    assert (grid[..., 3] == [[255, 0, 255], [0, 0, 0], [255, 0, 0]]).all()
    assert np.array_equal(decoded(array_png_data_uri(grid)), grid)


@pytest.mark.parametrize("seeds", [1, 3, 5])
def test_bold_line_is_the_mean_over_seeds(seeds):
    x = [1.0, 2.0, 3.0]
    values = np.random.default_rng(0).random((seeds, 3))
    axes = curves({"a": [], "b": [(x, y) for y in values]}, x_label="x", y_label="y").axes[0]
    bold = axes.lines[-1]
    assert np.allclose(bold.get_ydata(), values.mean(axis=0))
    assert bold.get_color() == PALETTE[1], "an empty series keeps its color"
    assert len(axes.lines) == (4 if seeds == 3 else 1)
    assert len(axes.collections) == (seeds > 3)


def test_mean_is_drawn_where_every_seed_has_a_value():
    diverged = {"a": [([1, 2, 3], [1, float("inf"), 2]), ([1, 2], [1, 2])]}
    figure = curves(diverged, x_label="x", y_label="y")
    assert list(figure.axes[0].lines[-1].get_xdata()) == [1, 2]
    assert "<svg" in figure_svg(figure, "diverged")


def test_svg_is_reproducible_well_formed_and_refers_only_to_itself():
    def figures() -> str:
        line = curves({"a": [([0, 1], [0, 1])]}, x_label="epoch", y_label="loss")
        name = "<script>alert(1)</script> $x$"
        boxes = draw_detections(image(300, 400), [[9, 9, 99, 99]], [name], [1.0])
        return figure_svg(line, "one") + figure_svg(line, "two") + figure_svg(boxes, '3 "quoted"')

    text = figures()
    assert text == figures()
    ids = re.findall(r' id="([^"]+)"', text)
    references = re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', text)
    assert ids
    assert len(ids) == len(set(ids))
    assert {a or b for a, b in references} == set(ids)
    assert all(href.startswith(("#", "data:")) for href in re.findall(r'href="([^"]+)', text))
    assert text.count("http") == text.count('xmlns="http://www.w3.org/2000/svg"') == 3
    assert not re.search("<(style|script)", text), "a style sheet would apply to the whole page"
    assert "<script>alert(1)</script> $x$" in "".join(ET.fromstring(f"<p>{text}</p>").itertext())
    curve = text.partition("</svg>")[0]
    assert INK not in curve, "the page decides on colors"
    assert all(part in curve for part in ("currentColor", "var(--series-0,", 'aria-label="one"'))


def test_photographs_are_embedded_as_jpeg_and_small_images_exactly():
    photo, small = (
        figure_svg(draw_detections(pixels, [], [], []), "name")
        for pixels in (image(300, 400), image())
    )
    assert "data:image/jpeg" in photo
    assert "pixelated" not in photo
    assert "pixelated" in small
    (uri,) = re.findall(r'href="(data:image/png[^"]+)"', small)
    assert np.array_equal(decoded(uri)[..., :3], image().permute(1, 2, 0).numpy())


def test_grid_shows_every_sample_with_its_boxes(tmp_path):
    images = [image(), image(20, 60), image(60, 20)]
    boxes = [[((1, 2, 11, 12), "cat", False)], [], [((0, 0, 5, 5), "dog", True)]]
    figure = draw_samples(images, ["one", "two", "three"], boxes)
    assert [axes.get_xlim()[1] for axes in figure.axes] == [50, 60, 20]
    texts = [[text.get_text() for text in part.texts] for part in (*figure.axes, figure)]
    assert texts == [["cat"], [], ["dog"], ["one", "two", "three"]]
    save_pixels(figure_pixels(figure, 300), tmp_path / "new" / "grid.png")
    saved = np.asarray(Image.open(tmp_path / "new" / "grid.png"))
    assert saved.shape[1:] == (300, 3)
    assert (saved[-10:, -10:] == 255).all(), "the fourth place is empty, and white"
