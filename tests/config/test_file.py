"""YAML files with bases and overrides: what is merged, and where each key was set."""

import pytest
from config_texts import CLASSIFICATION

from tract_transfer.config.file import merge, override, parse_words, read_config_file
from tract_transfer.config.schema import load_config


@pytest.fixture
def write(tmp_path):
    def write_file(text, name="x.yaml"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write_file


def test_bases_are_read_in_order_beside_their_file(write):
    write(CLASSIFICATION, "base/all.yaml")
    write("_BASE_: all.yaml\nseed: 1\nsolver: {lr: 2}\n", "base/middle.yaml")
    write("seed: 5\nsolver: {weight_decay: 0.5}\n", "other.yaml")
    path = write("_BASE_: [base/middle.yaml, other.yaml]\nsolver: {momentum: 0.9}\n")
    config = load_config(path)
    assert config.seed == 5
    solver = config.solver
    assert (solver.optimizer, solver.lr, solver.weight_decay, solver.momentum) == (
        "sgd", 2, 0.5, 0.9,
    )  # fmt: skip


def test_one_base_may_be_included_twice(write):
    write(CLASSIFICATION, "base.yaml")
    write("_BASE_: base.yaml\nseed: 1\n", "a.yaml")
    write("_BASE_: base.yaml\nname: b\n", "b.yaml")
    config = load_config(write("_BASE_: [a.yaml, b.yaml]\n"))
    assert (config.seed, config.name) == (1, "b")


def test_another_source_or_name_replaces_its_section(write):
    write(CLASSIFICATION.replace("name: cifar", "stem: cifar, name: cifar"), "base.yaml")
    text = """\
_BASE_: base.yaml
model: {backbone: {name: timm/resnet18}}
data: {train: {source: huggingface, path: p, split: s}, test: {classes: [1, 2]}}
"""
    config = load_config(write(text))
    assert (config.model.backbone.stem, config.model.backbone.args) == ("default", {})
    assert config.data.train.path == "p"
    assert config.data.test.split == "test"
    assert config.data.test.classes == [1, 2]
    same = load_config(write("_BASE_: base.yaml\n"), ["model.backbone.name=cifar/resnet18"])
    assert same.model.backbone.args == {"width": 16}
    other = load_config(write("_BASE_: base.yaml\n"), ["model.backbone.name=cifar/vit"])
    assert other.model.backbone.args == {}


def test_merging_changes_neither_tree():
    base, over = {"a": {"b": 1, "c": [1, 2]}}, {"a": {"c": [3]}, "d": None}
    assert merge(base, over) == {"a": {"b": 1, "c": [3]}, "d": None}
    assert (base, over) == ({"a": {"b": 1, "c": [1, 2]}}, {"a": {"c": [3]}, "d": None})
    assert merge(base, {"a": None}) == {"a": None}
    assert merge(base, {}) == base


@pytest.mark.parametrize(
    "words, tree",
    [
        (["a=1"], {"a": 1}),
        (["a", "1"], {"a": 1}),
        (["a.b=1", "a.c", "2"], {"a": {"b": 1, "c": 2}}),
        (["a=b=c"], {"a": "b=c"}),
        (["a", "b=c"], {"a": "b=c"}),
        (["a", "-1"], {"a": -1}),
        (["a=[1, 2e-1, x]"], {"a": [1, 0.2, "x"]}),
        (["a={b: true, c: null}"], {"a": {"b": True, "c": None}}),
        (["a="], {"a": None}),
        (["a=1", "a=2"], {"a": 2}),
        (["a={b: 1}", "a.c=2"], {"a": {"b": 1, "c": 2}}),
        (["a=https://x.org/y"], {"a": "https://x.org/y"}),
        ([], {}),
    ],
)
def test_overrides_are_words_or_pairs_of_words(words, tree):
    assert override({}, {}, parse_words(words))[0] == tree


def test_overrides_go_over_all_files(write):
    write(CLASSIFICATION, "base.yaml")
    tree, origins = read_config_file(
        write("_BASE_: base.yaml\nseed: 1\n"), ["seed=2", "solver.lr", "3"]
    )
    assert (tree["seed"], tree["solver"]["lr"], tree["solver"]["optimizer"]) == (2, 3, "sgd")
    assert origins["seed"] == origins["solver.lr"] == "command line"
    assert origins["data.batch_size"].endswith("base.yaml line 8")
