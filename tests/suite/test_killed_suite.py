"""What counts as the same suite, in two folders; torture.py kills one on the way."""

import json
import shutil

import killed_suite
import pytest
from report_runs import TRACT, VANILLA, write_pair


@pytest.fixture
def suites(tmp_path):
    """Two suites of the same numbers in different places, one of them slower."""
    folders = [tmp_path / "whole", tmp_path / "elsewhere" / "killed"]
    for slower, folder in enumerate(folders):
        runs = [path.relative_to(folder).as_posix() for path in write_pair(folder)]
        entries = [{"folder": run, "state": "finished", "seconds": 1.0 + slower} for run in runs]
        for entry, (method, _, seed) in zip(entries, (r.split("/") for r in runs), strict=True):
            entry |= {"method": method, "task": "finetune", "seed": int(seed.removeprefix("seed"))}
            entry |= {"id": "0" * 12, "needs": None, "attempts": 1 + slower, "error": None}
        plan = {
            "format": 1, "title": "Does it?", "baseline": "vanilla",
            "methods": ["vanilla", "tract"], "tasks": ["finetune"], "seeds": list(VANILLA),
            "runs": entries,
        }  # fmt: skip
        (folder / "suite.json").write_text(json.dumps(plan))
        for path in folder.rglob("results.json"):
            change(path, train_seconds=10.0 + slower)
            (path.parent / "model.safetensors").write_bytes(b"weights")
            where = {"command": str(folder), "git": {"commit": str(slower)}}
            change(path.with_name("environment.json"), **where)
    return folders


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_places_costs_and_attempts_may_differ(suites):
    assert killed_suite.compare(*suites) == []


def test_another_number_is_told_in_the_run_and_in_the_report(suites):
    change(suites[1] / "tract/finetune/seed1/results.json", metrics={"top1": 0.7, "loss": 0.3})
    told = killed_suite.compare(*suites)
    assert told[0] == f"tract/finetune/seed1/results.json.metrics.top1: {TRACT[1]} and 0.7"
    assert any(line.startswith("report.results[0].values.tract.1: ") for line in told)
    assert any(line.startswith("report.answer[0]: ") for line in told)


def test_other_weights_are_told(suites):
    (suites[1] / "vanilla/finetune/seed0/model.safetensors").write_bytes(b"others")
    assert killed_suite.compare(*suites) == [
        "vanilla/finetune/seed0/model.safetensors: other bytes"
    ]


def test_a_run_that_is_not_finished_is_told(suites):
    shutil.rmtree(suites[1] / "vanilla/finetune/seed2")
    told = killed_suite.compare(*suites)
    assert "vanilla/finetune/seed2: is finished in one alone" in told
    assert any("failure" in line for line in told)


def test_other_data_are_told(suites):
    path = suites[1] / "vanilla/finetune/seed0/environment.json"
    change(path, data={"digits": {"train": "sha256 0", "test": "sha256 77d02e"}})
    assert any("data.digits.train" in line for line in killed_suite.compare(*suites))
