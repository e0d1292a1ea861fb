"""What makes data in a folder that cannot be used, and returns the overrides that lead to it."""

import datasets
import numpy as np
from PIL import Image

NAMES = ["cat", "dog", "eel"]


def picture(value):
    return Image.fromarray(np.full((16, 16, 3), value, dtype=np.uint8))


def write_folder(folder, classes=NAMES, count=12):
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            picture(40 * number + index).save(folder / name / f"{index}.png")


def write_parquet(folder, count=40, **columns):
    """Write train.parquet and test.parquet of the columns given, each name -> (feature, cells)."""
    folder.mkdir(exist_ok=True)
    given = {
        "image": (datasets.Image(), [picture(index) for index in range(count)]),
        "label": (datasets.ClassLabel(names=NAMES), [index % 3 for index in range(count)]),
        **columns,
    }
    given = {name: column for name, column in given.items() if column is not None}
    features = datasets.Features({name: feature for name, (feature, _) in given.items()})
    cells = {name: cells for name, (_, cells) in given.items()}
    for split in ("train", "test"):
        rows = datasets.Dataset.from_dict(cells, features=features)
        rows = rows if split == "train" else rows.select(range(count - 1))  # other data
        rows.to_parquet(folder / f"{split}.parquet")


def from_files(path, *more):
    """Overrides that read both splits from one folder."""
    sources = [
        f"data.{split}={{source: huggingface, path: {path}, split: {split}}}"
        for split in ("train", "test")
    ]
    return [*sources, "data.batch_size=8", *more]


def no_path(folder):
    return from_files(folder / "nowhere")


def no_image_column(folder):
    write_parquet(folder / "pets", image=None, text=(datasets.Value("string"), ["x"] * 40))
    return from_files(folder / "pets")


def no_label_column(folder):
    write_parquet(folder / "pets", label=None)
    return from_files(folder / "pets")


def wrong_label_column(folder):
    write_parquet(folder / "pets")
    columns = [f"data.{split}.label_column=labell" for split in ("train", "test")]
    return from_files(folder / "pets", *columns)


def string_labels(folder):
    write_parquet(folder / "pets", label=(datasets.Value("string"), ["cat", "dog"] * 20))
    columns = [f"data.{split}.label_column=label" for split in ("train", "test")]
    return from_files(folder / "pets", *columns)


def unlabelled(folder):
    labels = [-1] * 40
    write_parquet(folder / "pets", label=(datasets.ClassLabel(names=NAMES), labels))
    return from_files(folder / "pets")


def no_split(folder):
    write_parquet(folder / "pets")
    return from_files(folder / "pets", "data.test.split=tset")


def class_missing_in_test(folder):
    write_folder(folder / "train")
    write_folder(folder / "test", ["cat", "eel"])
    return from_files(
        folder, f"data.train.path={folder / 'train'}", f"data.test.path={folder / 'test'}"
    )


def empty_folder(folder):
    (folder / "pets").mkdir()
    return from_files(folder / "pets")
