"""An exported model gives the logits of its run in the library that loads it."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from tract_transfer.build.batches import build_transforms
from tract_transfer.models import Classifier, build_backbone
from tract_transfer.models.export import export_onnx, load_exported, to_library
from tract_transfer.run.export import export_run
from tract_transfer.run.run import run
from tract_transfer.run.trained import load

PAGE = Path(__file__).parents[2] / "docs/guides/export.md"
# Kind of model -> its backbone, and the library that it is exported to.
KINDS = {
    "timm": ("{name: timm/test_resnet}", "timm"),
    "cifar stem": ("{name: timm/resnet18, stem: cifar, args: {channels: [8, 16, 32, 64]}}", "timm"),
    "own": ("{name: cifar/resnet18, args: {width: 8}}", "timm"),
    "vit": ("{name: cifar/vit, args: {depth: 1, width: 24, num_heads: 2, patch_size_px: 8}}",
        "timm"),
    "torchvision": ("{name: torchvision/shufflenet_v2_x0_5}", "torchvision"),
    "mlp": ("{name: cifar/resnet18, args: {width: 8}}", "tract_transfer"),
}  # fmt: skip


def python_blocks(file):
    return re.findall(r"```python\n(.*?)```", file.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def finished(load_tiny, tmp_path_factory):
    """Return the run folder of a backbone, trained once."""
    folders = {}

    def train(kind):
        if kind not in folders:
            folder = tmp_path_factory.mktemp("run")
            words = [f"model.backbone={KINDS[kind][0]}", "solver.max_iters=2"]
            words += ["data.transforms={size_px: 32, crop_ratio: 0.8, interpolation: bicubic}"]
            words += ["tract.enabled=true"] if kind != "torchvision" else []
            words += ["model.head={name: mlp, args: {hidden_dim: 8}}"] if kind == "mlp" else []
            run(load_tiny(folder, *words))
            folders[kind] = folder / "run"
        return folders[kind]

    return train


@pytest.fixture
def photo():
    return np.random.default_rng(0).integers(0, 256, (40, 52, 3), dtype=np.uint8)


def logits_of(folder, photo):
    """The run's own logits for a photo."""
    trained = load(folder, device="cpu")
    _, transform = build_transforms(trained.config)
    with torch.no_grad():
        return trained.model.eval()(transform(torch.from_numpy(photo).permute(2, 0, 1))[None])


@pytest.mark.parametrize("kind", KINDS)
def test_code_of_the_readme_gives_the_logits_of_the_run(
    kind, finished, photo, tmp_path, monkeypatch
):
    exported = export_run(finished(kind), tmp_path / "out")
    assert exported.library == KINDS[kind][1]
    assert (exported.reason is None) == (kind != "mlp")
    assert not list(tmp_path.glob(".export*"))
    Image.fromarray(photo).save(tmp_path / "out/photo.jpg", format="PNG")  # without loss
    (code,) = python_blocks(tmp_path / "out/README.md")
    namespace = {}
    monkeypatch.chdir(tmp_path / "out")
    exec(code, namespace)
    expected = logits_of(finished(kind), photo)
    torch.testing.assert_close(namespace["logits"], expected, atol=1e-6, rtol=1e-6)
    assert namespace["names"] == load(finished(kind)).class_names
    assert (tmp_path / "out/config.json").exists() == (kind in ("timm", "vit"))
    assert (tmp_path / "out/model.json").exists() == (kind not in ("timm", "vit"))


