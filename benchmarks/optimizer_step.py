"""Compare the time of torch's fused and default optimizer steps on the same parameters.

The two alternate step by step, with the same gradients. Prints the median, minimum and maximum of
the paired ratios.

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
    "ResNet-18, an eighth of the width": lambda: build_backbone(
        "cifar/resnet18", args={"width": 8}
    ),
    "ResNet-18": lambda: build_backbone("cifar/resnet18"),
    "ViT, 7 blocks, width 384": lambda: build_backbone("cifar/vit"),
    "ResNet-50": lambda: timm.create_model("resnet50"),
}


def step_seconds(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """Set gradients, and time one step."""
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    started = time.perf_counter()
    optimizer.step()
    return time.perf_counter() - started


def main() -> None:
    """Print a Markdown table with a row for each model and optimizer."""
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
            times = [
                [step_seconds(module, built) for module, built in pair]
                for _ in range(arguments.steps + 3)
            ]
            plain, fused_one = zip(*times[3:], strict=True)  # the first steps create the state
            ratios = [b / a for a, b in times[3:]]
            print(
                f"| {name} | {optimizer} | {1e3 * statistics.median(plain):.2f} "
                f"| {1e3 * statistics.median(fused_one):.2f} | {statistics.median(ratios):.2f} "
                f"({min(ratios):.2f} to {max(ratios):.2f}) |",
                flush=True,
            )


if __name__ == "__main__":
    main()
