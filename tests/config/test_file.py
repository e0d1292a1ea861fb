"""YAML files with bases and overrides: what is merged, what is refused, and where a key is from."""

import pytest
from config_texts import CLASSIFICATION, failing_in, writer_to

from tract_transfer.config.file import merge, override, parse_words, read_config_file
from tract_transfer.config.schema import ConfigError, load_config


@pytest.fixture
def write(tmp_path):
    return writer_to(tmp_path)


@pytest.fixture
def fails(write):
    return failing_in(write)


# -------------------------------------------------------------------------------------- the file


@pytest.mark.parametrize(
    "text, says",
    [
        ("task: a\nseed: 1\ntask: b\n", "task: given twice"),
        ("solver: {lr: 1,\n  lr: 2}\n", "solver.lr: given twice"),
        ("- a\n", "a config is a mapping"),
        ("", "a config is a mapping"),
        ("a: [1\n", "not YAML"),
        ("a: 1\n---\nb: 2\n", "not YAML"),
        ("a: !!int x\n", "not YAML"),
        ("? [a]\n: 1\n", "not YAML"),
        ("_BASE_: 3\n", "_BASE_: a path or a list of paths, got 3"),
        ("_BASE_: [{a: b}]\n", "_BASE_: a path or a list of paths"),
        ("_BASE_:\n", "_BASE_: a path or a list of paths, got None"),
    ],
)
def test_a_broken_file_is_refused(fails, tmp_path, text, says):
    message = fails(text)
    assert says in message
    assert str(tmp_path / "x.yaml") in message


def test_repeated_keys_are_told_with_both_lines(fails, tmp_path):
    path = tmp_path / "x.yaml"
    assert fails("a:\n  b: 1\n  c: 2\n  b: 3\n") == (
        f"a.b: given twice ({path} line 4 and {path} line 2)."
    )


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:pathlib.Path.touch", "!!python/object/new:pathlib.Path"]
)
def test_nothing_in_a_config_is_executed(fails, tmp_path, tag):
    touched = tmp_path / "touched"
    evil = f"{tag} [{touched}]"
    assert "not safe YAML" in fails(f"{CLASSIFICATION}name: {evil}\n")
    assert "is not YAML" in fails(CLASSIFICATION, f"name={evil}")
    assert not touched.exists()


def test_a_missing_file_is_named(tmp_path, write, refused):
    with refused(
        "a config that is not there", ConfigError, match=r"No config can be read at .*nowhere\.yaml"
    ):
        load_config(tmp_path / "nowhere.yaml")
    path = write("_BASE_: gone.yaml\n")
    with refused(
        "a _BASE_ that is not there", ConfigError, match=rf"gone\.yaml \(_BASE_ of {path}\)"
    ):
        load_config(path)


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


@pytest.mark.parametrize("name", ["x.yaml", "transfer/x.yaml"])
def test_an_error_names_the_base_it_is_in(write, name, refused):
    base = write(CLASSIFICATION.replace("seed", "").replace("lr:", "lrr:"), "base.yaml")
    path = write(f"_BASE_: {'../' * name.count('/')}base.yaml\nsolver: {{lr: 1}}\n", name)
    with refused("a misspelt key in a _BASE_", ConfigError) as error:
        load_config(path)
    assert str(error.value) == f"solver.lrr: unknown. Did you mean solver.lr? ({base} line 11)"


@pytest.mark.parametrize("others", [["x.yaml"], ["b.yaml", "x.yaml"], ["b.yaml", "b.yaml"]])
def test_a_circle_of_bases_is_refused(write, others, refused):
    files = ["x.yaml", *others]
    for name, base in zip(files, others, strict=False):
        write(f"_BASE_: {base}\n", name)
    with refused(
        f"a _BASE_ that leads back: {others}",
        ConfigError,
        match="leads back to the file itself",
    ):
        load_config(write(f"_BASE_: {others[0]}\n"))


def test_one_base_may_be_reached_twice(write):
    write(CLASSIFICATION, "base.yaml")
    write("_BASE_: base.yaml\nseed: 1\n", "a.yaml")
    write("_BASE_: base.yaml\nname: b\n", "b.yaml")
    config = load_config(write("_BASE_: [a.yaml, b.yaml]\n"))
    assert (config.seed, config.name) == (1, "b")


def test_another_source_or_name_starts_its_section_anew(write):
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


# ------------------------------------------------------------------------------------- overrides


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
def test_both_ways_of_writing_overrides(words, tree):
    assert override({}, {}, parse_words(words))[0] == tree


@pytest.mark.parametrize(
    "words, says",
    [
        (["=1"], "is no override"),
        (["--seed=1"], "is no override"),
        (["a"], "a: given without a value"),
        (["a=1", "a.b=2"], "a was given a value before"),
        (["a=[1"], "is not YAML"),
        (["a=!!int x"], "is not YAML"),
    ],
)
def test_what_is_no_override_is_refused(words, says):
    with pytest.raises(ConfigError, match=says):
        override({}, {}, parse_words(words))


def test_overrides_go_over_all_files(write):
    write(CLASSIFICATION, "base.yaml")
    tree, origins = read_config_file(
        write("_BASE_: base.yaml\nseed: 1\n"), ["seed=2", "solver.lr", "3"]
    )
    assert (tree["seed"], tree["solver"]["lr"], tree["solver"]["optimizer"]) == (2, 3, "sgd")
    assert origins["seed"] == origins["solver.lr"] == "command line"
    assert origins["data.batch_size"].endswith("base.yaml line 8")


BOMB = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))


@pytest.mark.parametrize(
    "text",
    [
        *("a: !!bool x", "a: !!int ''", "a: !!timestamp x", "a: &x {b: *x}", "a: &x [*x]"),
        *(BOMB, "a: " + "[" * 3000),
    ],
    ids=["bool", "int", "timestamp", "itself", "itself in a list", "bomb", "depth"],
)
def test_yaml_that_does_not_fit_or_grows_is_refused(fails, text):
    assert "x.yaml: not YAML, or not safe YAML: " in fails(text)
    with pytest.raises(ConfigError, match=r"key: .* is not YAML"):
        parse_words([f"key={text}"])
