"""What a suite shows while it runs, and how it estimates times."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from suites import run_of

from tract_transfer.suite import screen
from tract_transfer.suite.screen import Screen, duration, fraction_done, result_line, suite_left
from tract_transfer.suite.state import Job

SOLVER = {"max_iters": 200, "max_epochs": None}


def job_of(folder=Path("none"), task="voc", solver=SOLVER, **values):
    return Job(replace(run_of(task), folder=folder, config={"solver": solver}), **values)


def log(folder, **line):
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


class Now:
    seconds = 100.0

    def monotonic(self):
        return self.seconds


@pytest.fixture
def now(monkeypatch):
    """Stands for the clock."""
    now = Now()
    monkeypatch.setattr(screen, "time", now)
    return now


def test_last_complete_line_tells_the_fraction_done(tmp_path):
    job = job_of(tmp_path)
    assert fraction_done(job) is None
    for iteration in range(0, 60, 5):
        log(tmp_path, iteration=iteration, epoch=iteration / 100, text="x" * 2000)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 19')  # half-written
    assert fraction_done(job) == 55 / 200
    assert fraction_done(job_of(tmp_path, solver={"max_epochs": 1.1})) == pytest.approx(0.5)
    assert fraction_done(job_of(tmp_path, solver=None)) is None  # a probe's


@pytest.mark.parametrize("text", ["", "no json\n", "[1]\n", '{"iteration": "x"}\n'])
def test_metrics_without_progress_are_no_error(tmp_path, text):
    (tmp_path / "metrics.jsonl").write_text(text)
    assert fraction_done(job_of(tmp_path)) is None


def test_time_of_the_suite_needs_a_finished_run_of_every_open_task():
    done = job_of(state="finished", seconds=30.0)
    other = job_of(state="finished", seconds=10.0)
    waiting = [job_of() for _ in range(4)]
    assert suite_left([done, other, *waiting], {}) == 80
    running = [job_of(Path("r"), state="running"), job_of(Path("s"), state="running")]
    left = {Path("r"): 5.0, Path("s"): 15.0}
    assert suite_left([done, other, *waiting, *running], left) == (80 + 20) / 2
    assert suite_left([done, job_of(task="probe")], {}) is None
    assert suite_left([done, job_of(task="probe", state="failed")], {}) == 0


def test_durations_and_results_are_formatted():
    assert [duration(seconds) for seconds in (0, 59.6, 245, 3723)] == [
        "0:00", "1:00", "4:05", "1:02:03",
    ]  # fmt: skip
    results = {"primary_metric": "top1", "metrics": {"top1": 0.9125}}
    assert result_line(results) == "top1 91.25%"
    assert result_line({**results, "metrics": {"top1": None}}) == "top1 None"


def test_every_change_is_a_line_and_progress_is_shown_once_a_minute(tmp_path, now):
    out = io.StringIO()
    first = job_of(state="finished")
    job = job_of(tmp_path, state="running", attempts=2, note="resumes from iter_0000050")
    log(tmp_path, iteration=50)
    with Screen(3, Console(file=out, width=20)) as lines:
        lines.skipped(first)
        lines.started(job)
        lines.show([first, job])
        now.seconds += 61
        log(tmp_path, iteration=100)  # what a resumed run did before does not count
        lines.show([first, job])
        lines.show([first, job])
        job.state = "waiting"
        lines.ended(job, "failed, and is retried: [red]why[/red]")
        job.state, job.last = "finished", 61.0
        lines.ended(job, "top1 50.00%")
    assert out.getvalue().splitlines() == [
        "[1/3] seed 0  voc  vanilla  finished before",
        "[1/3] seed 0  voc  vanilla  started (resumes from iter_0000050)",
        "[1/3] seed 0  voc  vanilla  running 50%, 2:02 left",
        "1 finished, 1 running; about 2:02 left",
        "[1/3] seed 0  voc  vanilla  failed, and is retried: [red]why[/red]",
        "[2/3] seed 0  voc  vanilla  top1 50.00%  (1:01; 1 earlier start)",
    ]


def test_terminal_shows_progress_below_the_lines_every_second(tmp_path, now):
    out = io.StringIO()
    job = job_of(tmp_path, state="running")
    log(tmp_path, iteration=50)
    with Screen(2, Console(file=out, force_terminal=True, width=60)) as lines:
        lines.show([job])
        assert "running" not in out.getvalue()
        now.seconds += 1
        lines.show([job, job_of()])
        assert "[0/2] seed 0  voc  vanilla  running 25%" in out.getvalue()
        assert "1 running, 1 waiting" in out.getvalue()
