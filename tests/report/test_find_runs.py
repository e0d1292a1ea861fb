"""Which runs a report is about, and that none of them goes missing in silence."""

import json
import shutil
from pathlib import Path

import pytest
from report_runs import load_runs, page, seen, write_pair, write_report

from tract_transfer.report.content import read_report
from tract_transfer.report.runs import find_runs


def write_suite(root: Path, **changes: object) -> Path:
    """Write three seeds of two methods, and the plan they came from; return the suite's folder."""
    write_pair(root)
    runs = [
        {
            "id": f"{number:012x}", "method": method, "task": "finetune", "seed": seed,
            "folder": f"{method}/finetune/seed{seed}", "needs": None, "state": "finished",
            "attempts": 1, "error": None, "seconds": 2.0,
        }
        for number, (method, seed) in enumerate(
            (method, seed) for method in ("vanilla", "tract") for seed in range(3)
        )
    ]  # fmt: skip
    plan = {
        "format": 1, "title": "A plan", "baseline": "vanilla", "methods": ["vanilla", "tract"],
        "tasks": ["pretrain", "finetune"], "seeds": [0, 1, 2], "runs": runs, **changes,
    }  # fmt: skip
    (root / "suite.json").write_text(json.dumps(plan))
    return root


def change(root: Path, method: str, seed: int, **fields: object) -> None:
    """Change what the plan says of one run."""
    plan = json.loads((root / "suite.json").read_text())
    for run in plan["runs"]:
        if (run["method"], run["seed"]) == (method, seed):
            run.update(fields)
    (root / "suite.json").write_text(json.dumps(plan))


def test_a_folder_above_the_runs_serves_as_well_as_the_runs(tmp_path: Path) -> None:
    folders = write_pair(tmp_path / "runs")
    (folders[0] / "checkpoints" / "iter_5").mkdir(parents=True)
    (folders[0] / "checkpoints" / "config.yaml").write_text("")
    assert sorted(find_runs([tmp_path]).folders) == sorted(folders)
    assert find_runs([folders[0], tmp_path]).folders[0] == folders[0]
    assert len(find_runs([folders[0], tmp_path]).folders) == len(folders)


def test_nothing_below_a_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"No run in .* or below"):
        find_runs([tmp_path])


def test_the_plan_gives_title_baseline_order_and_states(tmp_path: Path) -> None:
    suite = write_suite(tmp_path / "s", title="Told by the plan")
    (suite / "tract/finetune/seed0/results.json").unlink()
    change(suite, "tract", 0, state="failed", error="ValueError: <b>bad</b>", attempts=2)
    shutil.rmtree(suite / "tract/finetune/seed1")
    change(suite, "tract", 1, state="waiting", attempts=0)
    shutil.rmtree(suite / "tract/finetune/seed2")
    change(suite, "tract", 2, state="blocked", error="its backbone x failed", attempts=0)
    report = read_report([suite])
    assert (report.title, report.baseline) == ("Told by the plan", "vanilla")
    assert report.methods == ["vanilla", "tract"]
    found = {(run.method, run.seed): (run.state, run.failure) for run in report.unfinished}
    assert found == {
        ("tract", 0): ("failed", "ValueError: <b>bad</b> (2 attempts)"),
        ("tract", 1): ("waiting", "not started yet"),
        ("tract", 2): ("blocked", "its backbone x failed"),
    }
    text = seen(page([suite], tmp_path))
    assert "seed 0 failed seed 1 is waiting seed 2 is blocked" in text
    assert "ValueError: <b>bad</b> (2 attempts)" in text
    assert "3 did not finish." in text


def test_a_run_that_the_plan_calls_finished_and_is_not_there_is_missing(tmp_path: Path) -> None:
    suite = write_suite(tmp_path)
    shutil.rmtree(suite / "vanilla/finetune/seed1")
    report = read_report([suite])
    assert [(run.state, run.failure) for run in report.unfinished] == [
        ("missing", "the folder does not exist")
    ]
    (row,) = report.rows
    assert row.seeds == [0, 1, 2]
    assert row.differences["tract"].n == 2
    assert "2 of 3 pairs" in seen(page([suite], tmp_path / "out"))


def test_a_task_of_which_nothing_has_finished_keeps_its_row(tmp_path: Path) -> None:
    suite = write_suite(tmp_path)
    plan = json.loads((suite / "suite.json").read_text())
    plan["runs"].append({**plan["runs"][0], "task": "detect", "folder": "d", "state": "waiting"})
    (suite / "suite.json").write_text(json.dumps(plan))
    text = seen(page([suite], tmp_path / "out"))
    assert "detect no run has finished – seed 0 is waiting" in text


