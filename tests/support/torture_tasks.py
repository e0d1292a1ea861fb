"""The runs that torture.py kills: how each is run, and what must be equal."""

import atexit
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from run_folders import assert_same_run, assert_same_scalars, results_of
from tiny_configs import CLASSIFICATION, DETECTION, PROBE, SUITE

from tract_transfer.cli.suite import main as suite_main
from tract_transfer.cli.train import main as train_main
from tract_transfer.config.schema import load_config
from tract_transfer.report.content import read_report
from tract_transfer.report.write import to_json
from tract_transfer.run.run import run
from tract_transfer.suite.launchers import Attempt, _end_with_parent

STATEFUL = """\
model.head={name: mlp, args: {hidden_dim: 16, dropout: 0.5}}
data.val={source: train, fraction: 0.2}
data.mixup={mixup_alpha: 0.2, cutmix_alpha: 1.0}
solver.ema_decay=0.5
solver.max_iters=12
engine.accumulate=2
engine.log={every_iters: 3, tensorboard: true}
engine.checkpoint.every_iters=2
evaluation={every_iters: 4, report: best}
tract={enabled: true, update_every: 2}""".splitlines()
DETECTOR = """\
solver.max_iters=6
solver.ema_decay=0.3
engine.accumulate=2
engine.checkpoint.every_iters=2
evaluation.every_iters=4""".splitlines()


class Task(NamedTuple):
    """A kind of run: how to start or resume it in `folder`/run, and what compares two of them."""

    work: Callable[[Path], None]
    assert_same: Callable[[Path, Path], None]
    num_processes: int = 1


def train(folder: Path, text: str, words: list[str]) -> None:
    path = folder / "config.yaml"
    path.write_text(f"output_dir: {folder}/run\n{text}")
    run(load_config(path, words), resume=True)


def run_child(work: Callable[[], object], log: Path) -> int:
    """Run `work` in a fork of this process, its output in `log`; return its process id."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        work()
        code = 0
    except BaseException as end:
        traceback.print_exc()
        exit_code = end.code if isinstance(end, SystemExit) else getattr(end, "exit_code", None)
        code = exit_code if isinstance(exit_code, int) else 1
    finally:
        atexit._run_exitfuncs()  # ends data workers and the process group
        sys.stderr.flush()
        os._exit(code)


class ForkedRun:
    """An attempt at a run as a fork of the suite, in place of the process that it starts."""

    def __init__(self, attempt: Attempt) -> None:
        def work() -> None:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            _end_with_parent()()
            os.setsid()
            os.environ.update(attempt.environment)
            sys.argv = list(attempt.command[2:])
            raise SystemExit(train_main())

        attempt.log.parent.mkdir(parents=True, exist_ok=True)
        self.pid = run_child(work, attempt.log)

    def poll(self) -> int | None:
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


def run_suite(folder: Path, file: Path) -> None:
    Attempt.start = lambda attempt: ForkedRun(attempt)
    sys.argv = ["run_suite.py", "--config-file", str(file), f"output_dir={folder / 'run'}"]
    if code := suite_main():
        raise SystemExit(code)


def run_tiny_suite(folder: Path) -> None:
    """Run a suite of a pre-training and a probe, with and without TrAct."""
    often = CLASSIFICATION.replace("device: cpu, ", "device: cpu, checkpoint: {every_iters: 2}, ")
    probe = PROBE.replace("name: cifar/resnet18, args: {width: 8}", "name: null")
    for name, text in {"classification": often, "probe": probe}.items():
        (folder / f"{name}.yaml").write_text(f"output_dir: unused\n{text}")
    (folder / "suite.yaml").write_text(SUITE.format(output_dir="unused"))
    run_suite(folder, folder / "suite.yaml")


def suite_task(file: Path) -> Task:
    return Task(lambda folder: run_suite(folder, file), same_suite)


def same_training(one: Path, two: Path) -> None:
    assert_same_run(one, two)
    assert_same_scalars(one, two)


def same_probe(one: Path, two: Path) -> None:
    assert results_of(one) == results_of(two)


def report_of(suite: Path) -> dict[str, Any]:
    """Return what must be equal of a suite's report."""
    text = to_json(read_report([suite]))
    for name in ("whole", "run"):
        text = text.replace(str(suite.with_name(name)), "suite")
    content = json.loads(text)
    del content["costs"]
    return content


def same_suite(one: Path, two: Path) -> None:
    runs = sorted(path.parent.relative_to(one) for path in one.rglob("results.json"))
    assert len(runs) == len(list(two.rglob("results.json"))) > 1
    for folder in runs:
        same = assert_same_run if (one / folder / "checkpoints").exists() else same_probe
        same(one / folder, two / folder)
    assert report_of(one) == report_of(two)
    assert (two / "report.html").exists()


def tasks(scenes: Path) -> dict[str, Task]:
    """Return the tasks by name; the number is that of data workers."""
    detection = DETECTION.replace("source: digit_scenes,", f"source: digit_scenes, root: {scenes},")

    def task(text: str, words: list[str], workers: int, num_processes: int = 1) -> Task:
        words = [*words, f"data.num_workers={workers}"]
        same = same_probe if text is PROBE else same_training
        return Task(lambda folder: train(folder, text, words), same, num_processes)

    return {
        **{f"classification-{n}": task(CLASSIFICATION, STATEFUL, n) for n in (0, 1, 2)},
        "classification-group": task(CLASSIFICATION, STATEFUL, 0, 2),
        **{f"detection-{n}": task(detection, DETECTOR, n) for n in (0, 1, 2)},
        **{f"probe-{n}": task(PROBE, [], n) for n in (0, 2)},
        "suite": Task(run_tiny_suite, same_suite),
    }
