"""A probe: features of a frozen backbone, and what simple classifiers see in them."""

# N images, K classes

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray

from tract_transfer.build import PRECISIONS
from tract_transfer.build_data import Data, Dataset, build_eval_loader
from tract_transfer.build_model import build_evaluator, build_model
from tract_transfer.config import ProbeConfig
from tract_transfer.data.loader import Batch
from tract_transfer.engine.evaluate import evaluating
from tract_transfer.engine.hooks import format_metrics
from tract_transfer.engine.run_folder import write_results
from tract_transfer.evaluation.probes import extract_features, knn_predict, logistic_regression
from tract_transfer.models import Backbone
from tract_transfer.results import label, log_weights, protocol

logger = logging.getLogger(__name__)
Features = tuple[NDArray[np.float32], NDArray[np.int64]]


def run_probe(
    config: ProbeConfig, data: Data, folder: Path, accelerator: Accelerator
) -> dict[str, Any]:
    """Probe a backbone and return the results, which it also writes to `folder`."""
    started = time.perf_counter()
    backbone = build_model(config, len(data.class_names)).to(accelerator.device)
    assert isinstance(backbone, Backbone)
    skipped: list[str] = []
    train = _features(config, backbone, data.train, accelerator, skipped)
    test = _features(config, backbone, data.report[1], accelerator, skipped)
    scores, details = _scores(config, train, test[0], len(data.class_names))
    metrics = {}
    for name, values in scores.items():
        evaluator = build_evaluator(config, data.class_names)
        if accelerator.is_main_process:  # every process has all of them
            evaluator.update(torch.from_numpy(values), torch.from_numpy(test[1]))
        for metric, value in evaluator.compute().items():
            if metric != "loss":  # the votes of neighbours are no probabilities
                metrics[f"{name}_{metric}"] = value
        details[name] = evaluator.details()
    results = {
        **label(config),
        "weights_match": log_weights(backbone),
        "metrics": metrics,
        "primary_metric": config.evaluation.metric,
        "details": details,
        "iterations": 0,
        "epochs": 0.0,
        "train_seconds": time.perf_counter() - started,
        "protocol": protocol(config, data, details),
        "skipped": sorted(skipped),
    }
    if accelerator.is_main_process:
        write_results(folder, results)
    logger.info("test %s", format_metrics(metrics))
    return results


def _features(
    config: ProbeConfig,
    backbone: Backbone,
    dataset: Dataset,
    accelerator: Accelerator,
    skipped: list[str],
) -> Features:
    """Return features and labels of a split; append what could not be decoded to `skipped`."""
    device, precision = accelerator.device, PRECISIONS[config.engine.precision]

    def batches() -> Iterator[Batch]:
        pin = device.type == "cuda"
        for batch in build_eval_loader(config, dataset, rank=0, world_size=1, pin_memory=pin):
            skipped.extend(batch.skipped)
            if len(batch.images):
                yield batch

    with evaluating(backbone), torch.autocast(device.type, precision, enabled=bool(precision)):
        features, labels, _ = extract_features(backbone.pooled, batches(), device)
    return features, labels


def _scores(
    config: ProbeConfig, train: Features, test_x: NDArray[np.float32], num_classes: int
) -> tuple[dict[str, NDArray[np.float64]], dict[str, Any]]:
    """Return the (N, K) scores of each probe, and what it selected."""
    scores: dict[str, NDArray[np.float64]] = {}
    details: dict[str, Any] = {}
    if knn := config.evaluation.knn:
        votes = knn_predict(*train, test_x, knn.k, knn.temperature, num_classes)
        scores["knn"] = np.asarray(votes, np.float64)
    if logistic := config.evaluation.logistic_regression:
        arguments = logistic.model_dump()
        fit = logistic_regression(
            *train, test_x, **arguments, seed=config.seed, num_classes=num_classes
        )
        scores["logistic"] = fit.scores
        details["logistic_c"] = fit.best_c
        details["logistic_converged"] = fit.converged
        details["logistic_val_accuracies"] = {str(c): v for c, v in fit.val_accuracies.items()}
    return scores, details
