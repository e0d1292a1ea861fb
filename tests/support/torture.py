"""Kill runs at any moment, resume them, and compare them with undisturbed ones.

python tests/support/torture.py                                  # 50 kills a task
python tests/support/torture.py --kills 3 --tasks probe          # a short one
python tests/support/torture.py --tasks classification --seed 7  # the same moments again
python tests/support/torture.py --kills 8 --signal TERM          # SIGTERM to one process of a group
python tests/support/torture.py --kills 3 --suite X.yaml         # any suite

Half of the kills come at a random time, half at a random file operation in the run folder: before
a file is opened for writing, renamed, removed or synced, or with a checkpoint's tensors half
written. Sessions, and the runs of a suite, are forks of this process, which imports everything once
and never trains.
"""

import argparse
import contextlib
import math
import os
import random
import shutil
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import mkdtemp

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import psutil  # noqa: E402
import torch  # noqa: E402
import torch.utils.tensorboard  # noqa: E402 - imported once, before the forks
from torture_tasks import Task, run_child, suite_task, tasks  # noqa: E402

from tract_transfer.data.digits import write_digit_scenes  # noqa: E402
from tract_transfer.engine import checkpoint  # noqa: E402

GROUP_ENDS_WITHIN_SECONDS = 60
WRITES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")
HIDDEN_FILES = (".lock",)


def die_at(number: int | None, folder: Path) -> Callable[[], int]:
    """Kill this process before its file operation of that number in `folder`/run.

    Returns:
        A function that returns the number of operations so far.
    """
    owner, count, inside = os.getpid(), 0, str(folder / "run")
    sync, save = os.fsync, checkpoint.save_file

    def tick(before_death: Callable[[], object] = lambda: None) -> None:
        nonlocal count
        count += 1
        if count == number and os.getpid() == owner:
            before_death()
            os.kill(owner, signal.SIGKILL)

    def watch(event: str, arguments: tuple) -> None:
        opens = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (opens or event in WRITES) and str(arguments[0]).startswith(inside):
            tick()

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
    """Run a session in a child, its output in `folder`/output.txt; return its process id."""

    def work() -> None:
        torch.set_num_threads(1)
        if task.num_processes > 1:
            group = {
                "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": task.num_processes,
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            }  # fmt: skip
            os.environ.update({name: str(value) for name, value in group.items()})
        count = die_at(at_operation, folder)
        task.work(folder)
        if rank == 0:
            (folder / "operations").write_text(str(count()))

    return run_child(work, folder / "output.txt")


def exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def session(
    task: Task,
    folder: Path,
    rng: random.Random,
    kind: str,
    scale: float = 0,
    number: int = signal.SIGKILL,
) -> bool:
    """Run one session and return whether it was killed.

    Args:
        kind: "whole", or what decides the moment: "time" or "operation".
        scale: the moment is drawn below this many seconds or file operations.
        number: the signal that comes at a time.
    """
    victim, port = rng.randrange(task.num_processes), free_port()
    operation = rng.randint(1, int(scale)) if kind == "operation" else None
    pids = [
        fork(task, folder, rank, port, operation if rank == victim else None)
        for rank in range(task.num_processes)
    ]
    if kind == "time":
        time.sleep(rng.uniform(0, scale))
        processes = [psutil.Process(pids[victim])]
        if rng.random() < 0.5:  # with its data workers or the runs of a suite, or without
            processes += processes[0].children(recursive=True)
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
    first = exit_code(pids.pop(victim))
    ended = time.monotonic()
    others = [exit_code(pid) for pid in pids]
    assert time.monotonic() - ended < GROUP_ENDS_WITHIN_SECONDS, "the group outlived its process"
    if first == -number:
        return True  # if nothing handled the signal yet, the others end as they can
    output = (folder / "output.txt").read_text()[-4000:]
    if first == 128 + number:
        # Before the training one process ends at once, and the others lose it.
        lost = {1} if "processes of the group has ended" in output else set()
        assert set(others) <= {first, 0} | lost, f"{others}:\n{output}"
        return True
    assert (first, *others) == (0,) * task.num_processes, f"{first}, {others}:\n{output}"
    return False


def torture(name: str, task: Task, kills: int, seed: int, root: Path, number: int) -> str:
    """Kill and resume runs of a task until there were `kills`; return a line of results.

    Raises:
        AssertionError: a resumed run differs from the undisturbed one.
    """
    rng = random.Random(f"{name} {seed}")
    folder = root / name
    folder.mkdir()
    started = time.monotonic()
    assert not session(task, folder, rng, "whole")
    scales = {"time": time.monotonic() - started}
    (folder / "run").rename(folder / "whole")
    operations = int((folder / "operations").read_text())
    if number == signal.SIGKILL:
        scales["operation"] = operations
    done, runs = Counter[str](), 0
    while done.total() < kills:
        runs += 1
        kind = rng.choice(list(scales))
        while session(task, folder, rng, kind, scales.get(kind, 0), number):
            done[kind] += 1
            kind = rng.choice(list(scales)) if done.total() < kills else "whole"
        task.assert_same(folder / "whole", folder / "run")
        left = [p for p in (folder / "run").rglob(".*") if p.name not in HIDDEN_FILES]
        assert not left, f"left behind: {left}"
        shutil.rmtree(folder / "run")
    shutil.rmtree(folder)
    return (
        f"{name:<20} {done.total():>3} {signal.Signals(number).name}s ({done['time']} by time, "
        f"{done['operation']} at one of {operations} file operations) in {runs} runs: "
        f"equal to the bit, {time.monotonic() - started:.0f} s"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50, help="of each task, over its kinds")
    parser.add_argument("--tasks", nargs="*", default=[""], help="prefixes of their names")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signal", choices=["KILL", "TERM"], default="KILL")
    parser.add_argument("--suite", type=Path, metavar="FILE", help="a suite in place of the tasks")
    arguments = parser.parse_args()
    root = Path(mkdtemp(prefix="torture."))
    write_digit_scenes(root / "scenes", num_train=12, num_test=6, size_px=64)
    available = tasks(root / "scenes")
    if arguments.suite:
        available = {arguments.suite.stem: suite_task(arguments.suite)}
    chosen = {k: task for k, task in available.items() if k.startswith(tuple(arguments.tasks))}
    if not chosen:
        parser.error(f"--tasks {arguments.tasks}: no name starts with one of these")
    kinds = Counter(name.partition("-")[0] for name in chosen)
    number = signal.Signals[f"SIG{arguments.signal}"]
    for name, task in chosen.items():
        kills = math.ceil(arguments.kills / kinds[name.partition("-")[0]])
        print(torture(name, task, kills, arguments.seed, root, number), flush=True)
    shutil.rmtree(root)
    return 0


if __name__ == "__main__":
    sys.exit(main())
