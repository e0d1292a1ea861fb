"""The Python API gives what the commands give, and predictions are the evaluation's."""

import ast
import json
import random
import re
from pathlib import Path

import image_folders
import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import constants
from PIL import Image

import tract_transfer
from tract_transfer.build.data import build_data
from tract_transfer.build.trainer import build_accelerator
from tract_transfer.config.schema import load_config
from tract_transfer.registry import Registry
from tract_transfer.run import evaluate as evaluation
from tract_transfer.run.trained import read_images

ROOT = Path(__file__).parents[2]
INIT = (ROOT / "tract_transfer/__init__.py").read_text(encoding="utf-8")
GUIDE = (ROOT / "docs/guides/api.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module", params=["classification", "detection"])
def run(request, write_tiny, tmp_path_factory):
    """A finished run of each kind, by the API."""
    path = write_tiny(tmp_path_factory.mktemp(request.param), request.param)
    overrides = {"solver.max_iters": 2, "engine.channels_last": True, "evaluation.flip": True}
    return tract_transfer.train(path, overrides=overrides)


def test_a_run_is_what_its_folder_holds(run):
    results = json.loads((run.folder / "results.json").read_text())
    assert run.metrics == results["metrics"] == run.results["metrics"]
    assert tract_transfer.evaluate(run) == pytest.approx(run.metrics, abs=1e-12)
    assert tract_transfer.evaluate(str(run.folder), overrides=["data.num_workers=0"])
    config = load_config(run.folder / "config.yaml")
    assert tract_transfer.evaluate(config) == pytest.approx(run.metrics, abs=1e-12)


def test_predictions_are_the_evaluations_to_the_bit(run, monkeypatch):
    seen = []
    build = evaluation.build_evaluator

    def spy(*arguments):
        evaluator = build(*arguments)
        update = evaluator.update

        def keep(predictions, targets):
            seen.extend(predictions)
            update(predictions, targets)

        evaluator.update = keep
        return evaluator

    monkeypatch.setattr(evaluation, "build_evaluator", spy)
    tract_transfer.evaluate(run)
    model = run.load(device="cpu")
    _, dataset = build_data(model.config).report
    images = [dataset.image(index) for index in range(len(dataset))]
    predictions = model.predict(images)
    assert len(predictions) == len(seen) == len(images)
    for predicted, output in zip(predictions, seen, strict=True):
        assert predicted.labels == [model.class_names[k] for k in predicted.class_ids.tolist()]
        if isinstance(model, tract_transfer.TrainedDetector):
            assert torch.equal(predicted.boxes_xyxy, output["boxes"])
            assert torch.equal(predicted.scores, output["scores"])
            assert torch.equal(predicted.class_ids, output["labels"])
        else:
            assert torch.equal(predicted.scores, output.softmax(0)[predicted.class_ids])
            assert predicted.class_ids[0] == output.argmax()


