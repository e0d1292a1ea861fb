"""Precision against recall, from the details of detection results."""

# K classes, R recalls

from collections.abc import Mapping, Sequence

import numpy as np
from markupsafe import Markup

from tract_transfer import visualize
from tract_transfer.suite.runs import Run


def draw_precision_recall(task: str, runs: Mapping[str, Sequence[Run]]) -> list[Markup]:
    """Draw one line a method: the mean over classes and seeds of the precision at IoU 0.5.

    Args:
        runs: method -> its runs; those without `pr_curves` in their details have no line.

    Returns:
        One figure, or none where no run has the curves.
    """
    series = {method: [c for run in own if (c := mean_curve(run))] for method, own in runs.items()}
    if not any(series.values()):
        return []
    figure = visualize.curves(series, x_label="recall", y_label="precision at IoU 0.5")
    return [Markup(visualize.figure_svg(figure, f"{task}: precision against recall, all classes"))]


def mean_curve(run: Run) -> visualize.Curve | None:
    """Return recalls and mean precisions, or None where the run has none that can be read."""
    by_class = run.results["details"].get("pr_curves")
    if not isinstance(by_class, dict):
        return None
    try:
        precision = np.array(list(by_class.values()), np.float64)  # (K, R)
    except (TypeError, ValueError):
        return None
    if precision.ndim != 2 or not precision.size or not np.isfinite(precision).all():
        return None
    recalls = np.linspace(0, 1, precision.shape[1])
    return recalls.tolist(), precision.mean(axis=0).tolist()
