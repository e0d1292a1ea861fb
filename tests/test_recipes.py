"""docs/recipes.md is what the configs say, and each trap it names has a test."""

import importlib.util
import re
from pathlib import Path

import pytest
import yaml

from tract_transfer.build.weights import check_card
from tract_transfer.config.schema import load_config

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
TRAPS = PAGE.partition("## Traps")[2]


def load_tool():
    spec = importlib.util.spec_from_file_location("recipes", ROOT / "tools/recipes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


recipes = load_tool()
FILES = recipes.files()


def name_of(file):
    return f"{file.parent.name}/{file.stem}"


def test_the_page_is_what_the_configs_say():
    assert recipes.page() == PAGE, "run python tools/recipes.py"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_a_recipe_names_its_source(file):
    found = recipes.sources(file)
    assert found
    assert all(found)
    if file.parent.name == "paper":
        assert re.match(r"# (Figure|Table) \d+", file.read_text(encoding="utf-8"))


def test_a_changed_config_changes_its_line(tmp_path, monkeypatch):
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
    monkeypatch.setattr(recipes, "ROOT", tmp_path)
    table = recipes.tables()
    assert "| [a](../configs/pretrain/a.yaml) | digits: train, test | cifar/resnet18" in table
    assert "sgd, lr 0.25, momentum 0.9, max_epochs 3, cosine, tract.lam 0.2" in table
    assert table.rstrip().endswith("| ours, and a long line of it |")


def test_the_grid_of_data_and_protocols_is_whole():
    """Each data set by each protocol, and a config for each experiment of the paper."""
    stems = {file.stem for file in FILES}
    for data in ("cifar10", "cifar100", "flowers102", "stanford_cars"):
        for protocol in ("finetune", "finetune_vissl", "knn", "linear", "logistic", "low_shot"):
            assert f"{data}_{protocol}" in stems
        assert f"t4_{data}_deit3_small" in stems
    told = {stem.partition("_")[0] for stem in stems}
    assert told >= {"f3", "f4", "t1", "f10", "f5", "t3", "f6", "f7", "f8", "f9", "t5"}
    rows = {RUNS[file].paper for file in FILES if file.parent.name == "paper"}
    assert rows >= {"t1", "t2", "t3_small_400", "t3_small_800", "t3_base_400", "t5"}


RUNS = {
    file: load_config(file)
    for file in sorted(ROOT.glob("configs/*/*.yaml"))
    if file.parent.name not in ("base", "suites")
}
MADE_BY = {config.output_dir: config for config in RUNS.values()}
# The suite of both engines pre-trains as cpu_demo does.
MADE_BY["output/voc_engines/pretrain"] = MADE_BY["output/cpu_demo/pretrain"]
WITH_WEIGHTS = [
    file for file, one in RUNS.items() if (one.model.weights or "").startswith("output/")
]


@pytest.mark.parametrize("file", WITH_WEIGHTS, ids=name_of)
def test_weights_are_those_of_the_backbone_that_is_named(file):
    """A config that goes on from another's run would load it, after however many epochs."""
    config = RUNS[file]
    made = MADE_BY[config.model.weights]
    if config.model.backbone.name is not None:
        check_card(made.model.backbone.model_dump(), config.model.backbone)


def test_each_trap_names_a_test():
    named = re.findall(r"\| `(\w+)\.py::(\w+)` \|$", TRAPS, re.MULTILINE)
    rows = [
        line
        for line in TRAPS.splitlines()
        if line.startswith("| ") and not line.startswith(("| trap", "| ---"))
    ]
    assert len(named) == len(rows) > 25
    for module, test in named:
        assert f"def {test}(" in (ROOT / f"tests/{module}.py").read_text(encoding="utf-8")
