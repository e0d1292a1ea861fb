import pydantic
import pytest
import yaml
from config_texts import CLASSIFICATION, failing_in, writer_to

from tract_transfer.config.file import dump_yaml
from tract_transfer.config.schema import (
    TASKS,
    ClassificationConfig,
    DetectionConfig,
    ProbeConfig,
    dump_config,
    known_keys,
    load_config,
)

DETECTION = """\
task: detection
output_dir: out
model: {weights: runs/a}
data:
  train: {source: voc, root: VOCdevkit, sets: [2007/trainval]}
  test: {source: voc, root: VOCdevkit, sets: [2007/test]}
  transforms: {short_sides_px: [600], max_side_px: 1000}
  batch_size: 2
solver: {optimizer: sgd, lr: 0.01, max_iters: 100, schedule: multistep, steps_iters: [80]}
"""
PROBE = """\
task: probe
output_dir: out
model: {backbone: {name: timm/resnet18}, weights: pretrained}
data:
  train: {source: huggingface, path: cifar10, split: train}
  test: {source: huggingface, path: cifar10, split: test}
  transforms: {size_px: 32}
  batch_size: 64
"""


@pytest.fixture
def write(tmp_path):
    return writer_to(tmp_path)


@pytest.fixture
def fails(write):
    return failing_in(write)


# --------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize(
    "text, schema",
    [
        (CLASSIFICATION, ClassificationConfig),
        (DETECTION, DetectionConfig),
        (PROBE, ProbeConfig),
    ],
)
def test_a_task_has_its_own_config_and_its_dump_reads_the_same(write, text, schema):
    config = load_config(write(text))
    assert type(config) is schema is TASKS[config.task]
    again = load_config(write(dump_config(config), "dump.yaml"))
    assert type(again) is schema
    assert again.model_dump() == config.model_dump()
    assert dump_config(again) == dump_config(config)


def test_numbers_are_numbers_and_words_are_words(write):
    text = CLASSIFICATION + "name: yes\nmethod: 2024-02-30\ntract: {enabled: True}\n"
    config = load_config(write(text))
    assert config.solver.lr == 0.001
    assert (config.name, config.method) == ("yes", "2024-02-30")
    assert config.tract.enabled is True


@pytest.mark.parametrize(
    "name", ["on", "no", "1e-3", "12e4", "1.5", "07", "null", "~", "a: b", "é"]
)
def test_a_dumped_string_stays_a_string(write, name):
    config = load_config(write(CLASSIFICATION), ["name", f"'{name}'"])
    assert config.name == name
    dumped = dump_config(config)
    assert load_config(write(dumped, "dump.yaml")).name == name
    assert yaml.safe_load(dumped)["name"] == name  # and for a reader of YAML 1.1
    assert yaml.safe_load(dump_yaml({"k": name})) == {"k": name}


def test_a_config_cannot_be_changed(write):
    config = load_config(write(CLASSIFICATION))
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        config.seed = 3
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        config.solver.lr = 3.0


def test_an_error_of_later_says_where_its_key_was_set(write):
    path = write(CLASSIFICATION)
    config = load_config(path, ["solver.max_epochs=3"])
    assert str(config.error("solver.lr", "too high")) == f"solver.lr: too high ({path} line 11)"
    assert str(config.error("solver.max_epochs", "x")) == "solver.max_epochs: x (command line)"
    assert str(config.error("solver.warmup_iters", "x")) == (
        f"solver.warmup_iters: x ({path} line 9)"
    )
    assert str(config.error("tract", "x")) == f"tract: x ({path})"


# -------------------------------------------------------------------------- what is not a config


@pytest.mark.parametrize(
    "override, says",
    [
        ("solver.lrr=1", "solver.lrr: unknown. Did you mean solver.lr?"),
        ("lr=1", "lr: unknown. Did you mean solver.lr?"),
        ("model.backbone.zzz=1", "model.backbone.zzz: unknown. Known: ['model.backbone.name'"),
        ("model.backbone.label_smooth=1", "model.backbone.label_smooth: unknown. Did you mean mod"),
        ("model.backbone.head=1", "model.backbone.head: unknown. Did you mean model.head?"),
        ("solvr.lr=1", "solvr: unknown. Did you mean solver?"),
        ("zzz=1", "zzz: unknown. Known: ['output_dir', 'seed'"),
        ("data.train.path=x", "data.train.path: not a key of source: digits."),
        ("model.detector.name=x", "model.detector: not a key of a classification config (of det"),
        ("evaluation.protocol=x", "evaluation.protocol: not a key of a classification config"),
        ("seed=x", "seed: Input should be a valid integer, got 'x'."),
        ("seed=1.0", "seed: Input should be a valid integer, got 1.0."),
        ("seed=true", "seed: Input should be a valid integer, got True."),
        ("name=1e-3", "name: Input should be a valid string, got 0.001."),
        ("solver.lr=0", "solver.lr: Input should be greater than 0, got 0."),
        ("solver.lr=1e999", "solver.lr: Input should be a finite number, got inf."),
        ("solver.lr='1'", "solver.lr: Input should be a valid number, got '1'."),
        ("solver=3", "solver: Input should be a valid dictionary"),
        ("tract.enabled=yes", "tract.enabled: Input should be a valid boolean, got 'yes'."),
        ("tract.layers=conv1", "tract.layers: Input should be a valid list, got 'conv1'."),
        ("data.train.source=foo", "data.train.source: 'foo' is none of 'huggingface', 'digits'."),
        ("data.train.classes=[1,a]", "data.train.classes.1: Input should be a valid integer"),
        ("data.val={fraction: 0.1}", "data.val.source: needed, and not given."),
        ("data.val={source: train}", "data.val.fraction: needed, and not given."),
        ("data.train={source: digits, split: x}", "data.train.split: Input should be 'train' or"),
        ("data=null", "data: Input should be a valid dictionary"),
        ("task=foo", "task: 'foo' is none of 'classification', 'detection', 'probe'."),
        ("model.backbone.mean=[0.5]", "model.backbone.mean: List should have at least 3 items"),
    ],
)
def test_a_wrong_override_is_explained(fails, override, says):
    message = fails(CLASSIFICATION, override)
    assert message.startswith(says)
    assert message.endswith("(command line)") or ".source: n" in message


