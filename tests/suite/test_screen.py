"""What a suite shows while it runs, and how it knows."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from tract_transfer.suite import screen
from tract_transfer.suite import screen as progress
from tract_transfer.suite.journal import Job
from tract_transfer.suite.plan import PlannedRun
from tract_transfer.suite.screen import Clock, fraction_done, in_words, suite_left

SOLVER = {"max_iters": 200, "max_epochs": None}


def job_of(folder=Path("none"), task="voc", solver=SOLVER, **values):
    run = PlannedRun("a", "tract", task, 3, {"solver": solver}, folder)
    return Job(run, **values)


def log(folder, **line):
    folder.mkdir(exist_ok=True)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


class Now:
    """Stands for the clock."""

    def __init__(self):
        self.seconds = 100.0

    def monotonic(self):
        return self.seconds


@pytest.fixture
def now(monkeypatch):
    now = Now()
    monkeypatch.setattr(progress, "time", now)
    monkeypatch.setattr(screen, "time", now)
    return now


def test_the_last_whole_line_tells_how_far_a_run_is(tmp_path):
    run = job_of(tmp_path).run
    assert fraction_done(run) is None
    for iteration in range(0, 60, 5):
        log(tmp_path, iteration=iteration, epoch=iteration / 100, text="x" * 2000)
    assert fraction_done(run) == 55 / 200
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 19')  # half-written
    assert fraction_done(run) == 55 / 200
    assert fraction_done(job_of(tmp_path, solver={"max_epochs": 1.1}).run) == pytest.approx(0.5)
    assert fraction_done(job_of(tmp_path, solver=None).run) is None  # a probe's


@pytest.mark.parametrize("text", ["", "no json\n", "[1]\n", '{"iteration": "x"}\n'])
def test_a_log_that_tells_nothing_is_no_error(tmp_path, text):
    (tmp_path / "metrics.jsonl").write_text(text)
    assert fraction_done(job_of(tmp_path).run) is None


def test_a_resumed_run_is_judged_by_what_it_did_since(tmp_path, now):
    log(tmp_path, iteration=100)
    run, clock = job_of(tmp_path).run, Clock()
    assert clock.left(run, 0.5) is None
    clock.start(run)
    assert clock.left(run, 0.5) is None  # nothing done yet
    now.seconds += 10
    assert clock.seconds(run) == 10
    assert clock.left(run, 0.75) == pytest.approx(10)
    assert clock.left(run, None) is None


def test_the_suites_time_needs_a_run_of_every_open_task():
    done = job_of(Path("a"), state="finished", seconds=30.0)
    other = job_of(Path("b"), state="finished", seconds=10.0)
    waiting = [job_of(Path(str(i)), state="waiting") for i in range(4)]
    assert suite_left([done, other, *waiting], {}) == 80
    running = job_of(Path("r"), state="running")
    twice = [running, replace(running, run=job_of(Path("s")).run)]
    left = {Path("r"): 5.0, Path("s"): 15.0}
    assert suite_left([done, other, *waiting, *twice], left) == (80 + 20) / 2
    assert suite_left([done, job_of(task="probe")], {}) is None
    assert suite_left([done, job_of(task="probe", state="failed")], {}) == 0


def test_durations_are_told_in_words():
    assert [in_words(s) for s in (None, 0, 59.6, 245, 3723)] == [
        "",
        "0:00",
        "1:00",
        "4:05",
        "1:02:03",
    ]


def test_plain_lines_tell_every_change_and_progress_once_a_minute(tmp_path, now):
    out = io.StringIO()
    lines = screen.Lines(out, total=3)
    first = job_of(Path("a"), state="finished")
    job = job_of(tmp_path, state="running", attempts=2, note="goes on from iter_5")
    with lines:
        lines.skipped(first)
        lines.started(job)
        log(tmp_path, iteration=50)
        lines.show([first, job])
        now.seconds += 61
        lines.show([first, job])
        lines.show([first, job])
        job.state = "waiting"
        lines.ended(job, "failed, and is tried again: why")
        job.state, job.last = "finished", 61.0
        lines.ended(job, "top1 50.00%")
    assert out.getvalue().splitlines() == [
        "[1/3] seed 3  voc  tract  finished before",
        "[1/3] seed 3  voc  tract  started (goes on from iter_5)",
        "[1/3] seed 3  voc  tract  running 25%, 3:03 left",
        "1 finished, 1 running; about 3:03 left",
        "[1/3] seed 3  voc  tract  failed, and is tried again: why",
        "[2/3] seed 3  voc  tract  top1 50.00%  (1:01; 1 start before it)",
    ]


def drawn(table, columns):
    out = io.StringIO()
    Console(file=out, width=columns).print(table)
    return out.getvalue()


@pytest.mark.parametrize("columns", [140, 60])
def test_the_table_shows_what_runs_what_ended_and_what_comes(tmp_path, now, columns):
    live = screen.LiveTable(Console(file=io.StringIO(), width=columns), total=9)
    running = job_of(tmp_path, task="pretrain", state="running", attempts=1)
    failed = job_of(Path("f"), task="flowers", state="running", last=125.0)
    waiting = [job_of(Path(f"w{i}"), task=f"late{i}", state="waiting") for i in range(6)]
    with live:
        live.started(running)
        log(tmp_path, iteration=50)
        now.seconds += 20
        failed.state = "failed"
        live.ended(failed, "failed: ValueError: [red]not markup[/red]")
        live.show([running, failed, *waiting])
    text = drawn(live.table([running, failed, *waiting]), columns)
    told = " ".join(text.split())
    assert "running 3 pretrain tract 25% 0:20 1:00" in told
    assert "failed 3 flowers tract 2:05" in told
    assert "[red]not" in text
    assert [f"late{i}" in text for i in range(6)] == [True] * 4 + [False] * 2
    assert "1 running, 1 failed, 6 waiting" in told


def test_the_table_keeps_the_last_that_ended(tmp_path, now):
    live = screen.LiveTable(Console(file=io.StringIO()), total=20)
    jobs = [job_of(Path(str(i)), task=f"task{i:02}", state="finished") for i in range(12)]
    for job in jobs:
        live.ended(job, "top1 50.00%")
    shown = [f"task{i:02}" in drawn(live.table(jobs), 120) for i in range(12)]
    assert shown == [False] * 4 + [True] * 8


def test_a_terminal_gets_the_table_and_a_file_lines(monkeypatch):
    assert isinstance(screen.make_screen(1), screen.Lines)
    monkeypatch.setattr(screen.sys.stderr, "isatty", lambda: True, raising=False)
    assert isinstance(screen.make_screen(1), screen.LiveTable)
