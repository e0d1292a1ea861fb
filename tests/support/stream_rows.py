"""Small rows of images and labels, saved in every format that Hugging Face data come in."""

from itertools import islice

import datasets
import numpy as np
from PIL import Image

from tract_transfer.data.streaming import StreamOrder
from tract_transfer.data.transforms import classification_train

NAMES = ["cat", "dog", "eel"]
CROP = classification_train(8, "pad", 2, (0.08, 1.0), 0.5, "bilinear")


def picture(value, side=8):
    return Image.fromarray(np.full((side, side, 3), value % 256, np.uint8))


def make_rows(labels, names=NAMES, first=0, feature=None, **columns):
    """Rows of images of the shades `first`, `first + 1`, ...

    Args:
        labels: a list, or how many rows of the labels 0, 1, 2, 0, ...
        feature: of the labels; by default ClassLabel, or int64 if `names` is None.
        columns: more columns, or other cells for these: name -> (feature, cells); None drops one.
    """
    count = labels if isinstance(labels, int) else len(labels)
    labels = [i % 3 for i in range(first, first + count)] if isinstance(labels, int) else labels
    feature = feature or (datasets.ClassLabel(names=names) if names else datasets.Value("int64"))
    given = {
        "image": (datasets.Image(), [picture(first + i) for i in range(count)]),
        "label": (feature, labels),
        **columns,
    }
    given = {name: column for name, column in given.items() if column is not None}
    features = datasets.Features({name: feature for name, (feature, _) in given.items()})
    return datasets.Dataset.from_dict(
        {name: c for name, (_, c) in given.items()}, features=features
    )


def write_splits(folder, train=12, test=9, **options):
    """Write train.parquet and test.parquet; return the folder's path."""
    for split, labels, first in (("train", train, 0), ("test", test, 100)):
        make_rows(labels, first=first, **options).to_parquet(folder / f"{split}.parquet")
    return str(folder)


def write_folders(folder, labels=(0, 0, 1, 2)):
    """Write images at <folder>/<class>/<number>.png; return the folder's path."""
    for number, label in enumerate(labels):
        path = folder / NAMES[label] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(path)
    return str(folder)


def write_shards(folder, sizes=(23, 7, 40), rows_of_group=5, names=NAMES):
    """Parquet shards of row groups of five; return the folder."""
    first = 0
    for shard, size in enumerate(sizes):
        name = f"train-{shard:05d}-of-{len(sizes):05d}.parquet"
        make_rows(size, names, first).to_parquet(folder / name, batch_size=rows_of_group)
        first += size
    return str(folder)


def huggingface(path, *more, label_column=None):
    """Overrides that read both splits from one path."""
    column = f", label_column: {label_column}" if label_column else ""
    splits = ("train", "test")
    sources = [f"{{source: huggingface, path: {path}, split: {s}{column}}}" for s in splits]
    return [*(f"data.{s}={source}" for s, source in zip(splits, sources, strict=True)), *more]


def order_of(stream, batch_size=8, **options):
    options = {"shuffle_rows": 24, "readers": 4, **options}
    return StreamOrder(stream.groups.counts, batch_size, 3, **options)


def indices_of(batches, count):
    return [[one.sample.index for one in batch] for batch in islice(batches, count)]
