"""What killed_suite.py compares between two suites; torture.py kills one."""

import json
import shutil

import killed_suite
import pytest
from report_runs import TRACT, VANILLA, write_pair


@pytest.fixture
def suites(tmp_path):
    """Two suites with the same numbers in different places, one of them slower."""
    folders = [tmp_path / "whole", tmp_path / "elsewhere" / "killed"]
    for slower, folder in enumerate(folders):
        runs = [path.relative_to(folder).as_posix() for path in write_pair(folder)]
        entries = [
            {
                "folder": run, "state": "finished", "seconds": 1.0 + slower, "id": "0" * 12,
                "method": run.split("/")[0], "task": "finetune", "seed": int(run[-1]),
                "needs": None, "attempts": 1 + slower, "error": None,
            }
            for run in runs
        ]  # fmt: skip
        plan = {
            "format": 1, "title": "Does it?", "baseline": "vanilla",
            "methods": ["vanilla", "tract"], "tasks": ["finetune"], "seeds": list(VANILLA),
            "runs": entries,
        }  # fmt: skip
        (folder / "suite.json").write_text(json.dumps(plan))
        for path in folder.rglob("results.json"):
            change(path, train_seconds=10.0 + slower)
            (path.parent / "model.safetensors").write_bytes(b"weights")
            environment = {"command": str(folder), "git": {"commit": str(slower)}}
            change(path.with_name("environment.json"), **environment)
    return folders


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_paths_costs_and_attempts_may_differ(suites):
    assert killed_suite.compare(*suites) == []


def test_differences_are_reported(suites):
    change(suites[1] / "tract/finetune/seed1/results.json", metrics={"top1": 0.7, "loss": 0.3})
    lines = killed_suite.compare(*suites)
    assert lines[0] == f"tract/finetune/seed1/results.json.metrics.top1: {TRACT[1]} and 0.7"
    for start in ("report.results[0].values.tract.1: ", "report.answer[0]: "):
        assert any(line.startswith(start) for line in lines)
    run = suites[1] / "vanilla/finetune/seed0"
    (run / "model.safetensors").write_bytes(b"others")
    data = {"digits": {"train": "sha256 0", "test": "sha256 77d02e"}}
    change(run / "environment.json", data=data)
    shutil.rmtree(suites[1] / "vanilla/finetune/seed2")
    lines = killed_suite.compare(*suites)
    assert "vanilla/finetune/seed0/model.safetensors: other bytes" in lines
    assert "vanilla/finetune/seed2: is finished in one alone" in lines
    for part in ("data.digits.train", "failure"):
        assert any(part in line for line in lines)
