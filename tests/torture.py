"""Kill runs with SIGKILL at any moment, go on with them, and compare with undisturbed ones.

python tests/torture.py                                  # the long form: 50 kills a task
python tests/torture.py --kills 3 --tasks probe          # a short one
python tests/torture.py --tasks classification --seed 7  # the same moments again

Every second kill comes at a random moment, the others at a random file operation in the run folder:
before a file is opened to be written, renamed, removed or synced, or with a checkpoint's tensors
half-written. Sessions are forks of this process, which imports everything once and never trains.
"""

import argparse
import atexit
import contextlib
import os
import random
import runpy
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from tempfile import mkdtemp

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
import torch.utils.tensorboard  # noqa: E402 - imported once, before the forks
from conftest import CLASSIFICATION, DETECTION, PROBE  # noqa: E402
from run_folders import assert_same_run, assert_same_scalars, results_of  # noqa: E402

import tract_transfer.suite.report  # noqa: E402, F401
from tract_transfer.config import load_config  # noqa: E402
from tract_transfer.data.digits import write_digit_scenes  # noqa: E402
from tract_transfer.engine import checkpoint  # noqa: E402
from tract_transfer.run import run  # noqa: E402

GROUP_ENDS_WITHIN_SECONDS = 60
WRITES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")
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
SUITE = """\
output_dir: {folder}/run
baseline: vanilla
seeds: [0]
methods:
  vanilla: {{}}
  tract: {{pretrain: {{tract.enabled: true}}}}
pretrain: classification.yaml
tasks: {{finetune: finetune.yaml, probe: probe.yaml}}
"""


def train(folder: Path, text: str, words: list[str]) -> None:
    """Carry out the run in `folder`/run, or go on with it."""
    path = folder / "config.yaml"
    path.write_text(f"output_dir: {folder}/run\n{text}")
    run(load_config(path, words), resume=True)


def train_suite(folder: Path) -> None:
    """Carry out a suite of a pre-training, a fine-tuning and a probe, by its tool."""
    known, unknown = "name: cifar/resnet18, args: {width: 8}", "name: null"
    often = CLASSIFICATION.replace("device: cpu, ", "device: cpu, checkpoint: {every_iters: 2}, ")
    texts = {
        "classification": often,
        "finetune": often.replace(known, unknown),
        "probe": PROBE.replace(known, unknown),
    }
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(f"output_dir: unused\n{text}")
    (folder / "suite.yaml").write_text(SUITE.format(folder=folder))
    sys.argv = ["run_suite.py", "--config-file", str(folder / "suite.yaml")]
    try:
        runpy.run_path(str(ROOT / "tools/run_suite.py"), run_name="__main__")
    except SystemExit as end:
        assert not end.code, f"the suite ended with {end.code}"


def same_training(one: Path, two: Path) -> None:
    assert_same_run(one, two)
    assert_same_scalars(one, two)


def same_probe(one: Path, two: Path) -> None:
    assert results_of(one) == results_of(two)


def same_suite(one: Path, two: Path) -> None:
    runs = sorted(path.parent.relative_to(one) for path in one.rglob("results.json"))
    assert len(runs) == 6
    for folder in runs:
        same = same_probe if "probe" in str(folder) else assert_same_run
        same(one / folder, two / folder)
    assert (two / "report.html").exists()


class Task:
    """A kind of run: how to carry it out, in how many processes, and what is equal."""

    def __init__(
        self,
        work: Callable[[Path], None],
        same: Callable[[Path, Path], None],
        num_processes: int = 1,
    ) -> None:
        self.work, self.same, self.num_processes = work, same, num_processes


def tasks(scenes: Path) -> dict[str, Task]:
    detection = DETECTION.replace("source: digit_scenes,", f"source: digit_scenes, root: {scenes},")

    def training(text: str, words: list[str], workers: int, num_processes: int = 1) -> Task:
        more = [*words, f"data.num_workers={workers}"]
        return Task(lambda folder: train(folder, text, more), same_training, num_processes)

    return {
        **{f"classification-{n}": training(CLASSIFICATION, STATEFUL, n) for n in (0, 1, 2)},
        "classification-group": training(CLASSIFICATION, STATEFUL, 0, 2),
        **{f"detection-{n}": training(detection, DETECTOR, n) for n in (0, 1, 2)},
        **{
            f"probe-{n}": Task(
                lambda folder, n=n: train(folder, PROBE, [f"data.num_workers={n}"]), same_probe
            )
            for n in (0, 2)
        },
        "suite": Task(train_suite, same_suite),
    }


# ------------------------------------------------------------------------------------- sessions


