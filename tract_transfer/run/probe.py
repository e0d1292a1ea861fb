"""A probe: features of a frozen backbone, and what simple classifiers see in them."""

import importlib.metadata
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from tract_transfer.build.batches import build_eval_loader
from tract_transfer.build.data import Data, Dataset
from tract_transfer.build.model import build_evaluator, build_model
from tract_transfer.build.probes import Measure, probe_protocol, run_probes
from tract_transfer.build.trainer import PRECISIONS
from tract_transfer.config.schema import ProbeConfig
from tract_transfer.data.detection import ImageLabels
from tract_transfer.data.images import content_hashes
from tract_transfer.data.loader import Batch
from tract_transfer.data.streaming import Stream
from tract_transfer.engine.cost import CostMeter
from tract_transfer.engine.hooks import evaluating, format_metrics
from tract_transfer.engine.run_folder import write_results
from tract_transfer.evaluation.classification import multilabel_metrics
from tract_transfer.evaluation.linear_probes import check_shots
from tract_transfer.evaluation.probes import (
    Extracted,
    Labels,
    Rows,
    Scores,
    cached_features,
    check_ks,
    extract_features,
    feature_key,
)
from tract_transfer.models import Backbone
from tract_transfer.run.results import find_leaks, label, log_weights, protocol

logger = logging.getLogger(__name__)
_PACKAGES = ("torch", "torchvision", "timm")


def build_probed(config: ProbeConfig, data: Data) -> Backbone:
    """Return the backbone to probe.

    Raises:
        ConfigError, ValueError: its weights do not fit it, or the data do not serve the probes,
            wherever the labels alone show that.
    """
    _check(config, data)
    backbone = build_model(config, len(data.class_names))
    assert isinstance(backbone, Backbone)
    return backbone


def run_probe(
    config: ProbeConfig,
    data: Data,
    backbone: Backbone,
    folder: Path,
    accelerator: Accelerator,
    meter: CostMeter,
) -> dict[str, Any]:
    """Probe a backbone and return the results, which it also writes to `folder`.

    Raises:
        ConfigError, ValueError: the data do not serve the probes.
    """
    started = time.perf_counter()
    backbone.to(accelerator.device)
    hashes = {
        name: content_hashes(split.encoded, len(split)) for name, split in data.splits.items()
    }
    cache = Path(config.data.feature_cache or folder / "features")
    found = _features(config, data, backbone, hashes, cache, accelerator)
    labels = {name: _targets(data.splits[name])[one.indices] for name, one in found.items()}
    rows = {name: Rows(one.features, labels[name]) for name, one in found.items()}
    decoded = {name: one.indices for name, one in found.items()}
    metrics, details, probes = _probe(config, data.class_names, rows, accelerator)
    whole = not any(one.was_kept for one in found.values())  # else its time would be too short
    results = {
        **label(config),
        "weights_match": log_weights(backbone),
        "metrics": metrics,
        "primary_metric": config.evaluation.metric,
        "probes": probes,
        "rows": {name: len(one.y) for name, one in rows.items()},
        "leaks": find_leaks(data, hashes, {name: one.tolist() for name, one in decoded.items()}),
        "test_classes_without_training_images": _untrained(data, labels),
        "details": details,
        "iterations": 0,
        "epochs": 0.0,
        "train_seconds": time.perf_counter() - started if whole else None,
        "cost": meter.read(whole=whole),
        "protocol": {**protocol(config, data, details), **probe_protocol(config)},
        "skipped": sorted(item for one in found.values() for item in one.skipped),
    }
    if accelerator.is_main_process:
        write_results(folder, results)
    return results


def _probe(
    config: ProbeConfig, class_names: list[str], rows: Mapping[str, Rows], accelerator: Accelerator
) -> tuple[dict[str, float], dict[str, Any], dict[str, Any]]:
    """Return the metrics of all probes, and by probe its details and what it says of itself."""
    metrics: dict[str, float] = {}
    details: dict[str, Any] = {}
    probes: dict[str, Any] = {}
    measure = _measure(config, class_names, rows["test"].y, accelerator)
    for name, probed in run_probes(config, rows, len(class_names), measure, accelerator.device):
        metrics.update({f"{name}_{metric}": value for metric, value in probed.metrics.items()})
        probes[name] = probed.about
        if not config.evaluation.metric.startswith(f"{name}_"):  # large, and one is enough
            probed.details.pop("confusion_matrix", None)
        details |= {name: probed.details} if probed.details else {}
        logger.info("%s test %s", name, format_metrics(probed.metrics))
    return metrics, details, probes


