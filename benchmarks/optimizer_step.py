"""The time of an optimizer's step: torch's fused one over the plain one, of the same parameters.

One step of each follows the other, with the same gradients; the median of the paired ratios is
printed, the least and the largest beside it.

    python benchmarks/optimizer_step.py [--optimizers adam adamw] [--threads 1] [--steps 100]
"""

import argparse
import statistics
import time

import timm
import torch
from torch import nn

from tract_transfer.engine.solver import build_optimizer
from tract_transfer.models import build_backbone

MODELS = {
    "ResNet-18 of an eighth of the width": lambda: build_backbone(
        "cifar/resnet18", args={"width": 8}
    ),
    "ResNet-18": lambda: build_backbone("cifar/resnet18"),
    "ViT of 7 blocks, 384 wide": lambda: build_backbone("cifar/vit"),
    "ResNet-50": lambda: timm.create_model("resnet50"),
}


def step_seconds(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """Time one step with gradients that are there."""
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    started = time.perf_counter()
    optimizer.step()
    return time.perf_counter() - started


def main() -> None:
    """Print a row of a Markdown table for each model and optimizer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--optimizers", nargs="+", default=["adam", "adamw"])
    parser.add_argument("--models", nargs="+", type=int, default=list(range(len(MODELS))))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=100)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    print("| model | optimizer | plain, ms | fused, ms | fused / plain |\n" + "| --- " * 5 + "|")
    for number in arguments.models:
        name, make = list(MODELS.items())[number]
        for optimizer in arguments.optimizers:
            pair = []
            for fused in (False, True):
                model, args = make(), {"fused": fused}
                built = build_optimizer(model, optimizer=optimizer, lr=1e-3, optimizer_args=args)
                pair.append((model, built))
            times = [[step_seconds(*each) for each in pair] for _ in range(arguments.steps + 3)]
            plain, fused_one = zip(*times[3:], strict=True)  # the first make the state
            ratios = [b / a for a, b in times[3:]]
            print(
                f"| {name} | {optimizer} | {1e3 * statistics.median(plain):.2f} "
                f"| {1e3 * statistics.median(fused_one):.2f} | {statistics.median(ratios):.2f} "
                f"({min(ratios):.2f} to {max(ratios):.2f}) |",
                flush=True,
            )


if __name__ == "__main__":
    main()
