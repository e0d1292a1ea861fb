"""What a Trainer is made of, as far as it looks at it."""

from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Batch(Protocol):
    """What a loader yields."""

    images: Any
    targets: Any
    indices: list[int]
    skipped: list[str]

    def to(self, device: torch.device) -> "Batch": ...


class GradientStep(Protocol):
    """TrAct, or anything else that changes finished gradients."""

    def step(self) -> None: ...

    def forget(self) -> None: ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...


class Ema(Protocol):
    """timm's ModelEmaV3."""

    module: nn.Module

    def update(self, model: nn.Module, step: int) -> None: ...


class Mix(Protocol):
    """mixup, CutMix, or anything else that changes a batch by the iteration's number."""

    def __call__(self, images: Any, targets: Any, iteration: int) -> tuple[Any, Any]: ...


def as_it_is(images: Any, targets: Any, iteration: int) -> tuple[Any, Any]:
    """Mix nothing."""
    return images, targets
