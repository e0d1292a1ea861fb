"""Metrics as pure functions on arrays, and evaluators that only collect.

An evaluator serves one pass over one split: `update(predictions, targets)` a batch, then
`compute() -> dict[str, float]`, then `details()`, a JSON-able dict with the protocol in words.
`compute` is a collective and is exact on any number of processes, provided that no process was
given an image twice. Every metric but a loss is a fraction in [0, 1]; reports print percent.
"""

from tract_transfer.evaluation.classification import ClassificationEvaluator
from tract_transfer.evaluation.detection import VocEvaluator
from tract_transfer.registry import Registry

EVALUATORS = Registry("EVALUATORS")
EVALUATORS.register("classification")(ClassificationEvaluator)
EVALUATORS.register("voc")(VocEvaluator)

__all__ = ["EVALUATORS", "ClassificationEvaluator", "VocEvaluator"]
