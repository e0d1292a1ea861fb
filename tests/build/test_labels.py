"""Labels that cannot be used are refused before a run writes anything."""

import datasets
import pytest
from stream_rows import huggingface, write_splits

from tract_transfer.run.run import run


@pytest.fixture
def pets(tmp_path, offline_cache):
    """Write train and test images with these labels; return the overrides."""

    def write(train, test, feature=None):
        (tmp_path / "pets").mkdir()
        feature = feature or datasets.ClassLabel(names=["cat", "dog"])
        path = write_splits(tmp_path / "pets", train, test, feature=feature)
        transforms = "data.transforms={size_px: 16, crop_ratio: 1.0}"
        return huggingface(path, "data.batch_size=4", transforms, label_column="label")

    return write


INTEGER = datasets.Value("int64")
LABELS = {
    "one class in train": ([0] * 8, [0, 1] * 4, None,
        ["data.train: its 8 images show only the class ['cat']", "two classes or more"]),
    "one class at all": ([1] * 8, [1] * 4, INTEGER, ["show only the class ['1']", "needs two"]),
    "one name": ([0] * 8, [0] * 4, datasets.ClassLabel(names=["cat"]), ["has one class, ['cat']"]),
    "no row": ([], [0, 1], None, ["data.train"]),
    "no row in test": ([0, 1] * 4, [], None, ["data.test"]),
    "unlabelled": ([0, 1] * 4, [-1] * 4, None, ["row 0: label -1", "data.test.split to another"]),
    "negative": ([0, 1, -7, 1] * 2, [0, 1], INTEGER, ["row 2: label -7", "must be in 0..1"]),
    "ids": ([900, 17, 44012, 5] * 2, [17, 5], INTEGER, ["would have no image", "Number them 0, 1"]),
}  # fmt: skip


@pytest.mark.parametrize("task", ["classification", "probe"])
@pytest.mark.parametrize("name", LABELS)
def test_bad_labels_are_refused(name, task, tmp_path, load_tiny, pets):
    train, test, feature, expected = LABELS[name]
    words = pets(train, test, feature)
    if task == "probe":
        words += ["data.transforms={size_px: 16}", "evaluation.knn.ks=[1]"]
    with pytest.raises(ValueError) as caught:
        run(load_tiny(tmp_path, *words, task=task))
    message = str(caught.value)
    assert [part for part in expected if part not in message] == [], message
    assert not (tmp_path / "run").exists()


def test_labels_from_1_have_an_unused_class_0(tmp_path, load_tiny, pets, caplog):
    words = pets([1, 2, 3] * 4, [1, 2, 3], INTEGER)
    results = run(load_tiny(tmp_path, *words, "solver.max_iters=1"))
    assert results["details"]["class_names"] == ["0", "1", "2", "3"]
    assert "train has no example of 1 of 4 classes: 0" in caplog.text
