import hashlib
import json
import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import save_file
from torture import die_at

from tract_transfer.models import Backbone, build_backbone
from tract_transfer.models.weights import (
    METADATA_NAME,
    WEIGHTS_NAME,
    WeightsError,
    build_from_metadata,
    load_weights,
    read_metadata,
    save_backbone,
)


def small(seed: int = 0) -> Backbone:
    torch.manual_seed(seed)
    return build_backbone("timm/test_resnet", stem="cifar", args={"drop_rate": 0.1})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    backbone = small()
    backbone.set_normalization([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    save_backbone(folder, backbone, {"method": "tract", "lam": 0.1, "name": "a label"})
    return folder


def same(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


@pytest.mark.parametrize("name", ["", WEIGHTS_NAME])
def test_what_is_saved_is_rebuilt_to_the_bit(folder, name):
    expected = small()
    expected.set_normalization([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    rebuilt = build_from_metadata(read_metadata(folder / name))
    assert not same(rebuilt, expected)
    load_weights(rebuilt, folder / name)
    assert same(rebuilt, expected)
    assert rebuilt.origin == expected.origin
    images = torch.rand(1, 3, 32, 32)
    assert torch.equal(rebuilt.eval().pooled(images), expected.eval().pooled(images))


def test_the_card_describes_the_backbone(folder):
    card, backbone = read_metadata(folder), small()
    assert card["name"] == "timm/test_resnet"  # whatever the caller's card says
    assert (card["stem"], card["args"]) == ("cifar", {"drop_rate": 0.1})
    assert (card["method"], card["lam"]) == ("tract", 0.1)
    assert card["feature_dim"] == backbone.feature_dim
    assert card["first_layers"] == ["model.conv1.0"]
    assert card["mean"] == pytest.approx([0.1, 0.2, 0.3])
    assert card["std"] == pytest.approx([0.4, 0.5, 0.6])
    assert card["maps"] == {name: info._asdict() for name, info in backbone.map_info.items()}
    weights = (folder / WEIGHTS_NAME).read_bytes()
    assert card["sha256"] == hashlib.sha256(weights).hexdigest()
    assert {path.name for path in folder.iterdir()} == {WEIGHTS_NAME, METADATA_NAME}


def test_saving_goes_over_what_is_there(tmp_path):
    for seed in (0, 1):
        save_backbone(tmp_path, small(seed).to(memory_format=torch.channels_last), {})
    rebuilt = build_from_metadata(read_metadata(tmp_path))
    load_weights(rebuilt, tmp_path)
    assert same(rebuilt, small(1))


def flip_a_byte(file):
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["", WEIGHTS_NAME])
def test_weights_that_are_not_what_the_card_tells_are_refused(folder, tmp_path, name, refused):
    copy = shutil.copytree(folder, tmp_path / "run")
    flip_a_byte(copy / WEIGHTS_NAME)
    model = small(1)
    with refused(
        "a run folder's weights with a flipped bit",
        ValueError,
        match=r"model\.safetensors is not what was written, by the sha256 .*--resume",
    ):
        load_weights(model, copy / name)
    assert same(model, small(1))
    (copy / WEIGHTS_NAME).rename(copy / "mine.safetensors")  # which the card does not speak of
    load_weights(model, copy / "mine.safetensors")
    assert not same(model, small(1))


@pytest.mark.parametrize("card", ["none", "of an earlier version"])
def test_weights_without_a_hash_load_and_it_is_said(folder, tmp_path, card, caplog):
    copy = shutil.copytree(folder, tmp_path / "run")
    told = read_metadata(copy)
    (copy / METADATA_NAME).unlink()
    if card != "none":
        del told["sha256"]
        (copy / METADATA_NAME).write_text(json.dumps(told))
    model = small(1)
    report = load_weights(model, copy)
    assert same(model.model, small().model)
    said = [note for note in report.notes if "no sha256" in note]
    assert len(said) == (card != "none")
    assert [f"{note}." for note in said] == [each.message for each in caplog.records]


def saved_until(number, folder, backbone):
    """Save in a child that is killed before its file operation of that number; did it finish?"""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    try:
        die_at(number, folder)
        save_backbone(folder / "run", backbone, {})
        os._exit(0)
    finally:
        os._exit(1)


@pytest.mark.parametrize("again", ["first", "other", "same"])
def test_a_kill_never_leaves_a_pair_that_is_refused_or_mixed(folder, tmp_path, again):
    old, new = small(), small(2)
    old.set_normalization([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    new = old if again == "same" else new
    has_old, finished, number = again != "first", False, 0
    while not finished:
        number += 1
        place = tmp_path / str(number)
        if has_old:
            shutil.copytree(folder, place / "run")
        else:
            (place / "run").mkdir(parents=True)
        finished = saved_until(number, place, new)
        has_weights, has_metadata = (
            (place / "run" / n).exists() for n in (WEIGHTS_NAME, METADATA_NAME)
        )
        assert has_weights or not has_metadata
        assert has_weights or again == "first"
        assert has_metadata or again != "same"
        if has_weights:
            found = small(3)
            load_weights(found, place / "run")
            assert same(found, new) or (has_old and same(found, old))
    assert number > 7
    assert same(found, new)
    assert has_metadata


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}])
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
def test_pytorch_files_are_read(tmp_path, suffix, wrap):
    file, source, model = tmp_path / f"w{suffix}", small(1), small(0)
    torch.save(wrap(source.state_dict()), file)
    load_weights(model, file)
    assert same(model, source)


def test_names_without_the_prefix_are_the_inner_model_s(tmp_path):
    file, source, model = tmp_path / "w.pth", small(1), small(0)
    torch.save(source.model.state_dict(), file)
    model.set_normalization([0.1, 0.2, 0.3])
    report = load_weights(model, file)
    assert same(model.model, source.model)
    assert model.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert any("does not say its colours" in note for note in report.notes)


def test_missing_names_are_ignored_by_pattern_alone(tmp_path):
    file, source, model = tmp_path / "w.pth", small(1), small(0)
    state = source.model.state_dict()
    gone = [name for name in state if name.startswith("layer4.")]
    torch.save({name: t for name, t in state.items() if name not in gone}, file)
    own = model.model.layer4[0].conv1.weight.detach().clone()
    with pytest.raises(WeightsError, match=r"Missing layer4\.0\.conv1\.weight"):
        load_weights(model, file)
    with pytest.raises(ValueError, match=r"model\.ignore_missing: 'layer5\.\*' is none of"):
        load_weights(model, file, ignore_missing=["layer4.*", "layer5.*"])
    report = load_weights(model, file, ignore_missing=["layer4.*"])
    assert {n for n in gone if "num_batches" not in n} == set(report.started_anew)
    assert torch.equal(model.model.layer4[0].conv1.weight, own)
    assert torch.equal(model.model.conv1[0].weight, source.model.conv1[0].weight)
    with pytest.raises(WeightsError, match="does not fit"):  # nothing at all would be loaded
        load_weights(build_backbone("cifar/vit", args={"depth": 1}), file, ignore_missing=["*"])


def test_another_architecture_is_refused_and_nothing_changes(folder, refused):
    model = build_backbone("cifar/vit", args={"depth": 1})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with refused(
        "weights of a ResNet in a ViT", ValueError, match=r"another architecture's.*and \d+ more"
    ) as error:
        load_weights(model, folder)
    assert "model.backbone" in str(error.value)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_another_shape_is_refused(tmp_path, refused):
    wide, narrow = (build_backbone("cifar/resnet18", args={"width": w}) for w in (16, 8))
    torch.save(wide.state_dict(), tmp_path / "w.pth")
    says = r"of another shape layer1\.0\.conv1\.weight \(16, 64, 3, 3\) for \(8, 64, 3, 3\)"
    with refused("weights of another width", ValueError, match=says):
        load_weights(narrow, tmp_path / "w.pth")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("kept", [0, 10, 5000])
def test_a_truncated_file_is_refused(tmp_path, suffix, kept, refused):
    file, state = tmp_path / f"w{suffix}", small().state_dict()
    save_file(state, file) if suffix == ".safetensors" else torch.save(state, file)
    file.write_bytes(file.read_bytes()[:kept])
    with refused(f"{suffix} weights cut to {kept} bytes", ValueError, match=f"w{suffix}"):
        load_weights(small(), file)


class Malicious:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (open, (str(self.file), "w"))


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_a_pickle_is_not_executed(tmp_path, how, refused):
    file, touched = tmp_path / "w.pth", tmp_path / "touched"
    content = {"model.conv1.weight": torch.zeros(1), "evil": Malicious(touched)}
    if how == "torch":
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps(content, protocol=2))
    with refused(
        f"weights that would run code ({how})",
        ValueError,
        match="holds more than tensors and was not opened",
    ):
        load_weights(small(), file)
    assert not touched.exists()
    torch.load(file, weights_only=False) if how == "torch" else pickle.loads(file.read_bytes())
    assert touched.exists()  # it would have been


@pytest.mark.parametrize("content", [{"a": 1}, [torch.zeros(1)], {"state_dict": {"a": "b"}}])
def test_a_holder_of_no_tensors_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="holds no state dict"):
        load_weights(small(), tmp_path / "w.pth")


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"No weights at {tmp_path}/{WEIGHTS_NAME}"):
        load_weights(small(), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nothing\.pth\. Set model\.weights"):
        load_weights(small(), tmp_path / "nothing.pth")
    with pytest.raises(FileNotFoundError, match=rf"No {METADATA_NAME} at {tmp_path}"):
        read_metadata(tmp_path)


@pytest.mark.parametrize(
    "text", ["{", "[]", "3", "{}", '{"name": "cifar/vit"}', "\udcff"], ids=repr
)
def test_a_broken_card_is_refused(tmp_path, text):
    (tmp_path / METADATA_NAME).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=METADATA_NAME):
        read_metadata(tmp_path)


def test_the_card_is_plain_json(folder):
    assert json.loads((folder / METADATA_NAME).read_text()) == read_metadata(folder)
