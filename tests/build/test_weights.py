"""The keys of model.weights, its errors, and its report in the run folder."""

import json
from pathlib import Path

import pytest
import timm
import torch
import yaml

from tract_transfer.build.model import build_model
from tract_transfer.build.weights import check_weights_exist
from tract_transfer.config.file import ConfigError
from tract_transfer.config.schema import load_config
from tract_transfer.models import build_backbone
from tract_transfer.models.weights import save_backbone
from tract_transfer.run.evaluate import evaluate_run, preview
from tract_transfer.run.run import run

ROOT = Path(__file__).parents[2]
SMALL = "model.backbone={name: timm/test_resnet}"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    torch.manual_seed(3)
    file = tmp_path_factory.mktemp("weights") / "published.pth"
    state = timm.create_model("test_resnet", num_classes=9).state_dict()
    torch.save({"state_dict": state}, file)
    return file


@pytest.mark.parametrize("task", ["classification", "probe"])
def test_a_run_reports_how_its_weights_matched(file, load_tiny, tmp_path, task):
    config = load_tiny(tmp_path, SMALL, f"model.weights={file}", task=task)
    results = run(config)
    match = json.loads((tmp_path / "run/results.json").read_text())["weights_match"]
    assert match == results["weights_match"]
    assert match["fits"]
    assert match["parameters_loaded"] == match["parameters"] > 0
    assert match["dropped"] == {"the file's own head": 2}
    log = (tmp_path / "run/log.txt").read_text()
    assert f"weights      {file}" in log
    assert "(100.00%)" in log


def flip_a_byte(file):
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)


def test_damaged_weights_are_refused_until_the_run_restores_them(load_tiny, tmp_path):
    """The backbone of a run, and the file of a checkpoint."""
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    config = load_tiny(tmp_path / "first", "solver.max_iters=1")
    run(config)
    file = tmp_path / "first/run/model.safetensors"
    intact = file.read_bytes()
    flip_a_byte(file)
    words = ["model.backbone={name: null}", f"model.weights={file.parent}"]
    downstream = load_tiny(tmp_path / "second", *words, task="probe")
    with pytest.raises(ConfigError, match=r"model\.weights: .* is not what was written, by the"):
        run(downstream)
    (file.parent / "results.json").unlink()
    run(config, resume=True)
    assert file.read_bytes() == intact
    run(downstream)
    (file,) = (tmp_path / "first/run/checkpoints").glob("iter_*/model.safetensors")
    flip_a_byte(file)
    with pytest.raises(ConfigError, match=r"model\.weights: Checkpoint .* is broken: model\.safet"):
        build_model(load_tiny(tmp_path, f"model.weights={file}"), 3)


def test_ignore_missing_and_its_refusals(load_tiny, tmp_path):
    state = timm.create_model("test_resnet").state_dict()
    kept = {name: tensor for name, tensor in state.items() if not name.startswith("layer4.")}
    torch.save(kept, tmp_path / "w.pth")
    words = [SMALL, f"model.weights={tmp_path / 'w.pth'}"]
    with pytest.raises(ConfigError, match=r"model\.weights: .*Missing layer4\.0\.conv1\.weight"):
        build_model(load_tiny(tmp_path, *words), 3)
    with pytest.raises(ConfigError, match=r"model\.ignore_missing: 'layer5\.\*' is none of"):
        build_model(load_tiny(tmp_path, *words, "model.ignore_missing=[layer5.*]"), 3)
    model = build_model(load_tiny(tmp_path, *words, "model.ignore_missing=[layer4.*]"), 3)
    assert torch.equal(model.backbone.model.conv1[0].weight, state["conv1.0.weight"])


def test_adapt_stem_resamples_patches(load_tiny, tmp_path):
    small = {"depth": 1, "embed_dim": 24, "num_heads": 3}
    source = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, **small)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    args = json.dumps({**small, "img_size": 16, "patch_size": 4})
    words = [
        f"model.backbone={{name: timm/vit_tiny_patch16_224, args: {args}}}",
        f"model.weights={tmp_path / 'w.pth'}",
    ]
    with pytest.raises(ConfigError, match=r"model\.weights: .*model\.adapt_stem: true"):
        build_model(load_tiny(tmp_path, *words), 3)
    model = build_model(load_tiny(tmp_path, *words, "model.adapt_stem=true"), 3)
    assert "patch_embed.proj.weight" in model.backbone.loaded.resized


def test_missing_weights_name_the_command_that_writes_them(tmp_path, monkeypatch):
    folder, file = "output/pretrain/cifar10_resnet18", "pretrain/cifar10_resnet18"
    assert load_config(file).output_dir == folder
    monkeypatch.chdir(tmp_path)
    for path, fix in ((folder, f"--config-file {file} makes it"), ("nowhere", "Set model.weights")):
        with pytest.raises(FileNotFoundError, match=rf"No weights at {path}: .*\. .*{fix}"):
            check_weights_exist(Path(path))


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("model.backbone={name: cifar/resnet18, args: {witdh: 8}}", "model.backbone.args.witdh"),
        ("model.weights=./tests", r"model\.weights: No weights at .*model\.safetensors"),
    ],
)
@pytest.mark.parametrize("start", [run, preview, evaluate_run])
def test_backbone_and_weights_are_checked_before_data_are_read(
    load_tiny, tmp_path, start, word, message
):
    data = f"data.train={{source: voc, root: {tmp_path / 'nowhere'}, sets: [2007/train]}}"
    with pytest.raises(ConfigError, match=message):
        start(load_tiny(tmp_path, word, data, task="detection"))


def test_image_size_and_drop_rates_may_differ_from_the_metadata(load_tiny, tmp_path):
    args = {"depth": 1, "embed_dim": 24, "num_heads": 3, "patch_size": 4}
    name = "timm/vit_tiny_patch16_224"
    save_backbone(tmp_path, build_backbone(name, args={**args, "img_size": 32}), {})

    def build(**more):
        backbone = yaml.safe_dump({"name": name, "args": {**args, **more}}, default_flow_style=True)
        words = [f"model.backbone={backbone.strip()}", f"model.weights={tmp_path}"]
        return build_model(load_tiny(tmp_path, *words), 3).backbone

    backbone = build(img_size=16, drop_path_rate=0.1)
    assert backbone.loaded.resized == {"pos_embed": "(1, 65, 24) -> (1, 17, 24)"}
    with pytest.raises(ConfigError, match="the weights are those of"):
        build(img_size=16, num_heads=2)


@pytest.mark.parametrize("metadata", ["{", "[]", json.dumps({"name": "cifar/resnet18"})])
def test_broken_metadata_are_refused(load_tiny, tmp_path, metadata):
    save_backbone(tmp_path, build_backbone("cifar/resnet18", args={"width": 8}), {})
    (tmp_path / "model.json").write_text(metadata)
    with pytest.raises(ConfigError, match=r"model.weights: .*model.json"):
        build_model(
            load_tiny(tmp_path, "model.backbone={name: null}", f"model.weights={tmp_path}"), 3
        )
