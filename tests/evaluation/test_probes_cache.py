import numpy as np
import pytest
import torch

from tract_transfer.evaluation.probes import Extracted, cached_features, feature_key

STATE = {"conv": torch.arange(6.0).view(2, 3), "count": torch.tensor(3)}
DESCRIBED = {"transforms": {"size_px": 32}, "precision": "fp32"}
HASHES = ["a", "b"]
KEY = feature_key(DESCRIBED, STATE, HASHES)


def make():
    return Extracted(np.ones((2, 3), np.float32), np.array([0, 4]), ["row 1: broken"])


def never():
    raise AssertionError("extracted again")


def changed_state(**changed):
    return {**STATE, **changed}


def test_the_key_is_a_function_of_its_content():
    again = {name: tensor.clone() for name, tensor in reversed(STATE.items())}
    assert feature_key(dict(reversed(DESCRIBED.items())), again, iter(HASHES)) == KEY


@pytest.mark.parametrize(
    ("described", "state", "hashes"),
    [
        ({**DESCRIBED, "precision": "bf16"}, STATE, HASHES),
        ({**DESCRIBED, "transforms": {"size_px": 64}}, STATE, HASHES),
        (DESCRIBED, changed_state(conv=STATE["conv"] + 1e-6 * (STATE["conv"] == 5)), HASHES),
        (DESCRIBED, changed_state(conv=STATE["conv"].view(3, 2)), HASHES),
        (DESCRIBED, changed_state(count=torch.tensor(4)), HASHES),
        (DESCRIBED, STATE, ["a", "c"]),
        (DESCRIBED, STATE, ["b", "a"]),
        (DESCRIBED, STATE, ["a"]),
    ],
)
def test_any_change_misses(described, state, hashes):
    assert feature_key(described, state, hashes) != KEY


def test_half_precision_weights_have_a_key():
    assert feature_key(DESCRIBED, {"w": torch.ones(2, dtype=torch.bfloat16)}, HASHES) != KEY


def test_features_come_back_as_they_were(tmp_path):
    first = cached_features(tmp_path / "new", KEY, make)
    second = cached_features(tmp_path / "new", KEY, never)
    for one, two in zip(first[:2], second[:2], strict=True):
        assert one.dtype == two.dtype
        np.testing.assert_array_equal(one, two)
    assert second.skipped == ["row 1: broken"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == [f"{KEY}.safetensors"]


@pytest.mark.parametrize(
    "damage", [lambda data: data[:40], lambda data: b"", lambda data: b"x" * 99]
)
def test_a_broken_file_is_named_and_written_anew(tmp_path, damage, caplog):
    cached_features(tmp_path, KEY, make)
    path = tmp_path / f"{KEY}.safetensors"
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    cached_features(tmp_path, KEY, make)
    assert f"{path} is no whole file of features" in caplog.text
    assert path.read_bytes() == whole


def test_a_file_of_another_key_is_not_trusted(tmp_path, caplog):
    cached_features(tmp_path, KEY, make)
    (tmp_path / f"{KEY}.safetensors").rename(tmp_path / "other.safetensors")
    cached_features(tmp_path, "other", make)
    assert f"it says it holds {KEY}" in caplog.text


def test_a_failed_extraction_leaves_nothing(tmp_path):
    with pytest.raises(AssertionError):
        cached_features(tmp_path, KEY, never)
    assert not list(tmp_path.iterdir())
