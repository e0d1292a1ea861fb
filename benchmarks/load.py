"""Measure time and memory of large data sets and long runs, in separate processes.

rows        1,000,000 tiny images in parquet: seconds from process start to the first log line (a
            dry run builds the index of `datasets` first), and growth of memory
iterations  10,000 iterations with log lines, checkpoints and evaluations: growth of memory
images      100,000 evaluated images of 30 detections each: peak memory, and that of half as many
classes     a detector with 1,000 classes: built, trained for 3 steps, evaluated

Trainings run tools/train_net.py. Growth of memory is Pss_Anon (see memory.py) at the end of the run
over that at a tenth of it: medians over the last twentieth and over a twentieth around the tenth.

    OMP_NUM_THREADS=1 python benchmarks/load.py [--cases rows iterations images classes] [--scale 1]
"""

import argparse
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memory import anonymous_kib

TRAIN = Path(__file__).parents[1] / "tools" / "train_net.py"
DETECTIONS, NUM_CLASSES = 30, 20
MANY_CLASSES = 1_000
CLASSIFICATION = """
task: classification
output_dir: {folder}/run
model: {{backbone: {{name: cifar/resnet18, args: {{width: 4}}}}}}
data:
  train: {{source: huggingface, path: {folder}/train.parquet, split: train}}
  test: {{source: huggingface, path: {folder}/test.parquet, split: test}}
  transforms: {{size_px: 8, crop: pad, pad_px: 1, flip_prob: 0.5}}
  batch_size: 16
  num_workers: 0
solver: {{optimizer: sgd, lr: 0.01, max_iters: {iters}}}
evaluation: {{every_iters: {often}}}
engine: {{device: cpu, log: {{every_iters: 10}}, checkpoint: {{every_iters: {often}}}}}
"""
DETECTION = """
task: detection
output_dir: {folder}/run
model:
  backbone: {{name: cifar/resnet18, args: {{width: 8}}}}
  detector:
    name: torchvision_fpn
    args: {{short_side_px: 96, max_side_px: 96, num_levels: 2, fpn_channels: 32, head_dim: 256}}
data:
  train: {{source: coco, images: {folder}, annotations: {folder}/train.json}}
  test: {{source: coco, images: {folder}, annotations: {folder}/test.json}}
  transforms: {{short_sides_px: [96], max_side_px: 96}}
  batch_size: 4
  num_workers: 0
solver: {{optimizer: sgd, lr: 1e-3, max_iters: 3}}
evaluation: {{protocol: coco, metric: ap}}
engine: {{device: cpu}}
"""


def write_rows(path: Path, rows: int, *, size_px: int = 8, use_dictionary: bool = True) -> None:
    """Write `rows` images of ten classes in row groups of 1000, repeating the same 1000 images."""
    import datasets
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    random, shape = np.random.default_rng(len(path.name)), (size_px, size_px, 3)
    images = []
    for _ in range(1000):
        stream = io.BytesIO()
        Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)).save(stream, "png")
        images.append({"bytes": stream.getvalue(), "path": None})
    names = [str(number) for number in range(10)]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
    )
    schema = features.arrow_schema
    with pq.ParquetWriter(path, schema, use_dictionary=use_dictionary) as writer:
        for first in range(0, rows, 1000):
            count = min(1000, rows - first)
            labels = [number % 10 for number in range(count)]
            columns = {"image": images[:count], "label": labels}
            writer.write_table(pa.table(columns, schema=schema))


def watch(config: Path, folder: Path) -> tuple[float, list[tuple[int, int]]]:
    """Run a config; return seconds to the first log line, and samples of (iteration, KiB)."""
    command = [sys.executable, str(TRAIN), "--config-file", str(config)]
    started, first, samples = time.perf_counter(), 0.0, []
    metrics = folder / "run/metrics.jsonl"
    log = (folder / "log.txt").open("w")
    with log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        while process.poll() is None:
            time.sleep(0.05)
            lines = metrics.read_text().splitlines() if metrics.exists() else []
            if not lines:
                continue
            first = first or time.perf_counter() - started
            iteration = max(json.loads(line)["iteration"] for line in lines[-2:-1] or lines)
            samples.append((iteration, anonymous_kib(process.pid)))
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: {(folder / 'log.txt').read_text()}")
    return first, samples


def growth(samples: list[tuple[int, int]], iters: int) -> str:
    """Describe memory at a tenth and at the end of the iterations, and its growth."""

    def at(low: float, high: float) -> float:
        return statistics.median(
            kib for i, kib in samples if low * iters <= i < high * iters and kib
        )

    early, late = at(0.075, 0.125), at(0.95, 1.0)
    return f"memory {early / 1024:.1f} -> {late / 1024:.1f} MiB, {100 * (late / early - 1):+.2f} %"


