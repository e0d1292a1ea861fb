"""Metrics as pure functions on arrays, and evaluators that collect their inputs.

An evaluator serves one pass over one split: `update(predictions, targets)` for each batch, then
`compute() -> dict[str, float]`, then `details()`, a JSON-able dict with the protocol in words.
`compute` is a collective, and exact for any number of processes as long as no image is evaluated
twice. All metrics but losses are fractions in [0, 1]; reports print percent.

EVALUATORS maps detection protocols (`evaluation.protocol`) to functions: class names -> evaluator.
"""

from functools import partial

from tract_transfer.evaluation.classification import ClassificationEvaluator, check_metric
from tract_transfer.evaluation.detection import CocoEvaluator, VocEvaluator
from tract_transfer.evaluation.voc import PROTOCOLS, VocProtocol
from tract_transfer.registry import Registry

EVALUATORS = Registry("EVALUATORS")
for _name, _protocol in PROTOCOLS.items():
    EVALUATORS.register(_name)(partial(VocEvaluator, protocol=_protocol))
EVALUATORS.register("coco")(CocoEvaluator)

__all__ = [
    "EVALUATORS",
    "PROTOCOLS",
    "ClassificationEvaluator",
    "CocoEvaluator",
    "VocEvaluator",
    "VocProtocol",
    "check_metric",
]
