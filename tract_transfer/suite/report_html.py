"""A report as one HTML page that fetches nothing and runs no script.

The template escapes everything but the figures that we draw.
"""

from pathlib import Path

import jinja2

from tract_transfer import __version__
from tract_transfer.suite import tables, wording
from tract_transfer.suite.content import Report
from tract_transfer.suite.pictures import (
    BEST_DRAWN,
    MAX_FILTERS,
    MIN_SCORE,
    draw_curves,
    draw_detections,
    picture_filters,
)

MAX_CLASSES = 150  # of a task, those that changed most; the JSON has all
PRINTED_CLASSES = 40  # on paper
NAMED_CLASSES = 20  # of a task, beside its bars


def html(report: Report) -> str:
    """Return the page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    names = "score gap spread interval metric_name count_pairs count_seeds is_loss"
    for name in names.split():
        environment.filters[name] = getattr(wording, name)
    environment.filters["unbroken"] = _unbroken
    problems = list(report.problems)
    curves = {
        own.task: draw_curves(report.tasks[own.task], own, report.methods)
        for own in report.evaluations
    }
    return environment.get_template("report.html.jinja").render(
        report=report,
        version=__version__,
        methods=report.methods,
        treated=report.treated,
        baseline=report.baseline,
        curves=curves,
        detections=draw_detections(report.tasks, problems),
        filters=picture_filters(report.runs, problems),
        tables=tables,
        problems=problems,
        limits={
            "score": MIN_SCORE, "best": BEST_DRAWN, "filters": MAX_FILTERS, "classes": MAX_CLASSES,
            "printed": PRINTED_CLASSES, "named": NAMED_CLASSES,
        },
    )  # fmt: skip


def _unbroken(text: str) -> str:
    """Return text whose percent signs stay on the line of their number."""
    return text.replace(" %", "\u00a0%")
