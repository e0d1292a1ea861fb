"""Attempts, and launchers: processes of this machine, jobs of Slurm (by submitit's local executor),
and tasks of a Ray cluster on this machine."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest.mock import Mock

import psutil
import pytest
from suites import COUNTS, ENDS, attempt_in, run_of, wait, wait_for

from tract_transfer.suite.launchers import (
    LocalLauncher,
    RayLauncher,
    SlurmLauncher,
    this_machine,
    why_it_ended,
    write_stop_file,
)

# Ends by SIGTERM as a run does, and resumes from what it left then.
RUN = """
import os, signal, sys, time
if os.path.exists("checkpoint"):
    print("resumed", flush=True)
    sys.exit(0)
def end(*_):
    open("checkpoint", "w").close()
    sys.exit(143)
signal.signal(signal.SIGTERM, end)
print("ready", flush=True)
time.sleep(60)
"""


def make(workers=1, cores=4, gpus=(), memory_gb=8.0):
    return LocalLauncher(workers, cores=cores, gpus=gpus, memory_gb=memory_gb)


@pytest.fixture
def log(tmp_path):
    return tmp_path / "console.txt"


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """submitit's executor on this machine."""
    pytest.importorskip("submitit")
    monkeypatch.chdir(tmp_path)
    return SlurmLauncher(tmp_path / "slurm", 1, cluster="local")


@pytest.fixture(scope="module")
def ray_launcher():
    pytest.importorskip("ray")
    launcher = RayLauncher(None, 1, num_cpus=2)
    yield launcher
    launcher.close()


@pytest.fixture(params=["local", "slurm", pytest.param("ray", marks=pytest.mark.slow)])
def launcher(request):
    """Each launcher, with one worker."""
    names = {"slurm": "slurm", "ray": "ray_launcher"}
    return make() if request.param == "local" else request.getfixturevalue(names[request.param])


def begin(attempt):
    """Call an attempt in a thread, wait until it is ready; return the thread and its exit codes."""
    codes = []
    thread = threading.Thread(target=lambda: codes.append(attempt()))
    thread.start()
    wait_for("ready", attempt.log)
    return thread, codes


# One attempt


def test_attempt_returns_its_exit_code_and_appends_to_its_log(tmp_path, log):
    script = "import os, sys; print(os.environ['A']); print('why', file=sys.stderr); sys.exit(4)"
    assert [attempt_in(tmp_path, script, A=word)() for word in ("one", "two")] == [4, 4]
    assert sorted(log.read_text().split()) == ["one", "two", "why", "why"]


@pytest.mark.parametrize("session", ["this", "another"])
def test_stop_or_another_session_ends_an_attempt_and_keeps_a_queued_one_from_starting(
    tmp_path, log, session
):
    attempt = attempt_in(tmp_path, ENDS)
    write_stop_file(attempt.stop_file, "this")
    thread, codes = begin(attempt)
    attempt.stop_file.write_text("")  # it is being written
    write_stop_file(attempt.stop_file, session, signal.SIGTERM if session == "this" else 0)
    thread.join(60)
    assert codes == [7]
    log.unlink()
    assert attempt() == 128 + signal.SIGTERM
    assert not log.exists()


def test_stopped_attempt_gets_no_second_signal_when_slurm_takes_the_machine(tmp_path, log):
    """It would end the run before its checkpoint is written."""
    pytest.importorskip("submitit")
    attempt = attempt_in(tmp_path, COUNTS)
    thread, codes = begin(attempt)
    attempt.stop(signal.SIGTERM)
    wait_for("ending", log)
    requeued = attempt.checkpoint().function
    thread.join(60)
    assert codes == [21]
    assert requeued() == 128 + signal.SIGTERM  # it was stopped, so it does not start again


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's own signal")
def test_attempt_gets_one_signal_when_the_suite_is_killed(tmp_path, log):
    """Importing launchers is cheap: Ray's and Slurm's machines do so beside every run."""
    script = (
        "import sys, time; from pathlib import Path; from tract_transfer.suite.launchers import *\n"
        "assert 'torch' not in sys.modules\n"
        "command = [sys.executable, '-S', '-c', sys.argv[2]]\n"
        "Attempt(command, Path(sys.argv[1]), Path('stop'), '').start(); time.sleep(60)"
    )
    command = [sys.executable, "-c", script, str(log), COUNTS]
    with subprocess.Popen(command, cwd=Path(__file__).parents[2]) as suite:
        wait_for("ready", log)
        suite.kill()
    wait_for("ended by", log)
    assert log.read_text().splitlines()[-1] == "ended by 1"