def test_every_kind_of_image_gives_the_same_prediction(run, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    path = tmp_path / "a.png"
    image.save(path)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    readonly = pixels.copy()
    readonly.flags.writeable = False
    kinds = [path, str(path), image, pixels, pixels[..., ::-1][..., ::-1], readonly, tensor]
    model = run.load()
    first, *others = model.predict(kinds)
    (alone,) = model.predict(path)
    (same,) = model.predict(iter([path]), batch_size=3)
    for other in [*others, alone, same]:
        assert other.scores == pytest.approx(first.scores, abs=1e-5)
        assert other.labels == first.labels
    floating = [tensor / 255, (tensor / 255).double()]  # mixed with uint8 in one batch
    for other in model.predict([tensor, *floating])[1:]:
        assert other.scores == pytest.approx(first.scores, abs=0.05)  # resized without rounding
    assert next(model.stream(path)).labels == alone.labels


def test_images_are_read_as_in_training(tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (8, 12, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(pixels).convert("CMYK").save(tmp_path / "cmyk.tif")
    Image.fromarray(pixels[..., 0]).save(tmp_path / "gray.png")
    Image.fromarray(pixels).quantize(16).save(tmp_path / "palette.png")
    for path in sorted(tmp_path.iterdir()):
        (by_path,) = read_images(path, 1000)
        (by_image,) = read_images([Image.open(path)], 1000)
        assert torch.equal(by_path, by_image)
        assert by_path.shape == ((3, 12, 8) if path.stem == "turned" else (3, 8, 12))


def test_options_of_predict_select(run):
    image = torch.rand(3, 40, 40)
    model = run.load()
    (everything,) = model.predict(image)
    if isinstance(model, tract_transfer.TrainedDetector):
        (best,) = model.predict(image, min_score=everything.scores[0].item())
        assert len(best.labels) == len(best.boxes_xyxy) == len(best.scores) == 1
    else:
        (best,) = model.predict(image, top_k=1)
        assert best.labels == everything.labels[:1]
        assert everything.scores.sum() == pytest.approx(1)


def test_a_loaded_model_knows_its_run(run):
    random.seed(3)
    torch.manual_seed(3)
    states = random.getstate(), torch.get_rng_state()
    model = tract_transfer.load(run)
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert model.class_names == run.results["details"]["class_names"]
    assert not model.model.training
    again = tract_transfer.create_backbone(weights=run.folder)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.backbone.state_dict()[name])


def test_a_config_is_a_file_a_name_a_dict_or_a_config(write_tiny, tmp_path):
    path = write_tiny(tmp_path)
    expected = tract_transfer.load_config(path, ["solver.lr=0.5", "seed=3"])
    tree = yaml.safe_load(path.read_text())
    tree["data"]["batch_size"] = np.int64(32)
    for config in (path, str(path), tree, {"_BASE_": str(path)}, load_config(path)):
        overrides = {"solver": {"lr": np.float32(0.5)}, "seed": 3}
        loaded = tract_transfer.load_config(config, overrides)
        assert loaded.model_dump() == expected.model_dump()
    assert tract_transfer.load_config("quickstart/pretrain").name == "pretrain"
    changed = tract_transfer.load_config(
        load_config(path), {"model.backbone": {"name": "cifar/vit"}}
    )
    assert changed.model.backbone.args == {}, "arguments of another backbone"


def test_a_folder_of_images_is_trained_and_its_recipe_saved(tmp_path, offline_cache, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    folder = image_folders.classes(tmp_path / "pets")
    overrides = {"solver": {"max_epochs": None, "max_iters": 1, "warmup_epochs": None}}
    overrides |= {"output_dir": str(tmp_path / "run"), "engine.device": "cpu"}
    overrides |= {"data.num_workers": 0, "data.batch_size": 2}
    run = tract_transfer.train(folder, overrides=overrides)
    assert run.folder == tmp_path / "run"
    recipe = tract_transfer.load_config(run.folder / "recipe.yaml")
    assert (
        recipe.model_dump() == tract_transfer.load_config(run.folder / "config.yaml").model_dump()
    )
    again = tract_transfer.train(folder, overrides=overrides, resume=True)
    assert again.metrics == run.metrics


def test_one_epoch_of_a_folder_by_an_override(tmp_path, offline_cache, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    overrides = {"solver.max_epochs": 1, "output_dir": str(tmp_path / "run")}
    overrides |= {"data.transforms.size_px": 8, "data.num_workers": 0, "engine.device": "cpu"}
    run = tract_transfer.train(image_folders.classes(tmp_path / "pets"), overrides=overrides)
    assert run.results["epochs"] == 1


def test_backbones_by_name():
    images = torch.rand(2, 3, 32, 32)
    backbone = tract_transfer.create_backbone("cifar/resnet18", args={"width": 8}, mean=[0, 0, 0])
    assert backbone.pooled(images).shape == (2, backbone.feature_dim)
    name, info = list(backbone.map_info.items())[-1]
    assert backbone.maps(images, [name])[name].shape[1] == info.channels
    assert backbone.mean.sum() == 0
    assert "cifar/resnet18" in tract_transfer.list_backbones("cifar/*")
    assert {"timm/resnet50", "torchvision/resnet50"} <= {
        *tract_transfer.list_backbones("*resnet50")
    }
    assert tract_transfer.list_backbones("nothing*") == []


def test_a_process_can_train_on_another_device_than_before(write_tiny, tmp_path, monkeypatch):
    from accelerate.state import PartialState

    config = load_config(write_tiny(tmp_path))
    assert build_accelerator(config).device.type == "cpu"
    monkeypatch.setitem(PartialState._shared_state, "device", torch.device("cuda"))
    assert build_accelerator(config).device.type == "cpu"


def test_the_public_names_are_lazy_documented_and_complete():
    reference = (ROOT / "docs/reference/api.md").read_text(encoding="utf-8")
    for name in tract_transfer.__all__:
        value = getattr(tract_transfer, name)
        assert name in dir(tract_transfer)
        if name != "__version__":
            is_registry = isinstance(value, Registry)
            assert (f"`{name}`" if is_registry else f":: tract_transfer.{name}") in reference
            assert is_registry or value.__doc__
    assert "hog" not in dir(tract_transfer)
    with pytest.raises(AttributeError, match="no attribute 'hog'"):
        _ = tract_transfer.hog


def test_type_checkers_see_every_name():
    (block,) = [node for node in ast.parse(INIT).body if isinstance(node, ast.If)][:1]
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    seen = {alias.name for node in block.body for alias in node.names}
    assert seen | {"__version__"} == {*tract_transfer.__all__}
    assert seen == tract_transfer._MODULES.keys()


@pytest.mark.parametrize("number", [0, 1])
def test_examples_of_the_guide_run(number, tmp_path, monkeypatch):
    """Each example is complete; here it gets a shorter training."""
    code = re.findall(r"<!-- example -->\n```python\n(.*?)```", GUIDE, re.DOTALL)[number]
    train = tract_transfer.train

    def short(config, *, overrides):
        fast = {"solver.max_iters": 2, "solver.max_epochs": None, "engine.device": "cpu"}
        if "detect" in config:
            few = {"root": str(tmp_path / "scenes"), "num_train": 12, "num_test": 6}
            fast |= {"solver.warmup_iters": None, "data.train": few, "data.test": few}
        return train(config, overrides={**overrides, **fast})

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tract_transfer, "train", short)
    exec(compile(code, "guide", "exec"), {})
    assert list((tmp_path / "output").rglob("results.json"))
