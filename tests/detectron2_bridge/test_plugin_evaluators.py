"""Our evaluators in detectron2's own trainers."""

import warnings

import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("detectron2")
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.structures import Boxes, BoxMode, Instances
    from detectron2_records import NAME, registered

    from tract_transfer.detectron2.plugin import VocDatasetEvaluator


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    with registered(tmp_path_factory.mktemp("images")) as records:
        yield records


def outputs_of(records, shift=0.0):
    """Each object found, as detectron2's models put it out."""
    inputs, outputs = [], []
    for record in records:
        boxes = torch.tensor([each["bbox"] for each in record["annotations"]]).float()
        boxes[:, 2:] += boxes[:, :2]
        found = Instances((64, 96))
        found.pred_boxes = Boxes(boxes + shift)
        found.scores = torch.full((len(boxes),), 0.9)
        found.pred_classes = torch.tensor([e["category_id"] for e in record["annotations"]])
        inputs.append({"image_id": record["image_id"]})
        outputs.append({"instances": found})
    return inputs, outputs


@pytest.mark.parametrize("protocol", ["voc2007_devkit", "detectron2", "area", "coco"])
def test_what_is_found_counts_in_percent(dataset, protocol):
    evaluator = VocDatasetEvaluator(NAME, protocol)
    evaluator.process(*outputs_of(dataset))
    metrics = evaluator.evaluate()["bbox"]
    assert metrics["AP"] == metrics["AP50"] == metrics["AP50-left"] == pytest.approx(100)
    assert evaluator.details()["num_difficult"] == 1
    evaluator.reset()
    evaluator.process(*outputs_of(dataset, shift=30.0))
    assert evaluator.evaluate()["bbox"]["AP50"] == 0


def test_difficult_objects_of_a_voc_dataset_come_from_its_files(tmp_path):
    (tmp_path / "Annotations").mkdir()
    objects = "".join(
        f"<object><name>cat</name><difficult>{flag}</difficult></object>" for flag in (1, 0)
    )
    xml = tmp_path / "Annotations" / "000001.xml"
    xml.write_text(f"<annotation>{objects}</annotation>")
    box = {"bbox": [1, 2, 30, 40], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    name = f"{NAME}_voc"
    DatasetCatalog.register(name, lambda: [{"image_id": "000001", "annotations": [box, box]}])
    try:
        metadata = MetadataCatalog.get(name)
        metadata.set(thing_classes=["cat"], dirname=str(tmp_path), year=2007, split="test")
        assert VocDatasetEvaluator(name)._targets["000001"]["difficult"].tolist() == [True, False]
        xml.write_text("<annotation></annotation>")
        with pytest.raises(ValueError, match="0 objects and the registered dataset 2"):
            VocDatasetEvaluator(name)
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
