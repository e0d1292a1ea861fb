"""With its own protocol, our VOC evaluator computes detectron2's numbers."""

import pytest
import torch
from random_detections import NAMES, images

from tract_transfer.evaluation import VocEvaluator

theirs = pytest.importorskip("detectron2.evaluation.pascal_voc_evaluation")
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


def blurred(made):
    """Add noise to coordinates and scores; many scores are equal when rounded to 3 decimals."""
    generator = torch.Generator().manual_seed(0)
    for detections, truth in made:
        n = len(detections["scores"])
        boxes = detections["boxes"] + 0.3 * torch.randn(n, 4, generator=generator)
        scores = detections["scores"] * 0.05 + 0.01 * torch.rand(n, generator=generator)
        yield {**detections, "boxes": boxes, "scores": scores}, truth


def by_detectron2(root, made):
    """Its evaluator from outputs to numbers, through its text files and rounding."""
    from detectron2.data import MetadataCatalog
    from detectron2.structures import Boxes, Instances

    meta = MetadataCatalog.get(f"tract_transfer {root}")
    meta.set(dirname=str(root), split="val", year=2007, thing_classes=NAMES)
    evaluator = theirs.PascalVOCDetectionEvaluator(meta.name)
    evaluator.reset()
    for detections, truth in made:
        output = Instances((500, 500), pred_boxes=Boxes(detections["boxes"]))
        output.scores, output.pred_classes = detections["scores"], detections["labels"]
        evaluator.process([{"image_id": f"{truth['image_id']:06d}"}], [{"instances": output}])
    return {name.lower(): value / 100 for name, value in evaluator.evaluate()["bbox"].items()}


def ours(made, protocol):
    evaluator = VocEvaluator(NAMES, protocol)
    evaluator.update([detections for detections, _ in made], [truth for _, truth in made])
    return evaluator.compute()


@pytest.mark.parametrize("seed", range(3))
def test_random_detections_score_the_same(tmp_path, seed):
    made = sorted(blurred(images(60, seed)), key=lambda pair: pair[1]["image_id"])
    write_devkit(tmp_path, made)
    metrics = ours(made, "detectron2")
    assert metrics == pytest.approx(by_detectron2(tmp_path, made), abs=1e-9)
    assert metrics != pytest.approx(ours(made, "voc2007_devkit"), abs=1e-3)
