"""From a config to the probes of frozen features, and their protocol in words."""

from collections.abc import Callable, Iterator, Mapping
from statistics import mean, stdev
from typing import Any, NamedTuple

import numpy as np
import torch

from tract_transfer.config.schema import ProbeConfig
from tract_transfer.config.sections import FewShotConfig
from tract_transfer.evaluation.linear_probes import (
    draws,
    few_shot_fit,
    linear_probe,
    linear_svm,
    logistic_regression,
    one_hot_marks,
)
from tract_transfer.evaluation.probes import (
    Fit,
    Rows,
    Scores,
    Selection,
    hold_out_selection,
    knn_predict,
)

Measure = Callable[[Scores], tuple[dict[str, float], dict[str, Any]]]
_VAL_FRACTION, _TEMPERATURE, _FOLDS = 0.1, 0.07, 3
_FEW_SHOT_CS = (0.01, 0.1, 1.0, 10.0, 100.0)


class Probed(NamedTuple):
    """Metrics of a probe, its description for results.json, and the evaluator's details."""

    metrics: dict[str, float]
    about: dict[str, Any]
    details: dict[str, Any]


def run_probes(
    config: ProbeConfig,
    rows: Mapping[str, Rows],
    num_classes: int,
    measure: Measure,
    device: torch.device,
) -> Iterator[tuple[str, Probed]]:
    """Fit and measure every probe of the config; yield its name and results.

    Args:
        rows: features and labels of `train` and `test`, and of `val` if there is one. Probes use
            only the features of test; only `measure` knows its labels.
        measure: converts scores (N, K) of the test images to metrics and details.
        device: where the linear probe is trained.
    """
    protocol = probe_protocol(config)
    for name, selected_on, fit in _fits(config, rows, num_classes, device):
        metrics, details = measure(fit.scores)
        kind = "knn" if name.startswith("knn") else name
        about = {
            "metrics": metrics,
            "chosen": fit.chosen,
            "selected_on": selected_on,
            "protocol": protocol[kind],
            **fit.details,
        }
        yield name, Probed(metrics, about, details)
    if few_shot := config.evaluation.few_shot:
        for k in few_shot.ks:
            yield f"shot{k}", _few_shot(config, few_shot, k, rows, num_classes, measure)


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
    if few_shot := evaluation.few_shot:
        texts["few_shot"] = _few_shot_protocol(few_shot)
    return texts


def _few_shot_protocol(section: FewShotConfig) -> str:
    text = f"{section.classifier} on k of {section.ks} training images a class, "
    text += f"{section.samplings} samplings, mean and standard deviation; "
    if section.classifier == "knn":
        return f"{text}the k nearest vote exp(s / {section.temperature or _TEMPERATURE:g})"
    return (
        f"{text}{_span('C', section.cs or _FEW_SHOT_CS)}, selected on the drawn images alone by "
        f"{section.folds or _FOLDS} folds (k where it is less; C = 1 where it is 1)"
    )


def _fits(
    config: ProbeConfig, rows: Mapping[str, Rows], num_classes: int, device: torch.device
) -> Iterator[tuple[str, str, Fit]]:
    """Yield name, selection data and fit of each probe except few-shot."""
    evaluation, train, test_x = config.evaluation, rows["train"], rows["test"].x
    if knn := evaluation.knn:
        scores_by_k = knn_predict(train, test_x, **knn.model_dump(), num_classes=num_classes)
        for k, scores in scores_by_k.items():
            yield f"knn{k}", "nothing: every k is reported", Fit(scores, {"k": k})
    if evaluation.selects:
        selection, selected_on = _selection(config, rows)
        common: dict[str, Any] = {"selection": selection, "num_classes": num_classes}
    if logistic := evaluation.logistic_regression:
        fit = logistic_regression(train, test_x, **logistic.model_dump(), **common)
        yield "logistic", selected_on, fit
    if linear := evaluation.linear:
        common |= {"seed": config.seed, "device": device}
        fit = linear_probe(train, test_x, **linear.model_dump(), **common)
        yield "linear", selected_on, fit
    if svm := evaluation.svm:
        marks = train.y if config.data.has_many_labels else one_hot_marks(train.y, num_classes)
        fit = linear_svm(Rows(train.x, marks), test_x, **svm.model_dump(), seed=config.seed)
        yield "svm", f"{svm.folds} folds of train, each class by itself", fit


def _selection(config: ProbeConfig, rows: Mapping[str, Rows]) -> tuple[Selection, str]:
    if "val" in rows:
        count = len(rows["val"].y)
        return Selection(rows["train"], rows["val"]), f"data.val, {count} images"
    fraction = _val_fraction(config)
    selection = hold_out_selection(rows["train"], fraction, config.seed)
    return selection, f"{fraction:.0%} of train, {len(selection.val.y)} images"


def _few_shot(
    config: ProbeConfig,
    section: FewShotConfig,
    k: int,
    rows: Mapping[str, Rows],
    num_classes: int,
    measure: Measure,
) -> Probed:
    """Return mean and standard deviation over the samplings, and the numbers of each."""
    fits = [
        few_shot_fit(
            section.classifier,
            drawn,
            rows["test"].x,
            k,
            cs=section.cs or _FEW_SHOT_CS,
            folds=section.folds or _FOLDS,
            temperature=section.temperature or _TEMPERATURE,
            seed=config.seed + sampling,
            num_classes=num_classes,
        )
        for sampling, drawn in enumerate(draws(rows["train"], k, section.samplings, config.seed))
    ]
    measured = [measure(one.scores)[0] for one in fits]
    columns = {name: [one[name] for one in measured] for name in measured[0]}
    metrics = {name: mean(values) for name, values in columns.items()}
    if section.samplings > 1:
        metrics |= {f"{name}_std": stdev(values) for name, values in columns.items()}
    uses_folds = section.classifier != "knn" and k > 1
    about = {
        "metrics": metrics,
        "samplings": measured,
        "chosen": [one.chosen for one in fits],
        "selected_on": (
            "folds of the drawn images" if uses_folds else "nothing: there is nothing to select"
        ),
        "protocol": _few_shot_protocol(section),
        "details": [one.details for one in fits],
    }
    return Probed(metrics, about, {})


def _val_fraction(config: ProbeConfig) -> float:
    return config.evaluation.val_fraction or _VAL_FRACTION


def _span(name: str, values: Any) -> str:
    low, high = np.min(values), np.max(values)
    return f"{name} of {len(values)} values in {low:g}..{high:g}"
