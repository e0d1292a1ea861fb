"""From a config to the probes of frozen features, and their protocol in words."""

from collections.abc import Callable, Iterator, Mapping
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch

from tract_transfer.config.schema import ProbeConfig
from tract_transfer.config.sections import FewShotConfig
from tract_transfer.evaluation import linear_probes, probes
from tract_transfer.evaluation.probes import Fit, Rows, Scores, Selection

Measure = Callable[[Scores], tuple[dict[str, float], dict[str, Any]]]
_VAL_FRACTION, _TEMPERATURE, _FOLDS = 0.1, 0.07, 3
_FEW_SHOT_CS = (0.01, 0.1, 1.0, 10.0, 100.0)


def run_probes(
    config: ProbeConfig,
    rows: Mapping[str, Rows],
    num_classes: int,
    measure: Measure,
    device: torch.device,
) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Fit and measure every probe; yield its name, its results, and the evaluator's details.

    Args:
        rows: features and labels of `train` and `test`, and of `val` if there is one. Probes use
            only the features of test; only `measure` knows its labels.
        measure: converts scores (N, K) of the test images to metrics and details.
        device: where the linear probe is trained.
    """
    protocol = probe_protocol(config)
    for name, selected_on, fit in _fits(config, rows, num_classes, device):
        metrics, details = measure(fit.scores)
        results = {
            "metrics": metrics,
            "chosen": fit.chosen,
            "selected_on": selected_on,
            "protocol": protocol["knn" if name.startswith("knn") else name],
            **fit.details,
        }
        yield name, results, details
    if few_shot := config.evaluation.few_shot:
        for k in few_shot.ks:
            results = _few_shot(config.seed, few_shot, k, rows, num_classes, measure)
            yield f"shot{k}", {**results, "protocol": protocol["few_shot"]}, {}


def probe_protocol(config: ProbeConfig) -> dict[str, str]:
    """Return the protocol of each probe of the config in words."""
    evaluation = config.evaluation
    on = "data.val" if config.data.val else f"{_val_fraction(config):.0%} of train, by class"
    texts = {}
    if knn := evaluation.knn:
        texts["knn"] = f"cosine similarity s, votes exp(s / {knn.temperature:g}), k of {knn.ks}"
    if logistic := evaluation.logistic_regression:
        texts["logistic"] = (
            f"L-BFGS on standardised features, {_span('C', logistic.cs)}; selected by top-1 on "
            f"{on}, then fitted on all of train"
        )
    if linear := evaluation.linear:
        texts["linear"] = (
            f"SGD (momentum {linear.momentum:g}, cosine, batch {linear.batch_size}, "
            f"{linear.max_epochs} epochs) on standardised features, lr of {linear.lrs}, weight "
            f"decay of {linear.weight_decays}; selected by top-1 on {on}, then trained on all of "
            "train"
        )
    if svm := evaluation.svm:
        texts["svm"] = (
            "one linear SVM a class (squared hinge, l2, positives weigh 2) on features of length "
            f"1, {_span('C', svm.cs)}; selected by average precision, {svm.folds} folds of train"
        )
    if shot := evaluation.few_shot:
        votes = f"the k nearest vote exp(s / {shot.temperature or _TEMPERATURE:g})"
        selection = (
            f"{_span('C', shot.cs or _FEW_SHOT_CS)}, selected on the drawn images alone by "
            f"{shot.folds or _FOLDS} folds (k where it is less; C = 1 where it is 1)"
        )
        texts["few_shot"] = (
            f"{shot.classifier} on k of {shot.ks} training images a class, {shot.samplings} "
            "samplings, mean and standard deviation; "
            f"{votes if shot.classifier == 'knn' else selection}"
        )
    return texts


def _fits(
    config: ProbeConfig, rows: Mapping[str, Rows], num_classes: int, device: torch.device
) -> Iterator[tuple[str, str, Fit]]:
    """Yield name, selection data and fit of each probe except few-shot."""
    evaluation, train, test_x = config.evaluation, rows["train"], rows["test"].x
    if knn := evaluation.knn:
        scores_by_k = probes.knn_predict(train, test_x, **knn.model_dump(), num_classes=num_classes)
        for k, scores in scores_by_k.items():
            yield f"knn{k}", "nothing: every k is reported", Fit(scores, {"k": k})
    if evaluation.selects:
        selection, selected_on = _selection(config, rows)
        common: dict[str, Any] = {"selection": selection, "num_classes": num_classes}
    if logistic := evaluation.logistic_regression:
        fit = linear_probes.logistic_regression(train, test_x, **logistic.model_dump(), **common)
        yield "logistic", selected_on, fit
    if linear := evaluation.linear:
        common |= {"seed": config.seed, "device": device}
        fit = linear_probes.linear_probe(train, test_x, **linear.model_dump(), **common)
        yield "linear", selected_on, fit
    if svm := evaluation.svm:
        marks = (
            train.y
            if config.data.has_many_labels
            else linear_probes.one_hot_marks(train.y, num_classes)
        )
        fit = linear_probes.linear_svm(
            Rows(train.x, marks), test_x, **svm.model_dump(), seed=config.seed
        )
        yield "svm", f"{svm.folds} folds of train, each class by itself", fit


def _selection(config: ProbeConfig, rows: Mapping[str, Rows]) -> tuple[Selection, str]:
    if "val" in rows:
        count = len(rows["val"].y)
        return Selection(rows["train"], rows["val"]), f"data.val, {count} images"
    fraction = _val_fraction(config)
    selection = probes.hold_out_selection(rows["train"], fraction, config.seed)
    return selection, f"{fraction:.0%} of train, {len(selection.val.y)} images"


def _few_shot(
    seed: int,
    section: FewShotConfig,
    k: int,
    rows: Mapping[str, Rows],
    num_classes: int,
    measure: Measure,
) -> dict[str, Any]:
    """Return mean and standard deviation over the samplings, and the numbers of each."""
    drawn = linear_probes.draws(rows["train"], k, section.samplings, seed)
    fits = [
        linear_probes.few_shot_fit(
            section.classifier,
            part,
            rows["test"].x,
            k,
            cs=section.cs or _FEW_SHOT_CS,
            folds=section.folds or _FOLDS,
            temperature=section.temperature or _TEMPERATURE,
            seed=seed + sampling,
            num_classes=num_classes,
        )
        for sampling, part in enumerate(drawn)
    ]
    measured = [measure(one.scores)[0] for one in fits]
    columns = {name: [one[name] for one in measured] for name in measured[0]}
    metrics = {name: mean(values) for name, values in columns.items()}
    if section.samplings > 1:
        metrics |= {f"{name}_std": stdev(values) for name, values in columns.items()}
    selects = section.classifier != "knn" and k > 1
    return {
        "metrics": metrics,
        "samplings": measured,
        "chosen": [one.chosen for one in fits],
        "selected_on": "folds of the drawn images" if selects else "nothing: there is no choice",
        "details": [one.details for one in fits],
    }


def _val_fraction(config: ProbeConfig) -> float:
    return config.evaluation.val_fraction or _VAL_FRACTION


def _span(name: str, values: Any) -> str:
    low, high = np.min(values), np.max(values)
    return f"{name} of {len(values)} values in {low:g}..{high:g}"
