"""Colours and line widths that all figures share."""

from typing import Any

INK = "#15181d"
PAPER = "#fefefd"
# Okabe and Ito's colours, told apart by every kind of colour vision, after a neutral first.
PALETTE = ("#6b7280", "#0072b2", "#d55e00", "#009e73", "#b3588f", "#c98a00")
BOX = "#0a64a4"
MARKERS = ("s", "o", "^", "D", "v", "P")

STYLE: dict[str, Any] = {
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