def die_at(number: int | None, folder: Path) -> Callable[[], int]:
    """Let this process be killed before its file operation of that number in `folder`/run.

    Returns:
        What tells how many there have been.
    """
    owner, count, inside = os.getpid(), 0, str(folder / "run")

    def tick(before_death: Callable[[], object] = lambda: None) -> None:
        nonlocal count
        count += 1
        if count == number and os.getpid() == owner:
            before_death()
            os.kill(owner, signal.SIGKILL)

    def watch(event: str, arguments: tuple) -> None:
        wanted = event in WRITES or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR))
        if wanted and str(arguments[0]).startswith(inside):
            tick()

    sync, save = os.fsync, checkpoint.save_file

    def dying_sync(descriptor: int) -> None:
        tick()
        sync(descriptor)

    def dying_save(tensors: dict, file: Path) -> None:
        save(tensors, file)
        tick(lambda: os.truncate(file, file.stat().st_size // 2))

    os.fsync, checkpoint.save_file = dying_sync, dying_save
    sys.addaudithook(watch)
    return lambda: count


def fork(task: Task, folder: Path, rank: int, port: int, at_operation: int | None) -> int:
    """Carry out a session in a child, its output in `folder`/said.txt; return its process id."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        os.setsid()
        said = os.open(folder / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(said, 1)
        os.dup2(said, 2)
        torch.set_num_threads(1)
        if task.num_processes > 1:
            group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": task.num_processes}
            os.environ.update({name: str(value) for name, value in group.items()})
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        count = die_at(at_operation, folder)
        task.work(folder)
        if rank == 0:
            (folder / "operations").write_text(str(count()))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()  # ends data workers, and a process group
        sys.stderr.flush()
        os._exit(code)


def exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def session(task: Task, folder: Path, rng: random.Random, kind: str, scale: float) -> bool:
    """Carry out one session and return whether it was killed.

    Args:
        kind: "whole", or what decides the moment: "time" or "operation".
        scale: the moment is drawn below this many seconds, or file operations.
    """
    victim = rng.randrange(task.num_processes)
    operation = rng.randint(1, int(scale)) if kind == "operation" else None
    port = free_port()
    pids = [
        fork(task, folder, rank, port, operation if rank == victim else None)
        for rank in range(task.num_processes)
    ]
    if kind == "time":
        time.sleep(rng.uniform(0, scale))
        kill = rng.choice([os.kill, os.killpg])  # with its data workers, or without
        with contextlib.suppress(ProcessLookupError):  # it has not come to its setsid
            kill(pids[victim], signal.SIGKILL)
    first = exit_code(pids.pop(victim))
    ended = time.monotonic()
    others = [exit_code(pid) for pid in pids]
    assert time.monotonic() - ended < GROUP_ENDS_WITHIN_SECONDS, "the group outlived its process"
    if first == -signal.SIGKILL:
        return True
    said = (folder / "said.txt").read_text()[-4000:]
    assert (first, *others) == (0,) * task.num_processes, f"{first}, {others}:\n{said}"
    return False


def torture(name: str, task: Task, kills: int, seed: int, place: Path) -> str:
    """Kill runs of a task `kills` times in all; return in words what was seen.

    Raises:
        AssertionError: a run that was killed and gone on with is not the undisturbed one.
    """
    rng = random.Random(f"{name} {seed}")
    folder = place / name
    folder.mkdir()
    started = time.monotonic()
    assert not session(task, folder, rng, "whole", 0)
    seconds = time.monotonic() - started
    (folder / "run").rename(folder / "whole")
    operations = int((folder / "operations").read_text())
    done, runs = 0, 0
    moments = {"time": 0, "operation": 0}
    while done < kills:
        runs += 1
        while True:
            kind = rng.choice(["time", "operation"]) if done < kills else "whole"
            scale = seconds if kind == "time" else operations
            if not session(task, folder, rng, kind, scale):
                break
            done, moments[kind] = done + 1, moments[kind] + 1
        task.same(folder / "whole", folder / "run")
        kept = (".lock", ".plan.json")  # a lock, and what a suite has read of its data
        left = [p for p in (folder / "run").rglob(".*") if p.name not in kept]
        assert not left, f"left behind: {left}"
        shutil.rmtree(folder / "run")
    shutil.rmtree(folder)
    by_time, at_operation = moments.values()
    return (
        f"{name:<20} {done:>3} kills ({by_time} by time, {at_operation} at one of {operations} "
        f"file operations) in {runs} runs: equal to the bit, {time.monotonic() - started:.0f} s"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50, help="of each task")
    parser.add_argument("--tasks", nargs="*", default=[], help="those whose names begin so")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    place = Path(mkdtemp(prefix="torture."))
    write_digit_scenes(place / "scenes", num_train=12, num_test=6, size_px=64)
    known = tasks(place / "scenes")
    chosen = {
        name: task
        for name, task in known.items()
        if not arguments.tasks or name.startswith(tuple(arguments.tasks))
    }
    if not chosen:
        parser.error(f"--tasks {arguments.tasks}: none of {list(known)} begins so")
    for name, task in chosen.items():
        print(torture(name, task, arguments.kills, arguments.seed, place), flush=True)
    shutil.rmtree(place)
    return 0


if __name__ == "__main__":
    sys.exit(main())
