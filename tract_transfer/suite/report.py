"""One HTML page, and one table for the terminal, from run folders alone.

The page fetches nothing and runs no script; the template escapes all but the figures we draw.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image
from safetensors import SafetensorError, safe_open

from tract_transfer import __version__, visualize
from tract_transfer.suite.precision_recall import draw_precision_recall
from tract_transfer.suite.runs import Row, Run, compare, is_finite, load_runs, matched, methods_of
from tract_transfer.suite.statistics import PairedDifference, Summary, summarize

_METRICS = {
    "top1": "top-1 accuracy", "top5": "top-5 accuracy", "mean_per_class": "mean per-class accuracy",
    "ap": "AP 50:95", "ap50": "AP 50", "ap75": "AP 75",
    "knn20_top1": "k-NN (20) top-1", "logistic_top1": "logistic top-1",
    "linear_top1": "linear top-1", "svm_top1": "SVM top-1",
}  # fmt: skip
_FEW_PAIRS = 5
_MAX_LOSS_POINTS, _MAX_FILTERS = 80, 64
_MAX_IMAGES, _MAX_IMAGE_PX, _MIN_SCORE = 4, 800, 0.3


def write_report(
    folders: Sequence[Path],
    path: Path,
    *,
    baseline: str = "vanilla",
    title: str = "Does the backbone transfer?",
) -> Path:
    """Write one self-contained HTML page about run folders, finished or not; return its path.

    Args:
        path: the file to write; its folder is made.
        baseline: label of the method that the others are compared with.

    Raises:
        ValueError: no folder, or two finished runs of one task, method and seed.
    """
    runs = load_runs(folders)
    methods, rows = methods_of(runs, baseline), compare(runs, baseline)
    tasks = {row.task: [r for r in runs if r.task == row.task and not r.failure] for row in rows}
    problems = [problem for run in runs for problem in run.problems]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(
        score=score, gap=gap, spread=spread, interval=interval, metric_name=metric_name
    )
    page = environment.get_template("report.html.jinja").render(
        title=title,
        version=__version__,
        baseline=baseline,
        methods=methods,
        answer=answer(rows, baseline),
        runs=runs,
        tasks=tasks,
        rows=rows,
        every_row=compare(runs, baseline, every_metric=True),
        curves={task: _curves(own, methods) for task, own in tasks.items()},
        detections=[d for own in tasks.values() if (d := _detections(own, problems))],
        filters=_filters(runs, problems),
        classes={task: _classes(own) for task, own in tasks.items()},
        summaries=_summaries,
        cards={task: _card(own) for task, own in tasks.items()},
        problems=problems,
        limits={"score": _MIN_SCORE, "filters": _MAX_FILTERS},
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def text_table(runs: Sequence[Run], baseline: str = "vanilla") -> str:
    """Return the primary metrics as an aligned table that is also Markdown.

    Fractions are in percent, differences in percentage points with their 95 % interval and the
    number of pairs; lines below the table tell what is missing.
    """
    rows, methods = compare(runs, baseline), methods_of(runs, baseline)
    treated = [method for method in methods if method != baseline]
    lines = [["task", "metric", *methods, *(f"{m} − {baseline} [95 %], pairs" for m in treated)]]
    for row in rows:
        gaps = [
            f"{gap(d.mean, row.metric)} {interval(d, row.metric)}, {d.n}" if d else "–"
            for d in map(row.differences.get, treated)
        ]
        means = [spread(row.summaries.get(method), row.metric) for method in methods]
        lines.append([row.task, metric_name(row.metric), *means, *gaps])
    lines = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    padded = [[c.ljust(w) for c, w in zip(line, widths, strict=True)] for line in lines]
    notes = [f"{row.task}: {note}" for row in rows for note in row.notes]
    notes += [f"Not finished: {r.folder.as_posix()}: {r.failure}." for r in runs if r.failure]
    return "\n".join([*(f"| {' | '.join(line)} |" for line in padded), *[""] * bool(notes), *notes])


def answer(rows: Sequence[Row], baseline: str) -> list[str]:
    """Return what the downstream tasks say of each treated method, and no more than they say."""
    methods = dict.fromkeys(m for row in rows for m in row.values if m != baseline)
    downstream = [row for row in rows if row.role == "downstream"]
    return [_compared(method, downstream, baseline) for method in methods]


def _compared(method: str, rows: Sequence[Row], baseline: str) -> str:
    measured = [(row.differences[method], row.metric) for row in rows if method in row.differences]
    if not measured:
        return f"{method} and {baseline} share no finished seed of a downstream task yet."
    gains = [(d, d.mean * (-1 if "loss" in metric else 1)) for d, metric in measured]
    # The paired t-test rejects at 1 - level exactly where the t interval excludes zero.
    excludes = [(gain, d.p_value is not None and d.p_value < 1 - d.level) for d, gain in gains]
    sides = {
        "ahead": [excluded for gain, excluded in excludes if gain > 0],
        "behind": [excluded for gain, excluded in excludes if gain < 0],
    }
    tasks = f"{len(gains)} downstream task{'s' * (len(gains) > 1)}"
    text = f"{method} is ahead of {baseline} on {len(sides['ahead']) or 'none'} of {tasks}"
    text += f" and behind on {len(sides['behind'])}. " if sides["behind"] else ". "
    where = [f"{sum(c)} of the {len(c)} where it is {side}" for side, c in sides.items() if any(c)]
    clear = " and on ".join(where) or "none"
    text += f"The 95 % interval of the paired difference excludes zero on {clear} "
    fewest, most = min(d.n for d, _ in gains), max(d.n for d, _ in gains)
    pairs = f"{fewest} pair{'s' * (fewest > 1)}" if fewest == most else f"{fewest} to {most} pairs"
    few = "one pair has no interval, its sign may be chance" if fewest == 1 else "wide intervals"
    return f"{text}({pairs} of seeds a task{f': {few}' if fewest < _FEW_PAIRS else ''})."


def metric_name(metric: str) -> str:
    """Return a metric's name in words; an unknown one is its own name."""
    return _METRICS.get(metric, metric)


