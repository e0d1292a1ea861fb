"""Overhead of a suite: planning and skipping 1,000 finished runs, and the gain of a second worker.

skip        2 methods x 5 tasks x 100 seeds, all finished (made up): seconds of a complete
            `run_suite.py --dry-run`
workers     time of a suite of 8 small trainings of equal length with one worker, divided by the
            time with two workers, one thread each

    python benchmarks/suite.py [--cases skip workers] [--seeds 100] [--iters 60] [--repeats 3]
"""

import argparse
import hashlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
TRAINING = """
task: classification
output_dir: unused
model: {{backbone: {backbone}}}
data:
  train: {{source: digits, split: train}}
  test: {{source: digits, split: test}}
  transforms: {{size_px: 32}}
  batch_size: 64
  num_workers: 0
solver: {{optimizer: sgd, lr: 0.02, max_iters: {iters}}}
engine: {{device: cpu, precision: fp32, log: {{tensorboard: false}}}}
"""
PROBE = """
task: probe
output_dir: unused
model: {{backbone: {{name: null}}}}
data:
  train: {{source: digits, split: train}}
  test: {{source: digits, split: test}}
  transforms: {{size_px: 32}}
  batch_size: 64
  num_workers: 0
evaluation: {{knn: {{ks: [{k}]}}}}
engine: {{device: cpu}}
"""
SUITE = """
output_dir: {folder}/suite
baseline: vanilla
seeds: {seeds}
workers: {workers}
methods:
  vanilla: {{}}
  tract: {{pretrain: {{tract.enabled: true}}}}
pretrain: pretrain.yaml
tasks: {tasks}
"""
WIDTHS = {"skip": 4, "workers": 16}


def write_configs(folder: Path, case: str, seeds: int, iters: int, workers: int = 1) -> Path:
    """Write a suite and its configs; return the path of the suite."""
    backbone = f"{{name: cifar/resnet18, args: {{width: {WIDTHS[case]}}}}}"
    (folder / "pretrain.yaml").write_text(TRAINING.format(backbone=backbone, iters=iters))
    ks = (1, 3, 5, 7) if case == "skip" else ()
    for k in ks:
        (folder / f"knn{k}.yaml").write_text(PROBE.format(k=k))
    tasks = json.dumps({f"knn{k}": f"knn{k}.yaml" for k in ks})
    file = folder / "suite.yaml"
    numbers = list(range(seeds))
    file.write_text(SUITE.format(folder=folder, seeds=numbers, workers=workers, tasks=tasks))
    return file


def finish(file: Path) -> int:
    """Write what finished runs of the suite leave, without running any; return their number."""
    from tract_transfer.config.file import dump_yaml
    from tract_transfer.config.suite import load_suite
    from tract_transfer.run.suite import open_suite

    suite = open_suite(load_suite(file))
    for run in suite.runs:
        run.folder.mkdir(parents=True)
        (run.folder / "config.yaml").write_text(dump_yaml(run.config))
        (run.folder / "environment.json").write_text(json.dumps({"data": run.fingerprints}))
        sha256 = hashlib.sha256(str(run.needs or run.folder).encode()).hexdigest()
        results = {"metrics": {"top1": 0.5}, "primary_metric": "top1"}
        if run.needs:
            results["weights_sha256"] = sha256
        else:
            (run.folder / "model.json").write_text(json.dumps({"sha256": sha256}))
        (run.folder / "results.json").write_text(json.dumps(results))
    return len(suite.runs)


def time_of(file: Path, *words: str) -> tuple[float, float, str]:
    """Return wall-clock and CPU seconds of a run_suite.py, and its standard output."""
    command = [sys.executable, str(ROOT / "tools/run_suite.py"), "--config-file", str(file), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    took, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return took, cpu, done.stdout


def skip(seeds: int, repeats: int) -> None:
    """Print how long it takes to plan and skip finished runs."""
    with tempfile.TemporaryDirectory() as text:
        file = write_configs(Path(text), "skip", seeds, iters=10)
        count = finish(file)
        seconds, cpu = [], []
        for _ in range(repeats):
            wall_clock, of_cpu, output = time_of(file, "--dry-run")
            assert output.count("skip: finished") == count, output
            seconds.append(wall_clock)
            cpu.append(of_cpu)
        times = f"{statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})"
        times += f", {statistics.median(cpu):.2f} s of CPU"
        print(f"{count} finished runs planned and skipped: {times}", flush=True)


def workers(iters: int, repeats: int) -> None:
    """Print how much faster two workers are than one."""
    ratios = []
    for pair in range(repeats):
        seconds = {}
        for count in (1, 2) if pair % 2 == 0 else (2, 1):
            with tempfile.TemporaryDirectory() as text:
                folder = Path(text)
                file = write_configs(folder, "workers", 4, iters, workers=count)
                seconds[count], _, _ = time_of(file)
                runs = json.loads((folder / "suite/suite.json").read_text())["runs"]
                assert [run["state"] for run in runs] == ["finished"] * 8
                shutil.rmtree(folder / "suite")
        ratios.append(seconds[1] / seconds[2])
        print(
            f"one worker {seconds[1]:.1f} s, two {seconds[2]:.1f} s: {ratios[-1]:.2f}", flush=True
        )
    print(f"median {statistics.median(ratios):.2f} (min {min(ratios):.2f}, max {max(ratios):.2f})")


def main() -> None:
    """Run the cases and print their times."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=list(WIDTHS), default=list(WIDTHS))
    parser.add_argument("--seeds", type=int, default=100, help="of the case skip: ten runs each")
    parser.add_argument("--iters", type=int, default=60, help="of a training of the case workers")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    if "skip" in arguments.cases:
        skip(arguments.seeds, arguments.repeats)
    if "workers" in arguments.cases:
        workers(arguments.iters, arguments.repeats)


if __name__ == "__main__":
    main()
