"""With its own protocol, our VOC evaluator computes detectron2's numbers."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from random_detections import NAMES, images, rows

from tract_transfer.data.voc import load_voc
from tract_transfer.evaluation import PROTOCOLS, VocEvaluator
from tract_transfer.evaluation.voc import COCO_IOUS, voc_ap

theirs = pytest.importorskip("detectron2.evaluation.pascal_voc_evaluation")
SAMPLES = Path(__file__).parents[3] / "shared/data/voc/VOCdevkit/VOC2007"
UNROUNDED = replace(PROTOCOLS["detectron2"], name="unrounded", round_scores=None, round_boxes=None)
OBJECT = (
    "<object><name>{}</name><pose>x</pose><truncated>0</truncated><difficult>{:d}</difficult>"
    "<bndbox><xmin>{:.0f}</xmin><ymin>{:.0f}</ymin><xmax>{:.0f}</xmax><ymax>{:.0f}</ymax></bndbox>"
    "</object>"
)


def write_devkit(root, made):
    """Write the objects of `made` as a devkit: 1-based boxes with inclusive ends."""
    (root / "Annotations").mkdir()
    (root / "ImageSets/Main").mkdir(parents=True)
    ids = [f"{truth['image_id']:06d}" for _, truth in made]
    for name, (_, truth) in zip(ids, made, strict=True):
        columns = truth["labels"], truth["difficult"], truth["boxes"] + torch.tensor([1, 1, 0, 0])
        objects = [OBJECT.format(NAMES[k], d, *box) for k, d, box in zip(*columns, strict=True)]
        text = f"<annotation>{''.join(objects)}</annotation>"
        (root / f"Annotations/{name}.xml").write_text(text)
    (root / "ImageSets/Main/val.txt").write_text("\n".join(ids))


def blurred(made, seed=0):
    """Add noise to coordinates and scores; many scores are equal when rounded to 3 decimals."""
    generator = torch.Generator().manual_seed(seed)
    for detections, truth in made:
        n = len(detections["scores"])
        boxes = detections["boxes"] + 0.3 * torch.randn(n, 4, generator=generator)
        scores = detections["scores"] * 0.05 + 0.01 * torch.rand(n, generator=generator)
        yield {**detections, "boxes": boxes, "scores": scores}, truth


def by_detectron2(root, made, class_names, name_of):
    """Its evaluator from outputs to numbers, through its text files and rounding."""
    from detectron2.data import MetadataCatalog
    from detectron2.structures import Boxes, Instances

    meta = MetadataCatalog.get(f"tract_transfer {root}")
    meta.set(dirname=str(root), split="val", year=2007, thing_classes=list(class_names))
    evaluator = theirs.PascalVOCDetectionEvaluator(meta.name)
    evaluator.reset()
    for detections, truth in made:
        output = Instances((500, 500), pred_boxes=Boxes(detections["boxes"]))
        output.scores, output.pred_classes = detections["scores"], detections["labels"]
        evaluator.process([{"image_id": name_of(truth)}], [{"instances": output}])
    return {name.lower(): value / 100 for name, value in evaluator.evaluate()["bbox"].items()}


def ours(made, class_names, protocol):
    evaluator = VocEvaluator(class_names, protocol)
    evaluator.update([detections for detections, _ in made], [truth for _, truth in made])
    return evaluator.compute()


@pytest.mark.parametrize("seed", range(3))
def test_rounded_random_detections_score_the_same(tmp_path, seed):
    made = sorted(blurred(images(60, seed)), key=lambda pair: pair[1]["image_id"])
    write_devkit(tmp_path, made)
    expected = by_detectron2(tmp_path, made, NAMES, lambda t: f"{t['image_id']:06d}")
    metrics = ours(made, NAMES, "detectron2")
    assert metrics == pytest.approx(expected, abs=1e-9)
    assert metrics != pytest.approx(ours(made, NAMES, "voc2007_devkit"), abs=1e-3)


@pytest.mark.parametrize("method", ["11point_float", "area"])
def test_unrounded_random_detections_score_the_same(tmp_path, method):
    made = list(blurred(images(60)))
    write_devkit(tmp_path, made)
    detections, objects = rows(made)
    for label, name in enumerate(NAMES):
        of_label = detections.labels == label
        boxes = detections.boxes_xyxy[of_label].astype(float) + np.array([1, 1, 0, 0])
        scores = detections.scores[of_label].astype(float)
        columns = detections.image_ids[of_label], scores, boxes
        lines = [
            " ".join([f"{i:06d}", *map(repr, [score, *box])])
            for i, score, box in zip(*(column.tolist() for column in columns), strict=True)
        ]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    result = voc_ap(detections, objects, NAMES, replace(UNROUNDED, method=method), COCO_IOUS)
    for label, name in enumerate(NAMES[:3]):
        for t, iou in enumerate(COCO_IOUS):
            files = ("{}.txt", "Annotations/{}.xml", "ImageSets/Main/val.txt")
            paths = [str(tmp_path / file) for file in files]
            _, _, ap = theirs.voc_eval(*paths, name, iou, use_07_metric=method != "area")
            assert result.ap[label, t] == pytest.approx(ap, abs=1e-12)


@pytest.mark.parametrize("rounded", [True, False])
def test_detections_on_real_images_score_the_same(rounded, tmp_path):
    if not SAMPLES.is_dir():
        pytest.skip("no ../shared/data")
    dataset = load_voc(SAMPLES.parents[1], ["2007/val"])
    generator = torch.Generator().manual_seed(0)
    made = [(near(dataset.target(i), generator, rounded), dataset.target(i)) for i in range(100)]
    (tmp_path / "ImageSets/Main").mkdir(parents=True)
    (tmp_path / "Annotations").symlink_to(SAMPLES / "Annotations")
    names = [Path(dataset.item(i)).stem for i in range(100)]
    (tmp_path / "ImageSets/Main/val.txt").write_text("\n".join(names))
    expected = by_detectron2(tmp_path, made, dataset.class_names, lambda t: names[t["image_id"]])
    metrics = ours(made, dataset.class_names, "detectron2" if rounded else UNROUNDED)
    assert metrics == pytest.approx(expected, abs=1e-9)
    assert 0.2 < metrics["ap50"] < 0.9


def near(target, generator, rounded):
    """Detections around the objects of an image; some are far off, some of another class.

    Without `rounded`, rounding does not change boxes and scores.
    """
    n = 6 * len(target["labels"])
    boxes, labels = target["boxes"].repeat(6, 1), target["labels"].repeat(6)
    noise = torch.tensor([0.02, 0.02, 0.1, 0.1, 0.2, 0.2]).repeat_interleave(n // 6)[:, None]
    sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    boxes = boxes + noise * sides * torch.randn(n, 4, generator=generator)
    other = torch.randint(0, 20, (n,), generator=generator)
    labels = torch.where(torch.rand(n, generator=generator) < 0.2, other, labels)
    scores = torch.rand(n, generator=generator) ** 3
    if not rounded:
        boxes, scores = boxes.round(), ((1000 * scores).round() / 1000).double()
    return {"boxes": boxes, "scores": scores, "labels": labels}
