"""Measures the time and size of a report of many long runs.

It fabricates 200 run folders (5 tasks x 4 methods x 10 seeds), each with 1,000 logged points, 20
evaluations, 100 classes and a first layer; one seed also has detections on eight images:

    python benchmarks/report.py
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from tract_transfer.report.content import read_report
from tract_transfer.report.write import FORMATS, save_report

METHODS = ("vanilla", "tract", "tract-0.05", "tract-0.2")
TASKS = ("pretrain", "cifar100", "flowers102", "stanford_cars", "voc")
SEEDS, POINTS, EVERY, CLASSES = 10, 1_000, 50, 100


def write_run(folder: Path, method: str, task: str, seed: int) -> None:
    """Write one fabricated finished run."""
    random = np.random.default_rng([METHODS.index(method), TASKS.index(task), seed])
    folder.mkdir(parents=True)
    end = 0.6 + 0.02 * METHODS.index(method) + 0.01 * float(random.normal())
    lines = []
    for point in range(1, POINTS + 1):
        at = {"iteration": 10 * point, "epoch": point / 10}
        loss = 4 * 0.997**point + 0.1 * float(random.random())
        speeds = {"lr": 0.1, "images_per_second": 2000.0, "data_fraction": 0.01}
        lines.append({**at, "split": "train", "loss": loss, "loss_cls": loss, **speeds})
        if point % EVERY == 0:
            top1 = end * (1 - 0.99**point) + 0.003 * float(random.normal())
            lines.append({**at, "split": "test", "top1": top1, "loss": loss})
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    per_class = {f"class {k:03d}": float(end + 0.1 * random.normal()) for k in range(CLASSES)}
    protocol = {"train": "made up: 10,000 images", "test": "made up: 2,000 images"}
    results = {
        "format": 1, "task": "classification", "name": task, "method": method, "seed": seed,
        "role": "pretrain" if task == "pretrain" else "downstream", "primary_metric": "top1",
        "metrics": {"top1": end, "top5": end + 0.2, "mean_per_class": end - 0.01, "loss": 1.5},
        "details": {"per_class": per_class}, "iterations": 10 * POINTS, "epochs": POINTS / 10,
        "train_seconds": 100.0 + seed, "images_per_second": 2000.0, "protocol": protocol,
        "cost": {"peak_memory_bytes": {"process": 2**30}, "energy_joules": None},
    }  # fmt: skip
    solver = {f"option_{i}": i for i in range(30)}
    (folder / "config.yaml").write_text(json.dumps({"seed": seed, "solver": solver}))
    (folder / "environment.json").write_text(json.dumps({"versions": {"torch": "2.8"}}))
    (folder / "model.json").write_text(json.dumps({"first_layers": ["conv1"]}))
    save_file({"conv1.weight": torch.randn(64, 3, 7, 7)}, folder / "model.safetensors")
    entries = []
    for i in range(8 if seed == 0 else 0):
        image = random.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        picture = Image.fromarray(image).resize((800, 600), Image.Resampling.BICUBIC)
        picture.save(folder / f"{i}.png")
        boxes = {"boxes": [[50, 60, 300, 400]] * 3, "truth_boxes": [[60, 60, 310, 400]]}
        labels = {"scores": [0.9, 0.5, 0.4], "labels": ["cat", "dog", "cow"]}
        entries.append({"image": f"{i}.png", **boxes, **labels})
    if entries:
        (folder / "detections.json").write_text(json.dumps(entries))
    (folder / "results.json").write_text(json.dumps(results))


def main() -> None:
    """Write the runs and every format of their report; print times and sizes."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        for task in TASKS:
            for method in METHODS:
                for seed in range(SEEDS):
                    write_run(folder / "runs" / method / task / f"seed{seed}", method, task, seed)
        started = time.perf_counter()
        report = read_report([folder / "runs"])
        print(f"{len(report.runs)} runs read and compared in {time.perf_counter() - started:.1f} s")
        for suffix in FORMATS:
            path = folder / f"report{suffix}"
            started = time.perf_counter()
            save_report(report, path)
            seconds, size = time.perf_counter() - started, path.stat().st_size / 1e6
            print(f"{suffix}: {seconds:.1f} s, {size:.2f} MB")


if __name__ == "__main__":
    main()
