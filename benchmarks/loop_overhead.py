"""Compare the time of our loop with a bare PyTorch loop: same model, data, optimizer, precision.

ResNet-18 at 32 px, batch 128, bf16, random images in memory. The loops alternate in blocks of
steps. Prints the median of the paired ratios.

    python benchmarks/loop_overhead.py [--blocks 10] [--steps 10]
"""

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from tract_transfer.data.loader import Batch
from tract_transfer.engine.checkpoint import Checkpointer
from tract_transfer.engine.hooks import LogProgress, MetricsFile, SaveCheckpoints
from tract_transfer.engine.solver import build_optimizer, build_schedule, set_progress
from tract_transfer.engine.trainer import Trainer
from tract_transfer.models import Classifier, build_backbone
from tract_transfer.tract import TrAct

BATCH_SIZE, NUM_BATCHES, NUM_CLASSES = 128, 8, 10


def make_model() -> nn.Module:
    """Build a ResNet-18 for 32 px with a linear head."""
    torch.manual_seed(0)
    backbone = build_backbone("cifar/resnet18")
    return Classifier(backbone, nn.Linear(backbone.feature_dim, NUM_CLASSES)).train()


def bare_loop(batches: list[Batch]) -> Callable[[int], None]:
    """Return a minimal training loop."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    endless = itertools.cycle(batches)

    def run(steps: int) -> None:
        for _ in range(steps):
            batch = next(endless)
            with torch.autocast("cpu", torch.bfloat16):
                logits = model.head(model.backbone.pooled(batch.images))
                loss = F.cross_entropy(logits, batch.targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return run


def our_loop(batches: list[Batch], folder: Path) -> Callable[[int], None]:
    """Return the Trainer's loop with its logging and checkpoint hooks."""
    model = make_model()
    metrics = MetricsFile(folder, tensorboard=True)
    trainer = Trainer(
        accelerator=Accelerator(cpu=True),
        model=model,
        optimizer=build_optimizer(model, optimizer="sgd", lr=0.01, momentum=0.9),
        schedule=build_schedule(max_iters=100_000),
        set_lr=set_progress,
        batches=lambda start: itertools.cycle(batches),
        tract=TrAct(model, layers=[]),
        max_iters=100_000,
        seed=0,
        precision=torch.bfloat16,
        hooks=[
            LogProgress(metrics, every_iters=20, iters_per_epoch=390),
            SaveCheckpoints(Checkpointer(folder / "checkpoints"), [100_000], metrics),
        ],
    )
    for hook in trainer.hooks:
        hook.before_train(trainer)
    endless: Iterator[Batch] = trainer.batches(0)

    def run(steps: int) -> None:
        for _ in range(steps):
            trainer.step(endless)
            trainer.iteration += 1
            for hook in trainer.hooks:
                hook.after_step(trainer)

    return run


def main() -> None:
    """Measure and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=10)
    parser.add_argument("--steps", type=int, default=10, help="steps per block")
    arguments = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    batches = [
        Batch(
            torch.randint(0, 256, (BATCH_SIZE, 3, 32, 32), dtype=torch.uint8, generator=generator),
            torch.randint(0, NUM_CLASSES, (BATCH_SIZE,), generator=generator),
            list(range(BATCH_SIZE)),
            [],
        )
        for _ in range(NUM_BATCHES)
    ]
    with tempfile.TemporaryDirectory() as folder:
        loops = {"bare": bare_loop(batches), "ours": our_loop(batches, Path(folder))}
        for run in loops.values():
            run(3)
        ratios = []
        for block in range(arguments.blocks):
            seconds = {}
            order = list(loops) if block % 2 else list(loops)[::-1]
            for name in order:
                started = time.perf_counter()
                loops[name](arguments.steps)
                seconds[name] = time.perf_counter() - started
            ratios.append(seconds["ours"] / seconds["bare"])
    low, high = min(ratios), max(ratios)
    print(
        f"ours / bare: median {statistics.median(ratios):.4f} "
        f"(min {low:.4f}, max {high:.4f}, {arguments.blocks} blocks of {arguments.steps} steps)"
    )


if __name__ == "__main__":
    main()
