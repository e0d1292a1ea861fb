"""Figures show the numbers given, and their SVG can be put into any page."""

import base64
import io
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tract_transfer import visualize
from tract_transfer.visualize import (
    array_png_data_uri,
    curves,
    draw_detections,
    draw_samples,
    figure_pixels,
    figure_svg,
    filter_grid,
    save_pixels,
)


def image(height: int = 40, width: int = 50) -> torch.Tensor:
    return torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(0)).to(
        torch.uint8
    )


def decoded(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


def test_without_boxes_the_figure_is_the_image() -> None:
    pixels = image()
    drawn = figure_pixels(draw_detections(pixels, [], []), width_px=50)
    assert np.array_equal(drawn, pixels.permute(1, 2, 0).numpy())


def test_a_box_lies_where_its_pixels_lie() -> None:
    """Boxes are exclusive at x2 and y2, so edges fall between pixels, never on their centres."""
    figure = draw_detections(image(), [[10, 5, 30, 25]], ["cat"], [0.5])
    x, y = figure.axes[0].lines[-1].get_data()
    assert (min(x), max(x), min(y), max(y)) == (10, 30, 5, 25)
    assert figure.axes[0].get_xlim() == (0, 50)
    assert figure.axes[0].get_ylim() == (40, 0)
    assert figure.axes[0].texts[0].get_text() == "cat 0.50"


@pytest.mark.parametrize(
    ("boxes", "labels", "scores"),
    [([[0, 0, 1, 1]], [], None), ([[0, 0, 1, 1]], ["a"], []), ([[0, 0, 1]], ["a"], None)],
)
def test_boxes_labels_and_scores_must_agree(
    boxes: list[list[float]], labels: list[str], scores: list[float] | None
) -> None:
    with pytest.raises(ValueError, match="box"):
        draw_detections(image(), boxes, labels, scores)


def test_an_image_must_be_uint8_and_channels_first() -> None:
    with pytest.raises(ValueError, match=r"\(3, H, W\) uint8"):
        draw_detections(image().float(), [], [])


def test_filters_do_not_depend_on_their_scale_and_mirror_with_their_sign() -> None:
    weight = torch.randn(5, 3, 3, 4, generator=torch.Generator().manual_seed(0))
    scales = torch.tensor([0.25, 2.0, 8.0, 1.0, 4.0]).view(5, 1, 1, 1)
    grid = filter_grid(weight)
    assert np.array_equal(grid, filter_grid(scales * weight))
    solid = grid[..., 3] == 255
    total = grid[solid][:, :3].astype(int) + filter_grid(-weight)[solid][:, :3]
    assert np.abs(total - 255).max() <= 1


def test_filters_stand_in_reading_order_with_clear_gaps() -> None:
    grid = filter_grid(torch.eye(3).view(3, 3, 1, 1), columns=2)
    assert grid.shape == (3, 3, 4)
    assert [tuple(grid[y, x, :3]) for y, x in ((0, 0), (0, 2), (2, 0))] == [
        (255, 128, 128), (128, 255, 128), (128, 128, 255),
    ]  # fmt: skip
    assert (grid[..., 3] == [[255, 0, 255], [0, 0, 0], [255, 0, 0]]).all()


def test_filters_of_zeros_are_grey_and_of_nan_an_error() -> None:
    assert (filter_grid(torch.zeros(1, 3, 2, 2))[..., :3] == 128).all()
    with pytest.raises(ValueError, match="NaN"):
        filter_grid(torch.full((1, 3, 2, 2), torch.nan))
    with pytest.raises(ValueError, match=r"\(O, 3, kh, kw\)"):
        filter_grid(torch.zeros(1, 1, 2, 2))


@pytest.mark.parametrize("seeds", [1, 3, 5])
def test_the_bold_line_is_the_mean_over_seeds(seeds: int) -> None:
    x = [1.0, 2.0, 3.0]
    values = np.random.default_rng(0).random((seeds, 3))
    axes = curves({"a": [], "b": [(x, y) for y in values]}, x_label="x", y_label="y").axes[0]
    bold = axes.lines[-1]
    assert np.allclose(bold.get_ydata(), values.mean(axis=0))
    assert bold.get_color() == visualize.PALETTE[1], "an empty series keeps its colour"
    assert len(axes.lines) == (4 if seeds == 3 else 1)
    assert len(axes.collections) == (seeds > 3)


def test_a_diverged_seed_breaks_the_line_and_not_the_figure() -> None:
    series = {"a": [([1, 2, 3], [1, float("inf"), 2]), ([1, 2], [1, 2])]}
    figure = curves(series, x_label="x", y_label="y")
    assert list(figure.axes[0].lines[-1].get_xdata()) == [1, 2]
    assert "<svg" in figure_svg(figure, "diverged")


def figures() -> str:
    line = curves({"a": [([0, 1], [0, 1])]}, x_label="epoch", y_label="loss")
    boxes = draw_detections(image(300, 400), [[9, 9, 99, 99]], ["<script>alert(1)</script> $x$"])
    return figure_svg(line, "one") + figure_svg(line, "two") + figure_svg(boxes, '3 "quoted"')


def test_svg_refers_only_to_itself_and_no_id_comes_twice() -> None:
    text = figures()
    ids = re.findall(r' id="([^"]+)"', text)
    references = re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', text)
    assert ids
    assert len(ids) == len(set(ids))
    assert {a or b for a, b in references} == set(ids)
    assert all(href.startswith(("#", "data:")) for href in re.findall(r'href="([^"]+)', text))
    assert text.count("http") == text.count('xmlns="http://www.w3.org/2000/svg"') == 3
    assert "<style" not in text, "a style sheet would apply to the whole page"


def test_svg_is_the_same_every_time_and_well_formed() -> None:
    assert figures() == figures()
    root = ET.fromstring(f"<page>{figures()}</page>")
    texts = "".join(root.itertext())
    assert "<script>alert(1)</script> $x$" in texts
    assert "<script" not in figures()


def test_svg_takes_its_colours_from_the_page() -> None:
    text = figure_svg(curves({"a": [([0, 1], [0, 1])]}, x_label="x", y_label="y"), "name")
    assert visualize.INK not in text
    assert "currentColor" in text
    assert "var(--series-0, #6b7280)" in text
    assert 'aria-label="name"' in text


def test_a_photograph_is_embedded_as_jpeg_and_a_small_image_exactly() -> None:
    photo = figure_svg(draw_detections(image(300, 400), [], []), "photo")
    assert "data:image/jpeg" in photo
    assert "pixelated" not in photo
    small = figure_svg(draw_detections(image(), [], []), "small")
    assert "pixelated" in small
    uri = re.search(r'href="(data:image/png[^"]+)"', small)
    assert uri
    assert np.array_equal(decoded(uri[1])[..., :3], image().permute(1, 2, 0).numpy())


def test_a_grid_shows_every_sample_with_its_boxes(tmp_path: Path) -> None:
    images = [image(), image(20, 60), image(60, 20)]
    boxes = [[((1, 2, 11, 12), "cat", False)], [], [((0, 0, 5, 5), "dog", True)]]
    figure = draw_samples(images, ["one", "two", "three"], boxes, columns=2)
    assert [axes.get_xlim()[1] for axes in figure.axes] == [50, 60, 20]
    drawn = [[text.get_text() for text in axes.texts] for axes in figure.axes]
    assert drawn == [["cat"], [], ["dog"]]
    assert [text.get_text() for text in figure.texts] == ["one", "two", "three"]
    save_pixels(figure_pixels(figure, 300), tmp_path / "new" / "grid.png")
    saved = np.asarray(Image.open(tmp_path / "new" / "grid.png"))
    assert saved.shape[1:] == (300, 3)
    assert (saved[-10:, -10:] == 255).all(), "the fourth place is empty, and white"
    with pytest.raises(ValueError, match="image"):
        draw_samples([], [])


def test_an_array_survives_its_png() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 4), dtype=np.uint8)
    assert np.array_equal(decoded(array_png_data_uri(pixels)), pixels)


def test_pyplot_is_never_imported() -> None:
    code = "import sys, tract_transfer.visualize; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
