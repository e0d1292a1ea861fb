"""Comparisons, notes and the answer state exactly what the numbers show."""

import json
from pathlib import Path

import pytest
from report_runs import edit_json, page_text, render, write_pair, write_run

from tract_transfer.report.content import read_report
from tract_transfer.report.tables import Table, tables_of
from tract_transfer.report.write import text_table

BASE = {0: 0.5, 1: 0.51, 2: 0.52}
THREE = {0: 0.04, 1: 0.06, 2: 0.05}
CANCELS = {0: 0.1, 1: 0.2, 2: -0.3}
EQUAL = dict.fromkeys(BASE, 0.02)


def write_gains(root: Path, gains: dict[str, dict[int, float]]) -> list[Path]:
    """Write vanilla, and tract better by task -> seed -> gain."""
    return [
        write_run(root, method, task, seed, {"top1": BASE[seed] + (gain if treated else 0)})
        for task, by_seed in gains.items()
        for treated, method in enumerate(("vanilla", "tract"))
        for seed, gain in by_seed.items()
    ]


def write_two_seeds(root: Path, methods: tuple[str, ...], tasks: tuple[str, ...]) -> list[Path]:
    return [
        write_run(root, method, task, seed, {"top1": 0.95 + seed / 50})
        for method in methods
        for task in tasks
        for seed in (0, 1)
    ]


def tables_named(name: str, folders: list[Path]) -> list[Table]:
    return [table for table in tables_of(read_report(folders)) if table.name == name]


def sentence_of(folders: list[Path]) -> str:
    (sentence,) = read_report(folders).answer
    return sentence


@pytest.mark.parametrize(
    ("gains", "start", "end"),
    [
        ({"a": THREE, "b": dict.fromkeys(BASE, 0)}, "On average over 2 downstream tasks, tract is "
         "2.50 points ahead of vanilla, 95 % interval [+1.26, +3.74] over 3 paired seeds: "
         "significant; it is ahead on 1 of 2 tasks, ", "significantly (Holm) ahead on 1 (a)."),
        ({"a": THREE, "b": {0: 0.02, 1: 0.01}}, "On average over 2 downstream tasks, tract is 3.25 "
         "points ahead of vanilla, 95 % interval [+0.07, +6.43] over 2 of 3 paired seeds, those "
         "that all tasks have: significant; ", "significantly (Holm) ahead on 1 (a)."),
        ({"a": {0: 0.09, 1: -0.05, 2: 0.01}}, "On a, tract is 1.67 points ahead of vanilla, 95 % "
         "interval [−15.78, +19.11] over 3 paired seeds: not significant; ",
         "so few seeds can hardly show a difference."),
        ({"a": {0: -0.04, 1: -0.041, 2: -0.042}, "b": {0: 0.001, 1: -0.001, 2: 0.002}},
         "On average over 2 downstream tasks, tract is 2.02 points behind vanilla, 95 % interval",
         "ahead on 1 of 2 tasks and behind on 1, significantly (Holm) behind on 1 (a)."),
        ({"a": {0: 0.03}}, "On a, tract is 3.00 points ahead of vanilla (1 paired seed)",
         "; this may be chance: one pair has no interval."),
        ({"a": {0: 0.03, 1: 0.03}}, "On a, tract is 3.00 points ahead of vanilla with each of 2 ",
         "paired seeds: without spread there is no test."),
        ({"a": EQUAL, "b": EQUAL}, "On average over 2 downstream tasks, tract is 2.00 points ahead",
         "ahead on 2 of 2 tasks; no task has enough pairs, or spread, for a test."),
        ({"a": CANCELS, "b": CANCELS}, "On average over 2 downstream tasks, tract is level with",
         "it is ahead on 0 of 2 tasks, on none significantly (Holm)."),
        ({"a": {0: 3e-5, 1: 1e-5, 2: 2e-5}}, "On a, tract is less than 0.01 points ahead of ",
         "so few seeds can hardly show a difference."),
    ],
    ids=["two tasks", "missing seed", "noise", "behind", "one pair", "two equal pairs",
         "three equal pairs", "cancels", "small"],
)  # fmt: skip
def test_answer_states_no_more_than_the_numbers_show(tmp_path, gains, start, end):
    folders = write_gains(tmp_path, gains)
    folders.append(write_run(tmp_path, "tract", "pre", 0, {"top1": 0.9}, role="pretrain"))
    sentence = sentence_of(folders)
    assert sentence.startswith(start)
    assert sentence.endswith(end)


def test_lower_loss_is_ahead_and_enters_no_mean(tmp_path):
    losses = {"vanilla": 0.5, "tract": 0.4}
    folders = [write_run(tmp_path, m, "a", 0, {"loss": loss}) for m, loss in losses.items()]
    report = read_report(folders)
    assert report.answer == [
        "tract is ahead on 1 of 1 task; no task has enough pairs, or spread, for a test."
    ]
    assert "−0.1000 [one pair, no interval], 1" in text_table(report)
    assert report.speed_ups == []


def test_holm_counts_every_comparison_of_downstream_tasks(tmp_path):
    folders = write_gains(tmp_path, {"a": THREE, "b": {0: 0.02, 1: 0.01, 2: 0.03}})
    folders.append(write_run(tmp_path, "tract", "pre", 0, {"top1": 0.9}, role="pretrain"))
    a, b, pre = read_report(folders).results
    low, high = sorted(row.differences["tract"].p_value for row in (a, b))
    assert a.corrected["tract"] == pytest.approx(2 * low)
    assert b.corrected["tract"] == pytest.approx(max(high, 2 * low))
    assert pre.corrected == {}


