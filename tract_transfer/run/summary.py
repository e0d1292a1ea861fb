"""What a run shows before it starts and after it ends, as labels and texts."""

import shlex
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from tract_transfer.build.data import Data
from tract_transfer.build.trainer import TrainLength
from tract_transfer.config.schema import Config, DetectionConfig, ProbeConfig, TrainedTask
from tract_transfer.engine.hooks import format_metric
from tract_transfer.engine.trainer import Trainer
from tract_transfer.files import RESULTS_NAME
from tract_transfer.models import Backbone
from tract_transfer.models.weights_file import WEIGHTS_NAME
from tract_transfer.registry import is_file

Rows = list[tuple[str, str]]
COMMAND = "tract-transfer"


def training_header(
    config: TrainedTask, data: Data, length: TrainLength, trainer: Trainer, seconds: float
) -> Rows:
    """Return what is trained, on what, and how long; `seconds` were spent on the start-up."""
    return [
        *_data_rows(config, data),
        *_model_rows(config, trainer.unwrapped, trainer.evaluated_model.get_submodule("backbone")),
        ("TrAct", _tract(config, trainer)),
        ("device", _device(config, trainer.accelerator)),
        ("batch", _batch(config, trainer.accelerator)),
        ("length", _length(length)),
        ("output", config.output_dir),
        ("start-up", f"{seconds:.1f} s for data and model" + _resumed(trainer)),
    ]


def probe_header(
    config: ProbeConfig, data: Data, backbone: Backbone, accelerator: Accelerator, seconds: float
) -> Rows:
    """Return what is probed, on what; `seconds` were spent on the start-up."""
    return [
        *_data_rows(config, data),
        *_model_rows(config, backbone, backbone),
        ("device", _device(config, accelerator)),
        ("output", config.output_dir),
        ("start-up", f"{seconds:.1f} s for data and model"),
    ]


def _data_rows(config: Config, data: Data) -> Rows:
    name = config.name or config.task
    rows = [("run", f"{name}: {config.task}, seed {config.seed}")]
    for split, dataset in data.splits.items():
        classes = f", {len(data.class_names):,} classes" if split == "train" else ""
        rows.append((split, f"{dataset.name}: {len(dataset):,} images{classes}"))
    return rows


def _model_rows(config: Config, model: nn.Module, backbone: nn.Module) -> Rows:
    origin = backbone.origin if isinstance(backbone, Backbone) else {}
    arguments = [f"{key} {value}" for key, value in origin.get("args", {}).items()]
    stem = origin.get("stem", "default")
    what = [" ".join([str(origin.get("name")), *arguments]), f"{stem} stem"]
    if isinstance(config, DetectionConfig):
        what.append(f"{config.model.detector.name} detector")
    elif not isinstance(config, ProbeConfig):
        what.append(f"{config.model.head.name} head")
    count = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if isinstance(config, ProbeConfig):
        trained_text = "frozen"
    else:
        trained_text = "all trained" if trained == count else f"{trained:,} trained"
    return [
        ("model", ", ".join(what)),
        ("weights", config.model.weights or "random"),
        ("parameters", f"{count:,}, {trained_text}"),
    ]


def _tract(config: TrainedTask, trainer: Trainer) -> str:
    section, layers = config.tract, trainer.tract.layer_names
    if not section.enabled:
        return "off"
    relative = " x mean square of the inputs" if section.lam_mode == "relative" else ""
    every = f", measured every {section.update_every} steps" if section.update_every > 1 else ""
    return f"{', '.join(layers)}, lambda {section.lam:g}{relative}{every}"


def _device(config: Config, accelerator: Accelerator) -> str:
    device, processes = accelerator.device, accelerator.num_processes
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        threads = torch.get_num_threads()
        name = f"{device.type} ({threads} thread{'s' * (threads > 1)})"
    count = f", {processes} processes" if processes > 1 else ""
    return f"{name}, {config.engine.precision}{count}"


def _batch(config: TrainedTask, accelerator: Accelerator) -> str:
    size, parts = config.data.batch_size, accelerator.num_processes * config.engine.accumulate
    split = f" ({parts} parts of {size // parts})" if parts > 1 else ""
    return f"{size:,} images{split}"


def _length(length: TrainLength) -> str:
    epochs = length.max_iters / length.iters_per_epoch
    per_epoch = f"{length.iters_per_epoch:,} an epoch"
    return f"{round(epochs, 2):g} epochs, {length.max_iters:,} iterations ({per_epoch})"


def _resumed(trainer: Trainer) -> str:
    return f", resumed from iteration {trainer.iteration:,}" if trainer.iteration else ""


def outcome(config: Config, split: str, results: Mapping[str, Any]) -> Rows:
    """Return the metrics of a run, where its files are, and what to do with them next."""
    folder = Path(config.output_dir)
    primary, metrics = results["primary_metric"], results["metrics"]
    ordered = {primary: metrics[primary], **metrics}
    if isinstance(config, ProbeConfig):  # has many, and has logged them
        kind = primary.rpartition("_")[2]
        ordered = {name: value for name, value in ordered.items() if name.endswith(kind)}
    rows = [(f"{split} {name}", format_metric(name, value)) for name, value in ordered.items()]
    if "reported_iteration" in results:
        rows.append(("checkpoint", _checkpoint(config, results)))
    if (seconds := results["train_seconds"]) is not None:
        speed = results.get("images_per_second")
        of_speed = "" if speed is None else f", {speed:,.0f} images/s"
        rows.append(("time", f"{timedelta(seconds=round(seconds))}{of_speed}"))
    rows.append(("results", str(folder / RESULTS_NAME)))
    if not isinstance(config, ProbeConfig):
        rows.append(("backbone", str(folder / WEIGHTS_NAME)))
    commands = next_commands(config)
    return rows + [("next" if not i else "", line) for i, line in enumerate(commands)]


def _checkpoint(config: Config, results: Mapping[str, Any]) -> str:
    kind = getattr(config.evaluation, "report", "last")
    chosen = f"{kind}, iteration {results['reported_iteration']:,}"
    stop = results["early_stop"]
    return f"{chosen} (stopped early at {stop['iteration']:,})" if stop else chosen


def next_commands(config: Config) -> list[str]:
    """Return commands that use the run of a config, to copy into a shell."""
    folder = shlex.quote(config.output_dir)
    if isinstance(config, ProbeConfig):
        return [f"{COMMAND} report {folder}"]
    # Of a run, only installed modules are imported without being named.
    plugins = "".join(f" --plugin {shlex.quote(p)}" for p in config.plugins if is_file(p))
    commands = [f"{COMMAND} predict --run {folder}{plugins} IMAGE"]
    if not isinstance(config, DetectionConfig):
        commands.append(f"{COMMAND} export --run {folder}{plugins} --output FOLDER")
    weights = shlex.quote(f"model.weights={config.output_dir}")
    return [*commands, f"{COMMAND} train --config-file CONFIG{plugins} {weights}"]
