"""Attempts as processes of this machine: who may start, what each is given, how each ends."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from suites import COUNTS, ENDS, attempt_in, run_of, wait, wait_for

from tract_transfer.suite.launchers import (
    LocalLauncher,
    find_gpus,
    this_machine,
    thread_variables,
    why_it_ended,
)


def make(workers=1, cores=4, gpus=(), memory_gb=8.0):
    return LocalLauncher(workers, cores=cores, gpus=gpus, memory_gb=memory_gb)


@pytest.fixture
def log(tmp_path):
    return tmp_path / "console.txt"


def begin(attempt):
    """Call an attempt in a thread, wait until it is ready; return the thread and its exit codes."""
    codes = []
    thread = threading.Thread(target=lambda: codes.append(attempt()))
    thread.start()
    wait_for("ready", attempt.log)
    return thread, codes


def test_attempt_returns_its_exit_code_and_appends_to_its_log(tmp_path, log):
    script = "import os, sys; print(os.environ['A']); print('why', file=sys.stderr); sys.exit(4)"
    assert [attempt_in(tmp_path, script, A=word)() for word in ("one", "two")] == [4, 4]
    assert sorted(log.read_text().split()) == ["one", "two", "why", "why"]


def test_stop_file_stops_an_attempt_and_keeps_a_queued_one_from_starting(tmp_path, log):
    attempt = attempt_in(tmp_path, ENDS)
    thread, codes = begin(attempt)
    attempt.stop(signal.SIGTERM)
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
    script = (
        "import sys, time; from pathlib import Path; from suites import COUNTS, attempt_in\n"
        "attempt_in(Path(sys.argv[1]), COUNTS).start(); time.sleep(60)"
    )
    paths = os.pathsep.join([*map(str, Path(__file__).parents[1:3]), *sys.path])
    paths = f"{Path(__file__).parents[1] / 'support'}{os.pathsep}{paths}"
    command = [sys.executable, "-c", script, str(tmp_path)]
    suite = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths})
    with suite:
        wait_for("ready", log)
        suite.kill()
    wait_for("ended by 1", log)


@pytest.mark.parametrize(
    ("code", "text", "why"),
    [
        (-9, "iter 3\n", "ended by SIGKILL, as when memory runs out; see {log}"),
        (-11, "iter 3\n", "ended by SIGSEGV; see {log}"),
        (-200, "", "ended by signal 200; see {log}"),
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


def test_only_the_end_of_a_long_log_is_read_and_long_errors_are_cut(log):
    log.write_text("OldError: x\n" + "line\n" * 5000 + "ValueError: " + "long " * 500)
    why = why_it_ended(1, log)
    assert why.startswith("ValueError: long")
    assert len(why) < 1400


@pytest.mark.parametrize(
    ("resources", "message"),
    [
        ({"cpus": 5}, r"resources\.cpus: voc needs 5, and this machine has 4"),
        ({"gpus": 1}, r"resources\.gpus: voc needs 1, and this machine has 0"),
        ({"memory_gb": 9}, r"resources\.memory_gb: voc needs 9, and this machine has 8"),
    ],
)
def test_runs_that_need_more_than_the_machine_has_are_refused(resources, message):
    make().check([run_of(cpus=4, memory_gb=8.0)])
    with pytest.raises(ValueError, match=message):
        make().check([run_of(), run_of(**resources)])


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
    assert launcher.ended() == []
    assert launcher.has_room(two)


def test_runs_get_their_gpus_and_threads_and_give_them_back(tmp_path, log, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    script = (
        "import os; print(os.environ['CUDA_VISIBLE_DEVICES'] or '-', os.environ['OMP_NUM_THREADS'])"
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
    assert set(thread_variables(3).values()) == {"3"}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 7), (signal.SIGKILL, -9)])
def test_stop_lets_a_run_end_by_itself_and_a_kill_does_not(tmp_path, log, number, code):
    launcher, run = make(), run_of()
    launcher.start(run, attempt_in(tmp_path, ENDS))
    wait_for("ready", log)
    launcher.stop(number)
    assert wait(launcher) == [(run, code)]


def test_processes_of_a_failed_run_end_with_it(tmp_path, log):
    """A data worker, say."""
    script = (
        "import subprocess, sys\n"
        "print(subprocess.Popen(['sleep', '60']).pid, flush=True)\n"
        "sys.exit(1)"
    )
    launcher, run = make(), run_of()
    launcher.start(run, attempt_in(tmp_path, script))
    assert wait(launcher) == [(run, 1)]
    child = int(log.read_text())
    end = time.monotonic() + 10
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end
        time.sleep(0.02)


def test_visible_gpus_are_found():
    assert find_gpus({"CUDA_VISIBLE_DEVICES": "0, GPU-5f,"}) == ["0", "GPU-5f"]
    for none in ("-1", ""):
        assert find_gpus({"CUDA_VISIBLE_DEVICES": none}) == []


def test_this_machine_is_measured(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    launcher = this_machine(5)
    assert launcher.workers == 5
    assert 1 <= launcher.cores <= psutil.cpu_count()
    assert launcher.memory_gb == pytest.approx(psutil.virtual_memory().total / 2**30)
    launcher.check([run_of(gpus=1)])
