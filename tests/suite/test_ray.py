"""Attempts as tasks of a Ray cluster that is started on this machine."""

import signal
import sys

import psutil
import pytest
from attempts import ENDS, run_of, wait, wait_for

from tract_transfer.suite.cluster import RayLauncher
from tract_transfer.suite.launchers import Attempt

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def launcher():
    launcher = RayLauncher(None, 2, num_cpus=2)
    yield launcher
    launcher.close()


@pytest.fixture
def attempt(tmp_path):
    def build(script):
        command = [sys.executable, "-S", "-c", script]
        return Attempt(command, tmp_path / "console.txt", {}, tmp_path / "stop")

    return build


@pytest.mark.parametrize("code", [0, 3])
def test_a_task_says_how_it_ended_and_leaves_its_log(launcher, attempt, code):
    script = f"import os; print('threads', os.environ['OMP_NUM_THREADS']); raise SystemExit({code})"
    run = run_of(cpus=2)
    launcher.start(run, attempt(script))
    assert wait(launcher) == [(run, code)]
    assert attempt("").log.read_text().strip() == "threads 2"
    assert launcher.ended() == []


def test_no_more_than_the_workers_are_under_way(launcher, attempt):
    runs = [run_of("one"), run_of("two")]
    for run in runs:
        assert launcher.has_room(run)
        launcher.start(run, attempt("pass"))
    assert not launcher.has_room(run_of("three"))
    ended = wait(launcher)
    while len(ended) < 2:
        ended += wait(launcher)
    assert sorted(run.task for run, _ in ended) == ["one", "two"]


def test_a_stop_reaches_the_process_of_a_task(launcher, attempt):
    run = run_of()
    launcher.start(run, attempt(ENDS))
    wait_for("ready", attempt("").log)
    launcher.stop(signal.SIGTERM)
    assert wait(launcher) == [(run, 7)]


def test_a_worker_that_dies_counts_as_a_kill_of_its_run(launcher, attempt):
    """As when a machine is lost: the suite counts it, tries again, and goes on with the others."""
    run = run_of()
    launcher.start(run, attempt("import os; print(os.getppid(), flush=True); " + ENDS))
    wait_for("ready", attempt("").log)
    worker = psutil.Process(int(attempt("").log.read_text().split()[0]))
    left = worker.children()
    worker.kill()
    assert wait(launcher) == [(run, -9)]
    assert launcher.has_room(run)
    assert len(left) == 1
    assert psutil.wait_procs(left, timeout=60)[1] == []  # it was asked to end, and did


def test_what_no_machine_has_is_refused_first(launcher):
    launcher.check([run_of(cpus=2)])
    for resources in ({"cpus": 3}, {"gpus": 1}, {"memory_gb": 1e6}):
        with pytest.raises(ValueError, match=r"voc asks for .*, and no machine of the Ray cluster"):
            launcher.check([run_of(**resources)])


def test_an_error_of_ray_fails_the_run_and_not_the_suite(launcher, attempt, monkeypatch):
    class Broken:
        def remote(self, attempt):
            raise ray.exceptions.RaySystemError("the cluster is gone")

    monkeypatch.setattr(ray, "remote", lambda **_: lambda function: Broken())
    with pytest.raises(OSError, match=r"Ray does not take seed 0  voc  vanilla: .*is gone"):
        launcher.start(run_of(), attempt("pass"))
    monkeypatch.undo()

    def lost(*_, **__):
        raise ray.exceptions.RaySystemError("the cluster is gone")

    run = run_of()
    launcher.start(run, attempt("pass"))
    for name in ("wait", "get"):
        monkeypatch.setattr(ray, name, lost)
    assert launcher.ended() == [(run, -9)]


def test_a_run_that_goes_on_is_not_waited_for_where_ray_cannot_tell(launcher, attempt, monkeypatch):
    def lost(*_, **__):
        raise ray.exceptions.RaySystemError("nothing is known now")

    run = run_of()
    launcher.start(run, attempt(ENDS))
    wait_for("ready", attempt("").log)
    monkeypatch.setattr(ray, "wait", lost)
    assert launcher.ended() == []
    monkeypatch.undo()
    launcher.stop(signal.SIGTERM)
    assert wait(launcher) == [(run, 7)]
