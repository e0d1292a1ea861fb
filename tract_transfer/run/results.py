"""The results of a run: metrics with all that a reader must know beside them."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from torch import nn
from torchvision.io import write_png

from tract_transfer import files
from tract_transfer.build.data import Data
from tract_transfer.build.model import build_evaluated
from tract_transfer.build.trainer import TrainLength
from tract_transfer.config.schema import Config, DetectionConfig, ProbeConfig, TrainedTask
from tract_transfer.data.detection import DetectionDataset
from tract_transfer.data.findings import size_checks
from tract_transfer.data.images import content_hashes, estimated_bytes
from tract_transfer.data.streaming import Stream
from tract_transfer.engine.hooks import evaluating
from tract_transfer.engine.run_folder import weights_metadata
from tract_transfer.engine.trainer import Trainer
from tract_transfer.files import RESULTS_FORMAT, RESULTS_NAME
from tract_transfer.models import Backbone
from tract_transfer.models.weights import save_backbone
from tract_transfer.models.weights_match import MatchReport
from tract_transfer.registry import is_file

# Of all splits together: more would delay the start of every training.
MAX_COMPARED_IMAGES, MAX_COMPARED_BYTES = 100_000, 2**31
_MAX_NAMED = 10
_DIFFICULT = {
    "keep": "trained on like all others",
    "drop": "not trained on: background",
    "ignore": "not trained on: neither object nor background",
}
logger = logging.getLogger(__name__)


class Measured(NamedTuple):
    """Metrics and details of an evaluator, and the images that could not be decoded."""

    metrics: dict[str, float]
    details: dict[str, Any]
    skipped: list[str]


def training_results(
    config: TrainedTask,
    data: Data,
    length: TrainLength,
    trainer: Trainer,
    reported_iteration: int,
    measured: Measured,
) -> dict[str, Any]:
    """Return the results of a training; `measured` are those of the reported checkpoint."""
    early_stop = None
    if trainer.stopped_early and trainer.best is not None:  # by patience
        best = {f"best_{key}": trainer.best[key] for key in ("iteration", "value")}
        early_stop = {"iteration": trainer.iteration, **best}
    return {
        **run_info(config),
        "metrics": measured.metrics,
        "primary_metric": config.evaluation.metric,
        "details": measured.details,
        "iterations": trainer.iteration,
        "reported_iteration": reported_iteration,
        "epochs": trainer.iteration / length.iters_per_epoch,
        "early_stop": early_stop,
        "train_seconds": trainer.seconds,
        "images_per_second": trainer.seen_images / max(trainer.seconds, 1e-9),
        "protocol": protocol(config, data, measured.details),
        "skipped": sorted(set(gather_object([*trainer.skipped, *measured.skipped]))),
        "skipped_steps": trainer.guard.skipped_steps,
        "mended_boxes": data.clipped_boxes,
    }


def write_results(folder: Path, results: Mapping[str, Any]) -> None:
    """Write results.json, which finishes the run; warn of images that were skipped."""
    files.write_json(folder / RESULTS_NAME, files.redact(results))
    if skipped := results.get("skipped"):
        logger.warning(
            "%d images that cannot be decoded were skipped (data.undecodable: skip), the first: "
            "%s. %s lists them.", len(skipped), skipped[0], folder / RESULTS_NAME,
        )  # fmt: skip


def save_model(
    config: TrainedTask, data: Data, trainer: Trainer, folder: Path, results: dict[str, Any]
) -> None:
    """Save the backbone with its metadata, and a detector's detections in the first images."""
    backbone, tract = trainer.evaluated_model.get_submodule("backbone"), config.tract
    assert isinstance(backbone, Backbone)
    hub_ids = {name: dataset.origin.hub_id for name, dataset in data.splits.items()}
    metadata: dict[str, Any] = {
        "method": results["method"],
        "lam": tract.lam if tract.enabled else None,
        "lam_mode": tract.lam_mode if tract.enabled else None,
        "task": config.task,
        "seed": config.seed,
        "iterations": results["reported_iteration"],
        "data": {
            "train": data.train.name,
            "classes": data.class_names,
            "hub_ids": {name: hub_id for name, hub_id in hub_ids.items() if hub_id},
        },
    }
    of_weights = weights_metadata(config.model.weights).get("plugins") or []
    modules = [plugin for plugin in of_weights if not is_file(str(plugin))]
    if plugins := [*dict.fromkeys([*config.plugins, *modules])]:
        metadata["plugins"] = plugins
    save_backbone(folder, backbone, metadata)
    _, dataset = data.report
    if isinstance(config, DetectionConfig) and isinstance(dataset, DetectionDataset):
        model = build_evaluated(config, trainer.evaluated_model)
        count, device = config.evaluation.save_detections, trainer.accelerator.device
        _save_detections(folder, model, dataset, count, device)


