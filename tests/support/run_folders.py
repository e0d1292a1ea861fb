"""Read run folders, compare runs bit by bit, and kill, resume and lock them."""

import contextlib
import json
import multiprocessing
from pathlib import Path

import pytest
import torch

from tract_transfer.engine.checkpoint import Checkpointer
from tract_transfer.engine.run_folder import lock_folder
from tract_transfer.run.run import run

TIMING = ("images_per_second", "data_fraction")
CARVED = ("data.val={source: train, fraction: 0.2}", "evaluation.report=best")


class Killed(Exception):  # noqa: N818 - not an error of the run
    pass


def entries(folder):
    """Return the names of all entries in a folder, including hidden ones."""
    return sorted(path.name for path in folder.iterdir())


def lines_of(folder):
    """Return the lines of metrics.jsonl without timings."""
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMING} for line in lines]


def results_of(folder):
    """Return results.json without timings and cost."""
    results = json.loads((folder / "results.json").read_text())
    costs = ("train_seconds", "images_per_second", "cost")
    return {k: v for k, v in results.items() if k not in costs}


def scalars_of(folder):
    """Return tag -> [(step, value)] in TensorBoard's files, in order and without purging."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    scalars = {}
    for path in sorted((folder / "tensorboard").glob("*")):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                (number,) = value.tensor.float_val
                scalars.setdefault(value.tag, []).append((event.step, number))
    return scalars


def assert_same_scalars(one, two):
    """Assert equal scalars in TensorBoard's files, except for timings."""
    scalars, others = scalars_of(one), scalars_of(two)
    assert scalars.keys() == others.keys()
    for tag, rows in scalars.items():
        if not tag.endswith(TIMING):
            assert rows == others[tag], tag
        assert [step for step, _ in rows] == [step for step, _ in others[tag]]


def last_parts(folder):
    checkpointer = Checkpointer(folder / "checkpoints")
    return checkpointer.load(checkpointer.newest())


def checkpoint_names(checkpointer):
    return sorted(path.name for path in checkpointer.folder.glob("iter_*"))


def write_checkpoints(checkpointer, *iterations):
    for iteration in iterations:
        checkpointer.save(iteration, {"model": {"w": torch.tensor(iteration)}}, {"at": iteration})


def truncate(checkpoint):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-3])


def assert_bits(one, two):
    """Assert that two values are equal in structure, type, order and bits."""
    assert type(one) is type(two)
    if torch.is_tensor(one):
        assert one.dtype == two.dtype
        assert torch.equal(one, two)
    elif isinstance(one, dict):
        assert list(one) == list(two)
        for key in one:
            assert_bits(one[key], two[key])
    elif isinstance(one, list):
        assert len(one) == len(two)
        for left, right in zip(one, two, strict=True):
            assert_bits(left, right)
    else:
        assert one == two


def assert_same_run(one, two):
    """Assert bit-identical weights, optimizer state, log and results."""
    (parts, state, at), (other_parts, other_state, other_at) = last_parts(one), last_parts(two)
    assert at == other_at
    assert_bits(parts, other_parts)
    assert {**state, "seconds": 0} == {**other_state, "seconds": 0}
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
    assert lines_of(one) == lines_of(two)
    assert results_of(one) == results_of(two)


def run_until_killed(kill_at, iteration, config):
    """Start a run that is killed at the start of an iteration; the next one is not."""
    kill_at(iteration)
    with pytest.raises(Killed):
        run(config)
    kill_at(None)


def whole_and_killed(folder, load_tiny, kill_at, *words):
    """Finish a tiny run in `whole`, and kill one in `run` at iteration 5; return its config."""
    run(load_tiny(folder, *words, f"output_dir={folder / 'whole'}"))
    config = load_tiny(folder, *words)
    run_until_killed(kill_at, 5, config)
    return config


def assert_resumes_exactly(kill_at, killed_at, whole, killed, resumed=None):
    """Assert that a killed and resumed run equals the uninterrupted `whole`; return its results.

    The configs differ in output_dir, and may differ in keys that can change on resume.
    """
    results = run(whole)
    run_until_killed(kill_at, killed_at, killed)
    assert not (Path(killed.output_dir) / "results.json").exists()
    run(resumed or killed, resume=True)
    assert_same_run(Path(whole.output_dir), Path(killed.output_dir))
    return results


def _hold(folder, connection):
    with lock_folder(folder):
        connection.send("held")
        connection.recv()


@contextlib.contextmanager
def held(folder):
    """Let another process lock a folder; yield its process id."""
    forks = multiprocessing.get_context("fork")
    ours, others = forks.Pipe()
    holder = forks.Process(target=_hold, args=(folder, others))
    holder.start()
    assert ours.recv() == "held"
    yield holder.pid
    ours.send("end")
    holder.join()
