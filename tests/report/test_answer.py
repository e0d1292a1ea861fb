"""The sentence at the head of a report says no more than its numbers."""

from pathlib import Path

import pytest
from report_runs import load_runs, page, seen, write_pair, write_run

from tract_transfer.report.compare import compare
from tract_transfer.report.content import answer, mean_over_tasks
from tract_transfer.report.statistics import paired_difference
from tract_transfer.report.write import text_table

BASE = {0: 0.5, 1: 0.51, 2: 0.52}


def write_gains(root: Path, gains: dict[str, dict[int, float]]) -> list[Path]:
    """Write two methods on several tasks, the second better by so much with each seed."""
    return [
        write_run(root, method, task, seed, {"top1": BASE[seed] + (by if treated else 0)})
        for task, own in gains.items()
        for treated, method in enumerate(("vanilla", "tract"))
        for seed, by in own.items()
    ]


def sentence_of(folders: list[Path]) -> str:
    (sentence,) = answer(compare(load_runs(folders), "vanilla"), "vanilla")
    return sentence


def test_the_mean_over_tasks_is_paired_by_seed(tmp_path: Path) -> None:
    folders = write_gains(tmp_path, {"a": {0: 0.04, 1: 0.06, 2: 0.05}, "b": dict.fromkeys(BASE, 0)})
    rows = compare(load_runs(folders), "vanilla")
    found = mean_over_tasks(rows, "tract", "vanilla")
    theirs = paired_difference({0: 0.02, 1: 0.03, 2: 0.025}, dict.fromkeys(range(3), 0.0))
    assert found is not None
    assert (found.mean, found.low, found.p_value) == pytest.approx(
        (theirs.mean, theirs.low, theirs.p_value)
    )
    assert sentence_of(folders) == (
        "On the mean of 2 downstream tasks, tract is 2.50 points ahead of vanilla, 95 % interval "
        "[+1.26, +3.74] over 3 paired seeds: more than the spread of seeds; it is ahead on 1 of 2 "
        "tasks, significantly (Holm) 1 ahead (a)."
    )
    assert sentence_of(folders) in seen(page(folders, tmp_path)).replace("\xa0", " ")


def test_seeds_that_a_task_lacks_are_not_in_the_mean_and_that_is_said(tmp_path: Path) -> None:
    gains = {"a": {0: 0.04, 1: 0.06, 2: 0.05}, "b": {0: 0.02, 1: 0.01}}
    sentence = sentence_of(write_gains(tmp_path, gains))
    assert "over 2 of 3 paired seeds (those that all tasks have)" in sentence


def test_noise_is_not_called_a_difference(tmp_path: Path) -> None:
    folders = write_gains(tmp_path, {"a": {0: 0.09, 1: -0.05, 2: 0.01}})
    folders.append(write_run(tmp_path, "tract", "pre", 0, {"top1": 0.9}, role="pretrain"))
    assert sentence_of(folders) == (
        "On a, tract is 1.67 points ahead of vanilla, 95 % interval [−15.78, +19.11] over 3 paired "
        "seeds: no difference is shown, and so few seeds could hardly show one."
    )


def test_being_behind_is_said_as_clearly(tmp_path: Path) -> None:
    gains = {"a": {0: -0.04, 1: -0.041, 2: -0.042}, "b": {0: 0.001, 1: -0.001, 2: 0.002}}
    sentence = sentence_of(write_gains(tmp_path, gains))
    assert "2.02 points behind vanilla" in sentence
    assert sentence.endswith(
        "ahead on 1 of 2 tasks and behind on 1, significantly (Holm) 1 behind (a)."
    )


def test_one_pair_and_equal_pairs_have_no_interval(tmp_path: Path) -> None:
    one = sentence_of(write_gains(tmp_path / "one", {"a": {0: 0.03}}))
    assert one.endswith("(1 paired seed), which may be chance: one pair has no interval.")
    same = sentence_of(write_gains(tmp_path / "same", {"a": {0: 0.03, 1: 0.03}}))
    assert same.endswith("with each of 2 paired seeds, so that there is no spread to judge it by.")


def test_what_cancels_is_level_and_what_is_small_is_not_zero(tmp_path: Path) -> None:
    cancels = {"a": {0: 0.1, 1: 0.2, 2: -0.3}}
    level = sentence_of(write_gains(tmp_path / "level", cancels))
    assert level.startswith("On a, tract is level with vanilla, 95 % interval")
    both = sentence_of(write_gains(tmp_path / "both", {**cancels, "b": {0: 0.1, 1: 0.2, 2: -0.3}}))
    assert "it is ahead on 0 of 2 tasks, on none significantly (Holm)" in both
    small = sentence_of(write_gains(tmp_path / "small", {"a": {0: 3e-5, 1: 1e-5, 2: 2e-5}}))
    assert small.startswith("On a, tract is less than 0.01 points ahead of vanilla, 95 %")


def test_three_equal_pairs_are_not_too_few(tmp_path: Path) -> None:
    gains = dict.fromkeys(BASE, 0.02)
    sentence = sentence_of(write_gains(tmp_path, {"a": gains, "b": gains}))
    assert "with each of 3 paired seeds, so that there is no spread to judge it by" in sentence
    assert sentence.endswith("on 2 of 2 tasks; no task has the pairs, or the spread, for a test.")


def test_a_lower_loss_is_ahead_and_is_no_part_of_a_mean(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path, "vanilla", "finetune", 0, {"loss": 0.5}),
        write_run(tmp_path, "tract", "finetune", 0, {"loss": 0.4}),
    ]
    sentence = sentence_of(folders)
    assert sentence == (
        "tract is ahead on 1 of 1 task; no task has the pairs, or the spread, for a test."
    )
    assert "−0.1000 [one pair, no interval], 1" in text_table(load_runs(folders))


def test_methods_without_a_pair_are_named(tmp_path: Path) -> None:
    folders = write_pair(tmp_path)[:3]
    folders.append(write_run(tmp_path, "tract", "finetune", 9, {"top1": 0.9}))
    assert sentence_of(folders) == (
        "tract and vanilla share no finished seed of a downstream task yet."
    )


def test_holm_counts_every_comparison_of_downstream_tasks(tmp_path: Path) -> None:
    gains = {"a": {0: 0.04, 1: 0.06, 2: 0.05}, "b": {0: 0.02, 1: 0.01, 2: 0.03}}
    folders = write_gains(tmp_path, gains)
    folders.append(write_run(tmp_path, "tract", "pre", 0, {"top1": 0.9}, role="pretrain"))
    a, b, pre = compare(load_runs(folders), "vanilla")
    p_values = sorted([a.differences["tract"].p_value or 0, b.differences["tract"].p_value or 0])
    assert a.corrected["tract"] == pytest.approx(2 * p_values[0])
    assert b.corrected["tract"] == pytest.approx(max(p_values[1], 2 * p_values[0]))
    assert pre.corrected == {}