def test_a_wrong_key_is_explained_by_file_and_line(fails, tmp_path):
    place = f"({tmp_path / 'x.yaml'} line"
    text = CLASSIFICATION.replace("  lr: 1e-3", "  lrr: 1e-3\n  nesterov: 3")
    assert fails(text).splitlines() == [
        f"solver.lr: needed, and not given. {place} 9)",
        f"solver.nesterov: Input should be a valid boolean, got 3. {place} 12)",
        f"solver.lrr: unknown. Did you mean solver.lr? {place} 11)",
    ]


def test_all_errors_are_told_at_once(fails):
    message = fails(CLASSIFICATION, "seed=x", "solver.lr=-1", "data.batch_size=0", "foo=1")
    keys = [line.split(":")[0] for line in message.splitlines()]
    assert sorted(keys) == ["data.batch_size", "foo", "seed", "solver.lr"]


def test_a_missing_task_is_named(fails):
    message = fails(CLASSIFICATION.replace("task: classification\n", ""))
    assert message.startswith("task: needed, one of ['classification', 'detection', 'probe'].")


@pytest.mark.parametrize(
    "overrides, says",
    [
        (["evaluation.report=best"], "needs data.val to select on: never data.test"),
        (["data.test=null"], "data.test or data.val is needed"),
        (["solver.steps_iters=[3]"], "solver.steps_epochs (or steps_iters) go together"),
        (["solver.schedule=multistep"], "solver.steps_epochs (or steps_iters) go together"),
        (["solver.max_iters=9"], "give one of solver.max_epochs and solver.max_iters"),
        (["solver.max_epochs=null"], "give one of solver.max_epochs and solver.max_iters"),
        (["solver.warmup_epochs=1", "solver.warmup_iters=1"], "solver.warmup_epochs and"),
        (["evaluation.every_epochs=1", "evaluation.every_iters=1"], "one of every_epochs and"),
        (
            ["data.transforms.pad_px=4"],
            "pad_px is for crop: pad or resize_random, and crop is none",
        ),
        (["data.transforms.scale=[0.1,1]"], "scale is for crop: random_resized"),
        (["model.bce_target_threshold=0"], "bce_target_threshold has no use here"),
        (
            ["model.loss=bce", "model.bce_target_threshold=0", "model.label_smoothing=0.1"],
            "set model.label_smoothing: 0, or leave the threshold out",
        ),
        (["model.loss=hinge"], "model.loss: Input should be 'cross_entropy' or 'bce'"),
        (["model.backbone=null"], "model.backbone: Input should be a valid dictionary"),
        (["model.backbone.name=null"], "model.backbone.name is needed"),
        (
            ["model.weights=a", "model.backbone={name: null, stem: cifar}"],
            "stem and args need model.backbone.name",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(fails, overrides, says):
    assert says in fails(CLASSIFICATION, *overrides)


def test_a_probe_is_measured_by_what_it_runs(fails):
    message = fails(PROBE, "evaluation.logistic_regression=null")
    assert "evaluation.metric is logistic_top1, and its probe is left out" in message
    assert "solver: not a key of a probe config" in fails(PROBE, "solver.lr=1")


def test_selection_on_val_is_fine(write):
    overrides = ["evaluation.report=best", "data.val={source: train, fraction: 0.1}"]
    config = load_config(write(CLASSIFICATION), overrides)
    assert config.data.val.fraction == 0.1


# ---------------------------------------------------------------------------------------- schema


def test_the_known_keys_are_the_schema_s():
    keys = known_keys(ClassificationConfig)
    assert len(keys) == len(set(keys))
    assert {"seed", "solver.lr", "data.val.fraction", "engine.log.every_iters"} <= set(keys)
    assert "model.detector" not in keys


@pytest.mark.parametrize("schema", TASKS.values())
def test_every_duration_and_size_carries_its_unit(schema):
    for key in known_keys(schema):
        leaf = key.rpartition(".")[2]
        assert leaf not in ("size", "steps", "warmup", "max", "every", "epochs", "iters"), key
