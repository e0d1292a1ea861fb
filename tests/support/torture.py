"""Kill runs with SIGKILL at any moment, go on with them, and compare with undisturbed ones.

python tests/support/torture.py                                  # 50 kills a task
python tests/support/torture.py --kills 3 --tasks probe          # a short one
python tests/support/torture.py --tasks classification --seed 7  # the same moments again
python tests/support/torture.py --kills 8 --signal TERM          # SIGTERM to one process of a group

Every second kill comes at a random moment, the others at a random file operation in the run folder:
before a file is opened to be written, renamed, removed or synced, or with a checkpoint's tensors
half-written. Sessions are forks of this process, which imports everything once and never trains.
"""

import argparse
import atexit
import contextlib
import math
import os
import random
import shutil
import signal
import socket
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import mkdtemp

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
import torch.utils.tensorboard  # noqa: E402 - imported once, before the forks
from torture_tasks import Task, tasks  # noqa: E402

import tract_transfer.report.write  # noqa: E402, F401
from tract_transfer.data.digits import write_digit_scenes  # noqa: E402
from tract_transfer.engine import checkpoint  # noqa: E402

GROUP_ENDS_WITHIN_SECONDS = 60
WRITES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")


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
    except BaseException as end:
        traceback.print_exc()
        found = end.code if isinstance(end, SystemExit) else getattr(end, "exit_code", None)
        code = found if isinstance(found, int) else 1
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


def session(
    task: Task,
    folder: Path,
    rng: random.Random,
    kind: str,
    scale: float = 0,
    number: int = signal.SIGKILL,
) -> bool:
    """Carry out one session and return whether it was ended.

    Args:
        kind: "whole", or what decides the moment: "time" or "operation".
        scale: the moment is drawn below this many seconds, or file operations.
        number: the signal that comes at a time.
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
            kill(pids[victim], number)
    first = exit_code(pids.pop(victim))
    ended = time.monotonic()
    others = [exit_code(pid) for pid in pids]
    assert time.monotonic() - ended < GROUP_ENDS_WITHIN_SECONDS, "the group outlived its process"
    if first == -number:
        return True  # where nothing heeded the signal yet, the others end as they can
    said = (folder / "said.txt").read_text()[-4000:]
    if first == 128 + number:
        # Before the training one process ends at once, and the others learn it.
        told = "processes of the group has ended" in said
        assert set(others) <= ({first, 0, 1} if told else {first, 0}), f"{others}:\n{said}"
        return True
    assert (first, *others) == (0,) * task.num_processes, f"{first}, {others}:\n{said}"
    return False


def torture(name: str, task: Task, kills: int, seed: int, place: Path, number: int) -> str:
    """End runs of a task `kills` times in all by a signal; return in words what was seen.

    Raises:
        AssertionError: a run that was killed and gone on with is not the undisturbed one.
    """
    rng = random.Random(f"{name} {seed}")
    folder = place / name
    folder.mkdir()
    started = time.monotonic()
    assert not session(task, folder, rng, "whole")
    seconds = time.monotonic() - started
    (folder / "run").rename(folder / "whole")
    operations = int((folder / "operations").read_text())
    done, runs = 0, 0
    moments = {"time": 0, "operation": 0}
    kinds = list(moments) if number == signal.SIGKILL else ["time"]
    while done < kills:
        runs += 1
        while True:
            kind = rng.choice(kinds) if done < kills else "whole"
            scale = seconds if kind == "time" else operations
            if not session(task, folder, rng, kind, scale, number):
                break
            done, moments[kind] = done + 1, moments[kind] + 1
        task.same(folder / "whole", folder / "run")
        kept = (".lock", ".plan.json")  # a lock, and what a suite has read of its data
        left = [p for p in (folder / "run").rglob(".*") if p.name not in kept]
        assert not left, f"left behind: {left}"
        shutil.rmtree(folder / "run")
    shutil.rmtree(folder)
    by_time, at_operation = moments.values()
    seconds = time.monotonic() - started
    return (
        f"{name:<20} {done:>3} {signal.Signals(number).name}s ({by_time} by time, "
        f"{at_operation} at one of {operations} file operations) in {runs} runs: "
        f"equal to the bit, {seconds:.0f} s"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50, help="of each task, over its kinds")
    parser.add_argument("--tasks", nargs="*", default=[], help="those whose names begin so")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signal", choices=["KILL", "TERM"], default="KILL")
    arguments = parser.parse_args()
    number = signal.Signals[f"SIG{arguments.signal}"]
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
    kinds = Counter(name.partition("-")[0] for name in chosen)
    for name, task in chosen.items():
        kills = math.ceil(arguments.kills / kinds[name.partition("-")[0]])
        print(torture(name, task, kills, arguments.seed, place, number), flush=True)
    shutil.rmtree(place)
    return 0


if __name__ == "__main__":
    sys.exit(main())
