"""The pictures of a report: curves, detections and first-layer filters, as SVG and PNG."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image
from safetensors import SafetensorError, safe_open

from tract_transfer import visualize
from tract_transfer.report.compare import matched
from tract_transfer.report.curves import Evaluations, curve_of
from tract_transfer.report.runs import Run, is_finite
from tract_transfer.report.statistics import is_loss, metric_name

# --- Precision against recall, from the details of detection results.


def draw_precision_recall(task: str, runs: Mapping[str, Sequence[Run]]) -> list[Markup]:
    """Draw one line a method: the mean over classes and seeds of the precision at IoU 0.5.

    Args:
        runs: method -> its runs; those without `pr_curves` in their details have no line.

    Returns:
        One figure, or none where no run has the curves.
    """
    series = {method: [c for run in own if (c := mean_curve(run))] for method, own in runs.items()}
    if not any(series.values()):
        return []
    figure = visualize.curves(series, x_label="recall", y_label="precision at IoU 0.5")
    return [Markup(visualize.figure_svg(figure, f"{task}: precision against recall, all classes"))]


def mean_curve(run: Run) -> visualize.Curve | None:
    """Return recalls and mean precisions, or None where the run has none that can be read."""
    by_class = run.results["details"].get("pr_curves")
    if not isinstance(by_class, dict):
        return None
    try:
        precision = np.array(list(by_class.values()), np.float64)  # (K, R)
    except (TypeError, ValueError):
        return None
    if precision.ndim != 2 or not precision.size or not np.isfinite(precision).all():
        return None
    recalls = np.linspace(0, 1, precision.shape[1])
    return recalls.tolist(), precision.mean(axis=0).tolist()


MAX_FILTERS, MIN_SCORE = 64, 0.3
BEST_DRAWN = 3  # detections of a picture, where none of a task's reaches MIN_SCORE
_MAX_LOSS_POINTS = 80
_MAX_IMAGES, _MAX_IMAGE_PX = 4, 480
_MAX_DRAWN = 48  # detections of a page: more would make it slow to open


def draw_curves(
    runs: Sequence[Run], evaluations: Evaluations, methods: Sequence[str]
) -> list[Markup]:
    """Draw evaluations and training loss of one task against the epoch, and its precision."""
    task, metric = evaluations.task, evaluations.metric
    scale = 1 if is_loss(metric) else 100
    label = f"{metric_name(metric)} on {evaluations.split}" + ("" if scale == 1 else " (%)")
    of_method = {method: [run for run in runs if run.method == method] for method in methods}
    scores = {
        method: [
            (epochs, [scale * value for value in values])
            for epochs, values in evaluations.curves.get(method, {}).values()
        ]
        for method in methods
    }
    losses = {
        m: [_binned(curve_of(r, "loss", "train")) for r in own] for m, own in of_method.items()
    }
    drawn = []
    for text, series in ((label, scores), ("training loss", losses)):
        full = {m: [line for line in own if len(line[0]) > 1] for m, own in series.items()}
        if any(full.values()):
            figure = visualize.curves(full, x_label="epoch", y_label=text)
            drawn.append(Markup(visualize.figure_svg(figure, f"{task}: {text} against the epoch")))
    return drawn + draw_precision_recall(task, of_method)


def _binned(curve: visualize.Curve) -> visualize.Curve:
    """Return the means of consecutive points, at most `_MAX_LOSS_POINTS` of them."""
    bins = min(len(curve[0]), _MAX_LOSS_POINTS)
    x, y = ([float(part.mean()) for part in np.array_split(v, bins)] if bins else [] for v in curve)
    return x, y


def draw_detections(
    tasks: Mapping[str, Sequence[Run]], problems: list[str]
) -> list[dict[str, Any]]:
    """Draw, for each task, the images that the runs of one seed have all detected on.

    Args:
        problems: what cannot be drawn is added to it.
    """
    drawn: list[dict[str, Any]] = []
    room = _MAX_DRAWN
    for runs in tasks.values():
        part = _detections(runs, problems, room)
        if part is not None:
            room -= sum(len(cells) for _, cells in part["images"])
            drawn.append(part)
    return drawn


def _detections(runs: Sequence[Run], problems: list[str], room: int) -> dict[str, Any] | None:
    chosen = matched([run for run in runs if run.detections])
    entries = {m: {str(d.get("image")): d for d in r.detections} for m, r in chosen.items()}
    shared = [i for i in next(iter(entries.values()), {}) if all(i in e for e in entries.values())]
    shown = shared[: min(_MAX_IMAGES, room // max(len(chosen), 1))]
    weak = not any(_is_sure(own[image]) for own in entries.values() for image in shown)
    images = []
    for image in shown:
        try:
            cells = {m: _detection(run, entries[m][image], weak) for m, run in chosen.items()}
        except (OSError, ValueError, LookupError, TypeError, Image.DecompressionBombError) as error:
            problems.append(f"detections.json of {runs[0].task}, {image}: {error}")
            continue
        images.append((image, cells))
    first = next(iter(chosen.values()), None)
    if first is None or not shared or (not images and room):
        return None
    told = {"task": first.task, "seed": first.seed, "images": images, "shared": len(shared)}
    return {**told, "weak": weak}


def _is_sure(entry: Mapping[str, Any]) -> bool:
    scores = entry.get("scores")
    return isinstance(scores, list) and any(is_finite(v) and v >= MIN_SCORE for v in scores)


def _detection(run: Run, entry: Mapping[str, Any], weak: bool) -> Markup:
    path = (run.folder / entry["image"]).resolve()
    if not path.is_relative_to(run.folder.resolve()):
        raise ValueError(f"images must lie in the run folder, and {path} does not")
    with Image.open(path) as file:
        picture = file.convert("RGB")
    width = picture.width
    picture.thumbnail((_MAX_IMAGE_PX, _MAX_IMAGE_PX))
    scale = picture.width / width
    scores = entry["scores"]
    best = sorted(range(len(scores)), key=lambda i: -scores[i])
    kept = best[:BEST_DRAWN] if weak else [i for i in best if scores[i] >= MIN_SCORE]
    figure = visualize.draw_detections(
        np.asarray(picture).transpose(2, 0, 1),
        [[scale * v for v in entry["boxes"][i]] for i in kept],
        [str(entry["labels"][i]) for i in kept],
        [scores[i] for i in kept],
        truth_boxes_xyxy=[[scale * v for v in box] for box in entry.get("truth_boxes", [])],
    )
    name = f"{run.task}: detections of {run.method} on {entry['image']}"
    return Markup(visualize.figure_svg(figure, name))


def picture_filters(runs: Sequence[Run], problems: list[str]) -> dict[str, Any] | None:
    """Picture the first layer of one run a method, after pre-training where there is one.

    Args:
        problems: what cannot be read is added to it.
    """
    saved = [
        run for run in runs if not run.failure and (run.folder / "model.safetensors").is_file()
    ]
    chosen = matched(sorted(saved, key=lambda run: run.role != "pretrain"))
    cells = {}
    for method, run in chosen.items():
        try:
            layer = json.loads((run.folder / "model.json").read_bytes())["first_layers"][0]
            with safe_open(run.folder / "model.safetensors", framework="pt") as tensors:
                weight = tensors.get_tensor(f"{layer}.weight").float()
            grid = visualize.filter_grid(weight[:MAX_FILTERS])
        except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
            problems.append(f"{run.folder / 'model.safetensors'}: {error}")
            continue
        cells[method] = (visualize.array_png_data_uri(grid), tuple(weight.shape), layer)
    first = next(iter(chosen.values()), None)
    return {"task": first.task, "seed": first.seed, "cells": cells} if first and cells else None
