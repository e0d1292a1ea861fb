"""Small parquet shards of row groups, to be streamed."""

from itertools import islice

import datasets
import numpy as np
from PIL import Image

from tract_transfer.data.streaming import StreamOrder
from tract_transfer.data.transforms import classification_train

NAMES = ["cat", "dog", "eel"]
CROP = classification_train(8, "pad", 2, (0.08, 1.0), 0.5, "bilinear")


def make_rows(count, names=NAMES, first=0):
    pixels = [np.full((8, 8, 3), value % 256, np.uint8) for value in range(first, first + count)]
    feature = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
    features = datasets.Features({"image": datasets.Image(), "label": feature})
    columns = {
        "image": [Image.fromarray(each) for each in pixels],
        "label": [value % 3 for value in range(first, first + count)],
    }
    return datasets.Dataset.from_dict(columns, features=features)


def write_shards(folder, sizes=(23, 7, 40), rows_of_group=5, names=NAMES):
    """Parquet shards of row groups of five; return the folder."""
    first = 0
    for shard, size in enumerate(sizes):
        name = f"train-{shard:05d}-of-{len(sizes):05d}.parquet"
        make_rows(size, names, first).to_parquet(folder / name, batch_size=rows_of_group)
        first += size
    return str(folder)


def order_of(stream, batch_size=8, **options):
    options = {"shuffle_rows": 24, "readers": 4, **options}
    return StreamOrder(stream.groups.counts, batch_size, 3, **options)


def indices_of(batches, count):
    return [[one.sample.index for one in batch] for batch in islice(batches, count)]
