"""Features: extraction, the cache and the part to select on; k-NN is its definition."""

import numpy as np
import pytest
import torch
from probe_rows import TEST, TRAIN, batches
from sklearn.neighbors import KNeighborsClassifier

from tract_transfer.evaluation import probes
from tract_transfer.evaluation.probes import (
    Extracted,
    Rows,
    cached_features,
    extract_features,
    feature_key,
    hold_out_selection,
    knn_predict,
)


def test_features_are_in_order_as_float32_without_a_graph():
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


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5])
def test_a_selection_holds_out_the_share_of_every_class(fraction):
    labels = np.random.default_rng(0).choice(6, 500, p=[0.4, 0.3, 0.2, 0.07, 0.02, 0.01])
    rows = Rows(np.arange(500, dtype=np.float32)[:, None], labels)
    fit, val = hold_out_selection(rows, fraction, seed=0)
    sizes, taken = np.bincount(labels), np.bincount(val.y, minlength=6)
    assert (np.abs(taken - sizes * fraction) < 1).all()
    assert abs(len(val.y) - 500 * fraction) < 1
    assert sorted([*fit.x[:, 0], *val.x[:, 0]]) == list(range(500))
    np.testing.assert_array_equal(val.x, hold_out_selection(rows, fraction, seed=0).val.x)
    other = hold_out_selection(rows, fraction, seed=1).val.x
    assert set(val.x[:, 0]) != set(other[:, 0])


# ------------------------------------------------------------------------------------ cache

STATE = {"conv": torch.arange(6.0).view(2, 3), "count": torch.tensor(3)}
DESCRIBED = {"transforms": {"size_px": 32}, "precision": "fp32"}
HASHES = ["a", "b"]
KEY = feature_key(DESCRIBED, STATE, HASHES)


def extract():
    return Extracted(np.ones((2, 3), np.float32), np.array([0, 4]), ["row 1: broken"])


def never():
    raise AssertionError("extracted again")


def test_any_change_of_the_content_and_nothing_else_changes_the_key():
    again = {name: tensor.clone() for name, tensor in reversed(STATE.items())}
    assert feature_key(dict(reversed(DESCRIBED.items())), again, iter(HASHES)) == KEY
    conv = STATE["conv"]
    convs = conv + 1e-6 * (conv == 5), conv.view(3, 2), conv.bfloat16()
    states = [*({"conv": changed} for changed in convs), {"count": torch.tensor(4)}]
    keys = {KEY, feature_key({**DESCRIBED, "precision": "bf16"}, STATE, HASHES)}
    keys |= {feature_key({**DESCRIBED, "transforms": {}}, STATE, HASHES)}
    keys |= {feature_key(DESCRIBED, STATE | state, HASHES) for state in states}
    keys |= {feature_key(DESCRIBED, STATE, hashes) for hashes in (["a", "c"], ["b", "a"], ["a"])}
    assert len(keys) == 10


def test_stored_features_are_read_back_unchanged(tmp_path):
    first = cached_features(tmp_path / "new", KEY, extract)
    second = cached_features(tmp_path / "new", KEY, never)
    for one, two in zip(first[:2], second[:2], strict=True):
        assert one.dtype == two.dtype
        np.testing.assert_array_equal(one, two)
    assert second.skipped == ["row 1: broken"]
    assert (first.was_kept, second.was_kept) == (False, True)
    assert [path.name for path in (tmp_path / "new").iterdir()] == [f"{KEY}.safetensors"]


@pytest.mark.parametrize("broken", [lambda data: data[:40], lambda _: b"", lambda _: b"x" * 99])
def test_a_broken_file_is_logged_and_replaced(tmp_path, broken, caplog):
    cached_features(tmp_path, KEY, extract)
    path = tmp_path / f"{KEY}.safetensors"
    intact = path.read_bytes()
    path.write_bytes(broken(intact))
    cached_features(tmp_path, KEY, extract)
    assert f"{path} is not an intact feature file" in caplog.text
    assert path.read_bytes() == intact


# ------------------------------------------------------------------------------------- k-NN

KS = (1, 10, 200)


def predict(train=TRAIN, test_x=TEST.x, ks=KS, temperature=0.07, num_classes=4):
    return knn_predict(train, test_x, ks=ks, temperature=temperature, num_classes=num_classes)


@pytest.mark.parametrize("block", [1, 700, 2**24])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_knn_is_scikit_learns_with_these_weights_for_any_block_size(
    monkeypatch, temperature, block
):
    monkeypatch.setattr(probes, "_MAX_SIMILARITIES", block)
    for k, scores in predict(temperature=temperature).items():
        oracle = KNeighborsClassifier(
            k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / temperature)
        ).fit(TRAIN.x, TRAIN.y)
        np.testing.assert_allclose(scores, oracle.predict_proba(TEST.x), atol=1e-3)
        alone = predict(ks=[k], temperature=temperature)[k]
        np.testing.assert_allclose(scores, alone, atol=1e-6)


def test_knn_ignores_length_and_order_and_accepts_extreme_temperatures():
    scores = predict(num_classes=5)[10]
    order = np.random.default_rng(0).permutation(len(TRAIN.x))
    shuffled = Rows(TRAIN.x[order] * 3, TRAIN.y[order])
    np.testing.assert_allclose(predict(shuffled, TEST.x * 7, num_classes=5)[10], scores, atol=1e-4)
    assert (scores[:, 4] == 0).all()  # a class without training rows
    cold = predict(temperature=1e-9)
    np.testing.assert_array_equal(cold[10].argmax(1), cold[1].argmax(1))
    assert np.isfinite(predict(test_x=TEST.x * 0)[10]).all()
