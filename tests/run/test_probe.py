"""A run of probes on digits: what they select on, and what they report."""

import json
import logging

import numpy as np
import pytest
import torch

from tract_transfer.build.data import build_data
from tract_transfer.data.classification import ClassificationDataset
from tract_transfer.evaluation import probes as probes_cache
from tract_transfer.models.backbone import Backbone
from tract_transfer.run.run import run

ALL = (
    "evaluation.linear={lrs: [0.01, 0.1], max_epochs: 3}",
    "evaluation.svm={cs: [0.1, 1.0]}",
    "evaluation.few_shot={ks: [1, 4], samplings: 3, cs: [0.1, 1.0]}",
)
MANY = (
    "evaluation={knn: null, logistic_regression: null, svm: {cs: [0.1, 1.0]},"
    " metric: svm_map_11point, few_shot: {classifier: svm, ks: [1, 2], samplings: 2, cs: [1.0]}}",
    "data.transforms={size_px: 32, resize: whole}",
)


@pytest.fixture(scope="module")
def everything(tmp_path_factory, call, write_tiny):
    """Results of all probes on three digits, through the tool, and the run's folder."""
    folder = tmp_path_factory.mktemp("probes")
    path = write_tiny(folder, "probe")
    done = call("train_net.py", "--config-file", path, *ALL)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "run/results.json").read_text()), folder / "run"


@pytest.fixture
def run_tiny(tmp_path, load_tiny, monkeypatch):
    """Run the tiny probe in a folder of its own, on data changed by `edit`."""

    def start(*words, name="run", edit=lambda data: None):
        def edited(config):
            data = build_data(config)
            edit(data)
            return data

        with monkeypatch.context() as patch:
            patch.setattr("tract_transfer.run.run.build_data", edited)
            return run(load_tiny(tmp_path, *words, f"output_dir={tmp_path / name}", task="probe"))

    return start


def test_every_probe_reports_its_metrics_choices_and_protocol(everything):
    results, folder = everything
    probes = results["probes"]
    assert list(probes) == ["knn1", "knn5", "logistic", "linear", "svm", "shot1", "shot4"]
    for name, about in probes.items():
        assert about["metrics"]["top1"] == results["metrics"][f"{name}_top1"] > 0.4
        assert about["protocol"]
    chosen = {name: about["chosen"] for name, about in probes.items()}
    assert chosen["knn5"] == {"k": 5}
    assert chosen["logistic"]["c"] in (0.1, 1.0)
    assert chosen["linear"]["lr"] in (0.01, 0.1)
    assert len(chosen["svm"]["c"]) == 3
    assert chosen["shot1"] == [{"c": 1.0}] * 3
    selected_on = {name: about["selected_on"] for name, about in probes.items()}
    assert selected_on["logistic"] == selected_on["linear"] == "10% of train, 43 images"
    assert selected_on["svm"] == "3 folds of train, each class by itself"
    assert selected_on["shot4"] == "folds of the drawn images"
    assert selected_on["shot1"].startswith("nothing")
    assert results["primary_metric"] in results["metrics"]
    assert results["rows"] == {"train": 431, "test": 106}
    assert results["leaks"] == {"train": {"images_in_test": 0, "first": []}}
    assert len(list((folder / "features").glob("*.safetensors"))) == 2
    assert "C of 2 values in 0.1..1" in results["protocol"]["logistic"]


def test_only_the_primary_metric_keeps_its_confusion_matrix(everything):
    details = everything[0]["details"]
    assert {name for name in details if "confusion_matrix" in details[name]} == {"logistic"}
    assert all("per_class" in of_probe for of_probe in details.values())


def test_few_shot_is_the_mean_and_deviation_of_its_samplings(everything):
    for k in (1, 4):
        about = everything[0]["probes"][f"shot{k}"]
        values = [sampling["top1"] for sampling in about["samplings"]]
        assert len(values) == 3
        assert about["metrics"]["top1"] == pytest.approx(np.mean(values))
        assert about["metrics"]["top1_std"] == pytest.approx(np.std(values, ddof=1))


def test_one_sampling_has_no_deviation(run_tiny):
    results = run_tiny("evaluation.few_shot={ks: [1], samplings: 1, classifier: knn}")
    assert "top1_std" not in results["probes"]["shot1"]["metrics"]


def test_selection_does_not_depend_on_the_reported_split(everything, run_tiny):
    """With other labels of the test images, the choices stay and the metrics change."""

    def mislabel(data):
        data.test.labels = (data.test.labels + 1) % 3

    two = run_tiny(*ALL, edit=mislabel)
    for name, about in everything[0]["probes"].items():
        other = two["probes"][name]
        assert (about["chosen"], about.get("val_top1")) == (other["chosen"], other.get("val_top1"))
        assert about["metrics"] != other["metrics"]


