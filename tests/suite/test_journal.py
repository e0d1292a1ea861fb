"""suite.json, and the lock of a suite's folder."""

import subprocess
import sys
from pathlib import Path

import pytest

from tract_transfer.report.runs import read_suite
from tract_transfer.suite.journal import Job, Journal, SuiteLock
from tract_transfer.suite.plan import PlannedRun


def jobs_in(folder):
    pre = PlannedRun("a" * 12, "vanilla", "pretrain", 0, {}, folder / "vanilla/pretrain/seed0")
    probe = PlannedRun(
        "b" * 12, "vanilla", "probe", 0, {}, folder / "vanilla/probe/seed0", pre.folder,
        also=("low_lr",),
    )  # fmt: skip
    return [Job(pre), Job(probe)]


def journal_of(folder):
    return Journal(folder, title="Does it?", baseline="vanilla", methods=["vanilla", "low_lr"])


def test_what_is_written_the_report_can_read(tmp_path):
    jobs = jobs_in(tmp_path)
    jobs[0].state, jobs[1].error = "finished", "why"
    journal_of(tmp_path).write(jobs)
    suite = read_suite(tmp_path / "suite.json")
    assert (suite["baseline"], suite["methods"]) == ("vanilla", ["vanilla", "low_lr"])
    assert (suite["tasks"], suite["seeds"]) == (["pretrain", "probe"], [0])
    assert suite["runs"][1] == {
        "id": "b" * 12, "method": "vanilla", "task": "probe", "seed": 0,
        "folder": "vanilla/probe/seed0", "needs": "vanilla/pretrain/seed0", "state": "waiting",
        "attempts": 0, "error": "why", "seconds": None, "also": ["low_lr"], "config_sha256": "",
        "spent": 0.0, "begun_with": None,
    }  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["suite.json"]


def test_the_past_of_the_same_run_is_recalled_and_not_its_state(tmp_path):
    jobs = jobs_in(tmp_path)
    jobs[0].state, jobs[0].attempts, jobs[0].seconds = "finished", 2, 3.5
    jobs[0].config_sha256, jobs[0].spent, jobs[0].begun_with = "c0ffee", 3.5, "w1"
    journal_of(tmp_path).write(jobs)
    first, second = journal_of(tmp_path).recall([job.run for job in jobs])
    assert (first.attempts, first.seconds, first.spent) == (2, 3.5, 3.5)
    assert (first.config_sha256, first.begun_with) == ("c0ffee", "w1")
    assert first.state == second.state == "waiting"
    other = PlannedRun("c" * 12, "vanilla", "pretrain", 0, {}, jobs[0].run.folder)
    (changed,) = journal_of(tmp_path).recall([other])
    assert (changed.attempts, changed.config_sha256) == (0, "")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"runs": [{}]}', '{"runs": 3}'])
def test_a_broken_file_is_as_none(tmp_path, text):
    (tmp_path / "suite.json").write_text(text)
    jobs = journal_of(tmp_path).recall([job.run for job in jobs_in(tmp_path)])
    assert [(job.attempts, job.state) for job in jobs] == [(0, "waiting")] * 2


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    journal_of(tmp_path).write(jobs_in(tmp_path))
    before = (tmp_path / "suite.json").read_text()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        journal_of(tmp_path).write(jobs_in(tmp_path)[:1])
    assert (tmp_path / "suite.json").read_text() == before


def test_a_second_suite_in_the_folder_is_told_who_is_there(tmp_path):
    lock = SuiteLock(tmp_path)
    assert lock.acquire() == {}
    script = (
        "import sys; from pathlib import Path\n"
        "from tract_transfer.suite.journal import SuiteLock\n"
        "SuiteLock(Path(sys.argv[1])).acquire()"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    root = Path(__file__).parents[2]
    said = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    assert said.returncode == 1
    assert "another run_suite is at work here (process " in said.stderr
    lock.release()
    assert subprocess.run(command, check=False, cwd=root).returncode == 0


def test_who_comes_after_a_crash_learns_what_was_left(tmp_path):
    crashed = SuiteLock(tmp_path)
    crashed.acquire()
    crashed.tell({"vanilla/voc": {"pid": 5, "started": 1.0}})
    crashed._lock.release()  # the system does so when the process dies
    later = SuiteLock(tmp_path)
    assert later.acquire() == {"vanilla/voc": {"pid": 5, "started": 1.0}}
    later._lock.release()  # it dies too, while it ends them
    last = SuiteLock(tmp_path)
    assert last.acquire() == {"vanilla/voc": {"pid": 5, "started": 1.0}}
    last.release()
    assert last.acquire() == {"vanilla/voc": {"pid": 5, "started": 1.0}}
    last.tell({})
    last.release()
    assert not (tmp_path / ".owner.json").exists()


@pytest.mark.parametrize("text", ["{", "[]", '{"jobs": []}'])
def test_a_broken_note_of_the_owner_leaves_nothing_behind(tmp_path, text):
    (tmp_path / ".owner.json").write_text(text)
    assert SuiteLock(tmp_path).acquire() == {}
