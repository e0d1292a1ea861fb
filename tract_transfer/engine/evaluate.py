"""A model over a loader, into an evaluator."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import nn

from tract_transfer.engine.protocols import Batch


class Evaluator(Protocol):
    """Collects predictions; `compute` is exact on any number of processes."""

    def update(self, predictions: Any, targets: Any) -> None:
        """Add a batch: what the model answers in eval mode, and the loader's targets."""

    def compute(self) -> dict[str, float]:
        """Return the metrics, of all processes together; every one must call it."""

    def details(self) -> dict[str, Any]:
        """Return what stands beside the metrics, as JSON has it: protocol, counts, classes."""


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode, and every part of it back in its own mode after."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def share_buffers(model: nn.Module, accelerator: Accelerator) -> None:
    """Give every process of a group the main one's buffers, which a checkpoint holds.

    Each process updates batch-norm statistics from its own images; training shares them again
    only at the next forward.
    """
    if accelerator.num_processes > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, src=0)


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    evaluator: Evaluator,
    *,
    device: torch.device,
    precision: torch.dtype | None = None,
) -> list[str]:
    """Feed every batch to `evaluator`; return the items that could not be decoded."""
    skipped: list[str] = []
    with evaluating(model):
        for batch in batches:
            batch = batch.to(device)
            skipped += batch.skipped
            if not len(batch.images):
                continue
            with torch.autocast(device.type, precision, enabled=precision is not None):
                predictions = model(batch.images)
            evaluator.update(predictions, batch.targets)
    return skipped
