"""Folders of images in the layouts that `describe_folder` knows, and in some that it does not."""

import json

import datasets
import numpy as np
from box_data import write_coco, write_rows, write_voc
from PIL import Image
from stream_rows import make_rows

BOX = [("dog", (4, 5, 14, 25)), ("cat", (30, 20, 40, 30))]


def draw(file, value, side=16):
    """Write an image whose class can be learned: its brightness."""
    file.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(value).integers(0, 60, (side, side, 3))
    Image.fromarray((noise + value % 3 * 60).astype(np.uint8)).save(file)
    return file


def classes(folder, count=12, names=("ant", "bee", "cow"), first=0):
    """Write <folder>/<class>/<number>.png, the classes in turn."""
    for number in range(first, first + count):
        draw(folder / names[number % len(names)] / f"{number}.png", number)
    return folder


def split_classes(folder, **counts):
    """Write <folder>/<split>/<class>/<number>.png."""
    for place, (name, count) in enumerate(counts.items()):
        classes(folder / name, count, first=100 * place)
    return folder


def litter(folder):
    """Add what operating systems and notebooks leave behind."""
    for name in (".DS_Store", "ant/._0.png", "ant/Thumbs.db"):
        (folder / name).write_bytes(b"none")
    for name in (".ipynb_checkpoints/0.png", "__MACOSX/ant/0.png", "ant/.ipynb_checkpoints/0.png"):
        draw(folder / name, 0)
    return folder


def devkit(folder, splits=("train",), name="VOC2007"):
    """Write a devkit with three images in each split."""
    write_voc(folder, BOX)
    (folder / "VOC2007").rename(folder / name)
    for place, split in enumerate(splits):
        ids = [f"{split}{number}" for number in range(3)]
        for number, image_id in enumerate(ids):
            annotation = (folder / name / f"Annotations/{number}.xml").read_text()
            (folder / name / f"Annotations/{image_id}.xml").write_text(annotation)
            color = (60 * number, 9, 50 * place)
            Image.new("RGB", (40, 30), color).save(folder / name / f"JPEGImages/{image_id}.jpg")
        (folder / name / f"ImageSets/Main/{split}.txt").write_text("\n".join(ids))
    return folder


def coco_export(folder, *splits):
    """Write each split's images and its json in one folder; category 1 is a mere parent."""
    for place, split in enumerate(splits):
        (folder / split).mkdir(parents=True)
        write_coco(folder / "made", BOX, parent)
        for number, file in enumerate(sorted((folder / "made/images").iterdir())):
            Image.new("RGB", (40, 30), (60 * number, 9, 50 * place)).save(
                folder / split / file.name
            )
            file.unlink()
        (folder / "made/boxes.json").rename(folder / split / "_annotations.coco.json")
        (folder / "made/images").rmdir()
        (folder / "made").rmdir()
    return folder


def parent(tree):
    tree["categories"].append({"id": 1, "name": "pets", "supercategory": "none"})
    for category in tree["categories"][:2]:
        category["supercategory"] = "pets"


def coco(folder, *splits):
    """Write annotations/instances_<split>.json, and the images in <split>/."""
    (folder / "annotations").mkdir(parents=True)
    for split in splits:
        write_coco(folder / "made", BOX)
        (folder / "made/images").rename(folder / split)
        target = folder / f"annotations/instances_{split}.json"
        (folder / "made/boxes.json").rename(target)
        (folder / "made").rmdir()
    return folder


def parquet(folder, *splits):
    folder.mkdir(parents=True)
    for number, split in enumerate(splits):
        make_rows(12, first=100 * number).to_parquet(folder / f"{split}.parquet")
    return folder


def saved(folder, *splits):
    rows = {split: make_rows(12, first=100 * n) for n, split in enumerate(splits)}
    datasets.DatasetDict(rows).save_to_disk(folder)
    return folder


def metadata(folder, count=6):
    """Write images with metadata.jsonl, whose label is an integer."""
    lines = []
    for number in range(count):
        draw(folder / f"{number}.png", number)
        lines.append(json.dumps({"file_name": f"{number}.png", "label": number % 2}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def boxes(folder, objects=BOX):
    write_rows(folder, objects)
    return folder
