"""Compare the time of our VOC evaluator with detectron2's, from detections to AP at ten IoUs.

As many images as the VOC 2007 test set (4,952), with 20 classes and three random objects and 30
random detections per image. Our evaluator uses the `detectron2` protocol, and both must agree. They
take turns, and the paired ratios are printed. detectron2 parses the XML annotations in the first
turn and caches them. Then prints the peak memory of our evaluator (tracemalloc) for these images
and for twice as many.

    python benchmarks/evaluator.py [--pairs 3] [--num-images 4952]
"""

import argparse
import statistics
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tract_transfer.evaluation import VocEvaluator

CLASSES = [f"class{k}" for k in range(20)]
OBJECTS, DETECTIONS = 3, 30
OBJECT = (
    "<object><name>{}</name><pose>x</pose><truncated>0</truncated><difficult>{:d}</difficult>"
    "<bndbox><xmin>{:.0f}</xmin><ymin>{:.0f}</ymin><xmax>{:.0f}</xmax><ymax>{:.0f}</ymax></bndbox>"
    "</object>"
)
Image = tuple[dict[str, Tensor], dict[str, Any]]


def random_images(count: int) -> list[Image]:
    """Make random objects, and detections that overlap them to any degree."""
    generator = torch.Generator().manual_seed(0)
    images = []
    for image_id in range(count):
        corners = torch.randint(0, 250, (OBJECTS, 2), generator=generator)
        sides = torch.randint(20, 250, (OBJECTS, 2), generator=generator)
        truth = torch.cat([corners, corners + sides], dim=1).float()
        labels = torch.randint(0, len(CLASSES), (OBJECTS,), generator=generator)
        owner = torch.randint(0, OBJECTS, (DETECTIONS,), generator=generator)
        noise = torch.randn(DETECTIONS, 4, generator=generator) * sides[owner].repeat(1, 2) * 0.15
        other = torch.randint(0, len(CLASSES), (DETECTIONS,), generator=generator)
        is_right = torch.rand(DETECTIONS, generator=generator) < 0.3
        detections = {
            "boxes": truth[owner] + noise,
            "scores": 0.05 + 0.95 * torch.rand(DETECTIONS, generator=generator) ** 4,
            "labels": torch.where(is_right, labels[owner], other),
        }
        difficult = torch.rand(OBJECTS, generator=generator) < 0.2
        target = {"boxes": truth, "labels": labels, "difficult": difficult, "image_id": image_id}
        images.append((detections, target))
    return images


def ours(images: list[Image]) -> dict[str, float]:
    """Evaluate with our evaluator, image by image."""
    evaluator = VocEvaluator(CLASSES, "detectron2")
    for detections, target in images:
        evaluator.update([detections], [target])
    return evaluator.compute()


def write_devkit(folder: Path, images: list[Image]) -> None:
    """Write the objects as a VOC devkit, which detectron2's evaluator reads."""
    (folder / "Annotations").mkdir()
    (folder / "ImageSets/Main").mkdir(parents=True)
    for _, target in images:
        columns = target["labels"], target["difficult"], target["boxes"]
        text = "".join(
            OBJECT.format(CLASSES[label], hard, x1 + 1, y1 + 1, x2, y2)
            for label, hard, (x1, y1, x2, y2) in zip(*columns, strict=True)
        )
        file = folder / f"Annotations/{target['image_id']:06d}.xml"
        file.write_text(f"<annotation>{text}</annotation>")
    ids = [f"{target['image_id']:06d}" for _, target in images]
    (folder / "ImageSets/Main/test.txt").write_text("\n".join(ids))


def theirs(images: list[Image], name: str) -> dict[str, float]:
    """Evaluate with detectron2's evaluator, image by image."""
    from detectron2.evaluation import PascalVOCDetectionEvaluator
    from detectron2.structures import Boxes, Instances

    evaluator = PascalVOCDetectionEvaluator(name)
    evaluator.reset()
    for detections, target in images:
        output = Instances((500, 500))
        output.pred_boxes = Boxes(detections["boxes"])
        output.scores, output.pred_classes = detections["scores"], detections["labels"]
        inputs = [{"image_id": f"{target['image_id']:06d}"}]
        evaluator.process(inputs, [{"instances": output}])
    return {metric.lower(): value / 100 for metric, value in evaluator.evaluate()["bbox"].items()}


def peak_mib(images: list[Image]) -> float:
    """Return the peak memory that our evaluator allocates, in MiB."""
    tracemalloc.start()
    ours(images)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 2**20


def compare(images: list[Image], pairs: int) -> None:
    """Time both in turns and print the ratios; stop if they disagree."""
    from detectron2.data import MetadataCatalog

    with tempfile.TemporaryDirectory() as folder:
        write_devkit(Path(folder), images)
        name = "tract_transfer_benchmark"
        MetadataCatalog.get(name).set(
            dirname=folder, split="test", year=2007, thing_classes=CLASSES
        )
        ratios = []
        for _ in range(pairs):
            seconds, metrics = [], []
            for evaluate in (lambda: ours(images), lambda: theirs(images, name)):
                started = time.perf_counter()
                metrics.append(evaluate())
                seconds.append(time.perf_counter() - started)
            apart = max(abs(metrics[0][metric] - metrics[1][metric]) for metric in metrics[0])
            if apart > 1e-6:
                raise SystemExit(f"The evaluators disagree: {metrics}")
            ratios.append(seconds[1] / seconds[0])
            print(
                f"ours {seconds[0]:.2f} s, detectron2 {seconds[1]:.2f} s, ratio {ratios[-1]:.1f}, "
                f"difference {apart:.0e}",
                flush=True,
            )
    print(f"median ratio {statistics.median(ratios):.1f} (min {min(ratios):.1f})")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--num-images", type=int, default=4952)
    arguments = parser.parse_args()
    images = random_images(arguments.num_images)
    try:
        import detectron2  # noqa: F401
    except ImportError:
        print("Comparison skipped: detectron2 is not installed. Install it from source.")
    else:
        compare(images, arguments.pairs)
    once, twice = peak_mib(images), peak_mib(random_images(2 * arguments.num_images))
    print(f"peak memory {once:.0f} MiB, for twice the images {twice:.0f} MiB ({twice / once:.2f})")


if __name__ == "__main__":
    main()