@pytest.mark.parametrize("kind", ["timm", "vit"])
def test_timm_builds_model_and_transform_from_the_folder(kind, finished, tmp_path):
    export_run(finished(kind), tmp_path / "out")
    state = load_file(tmp_path / "out/model.safetensors")
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    torch.testing.assert_close(dict(model.state_dict()), state, atol=0, rtol=0)
    data = timm.data.resolve_model_data_config(model)
    trained = load(finished(kind))
    backbone = trained.model.backbone
    assert list(data["input_size"]) == [3, 32, 32]
    assert (data["crop_pct"], data["interpolation"]) == (0.8, "bicubic")
    assert torch.allclose(torch.tensor(data["mean"]), backbone.mean.flatten())
    assert torch.allclose(torch.tensor(data["std"]), backbone.std.flatten())
    assert list(model.pretrained_cfg["label_names"]) == trained.class_names
    images = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(data[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        expected = trained.model.eval().cpu()(images)
        torch.testing.assert_close(model((images - mean) / std), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "name",
    ["mobilenetv3_small_050", "deit_tiny_patch16_224", "convnext_atto", "vit_tiny_patch16_224"],
)
def test_timm_models_keep_their_logits(name):
    torch.manual_seed(0)
    backbone = build_backbone(f"timm/{name}")
    classifier = Classifier(backbone, nn.Linear(backbone.feature_dim, 4)).eval()
    portable = to_library(classifier, backbone.image_size_px or 64)
    assert (portable.library, portable.name, portable.edits) == ("timm", name, [])


@pytest.mark.parametrize(
    "name", ["timm/deit_tiny_distilled_patch16_224", "torchvision/squeezenet1_1"]
)
def test_a_model_of_no_library_is_exported_for_this_package(name):
    backbone = build_backbone(name)
    classifier = Classifier(backbone, nn.Linear(backbone.feature_dim, 4))
    portable = to_library(classifier, 224)
    assert (portable.library, portable.model) == ("tract_transfer", classifier)
    assert "one matrix" in portable.reason


def test_runs_without_a_classifier_are_refused(finished, load_tiny, call, tmp_path):
    run(load_tiny(tmp_path, "solver.max_iters=1", task="detection"))
    run(load_tiny(tmp_path, f"output_dir={tmp_path}/probe", task="probe"))
    for source, output, message in (
        (tmp_path / "run", "new", "contains a detector"),
        (tmp_path / "probe", "new", "a probe trains no model"),
        (tmp_path, "new", "it is not a finished run"),
        (finished("own"), "probe", "exists. Name another --output"),
    ):
        done = call("export_model.py", "--run", source, "--output", tmp_path / output)
        assert done.returncode == 2
        assert message in done.stderr
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match=r"README.md"):
        load_exported(finished("own"))


def test_weights_of_another_model_are_refused(finished, tmp_path, refused):
    folder = tmp_path / "out"
    export_run(finished("mlp"), folder)
    save_file({"head.weight": torch.zeros(2, 2)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"sha256"):
        load_exported(folder)
    metadata = json.loads((folder / "model.json").read_text())
    del metadata["sha256"]  # as in old exports
    (folder / "model.json").write_text(json.dumps(metadata))
    with refused(
        "an export with another model's weights", ValueError, match=r"(?s)model.json.*head"
    ):
        load_exported(folder)


@pytest.mark.parametrize("kind", ["timm", "vit", "torchvision"])
def test_onnx_normalizes_and_takes_any_batch(kind, finished, tmp_path, photo):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    export_run(finished(kind), tmp_path / "out", onnx=True)
    namespace = {"folder": str(tmp_path / "out")}
    exec(python_blocks(tmp_path / "out/README.md")[1], namespace)
    assert namespace["logits"].shape == (1, 3)
    session = onnxruntime.InferenceSession(tmp_path / "out/model.onnx")
    images = torch.rand(5, 3, 32, 32)
    (logits,) = session.run(None, {"images": images.numpy()})
    with torch.no_grad():
        expected = load(finished(kind)).model.eval().cpu()(images)
    np.testing.assert_allclose(logits, expected.numpy(), atol=1e-4, rtol=0)
    onnx = pytest.importorskip("onnx")
    assert onnx.load(tmp_path / "out/model.onnx").opset_import[0].version == 18


def test_an_onnx_file_with_other_logits_is_removed(monkeypatch, tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    backbone = build_backbone("cifar/resnet18", args={"width": 8})
    classifier = Classifier(backbone, nn.Linear(backbone.feature_dim, 3))
    monkeypatch.setattr("tract_transfer.models.export.MAX_ONNX_DIFFERENCE", -1.0)
    with pytest.raises(ValueError, match=r"differ by"):
        export_onnx(classifier, 32, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_onnx_without_its_packages_names_what_to_install(finished, call, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    words = ("--run", finished("own"), "--output", tmp_path / "out", "--onnx")
    done = call("export_model.py", *words)
    assert done.returncode == 2
    assert "pip install onnx onnxruntime onnxscript" in done.stderr
    assert not (tmp_path / "out").exists()


def test_code_of_the_docs_runs(finished, tmp_path, monkeypatch):
    export_run(finished("timm"), tmp_path / "exported" / "flowers102")
    export_run(finished("mlp"), tmp_path / "exported_own")
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for block in python_blocks(PAGE):
        exec(block.replace('"resnet18"', '"test_resnet"'), namespace)
    assert namespace["model"](torch.rand(1, 3, 32, 32)).shape == (1, 3)
