"""What a run would cost: parameters, FLOPs, memory and time, from two steps and one batch."""

import itertools
import logging
import resource
import sys
import time
from collections.abc import Callable, Iterable
from datetime import timedelta

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tract_transfer.engine.evaluate import Evaluator, evaluate, evaluating
from tract_transfer.engine.trainer import Trainer

_RSS_BYTES = 1 if sys.platform == "darwin" else 1024  # the unit of ru_maxrss
logger = logging.getLogger(__name__)


def dry_run(
    trainer: Trainer,
    eval_batches: Iterable[object],
    make_evaluator: Callable[[], Evaluator],
    *,
    num_eval_batches: int,
    num_evaluations: int,
) -> dict[str, str]:
    """Run two steps and one evaluation batch; return what was measured, ready to print.

    FLOPs count a multiplication and its addition as two, and are those of one test image's
    forward. Memory is the peak of this process, or of its GPU.
    """
    device = trainer.accelerator.device
    parameters = list(trainer.model.parameters())
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    batches = trainer.batches(0)
    trainer.model.train()
    logger.info("Two training steps")
    trainer.step(batches)  # the first step warms up
    started = time.perf_counter()
    trainer.iteration = 1
    trainer.step(batches)
    losses = trainer.read_meter()
    step_seconds = time.perf_counter() - started
    model = trainer.evaluated_model
    logger.info("One batch of the evaluation")
    started = time.perf_counter()
    first = list(itertools.islice(iter(eval_batches), 1))
    evaluate(model, first, make_evaluator(), device=device, precision=trainer.precision)  # type: ignore[arg-type]
    eval_seconds = (time.perf_counter() - started) * num_eval_batches
    image = first[0].to(device).images[:1]  # type: ignore[attr-defined]
    total = step_seconds * trainer.max_iters + eval_seconds * num_evaluations
    peak = (
        torch.cuda.max_memory_allocated(device)
        if device.type == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_BYTES
    )
    return {
        "parameters": f"{sum(p.numel() for p in parameters):,} ({trainable:,} trained)",
        "FLOPs of a forward": _flops(model, model, image),
        "peak memory": f"{peak / 2**30:.2f} GiB",
        "loss after two steps": f"{losses['loss']:.4f}",
        "a step": f"{step_seconds:.3f} s",
        "an evaluation": f"{eval_seconds:.1f} s (x {num_evaluations})",
        "the whole run": f"about {timedelta(seconds=round(total))} ({trainer.max_iters} steps)",
    }


def dry_run_features(
    model: nn.Module, pooled: Callable[[Tensor], Tensor], images: Tensor, num_images: int
) -> dict[str, str]:
    """Extract features of one batch (B, 3, H, W); return what those of `num_images` would cost.

    FLOPs are counted as by `dry_run`.
    """
    started = time.perf_counter()
    with evaluating(model):
        pooled(images).sum().item()  # waits for the device
    seconds = (time.perf_counter() - started) * num_images / len(images)
    return {
        "parameters": f"{sum(p.numel() for p in model.parameters()):,} (frozen)",
        "FLOPs of a forward": _flops(model, pooled, images[:1]),
        "features": f"about {seconds:.0f} s for {num_images} images",
    }


def _flops(model: nn.Module, call: Callable[[Tensor], object], image: Tensor) -> str:
    counter = FlopCounterMode(display=False)
    with evaluating(model), counter:
        call(image)
    return f"{counter.get_total_flops() / 1e9:.3f} G an image"
