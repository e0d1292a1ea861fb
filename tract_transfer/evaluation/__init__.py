"""Metrics as pure functions on arrays, and evaluators that collect their inputs.

An evaluator serves one pass over one split: `update(predictions, targets)` for each batch, then
`compute() -> dict[str, float]`, then `details()`, a JSON-able dict with the protocol in words.
`compute` is a collective, and exact for any number of processes as long as no image is evaluated
twice. All metrics but losses are fractions in [0, 1]; reports print percent.

EVALUATORS maps protocols (`evaluation.protocol`) to classes, or partials of them, that are called
with the class names. Their attribute `task` is `classification` or `detection`, and `metrics` are
the names that `compute` always returns and of which larger is better, for `evaluation.metric`.
"""

from functools import partial
from typing import Any

from tract_transfer.evaluation.classification import ClassificationEvaluator, check_metric
from tract_transfer.evaluation.detection import CocoEvaluator, VocEvaluator
from tract_transfer.evaluation.voc import PROTOCOLS, VocProtocol
from tract_transfer.registry import Registry

EVALUATORS = Registry("EVALUATORS")
for _name, _protocol in PROTOCOLS.items():
    EVALUATORS.register(_name)(partial(VocEvaluator, protocol=_protocol))
EVALUATORS.register("coco")(CocoEvaluator)
EVALUATORS.register("accuracy")(ClassificationEvaluator)
_CONTRACT = ("task", "metrics", "update", "compute", "details")


def find_evaluator(name: str, task: str) -> Any:
    """Return the entry of EVALUATORS for a task.

    Raises:
        KeyError: there is no such name.
        ValueError: it is for another task, or lacks a part of the contract.
    """
    entry = EVALUATORS.get(name)
    kind = _class_of(entry)
    if missing := [attribute for attribute in _CONTRACT if not hasattr(kind, attribute)]:
        raise ValueError(
            f"{name} lacks {', '.join(missing)}. An evaluator is a class with task, metrics, "
            "update, compute and details: see docs/guides/plugins.md."
        )
    if kind.task != task:
        raise ValueError(
            f"{name} is for {kind.task}, and the task is {task}. Use one of {protocols_of(task)}."
        )
    return entry


def protocols_of(task: str) -> list[str]:
    """Return the names in EVALUATORS for a task."""
    return [name for name, entry in EVALUATORS if getattr(_class_of(entry), "task", None) == task]


def metrics_of(entry: Any) -> list[str]:
    """Return the names that `evaluation.metric` may have with an evaluator."""
    return list(_class_of(entry).metrics)


def _class_of(entry: Any) -> Any:
    return entry.func if isinstance(entry, partial) else entry


__all__ = [
    "EVALUATORS",
    "PROTOCOLS",
    "ClassificationEvaluator",
    "CocoEvaluator",
    "VocEvaluator",
    "VocProtocol",
    "check_metric",
    "find_evaluator",
    "metrics_of",
    "protocols_of",
]