@pytest.mark.parametrize(
    ("code", "text", "why"),
    [
        (-9, "iter 3\n", "ended by signal 9 (Killed), as when memory runs out; see {log}"),
        (-11, "iter 3\n", "ended by signal 11 (Segmentation fault); see {log}"),
        (1, None, "exit code 1 (see {log})"),
        (1, "", "exit code 1 (see {log})"),
        (1, "a\nNoRoomError: /x\nMake room.\n", "NoRoomError: /x Make room. (see {log})"),
        (2, "first\nlast\n", "last (see {log})"),
        (2, "iter 3\nerror: No x.\nSet y.\n", "No x. Set y. (see {log})"),
        (1, "failed: NonFiniteError: x\n", "NonFiniteError: x (see {log})"),
    ],
)
def test_failure_is_explained_by_the_last_error(log, code, text, why):
    if text is not None:
        log.write_text(text)
    assert why_it_ended(code, log) == why.format(log=log)


def test_long_errors_are_cut(log):
    log.write_text("OldError: x\n" + "line\n" * 5000 + "ValueError: " + "long " * 500)
    assert why_it_ended(1, log).startswith("ValueError: long")
    assert len(why_it_ended(1, log)) < 1400


# Every launcher


@pytest.mark.parametrize("code", [0, 3])
def test_run_ends_with_its_exit_code_and_writes_its_log(launcher, tmp_path, log, code):
    script = f"import os; print('threads', os.environ['OMP_NUM_THREADS']); raise SystemExit({code})"
    run = run_of(cpus=2, hours=0.1)
    launcher.check([run])
    assert launcher.has_room(run)
    launcher.start(run, attempt_in(tmp_path, script))
    assert not launcher.has_room(run_of("other", hours=0.1))
    assert wait(launcher) == [(run, code)]
    assert launcher.ended() == []
    assert launcher.has_room(run)
    assert log.read_text().strip() == "threads 2"


def test_stop_lets_a_run_end_by_itself(launcher, tmp_path, log):
    run = run_of(hours=0.1)
    launcher.start(run, attempt_in(tmp_path, ENDS))
    wait_for("ready", log)
    launcher.stop(signal.SIGTERM)
    assert wait(launcher) == [(run, 7)]


@pytest.mark.parametrize("launcher", ["local", "slurm"], indirect=True)
def test_kill_ends_a_run_with_all_its_processes(launcher, tmp_path, log, monkeypatch):
    if isinstance(launcher, SlurmLauncher):  # submitit waits 15 seconds for a lost result
        monkeypatch.setattr("submitit.core.core.Job._results_timeout_s", 0.1)
    run = run_of(hours=0.1)
    launcher.start(run, attempt_in(tmp_path, f"import os; print(os.getpid()); {ENDS}"))
    wait_for("ready", log)
    launcher.stop(signal.SIGKILL)
    assert wait(launcher) == [(run, -9)]
    assert has_ended(int(log.read_text().split()[0]))


def has_ended(pid, seconds=60):
    """Whether a process ends in time."""
    end = time.monotonic() + seconds
    with contextlib.suppress(psutil.NoSuchProcess):
        while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            if time.monotonic() > end:
                return False
            time.sleep(0.02)
    return True


