"""Fabricated run folders as the trainer writes them, and the text that a report shows."""

import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from tract_transfer.report.content import Report, read_report
from tract_transfer.report.runs import Run, find_runs, read_runs
from tract_transfer.report.write import FORMATS, save_report

VANILLA = {0: 0.8, 1: 0.82, 2: 0.81}
TRACT = {0: 0.83, 1: 0.84, 2: 0.845}


def write_run(
    root: Path,
    method: str,
    task: str,
    seed: int,
    metrics: dict[str, float],
    *,
    role: str = "downstream",
    per_class: dict[str, float] | None = None,
    iterations: int = 500,
) -> Path:
    """Write a finished run folder; the first of `metrics` is the primary one."""
    folder = root / method / task / f"seed{seed}"
    folder.mkdir(parents=True)
    primary = next(iter(metrics))
    rng = np.random.default_rng(seed)
    lines: list[dict[str, object]] = []
    for iteration in range(10, iterations + 1, 10):
        at = {"iteration": iteration, "epoch": iteration / 50}
        loss = 2.3 * 0.75 ** at["epoch"] + 0.05 + 0.03 * float(rng.random())
        reached = metrics[primary] * (1 - 0.6 ** at["epoch"]) + 0.004 * rng.standard_normal()
        lines.append({**at, "split": "train", "loss": loss, "lr": 0.1})
        lines += [{**at, "split": "val", primary: reached}] if iteration % 50 == 0 else []
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = {
        "task": "classification", "output_dir": str(folder), "seed": seed,
        "name": task, "method": method,
        "model": {"backbone": {"name": "cifar/resnet18", "stem": "cifar"}},
        "tract": {"enabled": method != "vanilla", "lam": 0.1},
        "solver": {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "max_epochs": 10},
    }  # fmt: skip
    results = {
        "task": "classification", "method": method, "name": task, "role": role, "seed": seed,
        "metrics": metrics, "primary_metric": primary, "details": {"per_class": per_class or {}},
        "iterations": iterations, "epochs": iterations / 50,
        "train_seconds": 31.2 + seed + 2 * (method != "vanilla"),
        "images_per_second": 2051.3 - 90 * (method != "vanilla"),
        "cost": {
            "peak_memory_bytes": {"process": 2**29 + 2**27 * (method != "vanilla")},
            "energy_joules": {"package-0": 1500.0 if method == "vanilla" else 2500.0, "gpu": 0.0},
        },
        "protocol": {"train": "1,257 images, random crop", "test": "540 images, each once"},
    }  # fmt: skip
    environment = {
        "versions": {"python": "3.12.3", "torch": "2.8.0"},
        "data": {"digits": {"train": "sha256 1f3c9a", "test": "sha256 77d02e"}},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "environment.json").write_text(json.dumps(environment))
    return folder


def write_pair(root: Path, task: str = "finetune", treated: str = "tract") -> list[Path]:
    """Write three seeds of vanilla and of a treated method; return the six folders."""
    return [
        write_run(root, method, task, seed, {"top1": value, "loss": 1 - value})
        for method, values in (("vanilla", VANILLA), (treated, TRACT))
        for seed, value in values.items()
    ]


def write_detections(folder: Path, name: str = "street.png", label: str = "car") -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "street.png")
    boxes = {"boxes": [[4, 4, 30, 30], [1, 1, 9, 9]], "labels": [label, "unsure"]}
    truth = {"scores": [0.9, 0.1], "truth_boxes": [[5, 5, 31, 31]], "truth_labels": [label]}
    (folder / "detections.json").write_text(json.dumps([{"image": name, **boxes, **truth}]))


def write_filters(folder: Path) -> None:
    save_file({"conv1.weight": torch.randn(70, 3, 3, 3)}, folder / "model.safetensors")
    (folder / "model.json").write_text(json.dumps({"first_layers": ["conv1"]}))


def edit_json(path: Path, **changes: object) -> None:
    """Change top-level keys of a JSON file; None removes a key."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def load_runs(paths: Sequence[Path]) -> list[Run]:
    """Read the runs that `paths` are, plan or contain."""
    return read_runs(find_runs(paths))


def write_report(paths: Sequence[Path], path: Path, *, title: str | None = None) -> Path:
    """Write the report of the runs that `paths` are, plan or contain; return its path."""
    save_report(read_report(paths, None, title), path)
    return path


def render(paths: Sequence[Path] | Report) -> dict[str, str]:
    """Return suffix -> text of a report in every format; the page as a reader sees it."""
    report = paths if isinstance(paths, Report) else read_report(paths)
    texts = {suffix: write(report) for suffix, write in FORMATS.items()}
    return {**texts, ".html": visible_text(texts[".html"])}


def page_text(paths: Sequence[Path]) -> str:
    """Return what a reader sees of the page."""
    return visible_text(FORMATS[".html"](read_report(paths)))


def visible_text(html: str) -> str:
    """Return the text of a page, without its style sheet; spaces are plain."""
    parts: list[str] = []
    parser = HTMLParser()
    parser.handle_data = parts.append  # type: ignore[method-assign]
    parser.feed(re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL))
    return " ".join(" ".join(parts).split())
