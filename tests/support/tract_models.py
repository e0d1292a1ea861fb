"""A small model, and the update that TrAct makes of its gradient."""

import torch
from torch import nn

from tract_transfer.tract import TrAct


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3, 2, 1)
    return nn.Sequential(conv, nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 5))


def images_like(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def loss_of(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return model(images).square().sum(1).mean()


def backward(model: nn.Module, images: torch.Tensor) -> None:
    loss_of(model, images).backward()


def update_of(model: nn.Module, *batches: torch.Tensor, **options) -> torch.Tensor:
    """The treated gradient after a backward through the mean over all images."""
    tract = TrAct(model, **options)
    count = sum(len(batch) for batch in batches)
    for batch in batches:
        (loss_of(model, batch) * len(batch) / count).backward()
    tract.step()
    tract.detach()
    return model.get_parameter(f"{tract.layer_names[0]}.weight").grad