NO_MACHINE = "voc needs .*, and no machine of the Ray cluster"
IMPOSSIBLE = {
    "more cpus than the machine has": ("local", {"cpus": 5}, r"cpus: voc needs 5, and .* 4"),
    "more GPUs than the machine has": ("local", {"gpus": 1}, r"gpus: voc needs 1, and .* 0"),
    "more memory than the machine has": ("local", {"memory_gb": 9}, r"memory_gb: voc needs 9"),
    "a Slurm run without hours": ("slurm", {}, r"resources\.hours: voc has none"),
    "half a GPU on Slurm": ("slurm", {"hours": 1, "gpus": 0.5}, r"resources\.gpus: voc needs 0\.5"),
    "cpus of Ray": ("ray", {"cpus": 3}, NO_MACHINE),
    "gpus of Ray": ("ray", {"gpus": 1}, NO_MACHINE),
    "memory of Ray": ("ray", {"memory_gb": 1e6}, NO_MACHINE),
}  # fmt: skip


@pytest.mark.parametrize(
    ("launcher", "resources", "message", "name"),
    [(*row, name) for name, row in IMPOSSIBLE.items()],
    indirect=["launcher"], ids=IMPOSSIBLE,
)  # fmt: skip
def test_runs_that_can_never_start_are_refused(launcher, resources, message, name, refused):
    catch = refused(name, ValueError, match=message)
    if isinstance(launcher, RayLauncher):  # not in the page of errors: Ray is not always installed
        catch = pytest.raises(ValueError, match=message)
    with catch:
        launcher.check([run_of(**resources)])


# This machine


@pytest.mark.parametrize(
    ("launcher", "first", "second", "fits"),
    [
        (make(workers=2), {}, {}, True),
        (make(workers=1), {}, {}, False),
        (make(workers=2), {"cpus": 3}, {"cpus": 1}, True),
        (make(workers=2), {"cpus": 3}, {"cpus": 2}, False),
        (make(workers=2), {"memory_gb": 5}, {"memory_gb": 3}, True),
        (make(workers=2), {"memory_gb": 5}, {"memory_gb": 4}, False),
        (make(workers=2, gpus=("0",)), {"gpus": 0.5}, {"gpus": 0.5}, True),
        (make(workers=2, gpus=("0",)), {"gpus": 0.5}, {"gpus": 0.6}, False),
        (make(workers=2, gpus=("0",)), {}, {}, False),  # one each, if there are any
        (make(workers=2, gpus=("0",)), {}, {"gpus": 0}, True),
    ],
)
def test_run_waits_for_its_resources(launcher, first, second, fits, tmp_path):
    one, two = run_of("one", **first), run_of("two", **second)
    assert launcher.has_room(one)
    launcher.start(one, attempt_in(tmp_path))
    assert launcher.has_room(two) is fits
    assert wait(launcher) == [(one, 0)]
    assert launcher.has_room(two)


