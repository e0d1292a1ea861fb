"""What the report says of fabricated run folders is what was written into them."""

import json
import re
from pathlib import Path

import pytest
from report_runs import (
    TRACT,
    VANILLA,
    load_runs,
    page,
    seen,
    write_detections,
    write_filters,
    write_pair,
    write_report,
    write_run,
)

from tract_transfer.report.compare import compare
from tract_transfer.report.statistics import paired_difference, summarize
from tract_transfer.report.write import text_table


def test_the_table_holds_the_statistics_of_the_values_written(tmp_path: Path) -> None:
    folders = write_pair(tmp_path)
    text = seen(page(folders, tmp_path))
    table = text_table(load_runs(folders))
    difference = paired_difference(TRACT, VANILLA)
    interval = f"[+{100 * (difference.low or 0):.2f}, +{100 * (difference.high or 0):.2f}]"
    assert "+-" not in interval
    for values in (VANILLA, TRACT):
        summary = summarize(list(values.values()))
        mean_std = f"{100 * summary.mean:.2f} ± {100 * (summary.std or 0):.2f}"
        assert mean_std in text
        assert mean_std in table
        assert " ".join(f"{100 * value:.2f}" for value in values.values()) in text
    assert f"+{100 * difference.mean:.2f} {interval} 3 pairs" in text
    assert f"+{100 * difference.mean:.2f} {interval}, 3" in table


def test_pairs_are_by_seed_and_lonely_seeds_are_told(tmp_path: Path) -> None:
    folders = write_pair(tmp_path)[1:]
    folders.append(write_run(tmp_path, "tract", "finetune", 7, {"top1": 0.9}))
    (row,) = compare(load_runs(folders), "vanilla")
    assert row.differences["tract"].n == 2
    assert row.summaries["tract"].n == 4
    note = (
        "tract has seeds 0, 7 and vanilla has not: they count in the mean of tract, not in the "
        "difference."
    )
    assert row.notes == [note]
    assert note in seen(page(folders, tmp_path))
    assert note in text_table(load_runs(folders))


def test_unfinished_runs_keep_their_place(tmp_path: Path) -> None:
    folders = write_pair(tmp_path)
    (folders[-1] / "results.json").unlink()
    broken = tmp_path / "tract" / "finetune" / "seed8"
    broken.mkdir()
    (broken / "results.json").write_text("{oops")
    (broken / "metrics.jsonl").write_text('{"iteration": 5}\n{"iter')
    folders += [broken, tmp_path / "elsewhere"]
    text = seen(page(folders, tmp_path))
    assert "3 did not finish." in text
    assert "seed 2 did not finish seed 8 is unreadable" in text
    assert "2 of 4 pairs" in text, "never a silently smaller n"
    ended = "tract 2 unfinished no results.json; the log ends at iteration 500"
    assert f"finetune {ended} {folders[5]}" in text
    assert f"finetune tract 8 unreadable results.json cannot be read {broken}" in text
    assert f"{broken / 'results.json'}: Expecting property name" in text
    assert f"{broken / 'metrics.jsonl'}, line 2: " in text
    assert f"– – – missing the folder does not exist {tmp_path / 'elsewhere'}" in text
    assert f"Not finished: {tmp_path / 'elsewhere'}: the" in text_table(load_runs(folders))


