"""The paper's numbers stand beside the runs that repeat its rows, with what differs."""

from pathlib import Path
from typing import get_args

import pytest
import yaml
from report_runs import load_runs, page, seen, write_run

from tract_transfer.config.schema import PaperRow, load_config
from tract_transfer.engine import run_folder
from tract_transfer.report import runs as suite_runs
from tract_transfer.report.compare import by_task
from tract_transfer.report.paper import SETUPS, beside_the_paper, read_table

CONFIGS = Path(__file__).parents[2] / "configs" / "paper"


def write_like(root: Path, config_file: str, method: str, *words: str) -> Path:
    """Write a finished run with the config of an experiment of the paper."""
    enabled = f"tract.enabled={'false' if method == 'vanilla' else 'true'}"
    config = load_config(CONFIGS / config_file, [enabled, *words])
    metric = config.evaluation.metric
    folder = write_run(root, method, "task", 0, {metric: 0.7})
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump()))
    return folder


def rows_of(folders: list[Path]):
    return beside_the_paper(by_task(load_runs(folders)))


def test_config_setups_and_numbers_know_the_same_rows():
    assert set(get_args(PaperRow)) == set(SETUPS) == {row["row"] for row in read_table()}
    assert run_folder.RESULTS_FORMAT == suite_runs.RESULTS_FORMAT


def test_the_means_of_table_1_are_the_papers():
    table = [row for row in read_table() if row["row"] == "t1" and row["metric"] == "top1"]
    assert len({row["backbone"] for row in table}) == 36
    for side, epochs, mean in (
        ("vanilla", "200", 75.90),
        ("tract", "200", 76.39),
        ("tract", "133", 75.94),
    ):
        own = [float(row[side]) for row in table if row["epochs"] == epochs]
        assert sum(own) / len(own) == pytest.approx(mean, abs=0.006)


@pytest.mark.parametrize(
    "file",
    ["t1_cifar100_resnet18", "f5_imagenet_resnet50", "t4_cifar10_deit3_small",
     "t4_cifar100_deit3_small", "t4_flowers102_deit3_small", "t4_stanford_cars_deit3_small",
     "t3_finetune_deit3_small", "t3_finetune_deit3_base", "t5_voc07_faster_rcnn_vgg16"],
)  # fmt: skip
def test_the_papers_configs_differ_in_the_seeds_alone(tmp_path, file):
    words = []
    if file.startswith("t4"):  # the backbone is told by the weights' folder, which is not there
        words = ["model.backbone.name=timm/deit3_small_patch16_224"]
    folders = [write_like(tmp_path, f"{file}.yaml", m, *words) for m in ("vanilla", "tract")]
    rows, problems = rows_of(folders)
    assert rows
    assert problems == []
    for row in rows:
        assert row.sides == {"vanilla": "vanilla", "tract": "tract"}
        assert all(
            text.startswith("seeds: 1 of vanilla, 1 of tract here") for text in row.differing
        )


def test_what_differs_is_named(tmp_path):
    words = ("solver.max_epochs=133", "solver.steps_epochs=[40,80,107]", "data.batch_size=64")
    folders = [write_like(tmp_path, "t1_cifar100_resnet18.yaml", "vanilla", *words)]
    folders.append(
        write_like(tmp_path, "t1_cifar100_resnet18.yaml", "tract", "tract.lam=0.2", *words)
    )
    (row,), _ = rows_of(folders)
    assert row.title == "table 1, CIFAR-100, cifar/resnet18, 133 epochs"
    assert row.paper == {"vanilla": (None, None), "tract": (75.86, 0.20)}
    assert "data.batch_size: 64 here, 128 in the paper" in row.differing
    assert "tract.lam: 0.2 here, 0.1 in the paper" in row.differing
    text = seen(page(folders, tmp_path))
    assert (
        "task table 1, CIFAR-100, cifar/resnet18, 133 epochs top-1 accuracy – 75.86 ± 0.20" in text
    )
    assert "data.batch_size: 64 here, 128 in the paper" in text


def test_a_row_that_the_tables_lack_is_told(tmp_path):
    folders = [write_like(tmp_path, "f5_imagenet_resnet18.yaml", "vanilla")]
    rows, problems = rows_of(folders)
    assert rows == []
    assert problems == [
        "task: the paper's tables have no row t2 for torchvision/resnet18 and 90.0 epochs, which "
        "its config's `paper` asks for"
    ]


def test_runs_that_name_no_row_have_none(tmp_path):
    assert rows_of([write_run(tmp_path, "vanilla", "task", 0, {"top1": 0.5})]) == ([], [])