def test_runs_get_their_gpus_and_threads_and_give_them_back(tmp_path, log, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    script = (
        "import os; print(os.environ['CUDA_VISIBLE_DEVICES'] or '-', os.environ['MKL_NUM_THREADS'])"
    )
    launcher = make(workers=2, gpus=("4", "7"))
    for resources in ({"gpus": 2}, {"gpus": 2, "cpus": 4}, {"gpus": 1}, {"gpus": 0, "cpus": 3}):
        launcher.start(run_of(**resources), attempt_in(tmp_path, script))
        wait(launcher)
    for limit in ("1", "9"):
        monkeypatch.setenv("OMP_NUM_THREADS", limit)
        launcher.start(run_of(gpus=0), attempt_in(tmp_path, script))
        wait(launcher)
    assert log.read_text().splitlines() == ["4,7 1", "4,7 2", "4 2", "- 3", "- 1", "- 2"]


def test_processes_of_a_failed_run_end_with_it(tmp_path, log):
    """A data worker, say."""
    script = (
        "import subprocess, sys\n"
        "print(subprocess.Popen(['sleep', '60']).pid, flush=True)\n"
        "sys.exit(1)"
    )
    launcher = make()
    launcher.start(run_of(), attempt_in(tmp_path, script))
    wait(launcher)
    assert has_ended(int(log.read_text()))


@pytest.mark.parametrize(("visible", "count"), [("0, GPU-5f,", 2), ("-1", 0), ("", 0)])
def test_this_machine_is_measured(monkeypatch, visible, count):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    launcher = this_machine(5)
    assert launcher.workers == 5
    assert 1 <= launcher.cores <= psutil.cpu_count()
    assert launcher.memory_gb == pytest.approx(psutil.virtual_memory().total / 2**30)
    with pytest.raises(ValueError, match=f"needs 3, and this machine has {count}"):
        launcher.check([run_of(gpus=3)])


# Ray


@pytest.mark.slow
class TestRay:
    def test_lost_worker_counts_as_a_kill_and_its_run_ends(self, ray_launcher, tmp_path, log):
        run, script = run_of(), f"import os; print(os.getppid()); {ENDS}"
        ray_launcher.start(run, attempt_in(tmp_path, script))
        wait_for("ready", log)
        worker = psutil.Process(int(log.read_text().split()[0]))
        left = worker.children()
        worker.kill()
        assert wait(ray_launcher) == [(run, -9)]
        assert len(left) == 1
        assert psutil.wait_procs(left, timeout=60)[1] == []

    def test_error_of_ray_fails_the_run(self, ray_launcher, tmp_path, monkeypatch):
        ray = pytest.importorskip("ray")
        lost = Mock(side_effect=ray.exceptions.RaySystemError("the cluster is gone"))
        monkeypatch.setattr("ray.remote", lambda **_: lambda function: Mock(remote=lost))
        with pytest.raises(OSError, match=r"Ray refused seed 0  voc  vanilla: .*is gone"):
            ray_launcher.start(run_of(), attempt_in(tmp_path))
        monkeypatch.undo()
        run = run_of()
        ray_launcher.start(run, attempt_in(tmp_path))
        monkeypatch.setattr("ray.get", lost)
        assert ray_launcher.ended() == [(run, -9)]


# Slurm


def test_machine_without_slurm_is_refused(tmp_path, monkeypatch, refused):
    pytest.importorskip("submitit")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with refused("--launcher slurm without Slurm", ValueError, match="no sbatch"):
        SlurmLauncher(tmp_path, 1)


def test_preempted_job_is_queued_again_and_resumes(slurm, tmp_path, log):
    run = run_of(hours=0.1)
    slurm.start(run, attempt_in(tmp_path, RUN))
    wait_for("ready", log)
    for task in psutil.Process(int(slurm._running[run][0].job_id)).children():
        task.send_signal(signal.SIGUSR2)  # as Slurm does
    assert wait(slurm) == [(run, 0)]
    assert log.read_text().split() == ["ready", "resumed"]


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """Returns a launcher with commands in place of Slurm's, which write `called`."""
    pytest.importorskip("submitit")

    def make(sbatch):
        (tmp_path / "bin").mkdir()
        scripts = {"sbatch": sbatch, "srun": "", "scancel": "", "sacct": "exit 1"}
        for name, script in scripts.items():
            file = tmp_path / "bin" / name
            file.write_text(f'#!/bin/sh\necho "{name} $*" >> {tmp_path}/called\n{script}\n')
            file.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
        return SlurmLauncher(tmp_path / "slurm", None)

    return make


def test_job_that_slurm_refuses_is_a_failure_of_its_run(commands, tmp_path):
    slurm = commands("echo 'error: QOSMaxSubmitJobPerUserLimit' >&2; exit 1")
    with pytest.raises(OSError, match=r"seed 0  voc.*QOSMaxSubmitJobPerUserLimit.* workers"):
        slurm.start(run_of(hours=1), attempt_in(tmp_path))


def test_stopped_job_is_cancelled_only_while_it_is_queued(commands, tmp_path):
    """A running one may write a checkpoint. A second signal cancels it."""
    slurm = commands("echo Submitted batch job 7")
    slurm.start(run_of(hours=1), attempt_in(tmp_path))
    for number in (signal.SIGTERM, signal.SIGKILL):
        slurm.stop(number)
        assert (tmp_path / "stop").read_text() == f"this {int(number)}"
    called = (tmp_path / "called").read_text().splitlines()
    cancelled = [line for line in called if line.startswith("scancel")]
    assert cancelled == ["scancel --state=PENDING 7", "scancel 7"]
