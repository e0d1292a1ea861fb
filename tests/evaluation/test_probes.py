from types import SimpleNamespace

import numpy as np
import pytest
import torch
from probe_rows import TEST, TRAIN

from tract_transfer.evaluation.probes import (
    Rows,
    accuracy,
    check_probe,
    extract_features,
    hold_out_selection,
    stratified_part,
)


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5])
def test_stratified_part_takes_the_share_of_every_class(fraction):
    labels = np.random.default_rng(0).choice(6, 500, p=[0.4, 0.3, 0.2, 0.07, 0.02, 0.01])
    part = stratified_part(labels, fraction, seed=0)
    sizes, taken = np.bincount(labels), np.bincount(labels[part], minlength=6)
    assert (np.abs(taken - sizes * fraction) < 1).all()
    assert abs(part.sum() - 500 * fraction) < 1
    np.testing.assert_array_equal(part, stratified_part(labels, fraction, seed=0))
    assert (part != stratified_part(labels, fraction, seed=1)).any()


def test_a_selection_is_train_in_two():
    fit, val = hold_out_selection(TRAIN, 0.25, seed=0)
    assert (len(fit.y), len(val.y)) == (150, 50)
    joined = np.concatenate([fit.x, val.x])
    assert sorted(map(tuple, joined)) == sorted(map(tuple, TRAIN.x))


def test_a_selection_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"in \(0, 1\)"):
        hold_out_selection(TRAIN, 1.0, seed=0)
    few = Rows(TRAIN.x[:3], TRAIN.y[:3])
    with pytest.raises(ValueError, match=r"2 classes to fit .* or set data\.val"):
        hold_out_selection(few, 0.9, seed=0)


def test_accuracy_is_the_share_of_hits():
    assert accuracy(np.eye(4)[[0, 1, 2, 3]], np.array([0, 1, 2, 0])) == 0.75


def test_what_no_probe_can_use_is_refused(refused):
    with refused(
        "labels beyond the classes (probe)", ValueError, match=r"must be in 0\.\.2, got 0\.\.3"
    ):
        check_probe(TRAIN, TEST.x, 3)
    with refused(
        "a probe whose training rows are of one class",
        ValueError,
        match="2 classes, and all 200 training rows are of class 1",
    ):
        check_probe(Rows(TRAIN.x, TRAIN.y * 0 + 1), TEST.x, 4)
    with refused("features of other widths", ValueError, match="of one D"):
        check_probe(TRAIN, TEST.x[:, :2], 4)
    with refused("fewer labels than features", ValueError, match="Need a label a training row"):
        check_probe(Rows(TRAIN.x, TRAIN.y[:5]), TEST.x, 4)
    broken = TEST.x.copy()
    broken[3, 1] = np.nan
    with refused(
        "features that are not finite",
        ValueError,
        match=r"1 of 80 test rows hold nan or inf \(images 3\)",
    ):
        check_probe(TRAIN, broken, 4)


def batches(images, size):
    for start in range(0, len(images), size):
        part = images[start : start + size]
        yield SimpleNamespace(images=part, indices=torch.arange(start, start + len(part)) + 100)


def test_features_come_out_in_order_as_float32_without_a_graph():
    images = torch.randint(0, 256, (10, 3, 4, 4), dtype=torch.uint8)
    weight = torch.nn.Parameter(torch.randn(48, 5))

    def pooled(x):
        assert torch.is_inference_mode_enabled()
        return (x.flatten(1).float() @ weight).to(torch.bfloat16)

    x, indices = extract_features(pooled, batches(images, 4), "cpu")
    expected = (images.flatten(1).float() @ weight).to(torch.bfloat16).float()
    np.testing.assert_array_equal(x, expected.detach().numpy())
    assert x.dtype == np.float32
    np.testing.assert_array_equal(indices, np.arange(10) + 100)


def test_features_must_exist_and_be_finite():
    with pytest.raises(ValueError, match="No batch"):
        extract_features(lambda x: x, [], "cpu")
    with pytest.raises(ValueError, match=r"6 of 6 extracted .*\(images 100, 101, 102, 103, 104, "):
        extract_features(
            lambda x: x.flatten(1).float() / 0, batches(torch.zeros(6, 3, 2, 2), 4), "cpu"
        )
    with pytest.raises(ValueError, match=r"must be \(B, D\)"):
        extract_features(lambda x: x, batches(torch.zeros(4, 3, 2, 2), 4), "cpu")
