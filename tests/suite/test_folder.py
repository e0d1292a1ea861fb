"""What a folder holds of a run: nothing, a part, all of it, or another run."""

import json
import os

import pytest
import yaml

from tract_transfer.engine.run_folder import changed_keys
from tract_transfer.suite.journal import look, read_weights_sha256

CONFIG = {"seed": 0, "output_dir": "x", "solver": {"lr": 0.1}, "model": {"weights": "a/pretrain"}}
PRINTS = {"train": "t1", "test": "t2"}
RESULTS = {"metrics": {"top1": 0.5}, "primary_metric": "top1", "weights_sha256": "w1"}


@pytest.fixture
def folder(tmp_path):
    """A finished run's."""
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    (tmp_path / "environment.json").write_text(json.dumps({"data": PRINTS}))
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    return tmp_path


def found_in(folder, config=CONFIG, prints=PRINTS, weights="w1", **more):
    return look(folder, config, prints, weights, changed=changed_keys, **more)


def begin(folder):
    """Leave what a run that was cut off leaves."""
    (folder / "results.json").unlink()
    (folder / "checkpoints/iter_0000005").mkdir(parents=True)


def test_an_empty_folder_is_new(tmp_path):
    assert found_in(tmp_path).state == "new"
    assert found_in(tmp_path / "none").state == "new"


def test_a_finished_run_is_found_with_its_results(folder):
    found = found_in(folder)
    assert (found.state, found.why, found.results) == ("finished", "", RESULTS)
    # The next look needs no comparison, and may be told of another config.
    other = {**CONFIG, "seed": 9}
    assert found_in(folder, other, known_sha256=found.config_sha256).state == "finished"
    assert found_in(folder, other).state == "other"


def test_a_run_cut_off_is_begun(folder):
    begin(folder)
    assert found_in(folder).state == "begun"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{oops", "results.json cannot be read"),
        ("[]", "results.json has no metrics"),
        ('{"metrics": 1}', "results.json has no metrics"),
        ('{"metrics": {}, "primary_metric": "top1"}', "results.json lacks its primary metric"),
    ],
)
def test_broken_results_are_no_results(folder, text, why):
    (folder / "results.json").write_text(text)
    found = found_in(folder)
    assert found.state == "begun"
    assert why in found.why


def test_another_config_names_what_differs(folder):
    found = found_in(folder, {**CONFIG, "seed": 1, "solver": {"lr": 0.2}})
    assert found.state == "other"
    assert found.why == "seed: 0 then, 1 now; solver.lr: 0.1 then, 0.2 now"


def test_places_and_speed_may_differ(folder):
    assert found_in(folder, {**CONFIG, "output_dir": "y"}).state == "finished"


def test_many_differences_are_counted(folder):
    found = found_in(folder, {**CONFIG, **{f"key{i}": i for i in range(9)}})
    assert found.why.endswith(" and 4 more")


@pytest.mark.parametrize("is_begun", [False, True])
def test_other_data_are_another_run(folder, is_begun):
    if is_begun:
        begin(folder)
    found = found_in(folder, prints={**PRINTS, "train": "t9", "val": "t3"})
    assert (found.state, found.why) == (
        "other",
        "other images or labels in data.train and data.val",
    )


def test_data_that_only_a_run_can_tell_are_not_compared(folder):
    assert found_in(folder, prints=None).state == "finished"


def test_a_backbone_that_was_trained_anew_makes_another_run(folder):
    found = found_in(folder, weights="w2")
    assert (found.state, found.why) == ("other", "its backbone has been trained anew since")
    assert found_in(folder, weights=None, weights_are_known=False).state == "finished"


def test_a_suite_can_be_moved(folder):
    """Where a hash tells the backbone, it does not matter where it lay."""
    moved = {**CONFIG, "model": {"weights": "b/pretrain"}}
    assert found_in(folder, moved).state == "finished"
    assert found_in(folder, moved, weights=None).state == "other"


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("config.yaml", None, "config.yaml cannot be read"),
        ("config.yaml", "a: [", "config.yaml is not YAML"),
        ("config.yaml", "- a", "config.yaml is no mapping"),
        ("environment.json", None, "environment.json does not tell its data"),
        ("environment.json", "{", "environment.json does not tell its data"),
        ("environment.json", '{"data": 3}', "environment.json does not tell its data"),
    ],
)
def test_a_broken_folder_is_another_run_and_says_why(folder, name, text, why):
    (folder / name).unlink()
    if text is not None:
        (folder / name).write_text(text)
    found = found_in(folder)
    assert found.state == "other"
    assert why in found.why


def test_results_of_another_version_are_another_run(folder):
    (folder / "results.json").write_text(json.dumps({"format": 7, "scores": []}))
    found = found_in(folder)
    assert found.state == "other"
    assert found.why == "results.json has format 7, and this version reads 1"


def test_a_card_tells_the_weights(tmp_path):
    assert read_weights_sha256(tmp_path) is None
    for text in ("{", "[]"):
        (tmp_path / "model.json").write_text(text)
        assert read_weights_sha256(tmp_path) is None
    (tmp_path / "model.json").write_text('{"sha256": "w1"}')
    assert read_weights_sha256(tmp_path) == "w1"


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_results_that_may_not_be_read_are_broken(folder):
    (folder / "results.json").chmod(0)
    assert "results.json cannot be read" in found_in(folder).why
