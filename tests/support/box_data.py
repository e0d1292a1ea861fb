"""The same small detection data in every format: three 40x30 images, the last one without objects.

A writer takes a folder and the first image's objects, (class, box xyxy pixels, 0-based and
exclusive), and returns the loader: `load(**arguments) -> DetectionDataset`.
"""

import json
from functools import partial
from io import BytesIO

import datasets
from PIL import Image

from tract_transfer.data.coco import load_coco
from tract_transfer.data.huggingface import load_huggingface_boxes
from tract_transfer.data.voc import load_voc

NAMES = ["cat", "dog"]
OTHERS = [[("dog", (0, 0, 40, 30))], []]
SIZE = "<size><width>40</width><height>30</height></size>"


def picture(value):
    return Image.new("RGB", (40, 30), (60 * value, 9, 9))


def voc_object(name, box):
    x1, y1, x2, y2 = box
    sides = {"xmin": x1 + 1, "ymin": y1 + 1, "xmax": x2, "ymax": y2}
    inside = "".join(f"<{side}>{value}</{side}>" for side, value in sides.items())
    return f"<object><name>{name}</name><bndbox>{inside}</bndbox></object>"


def write_voc(folder, objects):
    devkit = folder / "VOC2007"
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (devkit / name).mkdir(parents=True)
    for number, of_image in enumerate([objects, *OTHERS]):
        inside = "".join(voc_object(name, box) for name, box in of_image)
        text = f"<annotation>{SIZE}{inside}</annotation>"
        (devkit / f"Annotations/{number}.xml").write_text(text)
        picture(number).save(devkit / f"JPEGImages/{number}.jpg")
    (devkit / "ImageSets/Main/train.txt").write_text("0\n1\n2\n")
    return partial(load_voc, folder, sets=["2007/train"], classes=NAMES)


def xywh(box):
    return [box[0], box[1], box[2] - box[0], box[3] - box[1]]


def coco_tree(objects):
    """Return COCO's json of the data, with ids that are neither 0-based nor in order."""
    images = enumerate([objects, *OTHERS])
    rows = [(number, *entry) for number, of_image in images for entry in of_image]
    known = [*NAMES, "eel"]
    return {
        "images": [
            {"id": 30 - number, "file_name": f"{number}.png", "width": 40, "height": 30}
            for number in range(3)
        ],
        "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
        "annotations": [
            {
                "id": 100 + count,
                "image_id": 30 - number,
                "category_id": {"cat": 3, "dog": 7}.get(name, known.index(name)),
                "bbox": xywh(box),
                "iscrowd": 0,
            }
            for count, (number, name, box) in enumerate(rows)
        ],
    }


def write_coco(folder, objects, change=None):
    (folder / "images").mkdir(parents=True)
    for number in range(3):
        picture(number).save(folder / f"images/{number}.png")
    tree = coco_tree(objects)
    if change is not None:
        change(tree)
    (folder / "boxes.json").write_text(json.dumps(tree))
    return partial(load_coco, folder / "images", folder / "boxes.json")


def encoded(photo, exif):
    """A cell of a picture with EXIF."""
    buffer = BytesIO()
    photo.save(buffer, "PNG", exif=exif)
    return {"bytes": buffer.getvalue(), "path": None}


def write_rows(folder, objects, feature=None, key="bbox", box=xywh, more=None, first=None):
    """Write train.parquet; `feature` makes the feature of objects from those of their fields.

    `first` replaces the first picture and its EXIF.
    """
    fields = {"bbox": datasets.List(datasets.Value("float64"))}
    fields["category"] = datasets.ClassLabel(names=[*NAMES, "eel"])
    column = datasets.List(fields) if feature is None else feature(fields)
    known = [*NAMES, "eel"]
    cells = []
    for of_image in [objects, *OTHERS]:
        things = [{"bbox": box(b), "category": known.index(name)} for name, b in of_image]
        if not isinstance(column, datasets.List):
            things = {key: [thing[key] for thing in things] for key in ("bbox", "category")}
        cells.append(things)
    extra = more or {}
    features = {"image": datasets.Image(), "objects": column}
    features |= {name: datasets.Value("int64") for name in extra}
    pictures = [picture(number) for number in range(3)]
    if first is not None:
        pictures[0] = encoded(*first)
    rows = datasets.Dataset.from_dict(
        {"image": pictures, "objects": cells, **extra},
        features=datasets.Features(features),
    )
    folder.mkdir(parents=True, exist_ok=True)
    rows.to_parquet(folder / "train.parquet")
    return partial(
        load_huggingface_boxes, str(folder / "train.parquet"), "train", "xywh", classes=NAMES
    )


WRITERS = {"voc": write_voc, "coco": write_coco, "huggingface": write_rows}
# The name of the first image's objects in each format, numbered from 1.
PLACES = {
    "voc": "0.xml object {} ({})",
    "coco": "boxes.json annotations[{0}] id 10{0} ({1})",
    "huggingface": "train row 0 object {} ({})",
}


def place(source, number, name):
    """Return how an error names object `number` of the first image, from 1."""
    return PLACES[source].format(number - (source == "coco"), name)
