"""The pictures of a report: curves, detections and first-layer filters, as SVG and PNG."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image
from safetensors import SafetensorError, safe_open

from tract_transfer.report.curves import Curve, Evaluations, curve_of
from tract_transfer.report.runs import Run, is_finite
from tract_transfer.report.statistics import is_loss, metric_name
from tract_transfer.visualize import boxes, plots

MAX_FILTERS = 64  # of a layer
MIN_SCORE = 0.3  # of the detections drawn
BEST_DRAWN = 3  # detections of a picture, if none of its task reaches MIN_SCORE
_MAX_LOSS_POINTS = 80
_MAX_IMAGES, _MAX_IMAGE_PX = 4, 480  # of a task
_MAX_PICTURES = 48  # of detections on a page, which opens slowly with more
_UNREADABLE = (OSError, ValueError, LookupError, TypeError)


def draw_curves(
    runs: Sequence[Run], evaluations: Evaluations, methods: Sequence[str]
) -> list[Markup]:
    """Draw one task's evaluations, training loss, and precision against recall."""
    metric = evaluations.metric
    scale, unit = (1, "") if is_loss(metric) else (100, " (%)")
    label = f"{metric_name(metric)} on {evaluations.split}{unit}"

    def scores(run: Run) -> Curve:
        epochs, values = curve_of(run, metric, evaluations.split)
        return epochs, [scale * value for value in values]

    def losses(run: Run) -> Curve:
        both = curve_of(run, "loss", "train")
        bins = min(len(both[0]), _MAX_LOSS_POINTS) or 1  # of consecutive points, drawn as means
        x, y = ([float(part.mean()) for part in np.array_split(v, bins) if len(v)] for v in both)
        return x, y

    figures = []
    every = "precision against recall, all classes"
    for curve, x, y, title in (
        (scores, "epoch", label, f"{label} against the epoch"),
        (losses, "epoch", "training loss", "training loss against the epoch"),
        (precision_recall, "recall", "precision at IoU 0.5", every),
    ):
        lines: dict[str, list[Curve]] = {method: [] for method in methods}
        for run in runs:
            lines[run.method] += [line] if len((line := curve(run))[0]) > 1 else []
        if any(lines.values()):
            figure = plots.curves(lines, x_label=x, y_label=y)
            figures.append(Markup(plots.figure_svg(figure, f"{evaluations.task}: {title}")))
    return figures


def precision_recall(run: Run) -> Curve:
    """Return recalls and precisions at IoU 0.5 from `pr_curves` in the details of results.

    Precisions are averaged over classes; both are empty if there are no readable ones.
    """
    by_class = run.results["details"].get("pr_curves")
    try:
        precision = np.array(list(by_class.values()), np.float64)  # (classes, recalls)
    except (AttributeError, TypeError, ValueError):
        return [], []
    if precision.ndim != 2 or not precision.size or not np.isfinite(precision).all():
        return [], []
    return np.linspace(0, 1, precision.shape[1]).tolist(), precision.mean(axis=0).tolist()


def _matched(runs: Sequence[Run]) -> dict[str, Run]:
    """Return method -> run for the first task and seed that the most methods share."""
    groups: dict[tuple[str, int | None], dict[str, Run]] = {}
    for run in runs:
        groups.setdefault((run.task, run.seed), {})[run.method] = run
    return max(groups.values(), key=len, default={})


def draw_detections(
    tasks: Mapping[str, Sequence[Run]], problems: list[str]
) -> list[dict[str, Any]]:
    """Draw, for each task, the images on which every method's run of one seed has detections.

    Returns a dict for each task: `task`, `seed`, `images` (name, method -> SVG), `shared` (number
    of images that could be drawn), `weak` (whether no detection reaches `MIN_SCORE`). What cannot
    be drawn is appended to `problems`.
    """
    parts, room = [], _MAX_PICTURES
    for task, runs in tasks.items():
        chosen = _matched([run for run in runs if run.detections])
        entries = {m: {str(d.get("image")): d for d in r.detections} for m, r in chosen.items()}
        first = next(iter(entries.values()), {})
        shared = [i for i in first if all(i in of_method for of_method in entries.values())]
        if not shared:
            continue
        names = shared[: min(_MAX_IMAGES, room // len(chosen))]
        weak = not any(_is_sure(of_method[i]) for of_method in entries.values() for i in names)
        images = []
        for name in names:
            try:
                pictures = {m: _detection(r, entries[m][name], weak) for m, r in chosen.items()}
            except (*_UNREADABLE, Image.DecompressionBombError) as error:
                problems.append(f"detections.json of {task}, {name}: {error}")
                continue
            images.append((name, pictures))
        room -= len(images) * len(chosen)
        if images or not room:
            part = {"task": task, "seed": next(iter(chosen.values())).seed, "images": images}
            parts.append(part | {"shared": len(shared), "weak": weak})
    return parts


def _is_sure(entry: Mapping[str, Any]) -> bool:
    scores = entry.get("scores")
    return isinstance(scores, list) and any(is_finite(s) and s >= MIN_SCORE for s in scores)


def _detection(run: Run, entry: Mapping[str, Any], weak: bool) -> Markup:
    path = (run.folder / entry["image"]).resolve()
    if not path.is_relative_to(run.folder.resolve()):
        raise ValueError(f"images must be inside the run folder, {path} is not")
    with Image.open(path) as file:
        picture = file.convert("RGB")
    width = picture.width
    picture.thumbnail((_MAX_IMAGE_PX, _MAX_IMAGE_PX))
    scale, scores = picture.width / width, entry["scores"]
    best = sorted(range(len(scores)), key=lambda i: -scores[i])
    kept = best[:BEST_DRAWN] if weak else [i for i in best if scores[i] >= MIN_SCORE]
    figure = boxes.draw_detections(
        np.asarray(picture).transpose(2, 0, 1),
        [[scale * v for v in entry["boxes"][i]] for i in kept],
        [str(entry["labels"][i]) for i in kept],
        [scores[i] for i in kept],
        truth_boxes_xyxy=[[scale * v for v in box] for box in entry.get("truth_boxes", [])],
    )
    title = f"{run.task}: detections of {run.method} on {entry['image']}"
    return Markup(plots.figure_svg(figure, title))


def draw_filters(runs: Sequence[Run], problems: list[str]) -> dict[str, Any] | None:
    """Draw the first layer of one run of each method, after pre-training if there is one.

    What cannot be read is appended to `problems`.
    """
    finished = [run for run in runs if not run.failure]
    saved = [run for run in finished if (run.folder / "model.safetensors").is_file()]
    chosen = _matched(sorted(saved, key=lambda run: run.role != "pretrain"))
    cells = {}
    for method, run in chosen.items():
        try:
            layer = json.loads((run.folder / "model.json").read_bytes())["first_layers"][0]
            with safe_open(run.folder / "model.safetensors", framework="pt") as tensors:
                weight = tensors.get_tensor(f"{layer}.weight").float()
            uri = plots.array_png_data_uri(plots.filter_grid(weight[:MAX_FILTERS]))
        except (*_UNREADABLE, SafetensorError) as error:
            problems.append(f"{run.folder / 'model.safetensors'}: {error}")
            continue
        cells[method] = (uri, tuple(weight.shape), layer)
    first = next(iter(chosen.values()), None)
    return {"task": first.task, "seed": first.seed, "cells": cells} if first and cells else None
