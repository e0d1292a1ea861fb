"""Backbones on disk: saved atomically with their metadata, loaded completely or not at all."""

import hashlib
import json
import os
import shutil

import pytest
import torch
from torture import die_at

from tract_transfer.models import Backbone, build_backbone
from tract_transfer.models.weights import (
    WeightsError,
    build_from_metadata,
    load_weights,
    read_metadata,
    save_backbone,
)
from tract_transfer.models.weights_file import METADATA_NAME, WEIGHTS_NAME

MEAN, STD = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]


def small(seed: int = 0) -> Backbone:
    torch.manual_seed(seed)
    return build_backbone("timm/test_resnet", stem="cifar", args={"drop_rate": 0.1})


@pytest.fixture(scope="module")
def backbone():
    backbone = small()
    backbone.set_normalization(MEAN, STD)
    return backbone


@pytest.fixture(scope="module")
def folder(backbone, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    save_backbone(folder, backbone, {"method": "tract", "lam": 0.1, "name": "a label"})
    return folder


@pytest.fixture
def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "run")


def same(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


@pytest.mark.parametrize("name", ["", WEIGHTS_NAME])
def test_saved_backbone_is_rebuilt_exactly(folder, backbone, name):
    rebuilt = build_from_metadata(read_metadata(folder / name))
    assert not same(rebuilt, backbone)
    load_weights(rebuilt, folder / name)
    assert same(rebuilt, backbone)
    assert rebuilt.origin == backbone.origin
    images = torch.rand(1, 3, 32, 32)
    assert torch.equal(rebuilt.eval().pooled(images), backbone.eval().pooled(images))


def test_metadata_describes_the_backbone(folder, backbone):
    weights = (folder / WEIGHTS_NAME).read_bytes()
    metadata = json.loads((folder / METADATA_NAME).read_text())
    assert metadata == read_metadata(folder)
    assert metadata == {
        "name": "timm/test_resnet",  # and not the caller's
        "stem": "cifar",
        "args": {"drop_rate": 0.1},
        "method": "tract",
        "lam": 0.1,
        "feature_dim": backbone.feature_dim,
        "first_layers": ["model.conv1.0"],
        "maps": {name: info._asdict() for name, info in backbone.map_info.items()},
        "mean": pytest.approx(MEAN),
        "std": pytest.approx(STD),
        "sha256": hashlib.sha256(weights).hexdigest(),
    }
    assert {path.name for path in folder.iterdir()} == {WEIGHTS_NAME, METADATA_NAME}


@pytest.mark.parametrize("name", ["", WEIGHTS_NAME])
def test_weights_with_another_hash_are_refused(copied, name, refused):
    file = copied / WEIGHTS_NAME
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)
    model = small(1)
    match = r"model\.safetensors is not what was written, by the sha256 .*--resume"
    with refused("a run folder's weights with a flipped bit", ValueError, match=match):
        load_weights(model, copied / name)
    assert same(model, small(1))
    file.rename(copied / "mine.safetensors")  # which model.json does not describe
    load_weights(model, copied / "mine.safetensors")
    assert not same(model, small(1))


def test_weights_without_a_hash_load(copied):
    metadata = read_metadata(copied)
    del metadata["sha256"]  # as in other tools' files
    (copied / METADATA_NAME).write_text(json.dumps(metadata))
    model = small(1)
    load_weights(model, copied)
    assert same(model.model, small().model)


def save_until(number, folder, backbone):
    """Save in a child that is killed before its file operation `number`; return if it finished."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    try:
        die_at(number, folder)
        save_backbone(folder / "run", backbone, {})
        os._exit(0)
    finally:
        os._exit(1)


@pytest.mark.parametrize("existing", ["none", "other", "same"])
def test_kill_while_saving_never_mixes_weights_and_metadata(folder, backbone, tmp_path, existing):
    new = backbone if existing == "same" else small(2).to(memory_format=torch.channels_last)
    finished, number = False, 0
    while not finished:
        number += 1
        run = tmp_path / str(number) / "run"
        run.mkdir(parents=True)
        if existing != "none":
            shutil.copytree(folder, run, dirs_exist_ok=True)
        finished = save_until(number, run.parent, new)
        has_weights, has_metadata = ((run / n).exists() for n in (WEIGHTS_NAME, METADATA_NAME))
        assert has_weights or (existing == "none" and not has_metadata)
        assert has_metadata or existing != "same"
        if has_weights:
            loaded = small(3)
            load_weights(loaded, run)
            assert same(loaded, new) or (existing != "none" and same(loaded, backbone))
    assert number > 7
    assert same(loaded, new)
    assert has_metadata


def test_files_without_normalization_keep_that_of_the_backbone(tmp_path):
    file, source, model = tmp_path / "w.pth", small(1), small(0)
    torch.save(source.model.state_dict(), file)
    model.set_normalization(MEAN)
    report = load_weights(model, file)
    assert same(model.model, source.model)
    assert model.mean.flatten().tolist() == pytest.approx(MEAN)
    assert any("has no normalization" in note for note in report.notes)


def test_only_patterns_allow_missing_names(tmp_path):
    file, source, model = tmp_path / "w.pth", small(1), small(0)
    state = source.model.state_dict()
    missing = [name for name in state if name.startswith("layer4.")]
    torch.save({name: t for name, t in state.items() if name not in missing}, file)
    initial = model.model.layer4[0].conv1.weight.detach().clone()
    with pytest.raises(WeightsError, match=r"Missing layer4\.0\.conv1\.weight"):
        load_weights(model, file)
    with pytest.raises(ValueError, match=r"model\.ignore_missing: 'layer5\.\*' is none of"):
        load_weights(model, file, ignore_missing=["layer4.*", "layer5.*"])
    report = load_weights(model, file, ignore_missing=["layer4.*"])
    assert {n for n in missing if "num_batches" not in n} == set(report.started_anew)
    assert torch.equal(model.model.layer4[0].conv1.weight, initial)
    assert torch.equal(model.model.conv1[0].weight, source.model.conv1[0].weight)
    with pytest.raises(WeightsError, match="does not fit"):  # nothing would be loaded
        load_weights(build_backbone("cifar/vit", args={"depth": 1}), file, ignore_missing=["*"])


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"No weights at {tmp_path}/{WEIGHTS_NAME}"):
        load_weights(small(), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nothing\.pth\. Set model\.weights"):
        load_weights(small(), tmp_path / "nothing.pth")
    with pytest.raises(FileNotFoundError, match=rf"No {METADATA_NAME} at {tmp_path}"):
        read_metadata(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "3", "{}", '{"name": "cifar/vit"}', "\udcff"])
def test_broken_metadata_is_refused(tmp_path, text):
    (tmp_path / METADATA_NAME).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=METADATA_NAME):
        read_metadata(tmp_path)
