"""Fabricated run folders: what the report says of them is what was written into them."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from tract_transfer.suite.report import answer, text_table, write_report
from tract_transfer.suite.runs import compare, load_runs
from tract_transfer.suite.statistics import paired_difference, summarize

VANILLA = {0: 0.8, 1: 0.82, 2: 0.81}
TRACT = {0: 0.83, 1: 0.84, 2: 0.845}


def write_run(
    root: Path,
    method: str,
    task: str,
    seed: int,
    metrics: dict[str, float],
    *,
    role: str = "downstream",
    per_class: dict[str, float] | None = None,
    iterations: int = 500,
) -> Path:
    """Write a finished run folder as the trainer leaves it."""
    folder = root / method / task / f"seed{seed}"
    folder.mkdir(parents=True)
    primary = next(iter(metrics))
    rng = np.random.default_rng(seed)
    lines: list[dict[str, object]] = []
    for iteration in range(10, iterations + 1, 10):
        at = {"iteration": iteration, "epoch": iteration / 50}
        loss = 2.3 * 0.75 ** at["epoch"] + 0.05 + 0.03 * float(rng.random())
        reached = metrics[primary] * (1 - 0.6 ** at["epoch"]) + 0.004 * rng.standard_normal()
        lines.append({**at, "loss": loss, "lr": 0.1})
        lines += [{**at, "split": "val", primary: reached}] if iteration % 50 == 0 else []
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = {
        "task": "classification", "output_dir": str(folder), "seed": seed,
        "model": {"backbone": {"name": "cifar/resnet18", "stem": "cifar"}},
        "tract": {"enabled": method != "vanilla", "lam": 0.1},
        "solver": {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "max_epochs": 10},
    }  # fmt: skip
    results = {
        "task": "classification", "method": method, "name": task, "role": role, "seed": seed,
        "metrics": metrics, "primary_metric": primary, "details": {"per_class": per_class or {}},
        "iterations": iterations, "epochs": iterations / 50,
        "train_seconds": 31.2 + seed + 2 * (method != "vanilla"),
        "images_per_second": 2051.3 - 90 * (method != "vanilla"),
        "protocol": {"train": "1,257 images, random crop", "test": "540 images, each once"},
    }  # fmt: skip
    environment = {
        "versions": {"python": "3.12.3", "torch": "2.8.0"},
        "data": {"digits": {"train": "sha256 1f3c9a", "test": "sha256 77d02e"}},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "environment.json").write_text(json.dumps(environment))
    return folder


def write_pair(root: Path, task: str = "finetune", treated: str = "tract") -> list[Path]:
    """Write three seeds of two methods."""
    return [
        write_run(root, method, task, seed, {"top1": value, "loss": 1 - value})
        for method, values in (("vanilla", VANILLA), (treated, TRACT))
        for seed, value in values.items()
    ]


def write_detections(folder: Path, name: str = "street.png", label: str = "car") -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "street.png")
    found = {"boxes": [[4, 4, 30, 30], [1, 1, 9, 9]], "labels": [label, "unsure"]}
    truth = {"scores": [0.9, 0.1], "truth_boxes": [[5, 5, 31, 31]], "truth_labels": [label]}
    (folder / "detections.json").write_text(json.dumps([{"image": name, **found, **truth}]))


def write_filters(folder: Path) -> None:
    save_file({"conv1.weight": torch.randn(70, 3, 3, 3)}, folder / "model.safetensors")
    (folder / "model.json").write_text(json.dumps({"first_layers": ["conv1"]}))


def page(folders: list[Path], root: Path) -> str:
    return write_report(folders, root / "out" / "report.html").read_text(encoding="utf-8")


def seen(html: str) -> str:
    """Return the text a reader sees, without the style sheet."""
    parts: list[str] = []
    parser = HTMLParser()
    parser.handle_data = parts.append  # type: ignore[method-assign]
    parser.feed(re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL))
    return " ".join(" ".join(parts).split())


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


def test_the_answer_counts_tasks_and_intervals(tmp_path: Path) -> None:
    base = {0: 0.5, 1: 0.51, 2: 0.52}
    gains = {"clear": (0.05, 0.051, 0.049), "vague": (0.09, -0.05, 0.01)}
    gains["worse"] = (-0.04, -0.041, -0.042)
    folders = [
        write_run(tmp_path, method, task, seed, {"top1": value + (gain[seed] if treated else 0)})
        for task, gain in gains.items()
        for treated, method in enumerate(("vanilla", "tract"))
        for seed, value in base.items()
    ]
    folders.append(write_run(tmp_path, "tract", "pre", 0, {"top1": 0.9}, role="pretrain"))
    sentence = answer(compare(load_runs(folders), "vanilla"), "vanilla")
    assert sentence == [
        "tract is ahead of vanilla on 2 of 3 downstream tasks and behind on 1. The 95 % interval "
        "of the paired difference excludes zero on 1 of the 2 where it is ahead and on 1 of the 1 "
        "where it is behind (3 pairs of seeds a task: wide intervals)."
    ]
    assert sentence[0] in seen(page(folders, tmp_path))


def test_a_lower_loss_is_ahead(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path, "vanilla", "finetune", 0, {"loss": 0.5}),
        write_run(tmp_path, "tract", "finetune", 0, {"loss": 0.4}),
    ]
    (sentence,) = answer(compare(load_runs(folders), "vanilla"), "vanilla")
    assert "ahead of vanilla on 1 of 1 downstream task." in sentence
    assert "one pair has no interval" in sentence
    assert "−0.1000 [one pair, no interval], 1" in text_table(load_runs(folders))


def test_pairs_are_by_seed_and_lonely_seeds_are_told(tmp_path: Path) -> None:
    folders = write_pair(tmp_path)[1:]
    folders.append(write_run(tmp_path, "tract", "finetune", 7, {"top1": 0.9}))
    (row,) = compare(load_runs(folders), "vanilla")
    assert row.differences["tract"].n == 2
    assert row.summaries["tract"].n == 4
    note = "tract seeds 0, 7 without a vanilla run: in the mean, not in the difference."
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
    assert "seed 2 did not finish seed 8 did not finish" in text
    assert f"{folders[5]} : no results.json; the log ends at iteration 500." in text
    assert f"{broken} : results.json cannot be read." in text
    assert f"{broken / 'results.json'}: Expecting property name" in text
    assert f"{broken / 'metrics.jsonl'}, line 2: " in text
    assert f"{tmp_path / 'elsewhere'} : the folder does not exist." in text
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


def test_no_folders_and_double_runs_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one folder"):
        write_report([], tmp_path / "report.html")
    folders = write_pair(tmp_path)
    with pytest.raises(ValueError, match=r"seed 0\. Leave one of them out"):
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
    assert not re.search("<(script|link|iframe)", html)
    targets = re.findall(r"""(?:src|href)=["']([^"']+)""", html)
    assert all(target.startswith(("data:", "#")) for target in targets)
    assert html.count("http") == html.count("http-equiv") + html.count('xmlns="http://www.w3.org')
    ids = re.findall(r' id="([^"]+)"', html)
    assert len(ids) == len(set(ids))


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
    assert len(table) == 4
    assert len({tuple(i for i, c in enumerate(line) if c == "|") for line in table}) == 1
    text = seen(page(folders, tmp_path))
    assert "other − vanilla tract − vanilla" in text
    assert text.count(" of vanilla on ") == 2


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
    assert "31.2 33.2 × 1.06 2,051.3 1,961.3 × 0.96" in text
