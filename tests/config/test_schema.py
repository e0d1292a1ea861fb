"""What a config holds, its dump, and the lines that its errors name."""

import pydantic
import pytest
import yaml
from config_texts import CLASSIFICATION, PROBE, VOC_PROBE

from tract_transfer.config.file import dump_yaml
from tract_transfer.config.schema import (
    TASKS,
    ClassificationConfig,
    dump_config,
    known_keys,
    load_config,
)


@pytest.fixture
def load(tmp_path):
    def load_text(text, *overrides):
        path = tmp_path / "x.yaml"
        path.write_text(text, encoding="utf-8")
        return load_config(path, overrides)

    return load_text


def test_numbers_are_numbers_and_words_are_words(load):
    text = CLASSIFICATION + "name: yes\nmethod: 2024-02-30\ntract: {enabled: True}\n"
    config = load(text)
    assert config.solver.lr == 0.001
    assert (config.name, config.method) == ("yes", "2024-02-30")
    assert config.tract.enabled is True


@pytest.mark.parametrize(
    "name", ["on", "no", "1e-3", "12e4", "1.5", "07", "null", "~", "a: b", "é"]
)
def test_a_dumped_string_stays_a_string(load, name):
    config = load(CLASSIFICATION, "name", f"'{name}'")
    assert config.name == name
    dumped = dump_config(config)
    assert load(dumped).name == name
    assert yaml.safe_load(dumped)["name"] == name  # and for a reader of YAML 1.1
    assert yaml.safe_load(dump_yaml({"k": name})) == {"k": name}


def test_a_config_cannot_be_changed(load):
    config = load(CLASSIFICATION)
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        config.seed = 3
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        config.solver.lr = 3.0


def test_a_later_error_names_the_line_of_its_key(load, tmp_path):
    path = tmp_path / "x.yaml"
    config = load(CLASSIFICATION, "solver.max_epochs=3")
    assert str(config.error("solver.lr", "too high")) == f"solver.lr: too high ({path} line 11)"
    assert str(config.error("solver.max_epochs", "x")) == "solver.max_epochs: x (command line)"
    assert str(config.error("solver.warmup_iters", "x")) == (
        f"solver.warmup_iters: x ({path} line 9)"
    )
    assert str(config.error("tract", "x")) == f"tract: x ({path})"


def test_secrets_are_hidden_in_what_is_stored(load):
    token = f"hf_{'x' * 34}"
    words = (
        "output_dir=s3://me:word@host/x",
        f"model.backbone.args={{a: [{token}], class_token: mean}}",
    )
    config = load(CLASSIFICATION, *words, "name=tokens")
    assert config.output_dir == "s3://me:word@host/x"
    stored = yaml.safe_load(dump_config(config))
    assert stored["output_dir"] == "s3://***@host/x"
    assert stored["model"]["backbone"]["args"] == {"width": 16, "a": ["***"], "class_token": "mean"}
    assert stored["name"] == "tokens"
    assert dump_config(load(dump_config(config))) == dump_config(config)


def test_keys_at_their_default_may_be_written(load):
    """A stored config has every key, those without effect included."""
    off = "tract={enabled: false, lam: 0.1, lam_mode: absolute}"
    assert not load(CLASSIFICATION, off, "solver.step_factor=0.1").tract.enabled


def test_defaults_are_those_of_dino_and_vissl(load):
    evaluation = load(PROBE, "evaluation.svm={}").evaluation
    assert evaluation.knn.ks == [10, 20, 100, 200]
    assert evaluation.knn.temperature == 0.07
    cs = evaluation.logistic_regression.cs
    assert (len(cs), cs[0], cs[-1]) == (45, pytest.approx(1e-6), pytest.approx(1e5))
    assert cs[1] / cs[0] == pytest.approx(10 ** (11 / 44))
    assert evaluation.svm.cs == [0.01, 0.1, 1, 2, 5, 10, 15, 20, 50, 100, 1000]
    assert evaluation.svm.folds == 3


def test_every_probe_that_runs_can_be_the_metric(load):
    words = ("evaluation.linear={}", "evaluation.svm={}", "evaluation.few_shot={}")
    one = ("knn10_top1", "knn200_mean_per_class", "logistic_top5", "linear_top1", "svm_top1")
    for metric in (*one, "shot4_top1"):
        assert load(PROBE, *words, f"evaluation.metric={metric}").evaluation.metric == metric
    few_shot = "evaluation.few_shot={ks: [2], classifier: svm}"
    for metric in ("svm_map_11point", "svm_map_area", "shot2_map_area"):
        assert load(VOC_PROBE, few_shot, f"evaluation.metric={metric}").data.has_many_labels


def test_known_keys_are_those_of_the_schema():
    keys = known_keys(ClassificationConfig)
    assert len(keys) == len(set(keys))
    assert {"seed", "solver.lr", "data.val.fraction", "engine.log.every_iters"} <= set(keys)
    assert "model.detector" not in keys


@pytest.mark.parametrize("schema", TASKS.values())
def test_every_duration_and_size_carries_its_unit(schema):
    for key in known_keys(schema):
        leaf = key.rpartition(".")[2]
        assert leaf not in ("size", "steps", "warmup", "max", "every", "epochs", "iters"), key
