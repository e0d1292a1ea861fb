"""Frozen stages, frozen and synchronized BatchNorms, stochastic depth."""

import copy
import re
from itertools import pairwise

import pytest
import timm
import torch
from timm.layers import DropPath
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tract_transfer.build.model import build_features, build_model
from tract_transfer.config.schema import ConfigError
from tract_transfer.models import build_backbone
from tract_transfer.models.freeze import freeze_stages, set_drop_path, set_norm, stage_names

SMALL = {
    "cifar/resnet18": {"width": 8},
    "timm/vgg11_bn": {"mlp_ratio": 0.01},
    "timm/test_vit": {},
    "timm/test_convnext": {},
}


def backbone(name="cifar/resnet18"):
    torch.manual_seed(0)
    return build_backbone(name, args=SMALL.get(name, {}))


def frozen_names(backbone) -> list[str]:
    return [n.removeprefix("model.") for n, p in backbone.named_parameters() if not p.requires_grad]


@pytest.mark.parametrize("name", ["timm/resnet18", "torchvision/resnet18"])
def test_stages_of_a_resnet_are_those_of_detectron2(name):
    with torch.device("meta"):
        stem, *stages = stage_names(build_backbone(name))
    assert [stage[-1].split(".")[0] for stage in stages] == [f"layer{n}" for n in (1, 2, 3, 4)]
    assert {"conv1", "bn1"} <= set(stem)
    assert not any(name.startswith("layer") for name in stem)


@pytest.mark.parametrize("name", ["timm/vgg16", "torchvision/vgg16", "timm/vgg16_bn"])
def test_stages_of_a_vgg_are_its_five_groups_of_convolutions(name):
    with torch.device("meta"):
        vgg = build_backbone(name)
        stages = stage_names(vgg)
    layers = [[vgg.model.get_submodule(name) for name in stage] for stage in stages]
    assert [sum(isinstance(m, nn.Conv2d) for m in stage) for stage in layers] == [2, 2, 3, 3, 3]


