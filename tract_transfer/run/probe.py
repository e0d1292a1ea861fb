"""A probe: features of a frozen backbone, and what simple classifiers achieve with them."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from tract_transfer.build.batches import build_eval_loader
from tract_transfer.build.data import Data, Dataset
from tract_transfer.build.model import build_evaluator, build_model
from tract_transfer.build.probes import probe_protocol, run_probes
from tract_transfer.build.trainer import PRECISIONS
from tract_transfer.config.schema import ProbeConfig
from tract_transfer.data.detection import ImageLabels
from tract_transfer.data.images import content_hashes
from tract_transfer.data.loader import Batch
from tract_transfer.data.streaming import Stream
from tract_transfer.engine.cost import CostMeter
from tract_transfer.engine.hooks import evaluating, format_metrics
from tract_transfer.engine.run_folder import RunFolder
from tract_transfer.engine.screen import ProgressLine, log_rows
from tract_transfer.evaluation import probes
from tract_transfer.evaluation.classification import multilabel_metrics
from tract_transfer.evaluation.linear_probes import check_shots
from tract_transfer.evaluation.probes import Extracted, Labels, Rows, Scores
from tract_transfer.models import Backbone
from tract_transfer.run.results import log_weights, overlap, protocol, run_info, write_results
from tract_transfer.run.summary import outcome, probe_header

logger = logging.getLogger(__name__)


def run_probe(
    config: ProbeConfig, data: Data, run_folder: RunFolder, cost: CostMeter
) -> dict[str, Any]:
    """Probe a backbone; write and return the results."""
    backbone = build_probed(config, data)
    run_folder.begin(data.fingerprints)
    accelerator, started = run_folder.accelerator, time.perf_counter()
    if accelerator.is_main_process:
        log_rows(logger, probe_header(config, data, backbone, accelerator, cost.seconds))
    backbone.to(accelerator.device)
    hashes = {name: content_hashes(of.encoded, len(of)) for name, of in data.splits.items()}
    cache = Path(config.data.feature_cache or run_folder.path / "features")
    extracted = _features(config, data, backbone, hashes, cache, accelerator)
    labels = {name: _labels(data.splits[name])[one.indices] for name, one in extracted.items()}
    rows = {name: Rows(one.features, labels[name]) for name, one in extracted.items()}
    decoded = {name: one.indices.tolist() for name, one in extracted.items()}
    metrics, details, by_probe = _probe(config, data.class_names, rows, accelerator)
    is_new = not any(one.was_kept for one in extracted.values())  # else its time is too short
    results = {
        **run_info(config),
        "weights_match": log_weights(backbone),
        "metrics": metrics,
        "primary_metric": config.evaluation.metric,
        "probes": by_probe,
        "rows": {name: len(one.y) for name, one in rows.items()},
        "leaks": overlap(data, hashes, decoded),
        "test_classes_without_training_images": _untrained(data, labels),
        "details": details,
        "iterations": 0,
        "epochs": 0.0,
        "train_seconds": time.perf_counter() - started if is_new else None,
        "cost": cost.read(whole=is_new),
        "protocol": {**protocol(config, data, details), **probe_protocol(config)},
        "skipped": sorted(item for one in extracted.values() for item in one.skipped),
    }
    if accelerator.is_main_process:
        write_results(run_folder.path, results)
        rows_shown = outcome(config, "test", results)
        log_rows(logger, rows_shown, highlight=rows_shown[0][0])
    return results


def build_probed(config: ProbeConfig, data: Data) -> Backbone:
    """Return the backbone to probe."""
    if knn := config.evaluation.knn:
        probes.check_ks(knn.ks, len(data.train))
    if few_shot := config.evaluation.few_shot:
        check_shots(_labels(data.train), few_shot.ks, data.class_names)
    backbone = build_model(config, len(data.class_names))
    assert isinstance(backbone, Backbone)
    return backbone


def _features(
    config: ProbeConfig,
    data: Data,
    backbone: Backbone,
    hashes: Mapping[str, Sequence[str]],
    cache: Path,
    accelerator: Accelerator,
) -> dict[str, Extracted]:
    """Return the features of every split, cached or new; `hashes` are those of their images."""
    context = {  # what features depend on besides weights and images
        "backbone": backbone.origin,
        "transforms": config.data.transforms.model_dump(),
        "undecodable": config.data.undecodable,
        "precision": config.engine.precision,
        "device": backbone.mean.device.type,
        "versions": {name: version(name) for name in ("torch", "torchvision", "timm")},
    }
    with accelerator.main_process_first():  # the others read what it has cached
        return {
            name: probes.cached_features(
                cache,
                probes.feature_key(context, backbone.state_dict(), hashes[name]),
                partial(_extract, config, backbone, split, accelerator.device),
            )
            for name, split in data.splits.items()
        }


def _extract(
    config: ProbeConfig, backbone: Backbone, dataset: Dataset, device: torch.device
) -> Extracted:
    precision = PRECISIONS[config.engine.precision]
    skipped: list[str] = []
    loader = build_eval_loader(config, dataset)
    line = ProgressLine(f"features of {dataset.name}, batch", len(loader))

    def batches() -> Iterator[Batch]:
        for batch in line.track(loader):
            skipped.extend(batch.skipped)
            if len(batch.images):
                yield batch

    autocast = torch.autocast(device.type, precision, enabled=bool(precision))
    with line, evaluating(backbone), autocast:
        features, indices = probes.extract_features(backbone.pooled, batches(), device)
    return Extracted(features, indices, skipped)


def _probe(
    config: ProbeConfig, class_names: list[str], rows: Mapping[str, Rows], accelerator: Accelerator
) -> tuple[dict[str, float], dict[str, Any], dict[str, Any]]:
    """Return the metrics of all probes, and the details and the results of each by name."""

    def measure(scores: Scores) -> tuple[dict[str, float], dict[str, Any]]:
        if config.data.has_many_labels:
            return multilabel_metrics(scores, rows["test"].y, class_names)
        evaluator = build_evaluator(config, class_names)
        if accelerator.is_main_process:  # every process has all of them
            evaluator.update(torch.from_numpy(scores), torch.from_numpy(rows["test"].y))
        metrics = evaluator.compute()
        metrics.pop("loss")  # votes and distances are not probabilities
        return metrics, evaluator.details()

    metrics: dict[str, float] = {}
    details: dict[str, Any] = {}
    by_probe: dict[str, Any] = {}
    probed = run_probes(config, rows, len(class_names), measure, accelerator.device)
    for name, results, more in probed:
        by_probe[name], of_probe = results, results["metrics"]
        metrics |= {f"{name}_{metric}": value for metric, value in of_probe.items()}
        if not config.evaluation.metric.startswith(f"{name}_"):  # large, and one is enough
            more.pop("confusion_matrix", None)
        details |= {name: more} if more else {}
        logger.info("%s test %s", name, format_metrics(of_probe))
    return metrics, details, by_probe


def _labels(dataset: Dataset) -> Labels:
    """Return classes (N,), or marks (N, K) if an image has several labels."""
    assert not isinstance(dataset, Stream)  # its config is refused
    return dataset.marks if isinstance(dataset, ImageLabels) else dataset.labels


def _untrained(data: Data, labels: dict[str, Labels]) -> list[str]:
    """Return the classes of test images that no training image has."""

    def shown(y: Labels) -> set[int]:
        return set((y if y.ndim == 1 else np.nonzero(y == 1)[1]).tolist())

    return [data.class_names[k] for k in sorted(shown(labels["test"]) - shown(labels["train"]))]
