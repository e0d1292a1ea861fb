"""What a suite shows while it runs."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from suites import run_of

from tract_transfer.suite.screen import Screen, fraction_done, result_line
from tract_transfer.suite.state import Job

SOLVER = {"max_iters": 200, "max_epochs": None}


def job_of(folder=Path("none"), task="voc", solver=SOLVER, **values):
    return Job(replace(run_of(task), folder=folder, config={"solver": solver}), **values)


def log(folder, **line):
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def test_last_complete_line_tells_the_fraction_done(tmp_path):
    job = job_of(tmp_path)
    assert fraction_done(job) is None
    for iteration in range(0, 60, 5):
        log(tmp_path, iteration=iteration, epoch=iteration / 100, text="x" * 2000)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 19')  # half-written
    assert fraction_done(job) == 55 / 200
    assert fraction_done(
        job_of(tmp_path, solver={"max_iters": None, "max_epochs": 1.1})
    ) == pytest.approx(0.5)
    assert fraction_done(job_of(tmp_path, solver=None)) is None  # a probe's
    for text in ("", "no json\n", "[1]\n", '{"iteration": "x"}\n'):
        (tmp_path / "metrics.jsonl").write_text(text)
        assert fraction_done(job) is None


def test_results_are_formatted():
    results = {"primary_metric": "top1", "metrics": {"top1": 0.9125}}
    assert result_line(results) == "top1 91.25%"
    assert result_line({**results, "metrics": {"top1": None}}) == "top1 None"


def test_every_change_is_a_line(tmp_path):
    out = io.StringIO()
    first = job_of(state="finished")
    job = job_of(tmp_path, state="running", attempts=2, note="resumes from iter_0000050")
    with Screen(3, Console(file=out, width=20)) as lines:
        lines.ended(first, "finished before")
        lines.started(job)
        lines.show([first, job])
        job.state = "waiting"
        lines.ended(job, "failed, and is retried: [red]why[/red]")
        job.state, job.last = "finished", 61.0
        lines.ended(job, "top1 50.00%")
    assert out.getvalue().splitlines() == [
        "[1/3] seed 0  voc  vanilla  finished before",
        "[1/3] seed 0  voc  vanilla  started (resumes from iter_0000050)",
        "[1/3] seed 0  voc  vanilla  failed, and is retried: [red]why[/red]",
        "[2/3] seed 0  voc  vanilla  top1 50.00%  (0:01:01; 1 earlier start)",
    ]


def test_terminal_shows_progress_below_the_lines(tmp_path):
    out = io.StringIO()
    running, unknown = job_of(tmp_path, state="running"), job_of(state="running")
    log(tmp_path, iteration=50)
    with Screen(2, Console(file=out, force_terminal=True, width=100)) as lines:
        for job in (running, unknown):
            lines.started(job)
        lines.show([running, unknown])
        assert "25%" in out.getvalue()
        running.state = "finished"
        lines.ended(running, "")
