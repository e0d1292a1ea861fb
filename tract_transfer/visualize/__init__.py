"""Draw boxes, filters and curves as matplotlib figures, without global state.

Figures have no background. Text and axes have the color `INK`, outlines `PAPER` and series
`PALETTE`. `figure_svg` replaces these by `currentColor`, `var(--paper)` and `var(--series-0)`
onwards, so that the page decides how an SVG looks in light and dark mode. What is drawn on a
photograph keeps its colors.
"""