def train(folder: Path, rows: int, iters: int, often: int) -> str:
    """Train on `rows` images for `iters` iterations; return the line to print."""
    write_rows(folder / "train.parquet", rows)
    write_rows(folder / "test.parquet", 500)
    config = folder / "config.yaml"
    config.write_text(CLASSIFICATION.format(folder=folder, iters=iters, often=often))
    command = [sys.executable, str(TRAIN), "--config-file", str(config)]
    started = time.perf_counter()
    subprocess.run([*command, "--dry-run"], check=True, capture_output=True)
    index = time.perf_counter() - started
    first, samples = watch(config, folder)
    return (
        f"indexing {index:.1f} s, then {first:.1f} s to iteration 10; {growth(samples, iters)} "
        f"({len(samples)} samples)"
    )


def rows(folder: Path, scale: float) -> str:
    """Train on many rows."""
    return train(folder, int(1_000_000 * scale), 2_000, 10_000)


def iterations(folder: Path, scale: float) -> str:
    """Train for many iterations."""
    iters = int(10_000 * scale)
    return train(folder, 5_000, iters, max(1, iters // 20))


def images(folder: Path, scale: float) -> str:
    """Evaluate many images, each number of them in a separate process."""
    texts = []
    for count in (int(50_000 * scale), int(100_000 * scale)):
        command = [sys.executable, __file__, "--evaluate", str(count)]
        process = subprocess.run(command, check=True, capture_output=True, text=True)
        texts.append(process.stdout.strip())
    return "; ".join(texts)


def evaluate(count: int) -> str:
    """Evaluate `count` images with random boxes."""
    import torch

    from tract_transfer.evaluation import VocEvaluator

    generator = torch.Generator().manual_seed(0)

    def boxes(number: int) -> "torch.Tensor":
        corners = torch.rand(number, 2, generator=generator) * 800
        return torch.cat(
            [corners, corners + 20 + torch.rand(number, 2, generator=generator) * 300], 1
        )

    def labels(number: int) -> "torch.Tensor":
        return torch.randint(NUM_CLASSES, (number,), generator=generator)

    evaluator = VocEvaluator([f"class{k}" for k in range(NUM_CLASSES)])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    for image_id in range(count):
        scores = torch.rand(DETECTIONS, generator=generator)
        detections = {"boxes": boxes(DETECTIONS), "scores": scores, "labels": labels(DETECTIONS)}
        difficult = torch.zeros(3, dtype=torch.bool)
        truth: dict[str, Any] = {"boxes": boxes(3), "labels": labels(3), "difficult": difficult}
        evaluator.update([detections], [{**truth, "image_id": image_id}])
    collected = time.perf_counter() - started
    evaluator.compute()
    seconds = time.perf_counter() - started - collected
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    bytes_per_detection = peak * 2**20 / (count * DETECTIONS)
    return (
        f"{count} images: {peak:.0f} MiB added, {bytes_per_detection:.0f} bytes per detection, "
        f"collected in {collected:.0f} s, computed in {seconds:.1f} s"
    )


def classes(folder: Path, scale: float) -> str:
    """Train and evaluate a detector with many classes."""
    import numpy as np
    from PIL import Image

    many = int(MANY_CLASSES * scale)
    random = np.random.default_rng(0)
    categories = [{"id": number, "name": f"class {number}"} for number in range(many)]
    for split, count in (("train", 12), ("test", 8)):
        entries: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": []}
        for number in range(count):
            name = f"{split}{number}.png"
            pixels = random.integers(0, 256, (96, 96, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name)
            entries["images"].append({"id": number, "file_name": name, "height": 96, "width": 96})
            for _ in range(5):
                box = [int(corner) for corner in random.integers(0, 40, 2)] + [30, 40]
                annotation = {"id": len(entries["annotations"]), "image_id": number, "bbox": box}
                annotation["category_id"] = int(random.integers(many))
                entries["annotations"].append(annotation)
        content = {**entries, "categories": categories}
        (folder / f"{split}.json").write_text(json.dumps(content))
    config = folder / "config.yaml"
    config.write_text(DETECTION.format(folder=folder))
    command = [sys.executable, str(TRAIN), "--config-file", str(config)]
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    seconds = time.perf_counter() - started
    results = json.loads((folder / "run/results.json").read_text())
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return (
        f"{len(results['details']['class_names'])} classes in {seconds:.1f} s "
        f"({results['train_seconds'] / 3:.2f} s per step), peak {peak:.0f} MiB, "
        f"ap {results['metrics']['ap']:.4f}"
    )


CASES: dict[str, Callable[[Path, float], str]] = {
    "rows": rows,
    "iterations": iterations,
    "images": images,
    "classes": classes,
}


def main() -> None:
    """Measure the selected cases."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--scale", type=float, default=1.0, help="fraction of the load, for tests")
    parser.add_argument("--evaluate", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.evaluate:
        print(evaluate(arguments.evaluate))
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name in arguments.cases:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["HF_DATASETS_CACHE"] = f"{folder}/cache"
            print(f"{name:<10}  {CASES[name](Path(folder), arguments.scale)}", flush=True)


if __name__ == "__main__":
    main()
