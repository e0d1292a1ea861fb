"""The built-in digits: complete splits, and scenes that depend on their arguments alone."""

import json

import numpy as np
import pytest
import torch

from tract_transfer.data.digits import (
    DIGIT_NAMES,
    load_digit_scenes,
    load_digits,
    write_digit_scenes,
)
from tract_transfer.data.voc import load_voc


def test_splits_are_complete_disjoint_and_stratified():
    train, test = load_digits("train"), load_digits("test")
    assert (len(train), len(test)) == (1442, 355)
    shares = np.bincount(test.labels) / (np.bincount(train.labels) + np.bincount(test.labels))
    assert ((shares > 0.19) & (shares <= 0.2)).all()
    image = train.image(0)
    assert (image.dtype, image.shape) == (torch.uint8, (3, 32, 32))
    assert image.max() > 200
    assert image.min() == 0
    assert train.fingerprint() != test.fingerprint()


def test_chosen_digits_are_relabelled_in_order():
    chosen = load_digits("test", classes=[7, 2])
    assert chosen.class_names == ["seven", "two"]
    full = load_digits("test")
    of_item = {full.item(i): full.target(i) for i in range(len(full))}
    assert [(7, 2)[label] for label in chosen.labels] == [
        of_item[chosen.item(i)] for i in range(len(chosen))
    ]
    assert len(chosen) == sum(digit in (7, 2) for digit in of_item.values())


def tree(root):
    return {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_scenes_are_a_valid_devkit_and_a_function_of_the_arguments(tmp_path):
    root = write_digit_scenes(tmp_path / "deep/scenes", seed=1, num_train=12, num_test=5)
    train = load_voc(root, ["2007/train"], classes=DIGIT_NAMES)
    test = load_voc(root, ["2007/test"], classes=DIGIT_NAMES)
    assert (len(train), len(test)) == (12, 5)
    assert {train.image(index).shape for index in range(12)} == {(3, 128, 128)}
    counts = np.diff(train.objects.first)
    assert 1 <= counts.min() <= counts.max() <= 4
    heights = train.objects.boxes[:, 3] - train.objects.boxes[:, 1]
    assert 14 <= heights.min() <= heights.max() <= 54
    again = write_digit_scenes(tmp_path / "again", seed=1, num_train=12, num_test=5)
    assert tree(again) == tree(root)
    other = write_digit_scenes(tmp_path / "other", seed=2, num_train=12, num_test=5)
    assert tree(other) != tree(root)


def test_scenes_are_reused(tmp_path):
    arguments = {"num_train": 2, "num_test": 1, "size_px": 64}
    root = write_digit_scenes(tmp_path / "s", **arguments)
    stamp = root / "digit_scenes.json"
    written, before = json.loads(stamp.read_text()), stamp.stat()
    dataset = load_digit_scenes("train", root, **arguments)
    assert dataset.fingerprint() == load_voc(root, ["2007/train"], DIGIT_NAMES).fingerprint()
    assert written.items() >= arguments.items()
    assert stamp.stat().st_mtime_ns == before.st_mtime_ns


def test_an_interrupted_call_leaves_no_files(tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("tract_transfer.data.digits._annotation", fail)
    with pytest.raises(KeyboardInterrupt):
        write_digit_scenes(tmp_path / "s", num_train=2, num_test=1)
    assert list(tmp_path.iterdir()) == []