def _save_detections(
    folder: Path, model: nn.Module, dataset: DetectionDataset, count: int, device: torch.device
) -> None:
    """Write the first `count` images as PNG, and detections.json with detections and truth."""
    entries, names = [], dataset.class_names
    files.make_folder(folder / "detections")
    for index in range(min(count, len(dataset))):
        try:
            image, target = dataset.image(index), dataset.target(index)
        except ValueError:  # undecodable
            continue
        with evaluating(model):
            (detections,) = model([image.to(device)])
        path = f"detections/{index:04d}.png"
        with files.atomic_path(folder / path) as temporary:
            write_png(image, str(temporary))
        entry = {
            "image": path,
            "boxes": detections["boxes"].tolist(),
            "scores": detections["scores"].tolist(),
            "labels": [names[label] for label in detections["labels"].tolist()],
            "truth_boxes": target["boxes"].tolist(),
            "truth_labels": [names[label] for label in target["labels"].tolist()],
        }
        entries.append(entry)
    files.write_json(folder / "detections.json", entries)


def run_info(config: Config) -> dict[str, Any]:
    """Return what a run is: format, task, name, method, role, seed, weights and tract.

    The method is the config's, or `tract` if TrAct trains or pre-trained the first layer.
    """
    weights, tract = config.model.weights, None
    metadata = weights_metadata(weights)
    if not isinstance(config, ProbeConfig) and config.tract.enabled:
        tract = config.tract.model_dump()
    return {
        "format": RESULTS_FORMAT,
        "task": config.task,
        "name": config.name or config.task,
        "method": config.method or ("tract" if tract else metadata.get("method", "vanilla")),
        "role": "downstream" if weights else "pretrain",
        "seed": config.seed,
        "weights": weights,
        "weights_sha256": metadata.get("sha256"),
        "tract": tract,
    }


def log_weights(backbone: nn.Module) -> dict[str, Any] | None:
    """Log how a backbone's weights file matched; return the summary for the results."""
    report = backbone.loaded
    if not isinstance(report, MatchReport):
        return None
    for line in report.lines():
        logger.info(line)
    return report.summary()


def protocol(config: Config, data: Data, details: dict[str, Any]) -> dict[str, str]:
    """Return what a reader must know beside the number, a sentence a subject.

    Runs that are compared should have it in common, so method and seed are not in it.
    """
    split, reported = data.report
    lines = {
        "train": f"{data.train.name}: {len(data.train)} images, {len(data.class_names)} classes",
        split: f"{reported.name}: {len(reported)} images",
        "transforms": files.as_yaml(config.data.transforms.model_dump(exclude_none=True)),
        "precision": config.engine.precision,
    }
    if sizes := dict.fromkeys(check.text for check in size_checks(data.splits).values()):
        lines["official splits"] = "; ".join(sizes)
    if isinstance(config, ProbeConfig):
        lines["probe"] = "features of the frozen backbone in eval mode, test transforms throughout"
        return lines
    lines |= _training_protocol(config)
    if config.task == "detection":
        keys = {"empty_images", "invalid_boxes", "group_by_aspect", "repeat_threshold"}
        lines["sampling"] = files.as_yaml(config.data.model_dump(include=keys))
        policy = config.model.detector.args.get("difficult_in_training", "keep")
        lines["difficult objects"] = _DIFFICULT[policy]
    if config.evaluation.flip:
        joined = "detections joined by NMS" if config.task == "detection" else "logits averaged"
        lines["views"] = f"each image and its mirror image, {joined}"
    if isinstance(details.get("protocol"), str):
        lines["metric"] = details["protocol"]
    return lines