@pytest.mark.parametrize(
    ("change", "failure"),
    [({"metrics": {"top1": float("nan")}}, "no finite top1"), ({"seed": "0"}, "a usable seed")],
)
def test_results_that_do_not_count_say_why(
    tmp_path: Path, change: dict[str, object], failure: str
) -> None:
    folder = write_run(tmp_path, "vanilla", "finetune", 0, {"top1": 0.5})
    results = json.loads((folder / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps({**results, **change}))
    (run,) = load_runs([folder])
    assert run.failure.endswith(failure)
    text = seen(page([folder], tmp_path))
    assert failure in text
    assert "nothing is compared" in text


def test_no_folders_and_double_runs_are_errors(tmp_path: Path, refused) -> None:
    with refused("a report of no folder", ValueError, match="at least one folder"):
        write_report([], tmp_path / "report.html")
    folders = write_pair(tmp_path)
    with refused(
        "a report of two runs of one seed", ValueError, match=r"seed 0\. Leave one of them out"
    ):
        load_runs([*folders, *write_pair(tmp_path / "again")])


def test_names_are_shown_and_never_run(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>"
    folders = write_pair(tmp_path, treated="<b>tract")
    for folder in folders:
        results = json.loads((folder / "results.json").read_text())
        results["details"] = {"per_class": {evil: 0.5}}
        results["protocol"]["test"] = evil
        results["name"] = "fine<i>tune"
        (folder / "results.json").write_text(json.dumps(results))
        write_detections(folder, label=evil)
    html = page(folders, tmp_path)
    assert not re.search(r"<(script|b>tract|i>tune)", html)
    text = seen(html)
    assert text.count(evil) >= 4, "as a class, in a protocol, and on an image of each method"
    assert "<b>tract − vanilla" in text
    assert "fine<i>tune" in text


def test_the_page_fetches_and_runs_nothing_and_is_the_same_every_time(tmp_path: Path) -> None:
    folders = write_pair(tmp_path)
    for folder in folders:
        write_detections(folder)
        write_filters(folder)
    html = page(folders, tmp_path)
    assert html == page(folders, tmp_path)
    assert "default-src 'none'; img-src data:" in html
    assert not re.search("<(script|iframe)", html)
    assert re.findall("<link[^>]*>", html) == ['<link rel="icon" href="data:,">']
    targets = re.findall(r"""(?:src|href)=["']([^"']+)""", html)
    assert all(target.startswith(("data:", "#")) for target in targets)
    assert html.count("http") == html.count("http-equiv") + html.count('xmlns="http://www.w3.org')
    ids = re.findall(r' id="([^"]+)"', html)
    assert len(ids) == len(set(ids))


def test_of_a_weak_detector_the_best_is_drawn_and_said_to_be(tmp_path: Path) -> None:
    folders = write_pair(tmp_path)
    for folder in folders:
        write_detections(folder, label="car")
    sure = page(folders, tmp_path)
    assert "car 0.90" in sure
    assert "unsure 0.10" not in sure
    assert "Nothing here reaches" not in sure
    for folder in folders:
        (entry,) = json.loads((folder / "detections.json").read_text())
        entry |= {"scores": [0.05, 0.2, 0.01, 0.1], "labels": ["b", "a", "d", "c"]}
        entry["boxes"] = [[1, 1, 20, 20]] * 4
        (folder / "detections.json").write_text(json.dumps([entry]))
    weak = page(folders, tmp_path)
    assert "Nothing here reaches a score of 0.3: the 3 highest of each picture are drawn." in weak
    assert [f"{name} 0." in weak for name in "abcd"] == [True, True, True, False]


def test_detections_and_filters_of_both_methods_are_side_by_side(tmp_path: Path) -> None:
    folders = write_pair(tmp_path)
    for folder in reversed(folders):
        write_detections(folder)
        write_filters(folder)
    text = seen(page(folders[::-1], tmp_path))
    assert "car 0.90" in text
    assert "unsure" not in text, "a detection below the stated score is not drawn"
    assert "vanilla street.png car 0.90 tract street.png car 0.90" in text
    assert "vanilla conv1 , the first 64 of 70 filters of 3 × 3 tract conv1" in text


def test_pictures_outside_the_run_folder_are_refused(tmp_path: Path) -> None:
    folders = write_pair(tmp_path)
    write_detections(folders[0], name="../seed1/street.png")
    write_detections(folders[1], name="missing.png")
    text = seen(page(folders[:1], tmp_path))
    assert "images must lie in the run folder" in text
    assert "car 0.90" not in text
    assert "missing.png" in seen(page(folders[1:2], tmp_path))


def test_methods_stand_against_the_baseline_in_an_aligned_table(tmp_path: Path) -> None:
    folders = write_pair(tmp_path)
    folders.insert(0, write_run(tmp_path, "other", "a-longer-name", 1, {"top1": 0.8}))
    folders.append(write_run(tmp_path, "vanilla", "a-longer-name", 1, {"top1": 0.8}))
    table = text_table(load_runs(folders)).splitlines()
    heads = [head.strip() for head in table[0].split("|")[1:-1]]
    assert heads[:5] == ["task", "metric", "vanilla", "other", "tract"]
    assert heads[5:] == ["other − vanilla [95 %], pairs", "tract − vanilla [95 %], pairs"]
    assert "a-longer-name: vanilla and other have no run of seeds 0, 2" in table[-1]
    assert len({tuple(i for i, c in enumerate(line) if c == "|") for line in table[:4]}) == 1
    text = seen(page(folders, tmp_path))
    assert "other − vanilla tract − vanilla" in text
    assert "On a-longer-name, other is level with vanilla" in text
    assert "On finetune, tract is 2.83 points ahead of vanilla" in text
    assert text.count("1 task has no pair yet") == 2


def test_what_differs_between_runs_is_told(tmp_path: Path) -> None:
    folders = write_pair(tmp_path)
    folders.append(write_run(tmp_path, "tract", "probe", 0, {"top1": 0.5}, iterations=500))
    folders.append(write_run(tmp_path, "vanilla", "probe", 0, {"top1": 0.5}, iterations=400))
    text = seen(page(folders, tmp_path))
    assert "The runs differ in iterations: compare with care." in text
    assert "tract.enabled false true" in text
    assert "data.digits.train sha256 1f3c9a" in text


def test_all_metrics_and_classes_and_costs_are_there(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path, method, "finetune", 0, {"ap50": value, "ap": 0.3}, per_class={"cat": v})
        for method, value, v in (("vanilla", 0.5, 0.25), ("tract", 0.6, 0.375))
    ]
    text = seen(page(folders, tmp_path))
    assert "AP 50:95, %" in text
    assert "cat 25.00 37.50 +12.50" in text
    assert "training, s 31.2 33.2 (× 1.06)" in text
    assert "speed, images/s 2,051.3 1,961.3 (× 0.96)" in text
    assert "peak memory of the process, MiB 512.0 640.0 (× 1.25)" in text
    assert "energy of the machine, kJ 1.5 2.5 (× 1.67)" in text


def test_classes_stand_by_name_beside_their_bars(tmp_path: Path) -> None:
    """Few all of them; of many those that gain and lose most, the largest change first."""

    def report_of(count: int) -> str:
        folders = [
            write_run(
                tmp_path / str(count), method, "finetune", seed, {"top1": 0.5},
                per_class={
                    f"class{k:03}": 0.5 + sign * (k - count // 2) / 1000 for k in range(count)
                },
            )
            for method, sign in (("vanilla", 0), ("tract", 1))
            for seed in (0, 1)
        ]  # fmt: skip
        return page(folders, tmp_path / f"report{count}")

    def names(html: str) -> list[list[str]]:
        lists = re.findall(r'<ul class="changes[^>]*>(.*?)</ul>', html, re.DOTALL)
        return [re.findall(r'<span class="name"[^>]*>([^<]*)', own) for own in lists]

    few = report_of(20)
    assert names(few) == [[f"class{k:03}" for k in range(19, -1, -1)]]
    assert few.count('<i style="left') == 19, "none for the class that does not change"
    assert '<svg class="bars"' not in few
    many = report_of(41)
    gains, losses = names(many)
    assert gains == [f"class{k:03}" for k in range(40, 30, -1)]
    assert losses == [f"class{k:03}" for k in range(10)]
    assert many.count("<rect") >= 41
    text = seen(many)
    assert "The 10 that gain most class040 +2.00" in text
    assert "The 10 that lose most class000 −2.00" in text
    assert "tract − vanilla, percentage points" in text