def score(value: float, metric: str) -> str:
    """Return a fraction in percent, a loss as it is."""
    return f"{value:.4f}" if "loss" in metric else f"{100 * value:.2f}"


def spread(summary: Summary | None, metric: str) -> str:
    """Return mean ± standard deviation; one value has no deviation, none is a dash."""
    if summary is None:
        return "–"
    deviation = "" if summary.std is None else f" ± {score(summary.std, metric)}"
    return score(summary.mean, metric) + deviation


def gap(value: float, metric: str) -> str:
    """Return a difference with its sign, in percentage points unless it is of losses."""
    text = score(abs(value), metric)
    return f"{'+' if value > 0 else '−'}{text}" if float(text) else text


def interval(difference: PairedDifference, metric: str) -> str:
    """Return the interval of a difference, or why there is none."""
    if difference.low is None or difference.high is None:
        return "[one pair, no interval]"
    if difference.p_value is None:
        return "[the same for every seed]"
    return f"[{gap(difference.low, metric)}, {gap(difference.high, metric)}]"


def _curves(runs: Sequence[Run], methods: Sequence[str]) -> list[Markup]:
    """Draw evaluations and training loss of one task against the epoch, and its precision."""
    task, metric = runs[0].task, runs[0].primary_metric
    lines = [line for run in runs for line in run.history if metric in line]
    split = "val" if any(line.get("split") == "val" for line in lines) else "test"
    scale = 1 if "loss" in metric else 100
    labels = f"{metric_name(metric)} on {split}" + ("" if scale == 1 else " (%)"), "training loss"
    of_method = {method: [run for run in runs if run.method == method] for method in methods}
    scores = {m: [_curve(r, metric, split, scale) for r in own] for m, own in of_method.items()}
    losses = {m: [_binned(_curve(r, "loss", "train")) for r in own] for m, own in of_method.items()}
    drawn = []
    for label, series in zip(labels, (scores, losses), strict=True):
        full = {m: [line for line in own if len(line[0]) > 1] for m, own in series.items()}
        if any(full.values()):
            figure = visualize.curves(full, x_label="epoch", y_label=label)
            drawn.append(Markup(visualize.figure_svg(figure, f"{task}: {label} against the epoch")))
    return drawn + draw_precision_recall(task, of_method)


def _curve(run: Run, key: str, split: str | None, scale: float = 1) -> visualize.Curve:
    points = [(h.get("epoch"), h.get(key)) for h in run.history if h.get("split") == split]
    numbers = [(x, y) for x, y in points if is_finite(x) and isinstance(y, int | float)]
    return [float(x) for x, _ in numbers], [scale * float(y) for _, y in numbers]


