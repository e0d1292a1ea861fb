"""Which runs a report covers, how unfinished ones are listed, and that none is dropped silently."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from report_runs import edit_json, load_runs, page_text, render, write_pair, write_run

from tract_transfer.report.content import read_report
from tract_transfer.report.runs import find_runs
from tract_transfer.report.write import text_table


def write_suite(root: Path, changes: dict[tuple[str, int], dict[str, Any]] | None = None) -> Path:
    """Write three seeds of two methods and their plan; `changes`: (method, seed) -> plan fields."""
    write_pair(root)
    runs = [
        {
            "method": method, "task": "finetune", "seed": seed, "state": "finished",
            "folder": f"{method}/finetune/seed{seed}", **(changes or {}).get((method, seed), {}),
        }
        for method in ("vanilla", "tract")
        for seed in range(3)
    ]  # fmt: skip
    plan = {"format": 1, "title": "A plan", "baseline": "vanilla", "runs": runs}
    (root / "suite.json").write_text(json.dumps(plan))
    return root


def test_parent_folder_stands_for_its_runs(tmp_path):
    folders = write_pair(tmp_path / "runs")
    (folders[0] / "checkpoints" / "iter_5").mkdir(parents=True)
    (folders[0] / "checkpoints" / "config.yaml").write_text("")
    assert sorted(find_runs([tmp_path]).folders) == sorted(folders)
    both = list(find_runs([folders[0], tmp_path]).folders)
    assert (both[0], len(both)) == (folders[0], len(folders))


def test_plan_gives_title_baseline_and_states(tmp_path):
    changes = {
        ("vanilla", 2): {"folder": "nowhere"},
        ("tract", 0): {"state": "failed", "error": "ValueError: <b>bad</b>", "attempts": 2},
        ("tract", 1): {"state": "waiting", "attempts": 0},
        ("tract", 2): {"folder": "vanilla/finetune/seed2/../seed2"},
    }
    suite = write_suite(tmp_path / "s", changes)
    (suite / "tract/finetune/seed0/results.json").unlink()
    shutil.rmtree(suite / "tract/finetune/seed1")
    report = read_report([suite])
    assert (report.title, report.baseline) == ("A plan", "vanilla")
    assert report.methods == ["vanilla", "tract"]
    assert [(run.method, run.seed, run.state, run.failure) for run in report.unfinished] == [
        ("vanilla", 2, "missing", "the folder does not exist"),
        ("tract", 0, "failed", "ValueError: <b>bad</b> (2 attempts)"),
        ("tract", 1, "waiting", "not started yet"),
        ("tract", 2, "unreadable", "results.json has vanilla, finetune, seed 2, but the plan has "
         "tract, finetune, seed 2"),
    ]  # fmt: skip
    assert report.results[0].seeds == [0, 1, 2]
    text = page_text([suite])
    assert "seed 0 failed seed 1 is waiting seed 2 is unreadable" in text
    assert "ValueError: <b>bad</b> (2 attempts)" in text
    assert "4 did not finish." in text


def test_task_without_finished_run_keeps_its_row_and_unplanned_runs_are_named(tmp_path):
    suite = write_suite(tmp_path / "s")
    runs = json.loads((suite / "suite.json").read_text())["runs"]
    runs.append({**runs[0], "task": "detect", "folder": "d", "state": "waiting"})
    edit_json(suite / "suite.json", runs=runs)
    unplanned = shutil.copytree(suite / "tract/finetune/seed0", suite / "old/finetune/seed0")
    report = read_report([suite])
    assert len(report.runs) == 7
    plan = suite / "suite.json"
    assert report.problems == [f"{unplanned} is a run that {plan} does not plan: excluded"]
    assert "detect no run has finished – seed 0 is waiting" in page_text([suite])


def test_run_that_methods_share_counts_for_each(tmp_path):
    suite = write_suite(tmp_path, {("vanilla", seed): {"also": ["low_lr"]} for seed in range(3)})
    (row,) = read_report([suite]).results
    assert row.values["low_lr"] == row.values["vanilla"] == {0: 0.8, 1: 0.82, 2: 0.81}
    assert not any(row.missing.values())
    assert (row.differences["low_lr"].mean, row.differences["low_lr"].n) == (0, 3)
    assert row.notes == [
        "vanilla and low_lr share one run per seed: their settings do not affect this task."
    ]
    (suite / "vanilla/finetune/seed1/results.json").unlink()
    (row,) = read_report([suite]).results
    assert [len(row.missing[method]) for method in ("vanilla", "tract", "low_lr")] == [1, 0, 1]


def test_unfinished_runs_keep_their_place(tmp_path):
    folders = write_pair(tmp_path)
    (folders[-1] / "results.json").unlink()
    broken = write_run(tmp_path, "tract", "finetune", 8, {"top1": 0.5})
    (broken / "results.json").write_text("{oops")
    (broken / "metrics.jsonl").write_text('{"iteration": 5}\n{"iter')
    folders += [broken, tmp_path / "elsewhere"]
    text = page_text(folders)
    assert "3 did not finish." in text
    assert "seed 2 did not finish seed 8 is unreadable" in text
    assert "2 of 4 pairs" in text, "never a silently smaller n"
    ended = "tract 2 unfinished no results.json; the log ends at iteration 500"
    assert f"finetune {ended} {folders[5]}" in text
    assert f"finetune tract 8 unreadable results.json cannot be read {broken}" in text
    assert f"{broken / 'results.json'}: Expecting property name" in text
    assert f"{broken / 'metrics.jsonl'}, line 2: " in text
    assert f"– – – missing the folder does not exist {tmp_path / 'elsewhere'}" in text
    assert f"Unfinished: {tmp_path / 'elsewhere'}: the" in text_table(read_report(folders))


@pytest.mark.parametrize(
    ("config", "task", "method"),
    [
        ({"name": "probe", "method": "adamw"}, "probe", "adamw"),
        ({"name": None, "tract": {"enabled": True}}, "classification", "tract"),
        ({}, "classification", "vanilla"),
        ({"model": {"weights": "x"}}, "classification", ""),  # of its pre-training: not known
    ],
)
def test_unfinished_run_is_named_by_its_config(tmp_path, config, task, method):
    (tmp_path / "config.yaml").write_text(json.dumps({"task": "classification", **config}))
    (run,) = load_runs([tmp_path])
    assert (run.task, run.method, run.state) == (task, method, "unfinished")


def test_unusable_results_state_why(tmp_path):
    failures = {
        "results.json has no finite top1": {"metrics": {"top1": float("nan")}},
        "results.json lacks a usable seed": {"seed": "0"},
        "results.json has format 7, this version reads 1": {"format": 7},
    }
    for seed, change in enumerate(failures.values()):
        folder = write_run(tmp_path, "vanilla", "finetune", seed, {"top1": 0.5})
        edit_json(folder / "results.json", **change)
    runs = load_runs([tmp_path])
    assert [(run.failure, run.state) for run in runs] == [(f, "unreadable") for f in failures]
    text = page_text([tmp_path])
    assert all(failure in text for failure in (*failures, "nothing is compared"))


NINE = (f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in itertools.pairwise("abcdefghi"))
DIGITS = "1" + "0" * 400
ODD_CONTENTS = [
    ("config.yaml", "\n".join(["a: &a [1, 2, 3]", *NINE])),
    ("config.yaml", "seed: 0\na: &a {b: *a}\n"),
    ("config.yaml", "seed: 0\na: &a [*a]\n"),
    ("config.yaml", "seed: 0\na: [{2024-01-01: 1}]\n"),
    ("metrics.jsonl", f'{{"epoch": 1, "split": "val", "top1": {DIGITS}}}\n'),
    ("detections.json", f'[{{"image": "x", "boxes": [], "scores": [{DIGITS}]}}]'),
    ("environment.json", '{"data": {"a": [{"b": 1}]}}'),
    ("model.json", "[]"),
]


def test_no_content_of_a_run_makes_a_report_fail(tmp_path):
    for seed, (name, text) in enumerate(ODD_CONTENTS):
        folder = write_run(tmp_path, "vanilla", "finetune", seed, {"top1": 0.5 + seed / 100})
        (folder / name).write_text(text)
    texts = render([tmp_path])
    assert all("53.50" in texts[suffix] for suffix in (".html", ".md", ".tex")), "the mean of all"
    problems = json.loads(texts[".json"])["problems"]
    assert [("alias" in problem, str(tmp_path) in problem) for problem in problems] == [
        (True, True)
    ] * 3
