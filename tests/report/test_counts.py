"""Where fewer runs are behind a number than behind others, the report says how many."""

import json
import shutil
from pathlib import Path

import pytest
from report_runs import load_runs, page, seen, write_run

from tract_transfer.report.compare import compare
from tract_transfer.report.content import read_report
from tract_transfer.report.tables import speed_up_table
from tract_transfer.report.write import FORMATS, text_table


def write_two_seeds(root: Path, methods: tuple[str, ...], tasks: tuple[str, ...]) -> list[Path]:
    return [
        write_run(root, method, task, seed, {"top1": 0.95 + seed / 50})
        for method in methods
        for task in tasks
        for seed in (0, 1)
    ]


@pytest.mark.parametrize(
    ("methods", "note"),
    [
        (("adamw",), "adamw has no run of seed 1, which other runs of this report have."),
        (
            ("vanilla", "tract"),
            "vanilla and tract have no run of seed 1, which other runs of this report have.",
        ),
    ],
)
def test_a_seed_that_a_task_lacks_is_told(
    tmp_path: Path, methods: tuple[str, ...], note: str
) -> None:
    folders = write_two_seeds(tmp_path, methods, ("finetune", "other"))
    for method in methods:
        shutil.rmtree(tmp_path / method / "finetune" / "seed1")
    report = read_report([folder for folder in folders if folder.exists()])
    texts = {suffix: write(report) for suffix, write in FORMATS.items()}
    assert seen(texts[".html"]).count("95.00 95.00 1 of 2 seeds") == len(methods)
    assert note in seen(texts[".html"])
    assert "1 of 2 pairs" in seen(texts[".html"]) or len(methods) == 1
    for text in (texts[".md"], texts[".tex"], text_table(report.runs, report.baseline)):
        assert text.count("95.00 (1 of 2)") == len(methods)
        assert f"finetune: {note}" in text
    row, other = json.loads(texts[".json"])["results"]
    assert (row["seeds"], row["notes"]) == ([0, 1], [note])
    assert [summary["n"] for summary in row["summaries"].values()] == [1] * len(methods)
    assert other["notes"] == []
    assert "2 of 2" not in "".join(texts.values())


def test_a_seed_that_one_method_lacks_is_told_once(tmp_path: Path) -> None:
    folders = write_two_seeds(tmp_path, ("vanilla", "tract", "third"), ("finetune",))
    shutil.rmtree(folders.pop())
    (row,) = compare(load_runs(folders), "vanilla")
    assert row.notes == [
        "vanilla has seed 1 and third has not: it counts in the mean of vanilla, not in the "
        "difference."
    ]
    assert "95.00 (1 of 2)" in text_table(load_runs(folders))


def test_a_run_that_did_not_finish_is_counted_and_not_called_absent(tmp_path: Path) -> None:
    folders = write_two_seeds(tmp_path, ("vanilla",), ("finetune", "other"))
    (folders[1] / "results.json").unlink()
    row, _ = compare(load_runs(folders), "vanilla")
    assert row.notes == []
    assert "95.00 95.00 1 of 2 seeds seed 1 did not finish" in seen(page(folders, tmp_path))
    assert "95.00 (1 of 2)" in text_table(load_runs(folders))


def test_a_cost_that_a_run_lacks_is_counted(tmp_path: Path) -> None:
    """Memory of a resumed run is left out."""
    folders = write_two_seeds(tmp_path, ("vanilla", "tract"), ("finetune",))
    resumed = folders[0] / "results.json"
    results = json.loads(resumed.read_text())
    del results["cost"]["peak_memory_bytes"]
    resumed.write_text(json.dumps(results))
    report = read_report(folders)
    texts = {suffix: write(report) for suffix, write in FORMATS.items()}
    memory = "peak memory of the process, MiB"
    assert f"{memory} 512.0 (1 of 2) 640.0 (× 1.25)" in seen(texts[".html"])
    assert f"{memory} | 512.0 (1 of 2) | 640.0 (× 1.25) |" in texts[".md"]
    assert rf"{memory} & 512.0 (1 of 2) & 640.0 ($\times$ 1.25) " in texts[".tex"]
    costs = {row["quantity"]: row["counts"] for row in json.loads(texts[".json"])["costs"]}
    assert costs["peak memory of the process"] == {"vanilla": 1, "tract": 2}
    assert "training, s 31.7 33.7 (× 1.06)" in seen(texts[".html"])
    shutil.rmtree(folders[2])
    alone = FORMATS[".md"](read_report([folders[0], folders[1], folders[3]]))
    assert f"{memory} | 512.0 (1 of 2) | 640.0 (1 of 2; × 1.25) |" in alone


def test_seeds_without_epochs_are_counted_as_seeds(tmp_path: Path) -> None:
    """The method starts above the lowest value, and one seed of it never reaches the highest."""
    folders = write_two_seeds(tmp_path, ("vanilla", "tract"), ("finetune",))
    curves = ([0.5, 0.8], [0.5, 0.8], [0.7, 0.9], [0.7, 0.75])
    for folder, values in zip(folders, curves, strict=True):
        lines = [
            json.dumps({"epoch": epoch, "split": "val", "top1": value})
            for epoch, value in enumerate(values, 1)
        ]
        (folder / "metrics.jsonl").write_text("\n".join(lines))
    table = speed_up_table(read_report(folders))
    assert [row[3:5] for row in table.rows] == [
        ["1.3", "before the first in 2 seeds"],
        ["1.7", "1.3"],
        ["2.0", "never in 1 seed"],
    ]
