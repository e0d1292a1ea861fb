"""Damaged checkpoints, weights and configs are refused with errors that name the file.

`make fuzz` gives each test 10,000 new inputs; the test suite a few, always the same.
"""

import functools
import hashlib
import json
import operator
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


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpointer, its only complete checkpoint, and the files of that by name."""
    checkpointer = Checkpointer(tmp_path_factory.mktemp("checkpoints"), keep=9)
    model = {"a": torch.arange(6.0).view(2, 3), "b": [torch.zeros(2), 1, None, "x"]}
    path = checkpointer.save(10, {"model": model, "ema": {"a": torch.ones(3)}}, {"best": None})
    return checkpointer, path, {file.name: file.read_bytes() for file in path.iterdir()}


def seal(content):
    """Return the bytes of a state.json with the hash of its content."""
    content.pop("sha256", None)
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps({"sha256": digest, **content}).encode()


def check(checkpoint, changes):
    """Write changed files; loading may fail only with an error that names the checkpoint."""
    checkpointer, path, intact = checkpoint
    for name, content in {**intact, **changes}.items():
        (path / name).write_bytes(content)
    message = said_by(lambda: checkpointer.load(path))
    assert message is None or f"Checkpoint {path} is broken" in message
    assert checkpointer.newest() in (path, None)


@fuzzed
@given(data=st.data())
def test_damaged_checkpoints(checkpoint, data):
    """Often with the right hashes, so that the reader looks at the content."""
    intact = checkpoint[2]
    name = data.draw(st.sampled_from(sorted(intact)))
    changes = {name: data.draw(damaged(intact[name]))}
    if name != "state.json" and data.draw(st.integers(0, 4)):
        state = json.loads(intact["state.json"])
        part = state["parts"][name.partition(".")[0]]
        part["sha256"] = hashlib.sha256(changes[name]).hexdigest()
        changes["state.json"] = seal(state)
    check(checkpoint, changes)


def paths_in(node, path=()):
    """Yield the paths to all values in a tree."""
    yield path
    if isinstance(node, list):
        node = dict(enumerate(node))
    for key, value in node.items() if isinstance(node, dict) else ():
        yield from paths_in(value, (*path, key))


@fuzzed
@given(data=st.data())
def test_misleading_states(checkpoint, data):
    state = json.loads(checkpoint[2]["state.json"])
    for _ in range(data.draw(st.integers(1, 3))):
        *upper, last = data.draw(st.sampled_from([path for path in paths_in(state) if path]))
        node = functools.reduce(operator.getitem, upper, state)
        node[last] = data.draw(tree | st.just([["tensor", "model.a"]]) | st.just({"tensor": "x"}))
    check(checkpoint, {"state.json": seal(state)})


@fuzzed
@given(
    content=damaged(b'{"iteration": 10, "value": 0.5}') | tree.map(lambda x: json.dumps(x).encode())
)
def test_damaged_best(checkpoint, content):
    checkpointer = checkpoint[0]
    file = checkpointer.folder / "best.json"
    file.write_bytes(content)
    message = said_by(checkpointer.best)
    file.unlink()
    assert message is None or f"{file} is broken" in message


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return tmp_path_factory.mktemp("weights")


def weights_bytes(suffix, folder):
    tensors, file = {"a.b": torch.rand(3, 2), "c": torch.zeros(4)}, folder / f"intact{suffix}"
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
    intact, file = weights_bytes(suffix, weights), weights / f"w{suffix}"

    @fuzzed
    @given(content=damaged(intact))
    def check(content):
        file.write_bytes(content)
        message = said_by(lambda: read_tensors(file))
        assert message is None or str(file) in message

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
    message = said_by(lambda: load_config(file, [f"{key}={json.dumps(value)}"]), ConfigError)
    assert message is None or key.partition(".")[0] in message or "command line" in message
