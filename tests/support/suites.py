"""Suites for tests: planned runs, what finished runs leave, and attempts of a few lines."""

import json
import sys
import time
from pathlib import Path

import yaml

from tract_transfer.config.suite import ResourcesConfig, SuiteConfig
from tract_transfer.suite.launchers import Attempt
from tract_transfer.suite.plan import PlannedRun
from tract_transfer.suite.state import Suite

FINGERPRINTS = {"train": "t1", "test": "t2"}
ENDS = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
print("ready", flush=True)
time.sleep(60)
"""
# Ends some time after the first signal, with 20 more than the number of signals.
COUNTS = """
import signal, sys, time
signals = []
signal.signal(signal.SIGTERM, lambda *_: signals.append(1))
print("ready", flush=True)
while not signals:
    time.sleep(0.01)
print("ending", flush=True)
time.sleep(0.5)
print("ended by", len(signals), flush=True)
sys.exit(20 + len(signals))
"""


def run_of(task="voc", **resources):
    return PlannedRun(
        "a", "vanilla", task, 0, {}, Path(task), resources=ResourcesConfig(**resources)
    )


def make_suite(folder, retries=0):
    """Two methods, each with a pre-training and two tasks that take its backbone."""
    config = SuiteConfig(
        output_dir=str(folder), title="Does it?", baseline="vanilla", seeds=[0],
        methods={"vanilla": {}, "tract": {}}, pretrain="pretrain.yaml", retries=retries,
    )  # fmt: skip
    runs = []
    for task in ("pretrain", "probe", "voc"):
        for method in ("vanilla", "tract"):
            needs = None if task == "pretrain" else folder / method / "pretrain/seed0"
            values = {"seed": 0, "output_dir": "x", "model": {"weights": needs and str(needs)}}
            path = folder / method / task / "seed0"
            id_ = f"{method}-{task}"
            runs.append(PlannedRun(id_, method, task, 0, values, path, needs, FINGERPRINTS))
    return Suite(config, runs)


def finish(run, sha256="w1"):
    """Write what a finished run leaves; `sha256` is the hash of its backbone."""
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "config.yaml").write_text(yaml.safe_dump(dict(run.config)))
    (run.folder / "environment.json").write_text(json.dumps({"data": FINGERPRINTS}))
    results = {"format": 1, "metrics": {"top1": 0.5}, "primary_metric": "top1"}
    if run.needs:
        results["weights_sha256"] = sha256
    else:
        (run.folder / "model.json").write_text(json.dumps({"sha256": sha256}))
    (run.folder / "results.json").write_text(json.dumps(results))


def cut_off(run):
    """Write what a run leaves that was cut off after its first checkpoint."""
    finish(run)
    (run.folder / "results.json").unlink()
    (run.folder / "checkpoints/iter_0000005").mkdir(parents=True)


def attempt_in(folder, script="pass", **environment):
    command = [sys.executable, "-S", "-c", script]
    return Attempt(command, folder / "console.txt", folder / "stop", "this", environment)


def wait(launcher, seconds=120):
    """Return what has ended, as soon as something has."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if done := launcher.ended():
            return done
        time.sleep(0.02)
    raise AssertionError("nothing ended")


def wait_for(text, file, seconds=120):
    """Wait until a log contains a text."""
    end = time.monotonic() + seconds
    while not file.exists() or text not in file.read_text():
        assert time.monotonic() < end
        time.sleep(0.02)
