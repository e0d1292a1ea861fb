"""What a Trainer is made of, as far as it looks at it."""

from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Batch(Protocol):
    """What a loader yields.

    Attributes:
        images: what the model takes, of this process and micro-batch.
        targets: what it learns of them.
        indices: their numbers in the data set.
        skipped: file or row, and reason, of those left out because they cannot be decoded.
    """

    images: Any
    targets: Any
    indices: list[int]
    skipped: list[str]

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device."""


class GradientStep(Protocol):
    """TrAct, or anything else that changes finished gradients."""

    def step(self) -> None:
        """Change the gradient in its place, after the last backward and before clipping."""

    def forget(self) -> None:
        """Drop what was seen since the last step: it is passed over."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a checkpoint has to hold."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up what `state_dict` returned."""


class Ema(Protocol):
    """timm's ModelEmaV3."""

    module: nn.Module

    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after `step` steps."""


class Mix(Protocol):
    """mixup, CutMix, or anything else that changes a batch by the iteration's number."""

    def __call__(self, images: Any, targets: Any, iteration: int) -> tuple[Any, Any]:
        """Return images and targets, mixed."""


def as_it_is(images: Any, targets: Any, iteration: int) -> tuple[Any, Any]:
    """Mix nothing."""
    return images, targets
