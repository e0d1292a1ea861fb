"""Draw boxes, filters and curves as matplotlib figures, without global state.

Figures have no background. Text and axes have the color `INK`, outlines `PAPER` and series
`PALETTE`. `figure_svg` replaces these by `currentColor`, `var(--paper)` and `var(--series-0)`
onwards, so that the page decides how an SVG looks in light and dark mode. What is drawn on a
photograph keeps its colors.
"""

from tract_transfer.visualize.boxes import draw_detections, draw_samples
from tract_transfer.visualize.plots import (
    Curve,
    array_png_data_uri,
    curves,
    figure_pixels,
    figure_svg,
    filter_grid,
    save_pixels,
)

__all__ = [
    "Curve",
    "array_png_data_uri",
    "curves",
    "draw_detections",
    "draw_samples",
    "figure_pixels",
    "figure_svg",
    "filter_grid",
    "save_pixels",
]
