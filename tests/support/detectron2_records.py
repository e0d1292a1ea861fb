"""Four images with one object each, registered in detectron2's catalogs."""

import copy
import warnings
from contextlib import contextmanager

import pytest
import torch
from PIL import Image

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("detectron2")
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.structures import BoxMode

NAME = "tract_transfer_test"


@contextmanager
def registered(folder):
    """Write the images, register their records as NAME and yield them."""
    generator = torch.Generator().manual_seed(0)
    records = []
    for number in range(4):
        file = folder / f"{number}.png"
        pixels = torch.randint(256, (64, 96, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(file)
        annotation = {
            "bbox": [8 * number, 10, 40, 30],
            "bbox_mode": BoxMode.XYWH_ABS,
            "category_id": number % 2,
            "iscrowd": int(number == 3),
        }
        image = {"file_name": str(file), "image_id": f"picture {number}", "height": 64, "width": 96}
        records.append({**image, "annotations": [annotation]})
    DatasetCatalog.register(NAME, lambda: copy.deepcopy(records))
    MetadataCatalog.get(NAME).thing_classes = ["left", "right"]
    try:
        yield records
    finally:
        DatasetCatalog.remove(NAME)
        MetadataCatalog.remove(NAME)
