"""Checkpoints, weights and configs made to be wrong: errors of ours alone, which name the file.

`make fuzz` gives each test 10,000 inputs, others every time; the suite a few, always the same.
"""

import hashlib
import json
import pickle

import pytest
import torch
from fuzzing import damaged, fuzzed, said_by, tree
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny_configs import CLASSIFICATION

from tract_transfer.config.schema import ConfigError, load_config
from tract_transfer.engine.checkpoint import Checkpointer
from tract_transfer.models.weights_file import read_tensors

# ------------------------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpointer, the one whole checkpoint it has, and that one's files."""
    checkpointer = Checkpointer(tmp_path_factory.mktemp("checkpoints"), keep=9)
    model = {"a": torch.arange(6.0).view(2, 3), "b": [torch.zeros(2), 1, None, "x"]}
    path = checkpointer.save(10, {"model": model, "ema": {"a": torch.ones(3)}}, {"best": None})
    return checkpointer, path, {file.name: file.read_bytes() for file in path.iterdir()}


def seal(content):
    """The bytes of a state.json whose own hash is right, where it can have one."""
    content.pop("sha256", None)
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps({"sha256": digest, **content}).encode()


def check_checkpoint(checkpointer, path):
    found = said_by(lambda: checkpointer.load(path))
    assert found is None or f"Checkpoint {path} is broken" in found
    assert checkpointer.newest() in (path, None)


@fuzzed
@given(data=st.data())
def test_damaged_checkpoints(checkpoint, data):
    """With hashes that fit what they are of, so that the reader goes on behind them."""
    checkpointer, path, whole = checkpoint
    name = data.draw(st.sampled_from(sorted(whole)))
    content = data.draw(damaged(whole[name]))
    state = json.loads(whole["state.json"])
    (path / name).write_bytes(content)
    if name != "state.json" and data.draw(st.integers(0, 4)):
        state["parts"][name.partition(".")[0]]["sha256"] = hashlib.sha256(content).hexdigest()
        (path / "state.json").write_bytes(seal(state))
    try:
        check_checkpoint(checkpointer, path)
    finally:
        for file, bytes_ in whole.items():
            (path / file).write_bytes(bytes_)


def places(node, at=()):
    """The paths to all values in a tree."""
    yield at
    pairs = (
        node.items()
        if isinstance(node, dict)
        else enumerate(node)
        if isinstance(node, list)
        else ()
    )
    for key, value in pairs:
        yield from places(value, (*at, key))


@fuzzed
@given(data=st.data())
def test_states_made_to_mislead(checkpoint, data):
    checkpointer, path, whole = checkpoint
    state = json.loads(whole["state.json"])
    for _ in range(data.draw(st.integers(1, 3))):
        *upper, last = data.draw(st.sampled_from([at for at in places(state) if at]))
        node = state
        for key in upper:
            node = node[key]
        node[last] = data.draw(tree | st.just([["tensor", "model.a"]]) | st.just({"tensor": "x"}))
    (path / "state.json").write_bytes(seal(state))
    try:
        check_checkpoint(checkpointer, path)
    finally:
        (path / "state.json").write_bytes(whole["state.json"])


@fuzzed
@given(
    content=damaged(b'{"iteration": 10, "value": 0.5}') | tree.map(lambda x: json.dumps(x).encode())
)
def test_damaged_best(checkpoint, content):
    checkpointer = checkpoint[0]
    file = checkpointer.folder / "best.json"
    file.write_bytes(content)
    found = said_by(checkpointer.best)
    file.unlink()
    assert found is None or f"{file} is broken" in found


# ------------------------------------------------------------------------ weights and configs


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return tmp_path_factory.mktemp("weights")


def weights_bytes(suffix, folder):
    tensors, file = {"a.b": torch.rand(3, 2), "c": torch.zeros(4)}, folder / f"whole{suffix}"
    if suffix == ".pkl":
        file.write_bytes(pickle.dumps({"model": {k: v.numpy() for k, v in tensors.items()}}))
    elif suffix == ".pth":
        torch.save({"model": tensors}, file)
    else:
        save_file(tensors, file)
    return file.read_bytes()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suffix", [".pkl", ".pth", ".safetensors"])
def test_damaged_weights(weights, suffix):
    whole, file = weights_bytes(suffix, weights), weights / f"w{suffix}"

    @fuzzed
    @given(content=damaged(whole))
    def check(content):
        file.write_bytes(content)
        found = said_by(lambda: read_tensors(file))
        assert found is None or str(file) in found

    check()


@fuzzed
@given(content=damaged(f"output_dir: x\n{CLASSIFICATION}".encode()))
def test_damaged_configs(weights, content):
    file = weights / "x.yaml"
    file.write_bytes(content)
    assert said_by(lambda: load_config(file), ConfigError) != ""


@fuzzed
@given(key=st.sampled_from(["solver.lr", "data", "model.backbone", "seed", "a.b"]), value=tree)
def test_overrides_of_any_value(weights, key, value):
    file = weights / "y.yaml"
    file.write_text(f"output_dir: x\n{CLASSIFICATION}")
    found = said_by(lambda: load_config(file, [f"{key}={json.dumps(value)}"]), ConfigError)
    assert found is None or key.partition(".")[0] in found or "command line" in found
