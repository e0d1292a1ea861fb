"""The paper's numbers appear beside the runs that repeat its rows, with the differences."""

from pathlib import Path
from typing import get_args

import pytest
import yaml
from report_runs import page_text, write_run

from tract_transfer.config.schema import PaperRow, load_config
from tract_transfer.report.content import read_report
from tract_transfer.report.paper import read_setups, read_table

CONFIGS = Path(__file__).parents[2] / "configs" / "paper"


def write_like(root: Path, config_file: str, method: str, *overrides: str) -> Path:
    """Write a finished run with a config of the paper's experiments."""
    enabled = f"tract.enabled={'false' if method == 'vanilla' else 'true'}"
    config = load_config(CONFIGS / config_file, [enabled, *overrides])
    folder = write_run(root, method, "task", 0, {config.evaluation.metric: 0.7})
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump()))
    return folder


def test_config_setups_and_numbers_have_the_same_rows():
    assert set(get_args(PaperRow)) == set(read_setups()) == {row["row"] for row in read_table()}


def test_means_of_table_1_are_the_papers():
    table = [row for row in read_table() if row["row"] == "t1" and row["metric"] == "top1"]
    assert len({row["backbone"] for row in table}) == 36
    for side, epochs, mean in (
        ("vanilla", "200", 75.90), ("tract", "200", 76.39), ("tract", "133", 75.94),
    ):  # fmt: skip
        values = [float(row[side]) for row in table if row["epochs"] == epochs]
        assert sum(values) / len(values) == pytest.approx(mean, abs=0.006)


@pytest.mark.parametrize(
    "file",
    ["t1_cifar100_resnet18", "f5_imagenet_resnet50", "t4_cifar10_deit3_small",
     "t4_cifar100_deit3_small", "t4_flowers102_deit3_small", "t4_stanford_cars_deit3_small",
     "t3_finetune_deit3_small", "t3_finetune_deit3_base", "t5_voc07_faster_rcnn_vgg16"],
)  # fmt: skip
def test_configs_of_the_paper_differ_only_in_seeds(tmp_path, file):
    overrides = []
    if file.startswith("t4"):  # the backbone's name is in the folder of weights, which is missing
        overrides = ["model.backbone.name=timm/deit3_small_patch16_224"]
    folders = [write_like(tmp_path, f"{file}.yaml", m, *overrides) for m in ("vanilla", "tract")]
    report = read_report(folders)
    assert report.paper
    assert report.problems == []
    seeds = "seeds: 1 of vanilla, 1 of tract here"
    for row in report.paper:
        assert row.sides == {"vanilla": "vanilla", "tract": "tract"}
        assert all(text.startswith(seeds) for text in row.differing)


def test_differences_in_setup_are_named(tmp_path):
    words = ("solver.max_epochs=133", "solver.steps_epochs=[40,80,107]", "data.batch_size=64")
    file = "t1_cifar100_resnet18.yaml"
    folders = [write_like(tmp_path, file, "vanilla", *words)]
    folders.append(write_like(tmp_path, file, "tract", "tract.lam=0.2", *words))
    (row,) = read_report(folders).paper
    assert row.title == "table 1, CIFAR-100, cifar/resnet18, 133 epochs"
    assert row.paper == {"vanilla": (None, None), "tract": (75.86, 0.20)}
    text = page_text(folders)
    assert f"task {row.title} top-1 accuracy – 75.86 ± 0.20" in text
    for key, ours, theirs in (("data.batch_size", 64, 128), ("tract.lam", 0.2, 0.1)):
        assert f"{key}: {ours} here, {theirs} in the paper" in row.differing
        assert f"{key}: {ours} here, {theirs} in the paper" in text


def test_row_that_the_paper_lacks_is_a_problem_and_no_row_is_none(tmp_path):
    report = read_report([write_like(tmp_path, "f5_imagenet_resnet18.yaml", "vanilla")])
    assert (report.paper, report.problems) == (
        [],
        ["task: the config sets `paper: t2`, but the paper's tables have no such row for "
         "torchvision/resnet18 and 90.0 epochs"],
    )  # fmt: skip
    report = read_report([write_run(tmp_path, "vanilla", "unnamed", 0, {"top1": 0.5})])
    assert (report.paper, report.problems) == ([], [])
