"""recipes.md is what the configs set; errors.md can be read back."""

import importlib.util
import re
from pathlib import Path

import errors_page
import pytest
import yaml

from tract_transfer.build.weights import check_origin
from tract_transfer.config.schema import load_config

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("generate", ROOT / "docs/generate.py")
generate = importlib.util.module_from_spec(spec)
spec.loader.exec_module(generate)
FILES = generate.recipe_files()


def name_of(file):
    return f"{file.parent.name}/{file.stem}"


def test_the_recipes_are_those_of_the_configs():
    page = generate.RECIPES.read_text(encoding="utf-8")
    assert generate.recipes_page() == page, "make docs"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_a_recipe_names_its_source(file):
    sources = generate.sources(file)
    assert sources
    assert all(sources)
    if file.parent.name == "paper":
        assert re.match(r"# (Figure|Table) \d+", file.read_text(encoding="utf-8"))


def test_a_changed_config_changes_its_row(tmp_path, monkeypatch):
    folder = tmp_path / "configs/pretrain"
    folder.mkdir(parents=True)
    tree = yaml.safe_load((ROOT / "configs/quickstart/pretrain.yaml").read_text())
    base = ROOT / "configs/quickstart" / tree["_BASE_"]
    lines = [
        "# A run.", "# Source: ours, and a long", "#   line of it.", f"_BASE_: {base}",
        "output_dir: output/x", "model: {backbone: {name: cifar/resnet18}}",
        "solver: {lr: 0.25, max_epochs: 3}", "tract: {enabled: true, lam: 0.2}",
    ]  # fmt: skip
    (folder / "a.yaml").write_text("\n".join(lines))
    monkeypatch.setattr(generate, "ROOT", tmp_path)
    table = generate.recipe_tables()
    assert "| [a](../../configs/pretrain/a.yaml) | digits: train, test | cifar/resnet18" in table
    assert "sgd, lr 0.25, momentum 0.9, max_epochs 3, cosine, tract.lam 0.2" in table
    assert table.rstrip().endswith("| ours, and a long line of it |")


@pytest.fixture(scope="module")
def runs():
    """Return file -> config of every run, of the benchmarks too."""
    files = [*ROOT.glob("configs/*/*.yaml"), *ROOT.glob("benchmarks/configs/*/*.yaml")]
    of_runs = [file for file in sorted(files) if file.parent.name not in ("base", "suites")]
    return {file: load_config(file) for file in of_runs}


def test_no_data_set_lacks_a_protocol_and_no_experiment_of_the_paper_a_config(runs):
    stems = {file.stem for file in FILES}
    for data in ("cifar10", "cifar100", "flowers102", "stanford_cars"):
        for protocol in ("finetune", "finetune_vissl", "knn", "linear", "logistic", "low_shot"):
            assert f"{data}_{protocol}" in stems
        assert f"t4_{data}_deit3_small" in stems
    experiments = {stem.partition("_")[0] for stem in stems}
    assert experiments >= {"f3", "f4", "t1", "f10", "f5", "t3", "f6", "f7", "f8", "f9", "t5"}
    rows = {runs[file].paper for file in FILES if file.parent.name == "paper"}
    assert rows >= {"t1", "t2", "t3_small_400", "t3_small_800", "t3_base_400", "t5"}


def test_weights_of_another_run_fit_the_backbone_of_the_config(runs):
    made_by = {config.output_dir: config for config in runs.values()}
    # That suite pre-trains with the config of cpu_demo.
    made_by["output/voc_engines/pretrain"] = made_by["output/cpu_demo/pretrain"]
    for config in runs.values():
        if (config.model.weights or "").startswith("output/"):
            origin = made_by[config.model.weights].model.backbone
            if config.model.backbone.name is not None:
                check_origin(origin.model_dump(), config.model.backbone)  # raises


# errors.md


def test_there_are_many_rows_and_each_has_a_message():
    rows = errors_page.read_page()
    assert len(rows) >= 60
    assert min(map(len, rows.values())) > 20


def test_rows_read_back_as_they_were_written(tmp_path, monkeypatch):
    monkeypatch.setattr(errors_page, "PAGE", tmp_path / "errors.md")
    rows = {"a or | b": ("data", "give `x | y` or <class>"), "c": ("files.py", "a | b")}
    errors_page.PAGE.write_text(generate.errors_page(rows))
    assert errors_page.read_page() == {name: message for name, (_, message) in rows.items()}


def test_folders_and_words_of_other_libraries_are_hidden(tmp_path):
    message = f"No file at {tmp_path}/a/b.xml, in {tmp_path}. Known: ['alexnet', 1]"
    shown = errors_page.shown(message, tmp_path.parent)
    assert shown == "No file at …/a/b.xml, in …. Known: …"
    assert len(errors_page.shown("word " * 200, tmp_path)) <= errors_page.LONGEST + 2