def test_means_are_over_all_seeds_and_differences_over_shared_ones(tmp_path):
    folders = write_pair(tmp_path)[1:]
    folders.append(write_run(tmp_path, "tract", "finetune", 7, {"top1": 0.9}))
    (row,) = read_report(folders).results
    assert (row.differences["tract"].n, row.summaries["tract"].n) == (2, 4)
    assert row.notes == ["vanilla has no result for seeds 0, 7."]
    assert sentence_of([folders[0], folders[-1]]) == (
        "tract and vanilla do not share a finished seed of a downstream task yet."
    )


@pytest.mark.parametrize("methods", [("adamw",), ("vanilla", "tract")])
def test_every_format_counts_the_seeds_that_a_task_lacks(tmp_path, methods):
    folders = write_two_seeds(tmp_path, methods, ("finetune", "other"))
    report = read_report([f for f in folders if not f.match("finetune/seed1")])
    texts = {**render(report), ".txt": text_table(report)}
    row, other = report.results
    compares = len(methods) > 1
    assert (row.seeds, other.notes) == ([0, 1], [])
    names = " and ".join(methods)
    assert row.notes == [f"{names} {'have' if compares else 'has'} no result for seed 1."]
    assert all(row.notes[0] in text for text in texts.values())
    assert texts[".html"].count("95.00 95.00 1 of 2 seeds") == len(methods)
    for suffix in (".md", ".tex", ".txt"):
        assert texts[suffix].count("95.00 (1 of 2)") == len(methods)
    assert "2 of 2" not in "".join(texts.values())
    # A report of one method compares nothing.
    assert (report.baseline, bool(report.answer)) == (methods[0], compares)
    assert ("1 of 2 pairs" in texts[".html"]) == compares
    assert ("only one method, adamw: nothing is compared." in texts[".html"]) != compares
    for suffix in (".html", ".md", ".tex"):
        assert ("ifferences pair" in texts[suffix]) == compares


def test_differences_between_runs_of_a_task_are_noted(tmp_path):
    folders = [
        write_run(tmp_path, method, "probe", 0, {"top1": 0.5}, iterations=iterations)
        for method, iterations in (("vanilla", 400), ("tract", 500))
    ]
    text = page_text(folders)
    differs = "The runs differ in iterations: compare with care."
    facts = (differs, "tract.enabled false true", "data.digits.train sha256 1f3c9a")
    assert all(fact in text for fact in facts)


def test_costs_count_the_runs_that_have_them(tmp_path):
    """The memory of a resumed run is not reported."""
    folders = write_two_seeds(tmp_path, ("vanilla", "tract"), ("finetune",))
    edit_json(folders[0] / "results.json", cost={"energy_joules": {"gpu": 1e3}})
    (table,) = tables_named("cost", folders)
    memory = "peak memory of the process, MiB"
    assert table.rows == [
        ["finetune", "training, s", "31.7", "33.7 (× 1.06)"],
        ["finetune", "speed, images/s", "2,051.3", "1,961.3 (× 0.96)"],
        ["finetune", memory, "512.0 (1 of 2)", "640.0 (× 1.25)"],
        ["finetune", "energy of the machine, kJ", "1.2", "2.5 (× 2.00)"],
    ]
    counts = {row["quantity"]: row["counts"] for row in read_report(folders).costs}
    assert counts["peak memory of the process"] == {"vanilla": 1, "tract": 2}
    (table,) = tables_named("cost", [folders[0], folders[1], folders[3]])
    assert ["finetune", memory, "512.0 (1 of 2)", "640.0 (1 of 2; × 1.25)"] in table.rows


def test_seeds_without_an_epoch_are_counted(tmp_path):
    """The method starts above the lowest target, and one of its seeds never reaches the highest."""
    folders = write_two_seeds(tmp_path, ("vanilla", "tract"), ("finetune",))
    curves = ([0.5, 0.8], [0.5, 0.8], [0.7, 0.9], [0.7, 0.75])
    for folder, values in zip(folders, curves, strict=True):
        lines = [{"epoch": i, "split": "val", "top1": value} for i, value in enumerate(values, 1)]
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (table,) = tables_named("speed-ups", folders)
    assert [row[3:5] for row in table.rows] == [
        ["1.3", "before the first in 2 seeds"],
        ["1.7", "1.3"],
        ["2.0", "never in 1 seed"],
    ]


def test_probe_has_its_classes_in_the_details_of_its_name(tmp_path):
    folder = write_run(tmp_path, "vanilla", "probe", 0, {"knn20_top1": 0.5})
    details = {"linear": {"per_class": {"cat": 0.1}}, "knn20": {"per_class": {"dog": 0.2}}}
    edit_json(folder / "results.json", details=details)
    assert [row.name for row in read_report([folder]).classes["probe"]] == ["dog"]


def test_classes_that_change_beyond_chance_are_counted(tmp_path):
    for seed, (cat, dog) in enumerate([(0.7, 0.4), (0.71, 0.6), (0.72, 0.5)]):
        for method, classes in (("vanilla", (0.5, 0.5)), ("tract", (cat, dog))):
            per_class = dict(zip(("cat", "dog"), classes, strict=True))
            write_run(tmp_path, method, "a", seed, {"top1": 0.5}, per_class=per_class)
    (table,) = tables_named("classes", [tmp_path])
    (note,) = table.notes
    assert note.startswith(
        "tract: 2 classes have an interval. It excludes zero for 1 that gain and 0 "
    )