def _check(config: ProbeConfig, data: Data) -> None:
    """Refuse what the labels show to be impossible."""
    num_classes, metric = len(data.class_names), config.evaluation.metric
    train = _targets(data.train)
    assert not isinstance(data.train, Stream)
    if metric.endswith("_top5") and num_classes <= 5:
        message = f"{metric} needs more than 5 classes, and there are {num_classes}. Set a top1."
        raise config.error("evaluation.metric", message)
    if knn := config.evaluation.knn:
        check_ks(knn.ks, len(data.train))
    if few_shot := config.evaluation.few_shot:
        check_shots(train, few_shot.ks, data.class_names)


def _targets(dataset: Dataset) -> Labels:
    """Return classes (N,), or marks (N, K) where an image has several labels."""
    assert not isinstance(dataset, Stream)  # which build_data refuses
    return dataset.marks if isinstance(dataset, ImageLabels) else dataset.labels


def _described(config: ProbeConfig, backbone: Backbone) -> dict[str, Any]:
    """Return what features depend on beside weights and images."""
    return {
        "backbone": backbone.origin,
        "transforms": config.data.transforms.model_dump(),
        "undecodable": config.data.undecodable,
        "precision": config.engine.precision,
        "device": backbone.mean.device.type,
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def _features(
    config: ProbeConfig,
    data: Data,
    backbone: Backbone,
    hashes: Mapping[str, Sequence[str]],
    cache: Path,
    accelerator: Accelerator,
) -> dict[str, Extracted]:
    """Return the features of every split, from `cache` or new; `hashes` are of their images."""
    found: dict[str, Extracted] = {}
    with accelerator.main_process_first():  # the others read what it has kept
        for name, split in data.splits.items():
            key = feature_key(_described(config, backbone), backbone.state_dict(), hashes[name])
            extract = partial(_extract, config, backbone, split, accelerator)
            found[name] = cached_features(cache, key, extract)
    return found


def _extract(
    config: ProbeConfig, backbone: Backbone, dataset: Dataset, accelerator: Accelerator
) -> Extracted:
    device, precision = accelerator.device, PRECISIONS[config.engine.precision]
    skipped: list[str] = []

    def batches() -> Iterator[Batch]:
        pin = device.type == "cuda"
        for batch in build_eval_loader(config, dataset, rank=0, world_size=1, pin_memory=pin):
            skipped.extend(batch.skipped)
            if len(batch.images):
                yield batch

    with evaluating(backbone), torch.autocast(device.type, precision, enabled=bool(precision)):
        features, indices = extract_features(backbone.pooled, batches(), device)
    return Extracted(features, indices, skipped)


def _measure(
    config: ProbeConfig, class_names: list[str], truth: Labels, accelerator: Accelerator
) -> Measure:
    """Return what measures scores (N, K) of the test images, whose labels are `truth`."""

    def one_label(scores: Scores) -> tuple[dict[str, float], dict[str, Any]]:
        evaluator = build_evaluator(config, class_names)
        if accelerator.is_main_process:  # every process has all of them
            evaluator.update(torch.from_numpy(scores), torch.from_numpy(truth))
        metrics = evaluator.compute()
        metrics.pop("loss")  # votes and distances are no probabilities
        return metrics, evaluator.details()

    def many_labels(scores: Scores) -> tuple[dict[str, float], dict[str, Any]]:
        return multilabel_metrics(scores, truth, class_names)

    return many_labels if config.data.has_many_labels else one_label


def _untrained(data: Data, labels: dict[str, Labels]) -> list[str]:
    """Return the classes that test images show and training images do not."""

    def shown(y: Labels) -> set[int]:
        return set((y if y.ndim == 1 else np.nonzero(y == 1)[1]).tolist())

    return [data.class_names[k] for k in sorted(shown(labels["test"]) - shown(labels["train"]))]
