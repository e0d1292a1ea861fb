"""A report as JSON, for programs; docs/report.md tells the fields."""

import json
import math
from dataclasses import asdict
from typing import Any

from tract_transfer import __version__
from tract_transfer.suite.compare import Row
from tract_transfer.suite.content import Report

SCHEMA, SCHEMA_VERSION = "tract_transfer.report", 1


def to_json(report: Report) -> str:
    """Return the content of a report as JSON; numbers are as measured, fractions in [0, 1]."""
    content = {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "tract_transfer": __version__,
        "title": report.title,
        "baseline": report.baseline,
        "methods": report.methods,
        "answer": report.answer,
        "results": [_row(row) for row in report.rows],
        "all_metrics": [_row(row) for row in report.every_row],
        "curves": [asdict(own) for own in report.evaluations],
        "speed_ups": [asdict(row) for row in report.speed_ups],
        "classes": {task: [asdict(row) for row in own] for task, own in report.classes.items()},
        "costs": [asdict(row) for row in report.costs],
        "paper": [asdict(row) for row in report.paper],
        "protocol": {task: [asdict(card) for card in own] for task, own in report.cards.items()},
        "runs": [
            {
                "folder": run.folder.as_posix(),
                "task": run.task,
                "method": run.method,
                "seed": run.seed,
                "state": run.state,
                "failure": run.failure,
                "metrics": run.metrics,
            }
            for run in report.runs
        ],
        "problems": report.problems,
    }
    return json.dumps(_finite(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _row(row: Row) -> dict[str, Any]:
    own = {key: value for key, value in vars(row).items() if key not in ("missing", "differences")}
    own["summaries"] = {method: asdict(summary) for method, summary in row.summaries.items()}
    own["differences"] = {method: asdict(found) for method, found in row.differences.items()}
    own["missing"] = {
        method: [run.folder.as_posix() for run in runs] for method, runs in row.missing.items()
    }
    return own


def _finite(value: Any) -> Any:
    """Return nested values with "never" for an infinity: epochs until what is never reached."""
    if isinstance(value, dict):
        return {key: _finite(own) for key, own in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(own) for own in value]
    return "never" if isinstance(value, float) and math.isinf(value) else value
