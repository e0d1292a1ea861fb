"""Metrics as pure functions on arrays, and evaluators that only collect.

An evaluator serves one pass over one split: `update(predictions, targets)` a batch, then
`compute() -> dict[str, float]`, then `details()`, a JSON-able dict with the protocol in words.
`compute` is a collective and is exact on any number of processes, provided that no process was
given an image twice. Every metric but a loss is a fraction in [0, 1]; reports print percent.

EVALUATORS holds those of detection: an entry is a protocol that a config names
(`evaluation.protocol`), and makes an evaluator of the class names.
"""

from functools import partial

from tract_transfer.evaluation.classification import ClassificationEvaluator
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
]
