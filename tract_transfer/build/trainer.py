"""From a config to a Trainer: model, TrAct, optimizer, schedule, batches."""

from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState, PartialState
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim import Optimizer

from tract_transfer.build.batches import (
    build_epoch_order,
    build_mix,
    build_train_batches,
    whitening_images,
)
from tract_transfer.build.data import Data, Dataset
from tract_transfer.build.model import build_model, needs_whitening
from tract_transfer.build.weights import errors_at
from tract_transfer.config.schema import Config, DetectionConfig, TrainedTask
from tract_transfer.engine.non_finite import StepGuard
from tract_transfer.engine.solver import (
    JoinedOptimizer,
    build_optimizer,
    build_schedule,
    keep_parameters,
    set_progress,
)
from tract_transfer.engine.trainer import Trainer
from tract_transfer.models import Classifier
from tract_transfer.models.stem import whiten
from tract_transfer.tract import TrAct, find_first_layers

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class TrainLength(NamedTuple):
    """The length and the intervals of a training in iterations."""

    iters_per_epoch: int
    max_iters: int
    warmup_iters: int
    steps_iters: list[int]
    evaluate_every: int | None
    checkpoint_every: int | None


def train_length(config: TrainedTask, train: Dataset) -> TrainLength:
    """Convert what a config gives in epochs to iterations; an epoch drops its incomplete batch."""
    solver, evaluation = config.solver, config.evaluation
    checkpoint = config.engine.checkpoint
    with _errors_at_named_key(config):
        per_epoch = build_epoch_order(config, train).iters_per_epoch

    def count(epochs: float | None, iters: int | None) -> int | None:
        return max(1, round(epochs * per_epoch)) if epochs else iters

    steps = solver.steps_iters or [round(e * per_epoch) for e in solver.steps_epochs or []]
    max_iters = count(solver.max_epochs, solver.max_iters)
    assert max_iters is not None
    return TrainLength(
        iters_per_epoch=per_epoch,
        max_iters=max_iters,
        warmup_iters=count(solver.warmup_epochs, solver.warmup_iters) or 0,
        steps_iters=steps,
        evaluate_every=count(evaluation.every_epochs, evaluation.every_iters),
        checkpoint_every=count(checkpoint.every_epochs, checkpoint.every_iters),
    )


def build_accelerator(config: Config) -> Accelerator:
    """Join the process group this process was launched in, or run alone."""
    device = config.engine.device
    if device == "cuda" and not torch.cuda.is_available():
        raise config.error("engine.device", "torch finds no CUDA GPU. Set auto or cpu.")
    # A detector does not use the last layers of its backbone.
    unused = isinstance(config, DetectionConfig)
    cpu = device == "cpu" or not torch.cuda.is_available()
    state = PartialState._shared_state  # else a process keeps the device of its first run
    if state and state["num_processes"] == 1 and (state["device"].type == "cpu") != cpu:
        AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(
        cpu=cpu,
        mixed_precision="no",  # engine.precision decides, not the launcher's default
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=unused)],
    )


def build_trainer(
    config: TrainedTask, data: Data, accelerator: Accelerator, length: TrainLength | None = None
) -> Trainer:
    """Build the model and everything that trains it, without hooks.

    Args:
        length: as `train_length` returns it; None computes it.
    """
    engine, patience = config.engine, config.evaluation.patience
    length = length or train_length(config, data.train)
    model = build_model(config, len(data.class_names))
    if isinstance(model, Classifier) and needs_whitening(config):
        whiten(model.backbone, whitening_images(config, data.train))
    if engine.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    ema = _build_ema(config, model, length.max_iters, accelerator.device)
    tract = build_tract(config, model)
    with _errors_at_named_key(config):
        optimizer = _build_optimizer(config, model)
        lengths = {key: value for key, value in length._asdict().items() if "_every" not in key}
        keys = {"schedule", "warmup_start", "step_factor", "end_factor"}
        schedule = build_schedule(**lengths, **config.solver.model_dump(include=keys))
        batches = build_train_batches(
            config,
            data.train,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            device=accelerator.device,
        )
    mix = build_mix(config, len(data.class_names), accelerator.num_processes * engine.accumulate)
    return Trainer(
        accelerator=accelerator,
        model=accelerator.prepare_model(model),
        optimizer=optimizer,
        schedule=schedule,
        set_lr=set_progress,
        batches=batches,
        tract=tract,
        max_iters=length.max_iters,
        seed=config.seed,
        precision=PRECISIONS[engine.precision],
        grad_clip=engine.grad_clip,
        accumulate=engine.accumulate,
        ema=ema,
        mix=mix,
        patience_iters=patience and length.evaluate_every and patience * length.evaluate_every,
        guard=StepGuard(engine.non_finite, engine.max_skipped, data.train.item),
    )


def build_tract(config: TrainedTask, model: nn.Module) -> TrAct:
    """Build TrAct; if it is not enabled, one without layers."""
    options = config.tract.model_dump(exclude={"enabled"})
    if not config.tract.enabled:
        options["layers"] = []
    with errors_at(config, "tract.layers" if config.tract.layers else "tract"):
        return TrAct(model, **options)


def _errors_at_named_key(config: Config) -> AbstractContextManager[None]:
    return errors_at(config, "solver", prefix=r"(?:solver|data|model)[.\w]*")


def _build_ema(
    config: TrainedTask, model: nn.Module, max_iters: int, device: torch.device
) -> ModelEmaV3 | None:
    """Build the average of the weights; refuse one that would still be the initial weights."""
    decay, warms_up = config.solver.ema_decay, config.solver.ema_warmup
    if decay is None:
        return None
    # A warm-up forgets the initial weights in a few steps.
    if not warms_up and decay**max_iters > 0.01:
        raise config.error(
            "solver.ema_decay",
            f"{decay} over {max_iters} iterations leaves {decay**max_iters:.0%} of the initial "
            f"weights in the average. Set {0.01 ** (1 / max_iters):.4f} or less.",
        )
    # update_after_step: it averages from step 1 on.
    ema = ModelEmaV3(model, decay=decay, use_warmup=warms_up, update_after_step=-1)
    return ema.to(device)


def _build_optimizer(config: TrainedTask, model: nn.Module) -> Optimizer:
    """Build the optimizer; with `solver.first_layer`, another one for the first layer."""
    solver = config.solver
    keys = {
        "optimizer", "lr", "weight_decay", "momentum", "nesterov", "decay_all", "bias_lr_factor",
        "bias_weight_decay", "layer_decay", "optimizer_args",
    }  # fmt: skip
    rest = build_optimizer(model, **solver.model_dump(include=keys))
    if solver.first_layer is None:
        return rest
    key = "solver.first_layer"
    with errors_at(config, key, prefix=rf"{key}\.\w+"):
        first = build_optimizer(model, **solver.first_layer.model_dump(), section=key)
        names = config.tract.layers or find_first_layers(model)
    of_first = {parameter for name in names for parameter in model.get_submodule(name).parameters()}
    keep_parameters(first, of_first)
    if not first.param_groups:
        message = f"{names} are frozen, so it has nothing to step. Set it to null."
        raise config.error(key, message)
    keep_parameters(rest, [p for p in model.parameters() if p not in of_first])
    return JoinedOptimizer([first, rest])