def _training_protocol(config: TrainedTask) -> dict[str, str]:
    """Return what the weights of a training depend on beside its data, and their selection."""
    engine, lines = config.engine, {}
    lines["optimization"] = files.as_yaml(config.solver.model_dump(exclude_none=True))
    clipped = "not clipped" if engine.grad_clip is None else f"clipped at {engine.grad_clip}"
    lines["batch"] = f"{config.data.batch_size} images a step, gradient norm {clipped}"
    lines["model"] = files.as_yaml(config.model.model_dump(exclude={"backbone", "weights"}))
    if config.task == "classification":
        mixing = config.data.model_dump(include={"mixup", "repeats"})
        if mixing != {"mixup": None, "repeats": 1}:
            lines["mixing"] = files.as_yaml(mixing)
    if (drop_path := config.model.backbone.drop_path) is not None:
        lines["stochastic depth"] = f"rate {drop_path.rate}, {drop_path.mode}"
    metric, patience = config.evaluation.metric, config.evaluation.patience
    is_selected = config.evaluation.report == "best"
    lines["selection"] = (
        f"best {metric} on val" if is_selected else "none: the last checkpoint is reported"
    )
    if patience is not None:
        lines["early stopping"] = f"after {patience} evaluations on val without a better {metric}"
    if config.solver.ema_decay:
        lines["average"] = f"exponential moving average, decay {config.solver.ema_decay}"
    return lines


def find_overlap(data: Data) -> dict[str, dict[str, Any]] | None:
    """Return `overlap` of all images; None if they are streamed or too many to read first."""
    splits = {name: split for name, split in data.splits.items() if not isinstance(split, Stream)}
    reason = "data are streamed" if len(splits) < len(data.splits) else None
    if sum(map(len, splits.values())) > MAX_COMPARED_IMAGES or (
        sum(estimated_bytes(split.encoded, len(split)) for split in splits.values())
        > MAX_COMPARED_BYTES
    ):
        reason = reason or "too many images"
    if reason:
        logger.info(
            "Train/test overlap is not checked: %s. tract-transfer check-data checks it.", reason
        )
        return None
    logger.info("Comparing the images of the splits")
    hashes = {name: content_hashes(split.encoded, len(split)) for name, split in splits.items()}
    return overlap(data, hashes, {name: range(len(of)) for name, of in hashes.items()})


def overlap(
    data: Data, hashes: Mapping[str, Sequence[str]], rows: Mapping[str, Sequence[int]]
) -> dict[str, dict[str, Any]]:
    """Return, for train and val, how many images are also in the reported split, and the first.

    They stay; a warning is logged.

    Args:
        hashes: split -> the hash of each image's encoded bytes.
        rows: split -> the images that count.
    """
    reported, tested = data.report
    first_with = {hashes[reported][row]: row for row in reversed(rows[reported])}
    counts: dict[str, dict[str, Any]] = {}
    for name, split in data.splits.items():
        if name == reported:
            continue
        shared = [row for row in rows[name] if hashes[name][row] in first_with]
        pairs = [
            [split.item(row), tested.item(first_with[hashes[name][row]])]
            for row in shared[:_MAX_NAMED]
        ]
        counts[name] = {f"images_in_{reported}": len(shared), "first": pairs}
        if shared:
            logger.warning(
                "%d of the %d images of %s are in %s too, the first: %s is %s. They are kept, and "
                "make the result too good.",
                len(shared), len(rows[name]), name, reported, *pairs[0],
            )  # fmt: skip
    return counts
