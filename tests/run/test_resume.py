"""Exact resume, signals and process groups: an interrupted run gives the same numbers."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from run_folders import (
    CARVED,
    assert_resumes_exactly,
    assert_same_run,
    last_parts,
    lines_of,
    results_of,
    whole_and_killed,
)

from tract_transfer.config.schema import load_config
from tract_transfer.run.evaluate import evaluate_run
from tract_transfer.run.run import run

ROOT = Path(__file__).parents[2]
# Everything that has state or draws random numbers.
STATEFUL = (
    "model.backbone={name: timm/resnet18, stem: cifar, "
    "args: {channels: [8, 16, 32, 64], drop_path_rate: 0.2}}",
    "model.head={name: mlp, args: {hidden_dim: 16, dropout: 0.5}}",
    "solver.ema_decay=0.5",
    "solver.max_iters=8",
    "solver.weight_decay=1e-3",
    "engine.accumulate=2",
    "engine.log.every_iters=3",
    "engine.checkpoint.every_iters=2",
    "evaluation.every_iters=4",
    "tract={enabled: true, update_every: 2}",
)
CACHED = ("data.cache=device", "data.transforms.flip_prob=0.5", "engine.accumulate=2")
ERASED = "data.transforms={crop: random_resized, pad_px: null, erase_prob: 0.5}"
EVERY_2 = "engine.checkpoint.every_iters=2"
# Name -> task, overrides, workers of the killed run (the resumed one has none), killed at.
CASES = {
    "sgd": ("classification", [*STATEFUL, *CARVED], 0, [1, 5, 7]),
    "adamw, workers": ("classification",
        ["solver={optimizer: adamw, momentum: null}", *STATEFUL, *CARVED], 2, [5]),
    "first layer by sgd": ("classification",
        ["solver={optimizer: adam, momentum: null, first_layer: {optimizer: sgd, lr: 0.1}}",
         *STATEFUL, *CARVED], 0, [5]),
    # Its step walks through memory, whose layout differs from that of a loaded checkpoint.
    "fused, channels last": ("classification",
        ["solver={optimizer: adamw, momentum: null, optimizer_args: {fused: true}}",
         "engine.channels_last=true", *STATEFUL, *CARVED], 0, [7]),
    "detection": ("detection", [EVERY_2, "evaluation.every_iters=2"], 0, [3]),
    "detection, workers": ("detection", [EVERY_2, "evaluation.every_iters=2"], 1, [3]),
    "device cache": ("classification", [*CACHED, "engine.checkpoint.every_iters=1"], 0, [1]),
    "device cache, erasing": ("classification", [*CACHED, ERASED, EVERY_2], 0, [3]),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "killed_at"), [(name, at) for name, case in CASES.items() for at in case[-1]]
)
def test_a_killed_run_resumes_to_the_same_bits(tmp_path, load_tiny, kill_at, name, killed_at):
    task, words, num_workers, _ = CASES[name]

    def config(folder, workers):
        more = (f"output_dir={tmp_path / folder}", f"data.num_workers={workers}")
        return load_tiny(tmp_path, *words, *more, task=task)

    killed, resumed = config("killed", num_workers), config("killed", 0)
    assert_resumes_exactly(kill_at, killed_at, config("whole", 0), killed, resumed)


def test_a_device_cache_is_not_resumed_with_another_cache(tmp_path, load_tiny):
    run(load_tiny(tmp_path, *CACHED, "solver.max_iters=1"))
    with pytest.raises(ValueError, match=r"'device' then, 'ram' now"):  # other random numbers
        run(load_tiny(tmp_path, *CACHED[1:], "solver.max_iters=1", "data.cache=ram"), resume=True)


def test_a_run_with_broken_checkpoints_starts_from_scratch(tmp_path, load_tiny, caplog):
    config = load_tiny(tmp_path, EVERY_2)
    metrics = run(config)["metrics"]
    folder = Path(config.output_dir)
    for weights in folder.glob("checkpoints/iter_*/model.safetensors"):
        weights.write_bytes(b"no tensors")
    assert run(config, resume=True)["metrics"] == metrics
    assert "No checkpoint but broken-iter_" in caplog.text
    assert "training starts from scratch" in caplog.text


def test_a_broken_checkpoint_costs_only_time(tmp_path, load_tiny, kill_at, caplog):
    words = (*STATEFUL, "engine.checkpoint={every_iters: 2, keep: 2}")
    config = whole_and_killed(tmp_path, load_tiny, kill_at, *words)
    (tmp_path / "run/checkpoints/iter_0000004/model.safetensors").write_bytes(b"")
    run(config, resume=True)
    assert "iter_0000004 is broken" in caplog.text
    assert "iter_0000004" in (tmp_path / "run/log.txt").read_text()
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=["SIGTERM", "SIGUSR1"])
def test_a_run_ended_by_a_signal_resumes(tmp_path, write_tiny, number):
    words = ["solver.max_iters=60", "engine.log.every_iters=1", "data.num_workers=1"]
    path = write_tiny(tmp_path)
    command = [sys.executable, str(ROOT / "tools/train_net.py"), "--config-file", str(path), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while not (tmp_path / "run/metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, number)  # schedulers and Ctrl-C reach the workers too
    _, errors = process.communicate()
    assert process.returncode == 128 + number
    hint = f"checkpoint written. Resume with --resume (output_dir {tmp_path}/run)"
    assert f"{number.name}: {hint}" in errors
    assert "Traceback" not in errors
    _, _, iteration = last_parts(tmp_path / "run")
    assert 0 < iteration < 60
    assert not (tmp_path / "run/results.json").exists()
    run(load_config(path, words), resume=True)
    run(load_config(path, [*words, f"output_dir={tmp_path / 'whole'}"]))
    assert_same_run(tmp_path / "whole", tmp_path / "run")


GROUP = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
VIT = (
    "model.backbone={name: cifar/vit, args: {depth: 1, width: 48, num_heads: 3}}",
    "data.transforms={size_px: 32}",
    "solver.max_iters=4",
    "engine.accumulate=2",
    "tract={enabled: true, update_every: 2}",
)
BATCH_NORM = ("solver.lr=0.3", "evaluation.every_iters=2")
BOTH = f"""\
import sys