def test_stages_of_a_vit_are_its_embedding_and_quarters_of_its_blocks():
    with torch.device("meta"):
        vit = build_backbone("timm/vit_tiny_patch16_224")
        stages = stage_names(vit)
    blocks = [{int(n.split(".")[1]) for n in s if n.startswith("blocks.")} for s in stages]
    assert blocks == [set(), {0, 1, 2}, {3, 4, 5}, {6, 7, 8}, {9, 10, 11}]
    freeze_stages(vit, 1)
    embedding = {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    assert set(frozen_names(vit)) == embedding


@pytest.mark.parametrize("name", SMALL)
def test_each_further_stage_freezes_more_parameters(name):
    frozen = []
    for count in range(len(stage_names(backbone(name))) + 1):
        model = backbone(name)
        freeze_stages(model, count)
        frozen.append(frozen_names(model))
        first = model.get_submodule(model.first_layers[0])
        assert first.weight.requires_grad == (count == 0)
    assert frozen[0] == []
    assert all(set(few) < set(more) for few, more in pairwise(frozen))
    last = list(model.pyramid())[-1]
    assert not model.maps(torch.rand(1, 3, 160, 160), [last])[last].requires_grad


# How parts are frozen -> the names that are.
FROZEN = {
    "stages": (lambda b: freeze_stages(b, 2), r"(mean|std|model\.(conv1|bn1|layer1)\..*)"),
    "norms": (lambda b: set_norm(b, "frozen"), r"(mean|std|.*\.(bn\d|downsample\.1)\..*)"),
}


@pytest.mark.parametrize("kind", FROZEN)
def test_frozen_parts_keep_weights_and_statistics_and_others_train(kind):
    freeze, names = FROZEN[kind]
    original = backbone()
    freeze(original)
    for model in (copy.deepcopy(original), original):  # the average of the weights is a copy
        before = {name: tensor.clone() for name, tensor in backbone().state_dict().items()}
        model.train().pooled(torch.rand(4, 3, 32, 32)).square().sum().backward()
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
        after = model.state_dict()
        assert list(after) == list(before)
        for name, tensor in after.items():
            assert torch.equal(tensor, before[name]) == bool(re.fullmatch(names, name)), name


@pytest.mark.parametrize("name", ["cifar/resnet18", "timm/test_efficientnet"])
def test_synchronized_norms_compute_the_same_on_one_process(name):
    images = torch.rand(2, 3, 64, 64)
    plain, synced = backbone(name), set_norm(backbone(name), "synced")
    assert list(plain.state_dict()) == list(synced.state_dict())
    norms = [module for module in synced.modules() if isinstance(module, _BatchNorm)]
    assert norms
    assert all(isinstance(norm, nn.SyncBatchNorm) for norm in norms)
    torch.testing.assert_close(synced.train().pooled(images), plain.train().pooled(images))


# Stochastic depth

MODELS = {
    "deit3_small_patch16_224": {"depth": 4, "embed_dim": 48, "num_heads": 3, "img_size": 32},
    "resnet18": {"channels": [8, 8, 8, 8]},
    "convnext_atto": {"depths": [1, 1, 2, 1]},
    "swin_tiny_patch4_window7_224": {"depths": [1, 1, 2, 1], "img_size": 64, "window_size": 2},
}
VIT = "model.backbone={name: cifar/vit, args: {depth: 3, width: 48, num_heads: 3}"


def rates_of(model):
    return {name: p.drop_prob for name, p in model.named_modules() if isinstance(p, DropPath)}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_drop_path_is_linear_as_in_timm_or_constant(name, rate):
    expected = rates_of(timm.create_model(name, drop_path_rate=0.3, **MODELS[name]))
    model = timm.create_model(name, drop_path_rate=rate, **MODELS[name])
    set_drop_path(model, 0.3, "linear")
    assert rates_of(model) == pytest.approx(expected, abs=1e-6)
    assert len(expected) > 3
    set_drop_path(model, 0.1, "constant")
    assert set(rates_of(model).values()) == {0.1}
    assert rates_of(model).keys() > expected.keys()  # timm's first block has none


def test_drop_path_drops_complete_branches_and_only_in_training():
    torch.manual_seed(0)
    vit = build_backbone("cifar/vit", args={"depth": 3, "width": 48, "num_heads": 3})
    images = torch.rand(1, 3, 32, 32)
    plain = vit.eval().pooled(images)
    set_drop_path(vit.model, 0.5, "constant")
    torch.testing.assert_close(vit.pooled(images), plain)
    vit.train()
    with torch.no_grad():
        outputs = {vit.pooled(images)[0, 0].item() for _ in range(60)}
    assert 10 < len(outputs) <= 2**6  # six branches, each dropped or not


def test_config_sets_drop_path(tmp_path, load_tiny):
    words = VIT + ", drop_path: {rate: 0.2, mode: constant}}"
    model = build_model(load_tiny(tmp_path, words, "data.transforms.size_px=32"), 3)
    assert list(rates_of(model).values()) == [0.2] * 6
    assert model.backbone.origin["args"] == {"depth": 3, "width": 48, "num_heads": 3}


@pytest.mark.parametrize(
    ("task", "words", "match"),
    [
        ("classification", "model.backbone={name: timm/vgg11, args: {mlp_ratio: 0.01}, "
            "drop_path: {rate: 0.1, mode: linear}}", "model.backbone.drop_path: is for timm's"),
        ("classification", VIT + ", drop_path: {rate: 0.1}}", "drop_path.mode: required"),
        ("classification", VIT + ", drop_path: {rate: 1.0, mode: linear}}", "drop_path.rate: "),
        ("classification", "model.backbone={name: timm/resnet18, args: {drop_path_rate: 0.1}, "
            "drop_path: {rate: 0.1, mode: linear}}", "give one of model.backbone.drop_path and"),
        ("probe", VIT + ", drop_path: {rate: 0.1, mode: linear}}",
            "model.backbone.drop_path has no use here: a probe trains no backbone"),
    ],
)  # fmt: skip
def test_drop_path_that_cannot_be_set_is_refused(tmp_path, load_tiny, task, words, match):
    with pytest.raises(ConfigError) as error:
        build_features(load_tiny(tmp_path, words, "data.transforms.size_px=32", task=task))
    assert match in str(error.value)
