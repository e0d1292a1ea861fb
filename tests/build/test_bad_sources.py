"""Checkpoints and labels that are not what they should be, told before a run writes anything."""

import os
import pickle

import datasets
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tract_transfer.models import build_backbone
from tract_transfer.run.evaluate import preview
from tract_transfer.run.run import run

VIT = "timm/vit_tiny_patch16_224"
VIT_ARGS = "{img_size: 16, patch_size: 4, depth: 1, embed_dim: 24, num_heads: 3}"


class Payload:
    """What opening a hostile pickle would do: leave a file."""

    def __init__(self, touched):
        self.touched = touched

    def __reduce__(self):
        return os.system, (f"touch {self.touched}",)


def weights_of(name="timm/test_resnet", **args):
    torch.manual_seed(0)
    return dict(build_backbone(name, args=args).model.state_dict())


def truncated(folder):
    save_file(weights_of(), folder / "w.safetensors")
    whole = (folder / "w.safetensors").read_bytes()
    (folder / "w.safetensors").write_bytes(whole[: len(whole) // 2])
    return "w.safetensors"


def truncated_pickle(folder):
    torch.save(weights_of(), folder / "w.pth")
    whole = (folder / "w.pth").read_bytes()
    (folder / "w.pth").write_bytes(whole[: len(whole) // 2])
    return "w.pth"


def another_model(folder):
    torch.save(weights_of("timm/test_efficientnet"), folder / "w.pth")
    return "w.pth"


def not_a_number(folder):
    state = weights_of()
    state["conv1.0.weight"][0, 0, 0, 0] = float("nan")
    save_file(state, folder / "w.safetensors")
    return "w.safetensors"


def malicious(folder):
    torch.save({**weights_of(), "evil": Payload(folder / "touched")}, folder / "w.pth")
    return "w.pth"


def malicious_plain(folder):
    (folder / "w.pkl").write_bytes(pickle.dumps({"model": Payload(folder / "touched")}))
    return "w.pkl"


def nowhere(_):
    return "w.pth"


CHECKPOINTS = {
    "truncated": (truncated, ["w.safetensors cannot be read as weights"]),
    "truncated pickle": (truncated_pickle, ["w.pth cannot be read as weights"]),
    "another model": (another_model, ["another architecture's", "Set model.backbone"]),
    "not a number": (not_a_number, ["NaN or infinite values in conv1.0.weight", "earlier"]),
    "malicious": (malicious, ["w.pth", "was not opened"]),
    "malicious plain": (malicious_plain, ["w.pkl", "not opened"]),
    "nowhere": (nowhere, ["No weights at", "w.pth: there is no such file or folder", "Set model."]),
}


@pytest.mark.parametrize("task", ["classification", "probe"])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_bad_checkpoint_is_told_and_nothing_is_executed_or_written(
    name, task, tmp_path, load_tiny
):
    prepare, wanted = CHECKPOINTS[name]
    words = ["model.backbone={name: timm/test_resnet}"]
    words.append(f"model.weights={tmp_path / prepare(tmp_path)}")
    with pytest.raises(ValueError, match=r"model\.weights: ") as caught:
        run(load_tiny(tmp_path, *words, task=task))
    message = str(caught.value)
    assert [part for part in wanted if part not in message] == [], message
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("begin", [run, preview])
def test_weights_that_are_not_there_are_told_before_data_are_loaded(
    begin, tmp_path, load_tiny, monkeypatch
):
    monkeypatch.setattr(
        "tract_transfer.run.run.build_data", lambda _: pytest.fail("data were loaded")
    )
    with pytest.raises(ValueError, match=r"model\.weights: No weights at"):
        begin(load_tiny(tmp_path, f"model.weights={tmp_path / 'none'}"))


def test_position_embeddings_of_another_grid_are_resized_and_that_is_in_the_results(
    tmp_path, load_tiny
):
    args = {"patch_size": 4, "depth": 1, "embed_dim": 24, "num_heads": 3}
    save_file(weights_of(VIT, img_size=32, **args), tmp_path / "w.safetensors")
    words = [f"model.backbone={{name: {VIT}, args: {VIT_ARGS}}}", "solver.max_iters=1"]
    results = run(load_tiny(tmp_path, *words, f"model.weights={tmp_path / 'w.safetensors'}"))
    assert results["weights_match"]["resized"] == {"pos_embed": "(1, 65, 24) -> (1, 17, 24)"}


# ------------------------------------------------------------------------------------- labels


@pytest.fixture
def pets(tmp_path, monkeypatch):
    """Write train and test of so many images with these labels; return the overrides."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()

    def write(train, test, feature=None):
        feature = feature or datasets.ClassLabel(names=["cat", "dog"])
        words = ["data.batch_size=4", "data.transforms={size_px: 16, crop_ratio: 1.0}"]
        for split, labels, shade in (("train", train, 0), ("test", test, 100)):
            images = [Image.new("RGB", (16, 16), (shade + i,) * 3) for i in range(len(labels))]
            rows = datasets.Dataset.from_dict(
                {"image": images, "label": labels},
                features=datasets.Features({"image": datasets.Image(), "label": feature}),
            )
            rows.to_parquet(tmp_path / f"pets/{split}.parquet")
            source = f"source: huggingface, path: {tmp_path / 'pets'}, split: {split}"
            column = "label_column: label"
            words.append(f"data.{split}={{{source}, {column}}}")
        return words

    return write


INTEGER = datasets.Value("int64")
LABELS = {
    "one class in train": ([0] * 8, [0, 1] * 4, None,
        ["data.train: its 8 images show only the class ['cat']", "two classes or more"]),
    "one class at all": ([1] * 8, [1] * 4, INTEGER, ["show one class, [1]", "needs two"]),
    "one name": ([0] * 8, [0] * 4, datasets.ClassLabel(names=["cat"]), ["has one class, ['cat']"]),
    "no row": ([], [0, 1], None, ["data.train"]),
    "no row in test": ([0, 1] * 4, [], None, ["data.test"]),
    "unlabelled": ([0, 1] * 4, [-1] * 4, None, ["row 0: label -1", "data.test.split to another"]),
    "negative": ([0, 1, -7, 1] * 2, [0, 1], INTEGER, ["row 2: label -7", "must be in 0..1"]),
    "ids": ([900, 17, 44012, 5] * 2, [17, 5], INTEGER, ["would have no image", "Number them 0, 1"]),
}  # fmt: skip


@pytest.mark.parametrize("task", ["classification", "probe"])
@pytest.mark.parametrize("name", LABELS)
def test_bad_labels_are_told(name, task, tmp_path, load_tiny, pets):
    train, test, feature, wanted = LABELS[name]
    words = pets(train, test, feature)
    if task == "probe":
        words += ["data.transforms={size_px: 16}", "evaluation.knn.ks=[1]"]
    with pytest.raises(ValueError) as caught:
        run(load_tiny(tmp_path, *words, task=task))
    message = str(caught.value)
    assert [part for part in wanted if part not in message] == [], message
    assert not (tmp_path / "run").exists()


def test_labels_from_1_have_a_class_more_and_that_is_said(tmp_path, load_tiny, pets, caplog):
    words = pets([1, 2, 3] * 4, [1, 2, 3], INTEGER)
    results = run(load_tiny(tmp_path, *words, "solver.max_iters=1"))
    assert results["details"]["class_names"] == ["0", "1", "2", "3"]
    assert "train has no example of 1 of 4 classes: 0" in caplog.text
