"""A run that is not finite keeps its step, and the command it gives replays it."""

import json
import re
import shlex

import pytest
import torch

from tract_transfer.engine.non_finite import NonFiniteError
from tract_transfer.run.run import run

DIVERGES = ("solver={lr: 1e+30, momentum: 0.0, schedule: constant}",)


@pytest.mark.parametrize("task", ["classification", "detection"])
def test_the_command_in_the_error_tells_where_it_begins(tmp_path, load_tiny, call, task, recwarn):
    config = load_tiny(tmp_path, *DIVERGES, "solver.optimizer=sgd", task=task)
    with pytest.raises(NonFiniteError, match=r"in iteration \d.* Images: ") as caught:
        run(config)
    assert not (tmp_path / "run/results.json").exists()
    command = re.search(r"python tools/(\S+) (.*)$", str(caught.value))
    said = call(command[1], *shlex.split(command[2]))
    assert said.returncode == 0, said.stderr
    assert "is not finite" in said.stdout
    assert "The losses: " in said.stdout
    backward = any(line.startswith("Backward: ") for line in said.stdout.splitlines())
    assert backward or task == "detection"
    calls = "Traceback of forward call"  # of the operation that failed, printed by torch
    assert any(calls in str(warning.message) for warning in recwarn) == backward


def test_steps_passed_over_are_in_metrics_and_results(tmp_path, load_tiny, monkeypatch):
    from tract_transfer.engine.trainer import Trainer

    losses = Trainer.losses

    def broken(self, batch):
        found = losses(self, batch)
        if self.iteration == 2:
            found = {name: loss * torch.nan for name, loss in found.items()}
        return found

    monkeypatch.setattr(Trainer, "losses", broken)
    results = run(load_tiny(tmp_path, "engine.non_finite=skip", "tract.enabled=true"))
    (step,) = results["skipped_steps"]
    assert step["iteration"] == 3
    assert len(step["processes"][0]["images"]) == 32
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    counts = [line["skipped_steps"] for line in lines if line["split"] == "train"]
    assert counts == [0, 1, 1]


@pytest.mark.parametrize("task", ["classification", "detection"])
def test_a_deterministic_run_gives_the_same_bits_again(tmp_path, load_tiny, task):
    weights = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        run(load_tiny(tmp_path / name, "engine.deterministic=true", task=task))
        weights.append((tmp_path / name / "run/model.safetensors").read_bytes())
        assert not torch.are_deterministic_algorithms_enabled()
    assert weights[0] == weights[1]


def test_a_deterministic_run_refuses_what_has_no_such_algorithm(tmp_path, load_tiny, monkeypatch):
    from tract_transfer.engine.trainer import Trainer

    def step(self, batches):
        torch.zeros(3).put_(torch.tensor([0]), torch.tensor([1.0]), accumulate=False)

    monkeypatch.setattr(Trainer, "step", step)
    with pytest.raises(RuntimeError, match=r"put_.* does not have a deterministic implementation"):
        run(load_tiny(tmp_path, "engine.deterministic=true"))