def _binned(curve: visualize.Curve) -> visualize.Curve:
    """Return the means of consecutive points, at most `_MAX_LOSS_POINTS` of them."""
    bins = min(len(curve[0]), _MAX_LOSS_POINTS)
    x, y = ([float(part.mean()) for part in np.array_split(v, bins)] if bins else [] for v in curve)
    return x, y


def _detections(runs: Sequence[Run], problems: list[str]) -> dict[str, Any] | None:
    """Draw the images that the runs of one seed have all detected on, method by method."""
    chosen = matched([run for run in runs if run.detections])
    entries = {m: {str(d.get("image")): d for d in r.detections} for m, r in chosen.items()}
    shared = [i for i in next(iter(entries.values()), {}) if all(i in e for e in entries.values())]
    images = []
    for image in shared[:_MAX_IMAGES]:
        try:
            cells = {m: _detection(run, entries[m][image]) for m, run in chosen.items()}
        except (OSError, ValueError, LookupError, TypeError) as error:
            problems.append(f"detections.json of {runs[0].task}, {image}: {error}")
            continue
        images.append((image, cells))
    first = next(iter(chosen.values()), None)
    if first is None or not images:
        return None
    return {"task": first.task, "seed": first.seed, "images": images, "shared": len(shared)}


def _detection(run: Run, entry: Mapping[str, Any]) -> Markup:
    path = (run.folder / entry["image"]).resolve()
    if not path.is_relative_to(run.folder.resolve()):
        raise ValueError(f"images must lie in the run folder, and {path} does not")
    with Image.open(path) as file:
        picture = file.convert("RGB")
    width = picture.width
    picture.thumbnail((_MAX_IMAGE_PX, _MAX_IMAGE_PX))
    scale = picture.width / width
    kept = [i for i, value in enumerate(entry["scores"]) if value >= _MIN_SCORE]
    figure = visualize.draw_detections(
        np.asarray(picture).transpose(2, 0, 1),
        [[scale * v for v in entry["boxes"][i]] for i in kept],
        [str(entry["labels"][i]) for i in kept],
        [entry["scores"][i] for i in kept],
        truth_boxes_xyxy=[[scale * v for v in box] for box in entry.get("truth_boxes", [])],
    )
    name = f"{run.task}: detections of {run.method} on {entry['image']}"
    return Markup(visualize.figure_svg(figure, name))


def _filters(runs: Sequence[Run], problems: list[str]) -> dict[str, Any] | None:
    """Picture the first layer of one run a method, after pre-training where there is one."""
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
            grid = visualize.filter_grid(weight[:_MAX_FILTERS])
        except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
            problems.append(f"{run.folder / 'model.safetensors'}: {error}")
            continue
        cells[method] = (visualize.array_png_data_uri(grid), tuple(weight.shape), layer)
    first = next(iter(chosen.values()), None)
    return {"task": first.task, "seed": first.seed, "cells": cells} if first and cells else None


def _summaries(runs: Sequence[Run], *keys: str) -> dict[str, Summary]:
    """Return method -> summary over the seeds of a number deep in the results."""
    values: dict[str, list[float]] = {}
    for run in runs:
        value: Any = run.results
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if is_finite(value):
            values.setdefault(run.method, []).append(value)
    return {method: summarize(own) for method, own in values.items()}


def _classes(runs: Sequence[Run]) -> list[str]:
    classes = [run.results["details"].get("per_class") or {} for run in runs]
    return list(dict.fromkeys(name for own in classes for name in own))


def _card(runs: Sequence[Run]) -> dict[str, dict[str, dict[str, list[str]]]]:
    """Return heading -> key -> method -> the distinct values of its runs."""
    card: dict[str, dict[str, dict[str, list[str]]]] = {}
    for run in runs:
        config = {k: v for k, v in run.config.items() if k not in ("seed", "output_dir")}
        parts = {"Protocol": run.results["protocol"], "Configuration": config}
        for heading, part in {**parts, "Environment and data": run.environment}.items():
            for key, text in _flatten(part).items():
                own = card.setdefault(heading, {}).setdefault(key, {}).setdefault(run.method, [])
                own += [text] if text not in own else []
    return card


def _flatten(value: Any, key: str = "") -> dict[str, str]:
    """Return nested mappings as dotted key -> text."""
    if isinstance(value, dict) and value:
        items = [_flatten(v, f"{key}.{k}" if key else str(k)) for k, v in value.items()]
        return {k: v for item in items for k, v in item.items()}
    return {key: value if isinstance(value, str) else json.dumps(value, default=str)} if key else {}
