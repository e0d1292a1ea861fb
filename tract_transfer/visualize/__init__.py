"""Pictures of boxes, filters and curves, as matplotlib figures that no global state touches.

Figures have no background. Their text and axes are drawn in `INK`, rims in `PAPER` and series in
`PALETTE`; `figure_svg` turns these colours into `currentColor`, `var(--paper)` and
`var(--series-0)` onwards, so that the page an SVG is put into decides how they look, in the light
and in the dark. What lies on a photograph keeps its colours: so does the photograph.
"""

from tract_transfer.visualize.boxes import draw_detections, draw_samples
from tract_transfer.visualize.plots import (
    BOX,
    INK,
    MARKERS,
    PALETTE,
    PAPER,
    Curve,
    array_png_data_uri,
    curves,
    figure_pixels,
    figure_svg,
    filter_grid,
    save_pixels,
)

__all__ = [
    "BOX",
    "INK",
    "MARKERS",
    "PALETTE",
    "PAPER",
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
