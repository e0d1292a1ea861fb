"""Attempts as tasks of a Ray cluster that is started on this machine."""

import signal

import psutil
import pytest
from suites import ENDS, attempt_in, run_of, wait, wait_for

from tract_transfer.suite.launchers import RayLauncher

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def launcher():
    launcher = RayLauncher(None, 2, num_cpus=2)
    yield launcher
    launcher.close()


@pytest.fixture
def begun(launcher, tmp_path):
    """A run that is running, and its log."""
    run, attempt = run_of(), attempt_in(tmp_path, "import os; print(os.getppid()); " + ENDS)
    launcher.start(run, attempt)
    wait_for("ready", attempt.log)
    return run, attempt.log


def lost(*_, **__):
    raise ray.exceptions.RaySystemError("the cluster is gone")


@pytest.mark.parametrize("code", [0, 3])
def test_task_returns_its_exit_code_and_writes_its_log(launcher, tmp_path, code):
    script = f"import os; print('threads', os.environ['OMP_NUM_THREADS']); raise SystemExit({code})"
    run = run_of(cpus=2)
    launcher.start(run, attempt_in(tmp_path, script))
    assert wait(launcher) == [(run, code)]
    assert (tmp_path / "console.txt").read_text().strip() == "threads 2"
    assert launcher.ended() == []


def test_number_of_running_tasks_is_limited_by_the_workers(launcher, tmp_path):
    runs = [run_of("one"), run_of("two")]
    for run in runs:
        assert launcher.has_room(run)
        launcher.start(run, attempt_in(tmp_path))
    assert not launcher.has_room(run_of("three"))
    ended = wait(launcher)
    while len(ended) < 2:
        ended += wait(launcher)
    assert sorted(run.task for run, _ in ended) == ["one", "two"]


def test_stop_reaches_the_process_of_a_task(launcher, begun):
    launcher.stop(signal.SIGTERM)
    assert wait(launcher) == [(begun[0], 7)]


def test_lost_worker_counts_as_a_kill_and_its_run_ends(launcher, begun):
    run, log = begun
    worker = psutil.Process(int(log.read_text().split()[0]))
    left = worker.children()
    worker.kill()
    assert wait(launcher) == [(run, -9)]
    assert launcher.has_room(run)
    assert len(left) == 1
    assert psutil.wait_procs(left, timeout=60)[1] == []


def test_runs_that_no_machine_can_take_are_refused(launcher):
    launcher.check([run_of(cpus=2)])
    for resources in ({"cpus": 3}, {"gpus": 1}, {"memory_gb": 1e6}):
        with pytest.raises(ValueError, match=r"voc needs .*, and no machine of the Ray cluster"):
            launcher.check([run_of(**resources)])


def test_error_of_ray_fails_the_run_and_not_the_suite(launcher, tmp_path, monkeypatch):
    class Broken:
        remote = staticmethod(lost)

    monkeypatch.setattr(ray, "remote", lambda **_: lambda function: Broken())
    with pytest.raises(OSError, match=r"Ray refused seed 0  voc  vanilla: .*is gone"):
        launcher.start(run_of(), attempt_in(tmp_path))
    monkeypatch.undo()
    run = run_of()
    launcher.start(run, attempt_in(tmp_path))
    for name in ("wait", "get"):
        monkeypatch.setattr(ray, name, lost)
    assert launcher.ended() == [(run, -9)]


def test_running_task_is_not_awaited_if_ray_cannot_report_it(launcher, begun, monkeypatch):
    monkeypatch.setattr(ray, "wait", lost)
    assert launcher.ended() == []
    monkeypatch.undo()
    launcher.stop(signal.SIGTERM)
    assert wait(launcher) == [(begun[0], 7)]
