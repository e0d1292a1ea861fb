"""The runs that torture.py kills: how each is run, and what must be equal."""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from run_folders import assert_same_run, assert_same_scalars, results_of
from tiny_configs import CLASSIFICATION, DETECTION, PROBE, SUITE

from tract_transfer.config.schema import load_config
from tract_transfer.run.run import run

ROOT = Path(__file__).parents[2]
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


def train_suite(folder: Path) -> None:
    """Run a suite of a pre-training and a probe, with and without TrAct, by its command."""
    often = CLASSIFICATION.replace("device: cpu, ", "device: cpu, checkpoint: {every_iters: 2}, ")
    probe = PROBE.replace("name: cifar/resnet18, args: {width: 8}", "name: null")
    for name, text in {"classification": often, "probe": probe}.items():
        (folder / f"{name}.yaml").write_text(f"output_dir: unused\n{text}")
    (folder / "suite.yaml").write_text(SUITE.format(output_dir=folder / "run"))
    sys.argv = ["run_suite.py", "--config-file", str(folder / "suite.yaml")]
    try:
        runpy.run_path(str(ROOT / "tools/run_suite.py"), run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise


def same_training(one: Path, two: Path) -> None:
    assert_same_run(one, two)
    assert_same_scalars(one, two)


def same_probe(one: Path, two: Path) -> None:
    assert results_of(one) == results_of(two)


def same_suite(one: Path, two: Path) -> None:
    runs = sorted(path.parent.relative_to(one) for path in one.rglob("results.json"))
    assert len(runs) == 4
    for folder in runs:
        same = same_probe if "probe" in str(folder) else assert_same_run
        same(one / folder, two / folder)
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
        "suite": Task(train_suite, same_suite),
    }