from tract_transfer.cli import train

for name, words in (("vit", {VIT}), ("batch_norm", {BATCH_NORM})):
    options = ["--config-file", sys.argv[-1]]
    sys.argv = ["train_net.py", f"output_dir={{name}}", *words, *options]
    assert train.main() == 0
"""


@pytest.fixture(scope="module")
def group(tmp_path_factory, write_tiny, tool):
    """A config, and the folder of the runs of two processes: vit/, batch_norm/."""
    folder = tmp_path_factory.mktemp("group")
    (folder / "both.py").write_text(BOTH)
    path = write_tiny(folder)
    ran = tool(folder / "both.py", path, launcher=GROUP, cwd=folder)
    assert ran.returncode == 0, ran.stderr
    assert sorted(ran.stdout.split()) == ["batch_norm/results.json", "vit/results.json"]
    return path, folder


def test_two_processes_give_the_results_of_one(group, tmp_path):
    path, folder = group
    run(load_config(path, [*VIT, f"output_dir={tmp_path}"]))
    (parts, _, _), (alone, _, _) = last_parts(folder / "vit"), last_parts(tmp_path)
    for name, tensor in alone["model"].items():
        torch.testing.assert_close(parts["model"][name], tensor, atol=1e-5, rtol=1e-5)
    for two, one in zip(lines_of(folder / "vit"), lines_of(tmp_path), strict=True):
        assert two.pop("split") == one.pop("split")
        assert two == pytest.approx(one, rel=1e-4, abs=1e-6)
    counts = [results_of(run)["details"]["num_images"] for run in (folder / "vit", tmp_path)]
    assert counts == [106, 106]


def test_two_processes_evaluate_what_they_save(group):
    """Batch-norm statistics differ between processes: all use those of the main process."""
    path, folder = group
    metrics = evaluate_run(load_config(path, [*BATCH_NORM, f"output_dir={folder / 'batch_norm'}"]))
    assert metrics == pytest.approx(results_of(folder / "batch_norm")["metrics"], rel=1e-6)
