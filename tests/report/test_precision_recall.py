"""The report's precision-recall lines are the means of what the results hold."""

from pathlib import Path

import numpy as np
import pytest

from tract_transfer.report.pictures import draw_precision_recall, mean_curve
from tract_transfer.report.runs import Run


def run(**curves):
    return Run(Path(), results={"details": {"pr_curves": curves} if curves else {}})


def test_a_line_is_the_mean_over_classes():
    assert mean_curve(run(cat=[1, 0.5, 0], dog=[0.5, 0.5, 0])) == ([0, 0.5, 1], [0.75, 0.5, 0])
    assert mean_curve(run(cat=[1, 1])) == ([0, 1], [1, 1])


@pytest.mark.parametrize(
    "curves", [{}, {"cat": [1, None]}, {"cat": [1], "dog": [1, 2]}, {"cat": "x"}, {"cat": []}]
)
def test_runs_without_curves_have_no_figure(curves):
    assert mean_curve(run(**curves)) is None
    assert draw_precision_recall("detect", {"vanilla": [run(**curves)]}) == []


def test_the_figure_shows_every_method():
    curve = np.linspace(1, 0, 101).tolist()
    (figure,) = draw_precision_recall(
        "detect", {"vanilla": [run(a=curve)], "tract": [run(a=curve)]}
    )
    assert "vanilla" in figure
    assert "tract" in figure