def test_results_of_another_run_than_planned_do_not_count(tmp_path: Path) -> None:
    suite = write_suite(tmp_path)
    change(suite, "tract", 2, folder="vanilla/finetune/seed2/../seed2")
    change(suite, "vanilla", 2, folder="nowhere")
    runs = {(run.method, run.seed): run for run in load_runs([suite])}
    assert runs["tract", 2].state == "unreadable"
    assert runs["tract", 2].failure == (
        "its results.json is of vanilla, finetune, seed 2, and the plan says tract, finetune, "
        "seed 2"
    )


def test_runs_beside_the_plan_are_left_out_and_named(tmp_path: Path) -> None:
    suite = write_suite(tmp_path / "s")
    shutil.copytree(suite / "tract/finetune/seed0", suite / "old/finetune/seed0")
    report = read_report([suite])
    assert len(report.runs) == 6
    (problem,) = report.problems
    assert problem.startswith(f"{suite / 'old/finetune/seed0'} is a run that")
    assert problem.endswith("does not plan: left out")


def test_a_run_that_methods_share_counts_for_each(tmp_path: Path) -> None:
    """Two methods that change other tasks alone: their run here is one, and nothing is missing."""
    suite = write_suite(tmp_path, methods=["vanilla", "tract", "low_lr"])
    for seed in range(3):
        change(suite, "vanilla", seed, also=["low_lr"])
    report = read_report([suite])
    (row,) = report.rows
    assert row.values["low_lr"] == row.values["vanilla"] == {0: 0.8, 1: 0.82, 2: 0.81}
    assert not any(row.missing.values())
    assert row.differences["low_lr"].mean == 0
    assert row.differences["low_lr"].n == 3
    assert row.notes == [
        "vanilla and low_lr share one run a seed: what they change does not reach it."
    ]
    (suite / "vanilla/finetune/seed1/results.json").unlink()
    (row,) = read_report([suite]).rows
    assert [len(row.missing[method]) for method in ("vanilla", "tract", "low_lr")] == [1, 0, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{oops", "cannot be read"),
        ('{"format": 2, "runs": []}', "format 1, and its format is 2"),
        ("[]", "format is None"),
        ('{"format": 1, "runs": [{"method": "a"}]}', r"runs\[0\] lacks a usable task, seed"),
        ('{"format": 1}', r"runs\[0\] lacks"),
    ],
)
def test_a_plan_that_cannot_be_used_is_an_error(
    tmp_path: Path, text: str, message: str, refused
) -> None:
    (tmp_path / "suite.json").write_text(text)
    with refused(f"a suite.json of {text}", ValueError, match=message):
        find_runs([tmp_path])


def test_a_missing_baseline_is_an_error_that_names_the_methods(tmp_path: Path, refused) -> None:
    folders = write_pair(tmp_path)
    with refused(
        "a baseline that no run has", ValueError, match=r"'plain' is none of \['tract', 'vanilla'\]"
    ):
        read_report(folders, "plain")
    with refused(
        "several methods and no baseline",
        ValueError,
        match=r"of other, tract, and none of vanilla.* --baseline other",
    ):
        read_report([*folders[3:], *write_pair(tmp_path / "more", treated="other")[3:]])


def test_runs_of_one_method_make_a_report_without_differences(tmp_path: Path) -> None:
    folders = write_pair(tmp_path)[3:]
    report = read_report(folders)
    assert (report.baseline, report.methods, report.treated) == ("tract", ["tract"], [])
    assert report.answer == []
    for suffix in (".html", ".md", ".tex", ".json"):
        text = write_report(folders, tmp_path / f"report{suffix}").read_text(encoding="utf-8")
        assert ("83.83" in text) == (suffix != ".json")
        assert "ifferences pair" not in text
    assert "These folders hold one method only, tract: nothing is compared." in seen(
        page(folders, tmp_path)
    )
    with pytest.raises(ValueError, match=r"'vanilla' is none of \['tract'\]"):
        read_report(folders, "vanilla")


def test_results_of_another_version_are_marked(tmp_path: Path) -> None:
    folders = write_pair(tmp_path)
    results = json.loads((folders[5] / "results.json").read_text())
    (folders[5] / "results.json").write_text(json.dumps({**results, "format": 7}))
    text = seen(page(folders, tmp_path))
    assert "results.json has format 7, and this version reads 1" in text
    assert "seed 2 is unreadable" in text
