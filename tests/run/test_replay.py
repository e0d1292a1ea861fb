"""A run that is not finite saves its step, and the command in its error replays the step."""

import re
import shlex

import pytest
import torch
from run_folders import lines_of

from tract_transfer.engine.non_finite import NonFiniteError
from tract_transfer.engine.trainer import Trainer
from tract_transfer.run.run import run

DIVERGES = ("solver={lr: 1e+30, momentum: 0.0, schedule: constant}",)


@pytest.mark.parametrize("task", ["classification", "detection"])
def test_the_command_in_the_error_replays_the_step(tmp_path, load_tiny, call, task, recwarn):
    config = load_tiny(tmp_path, *DIVERGES, "solver.optimizer=sgd", task=task)
    with pytest.raises(NonFiniteError, match=r"in iteration \d.* Images: ") as caught:
        run(config)
    assert not (tmp_path / "run/results.json").exists()
    command = re.search(r"tract-transfer train (.*)$", str(caught.value))
    done = call("train_net.py", *shlex.split(command[1]))
    assert done.returncode == 0, done.stderr
    assert "is not finite" in done.stdout
    assert "The losses: " in done.stdout
    backward = any(line.startswith("Backward: ") for line in done.stdout.splitlines())
    assert backward or task == "detection"
    calls = "Traceback of forward call"  # of the operation that failed, printed by torch
    assert any(calls in str(warning.message) for warning in recwarn) == backward


def test_skipped_steps_are_in_metrics_and_results(tmp_path, load_tiny, monkeypatch):
    losses = Trainer.losses

    def broken(self, batch):
        factor = torch.nan if self.iteration == 2 else 1
        return {name: loss * factor for name, loss in losses(self, batch).items()}

    monkeypatch.setattr(Trainer, "losses", broken)
    results = run(load_tiny(tmp_path, "engine.non_finite=skip", "tract.enabled=true"))
    (step,) = results["skipped_steps"]
    assert step["iteration"] == 3
    assert len(step["processes"][0]["images"]) == 32
    lines = [line for line in lines_of(tmp_path / "run") if line["split"] == "train"]
    counts = [line["skipped_steps"] for line in lines]
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


def test_a_deterministic_run_refuses_nondeterministic_operations(tmp_path, load_tiny, monkeypatch):
    def step(self, batches):
        torch.zeros(3).put_(torch.tensor([0]), torch.tensor([1.0]), accumulate=False)

    monkeypatch.setattr(Trainer, "step", step)
    with pytest.raises(RuntimeError, match=r"put_.* does not have a deterministic implementation"):
        run(load_tiny(tmp_path, "engine.deterministic=true"))