def test_probes_select_on_data_val(run_tiny, monkeypatch):
    def halve(data):
        rows = np.arange(len(data.test))
        data.val = data.test.select(rows[::2], "first half")
        data.test = data.test.select(rows[1::2], "second half")

    monkeypatch.setattr("tract_transfer.build.data.check_disjoint", lambda splits: None)
    words = ("data.val={source: digits, split: test, classes: [0, 1, 2]}",)
    results = run_tiny(*words, edit=halve)
    assert results["probes"]["logistic"]["selected_on"] == "data.val, 53 images"
    assert results["rows"] == {"train": 431, "test": 53, "val": 53}
    assert set(results["leaks"]) == {"train", "val"}


def test_features_are_cached(tmp_path, run_tiny, monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="tract_transfer")
    cache = f"data.feature_cache={tmp_path / 'features'}"
    one = run_tiny(cache, name="one")
    assert len(list((tmp_path / "features").iterdir())) == 2

    def refuse(self, images):
        raise AssertionError("extracted again")

    monkeypatch.setattr(Backbone, "pooled", refuse)
    two = run_tiny(cache, name="two")
    assert two["metrics"] == one["metrics"]
    assert caplog.text.count("Features read from") == 2
    assert one["train_seconds"] > 0
    assert two["train_seconds"] is None, "the time of reading is not that of a probe"
    assert two["cost"]["peak_memory_bytes"] is None
    for changed in ("seed=3", "data.transforms.size_px=20", "data.transforms.resize=whole"):
        with pytest.raises(AssertionError, match="extracted again"):
            run_tiny(cache, changed, name=changed)


def test_a_changed_image_misses_the_cache_of_its_split(tmp_path, run_tiny, monkeypatch):
    cache = f"data.feature_cache={tmp_path / 'features'}"
    run_tiny(cache, name="one")
    extracted = []
    original = probes_cache.save_file

    def count(*arguments, **keywords):
        extracted.append(1)
        original(*arguments, **keywords)

    monkeypatch.setattr(probes_cache, "save_file", count)
    true = ClassificationDataset.encoded

    def changed(self, index):
        stored = true(self, index)
        is_changed = index == 7 and "train" in self.item(index)
        return stored[:-1] + bytes([stored[-1] ^ 1]) if is_changed else stored

    monkeypatch.setattr(ClassificationDataset, "encoded", changed)
    run_tiny(cache, name="two")
    assert len(extracted) == 1  # of train, not of test


def test_training_images_in_test_are_counted_and_kept(run_tiny, caplog):
    def overlap(data):
        data.test = data.train.select(np.tile(np.arange(20), 2), "some of train")

    results = run_tiny(edit=overlap)
    assert results["leaks"]["train"]["images_in_test"] == 20
    assert results["leaks"]["train"]["first"][0] == ["digits split train row 0"] * 2
    assert len(results["leaks"]["train"]["first"]) == 10
    assert results["rows"] == {"train": 431, "test": 40}
    assert "20 of the 431 images of train are in test too, the first: digits" in caplog.text


def test_classes_that_train_lacks_are_reported(run_tiny):
    def drop_twos(data):
        data.train = data.train.select(np.flatnonzero(data.train.labels != 2), "train")

    results = run_tiny(*ALL, edit=drop_twos)
    assert results["test_classes_without_training_images"] == ["two"]
    assert results["details"]["logistic"]["per_class"]["two"] == 0


def test_several_labels_an_image(run_tiny, scenes):
    source = f"source: digit_scenes, root: {scenes}_many, num_train: 40, num_test: 12, size_px: 64"
    splits = [f"data.{split}={{{source}, split: {split}}}" for split in ("train", "test")]
    results = run_tiny(*MANY, *splits)
    assert set(results["metrics"]) == {
        f"{probe}_map_{method}{end}"
        for probe, ends in (("svm", [""]), ("shot1", ["", "_std"]), ("shot2", ["", "_std"]))
        for method in ("11point", "area")
        for end in ends
    }
    assert results["rows"] == {"train": 40, "test": 12}
    assert "difficult" in results["details"]["svm"]["protocol"]
    assert all(0 <= value <= 1 for value in results["metrics"].values())


def test_features_that_are_not_finite_name_their_images(run_tiny, monkeypatch):
    true = Backbone.pooled

    def broken(self, images):
        features = true(self, images)
        features[2] = torch.nan
        return features

    monkeypatch.setattr(Backbone, "pooled", broken)
    with pytest.raises(
        ValueError, match=r"hold nan or inf \(images 2, 66, 130, 194, 258, \.\.\.\)"
    ):
        run_tiny()
