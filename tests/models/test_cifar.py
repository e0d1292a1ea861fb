"""The paper's ResNet-18 and ViT for 32 px, and its table 1 (docs/guides/models.md)."""

import csv
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from tract_transfer import TrAct
from tract_transfer.models import build_backbone
from tract_transfer.registry import load_plugins
from tract_transfer.tract import find_first_layers

load_plugins(["paper/cifar_zoo.py"])
from cifar_zoo import ZOO, HalfSize  # noqa: E402 - its folder is on sys.path now

ROOT = Path(__file__).parents[2]
# Million parameters with 100 classes, as github.com/weiaicunzai/pytorch-cifar100 gives them.
PUBLISHED = {
    "squeezenet": 0.78, "mobilenet": 3.3, "mobilenetv2": 2.36, "shufflenet": 1.0,
    "shufflenetv2": 1.3, "vgg11": 28.5, "vgg13": 28.7, "vgg16": 34.0, "vgg19": 39.0,
    "densenet121": 7.0, "densenet161": 26, "densenet201": 18, "googlenet": 6.2,
    "inceptionv3": 22.3, "inceptionv4": 41.3, "inceptionresnetv2": 65.4, "xception": 21.0,
    "resnet18": 11.2, "resnet34": 21.3, "resnet50": 23.7, "resnet101": 42.7, "resnet152": 58.3,
    "resnext50": 14.8, "resnext101": 25.3, "resnext152": 33.3, "seresnet18": 11.4,
    "seresnet34": 21.6, "seresnet50": 26.5, "seresnet101": 47.7, "seresnet152": 66.2,
    "nasnet": 5.2, "wideresnet": 55.9, "stochasticdepth18": 11.22, "stochasticdepth34": 21.36,
    "stochasticdepth50": 23.71,
}  # fmt: skip
# The library has another version: see docs/guides/models.md.
DIFFERENT = {"googlenet", "inceptionresnetv2", "nasnet"}
# A network of each kind -> arguments that make it small enough to train in a test.
_UNCHANGED = (
    "squeezenet", "mobilenet", "mobilenetv2", "shufflenet", "shufflenetv2", "vgg11", "densenet121",
    "googlenet", "inceptionv3", "inceptionv4", "inceptionresnetv2", "xception",
)  # fmt: skip
_FLATTENED = "resnet34", "resnet50", "seresnet18", "seresnet50", "stochasticdepth18"
TRAINED = {
    **{name: {} for name in _UNCHANGED},
    **{name: {"layers": (1, 1, 1, 1), "channels": (16, 16, 16, 16)} for name in _FLATTENED},
    "resnext50": {"layers": (1, 1, 1, 1)},
    "wideresnet": {"layers": (1, 1, 1), "channels": (16, 16, 16)},
    "nasnet": {"depth": 1, "width": 8},
    "resnet18": {"width": 8},
}
NAMES = ["resnet18", *ZOO]


def build(name, **args):
    if name == "resnet18":
        args = {"max_pool": False, **args}
    return build_backbone(f"cifar/{name}", args=args)


@pytest.fixture(scope="module")
def networks():
    with torch.device("meta"):
        return {name: build(name) for name in NAMES}


def num_parameters(backbone):
    """With a linear head of 100 classes."""
    return sum(p.numel() for p in backbone.parameters()) + 100 * (backbone.feature_dim + 1)


def test_there_is_a_network_for_each_row_of_the_table():
    assert len(NAMES) == 36
    table = ROOT / "../shared/paper/cifar100_table.csv"
    if not table.is_file():
        pytest.skip("no ../shared/paper")
    rows = [row["model"] for row in csv.DictReader(table.open())]
    assert {"ResNet18", *(net.row for net in ZOO.values())} == set(rows)


@pytest.mark.parametrize("name", NAMES)
def test_network_has_the_published_parameters_and_a_cifar_stem(networks, name):
    backbone = networks[name]
    millions = num_parameters(backbone) / 1e6
    if name in DIFFERENT:
        assert millions != pytest.approx(PUBLISHED[name], rel=0.02)
    elif name in PUBLISHED:
        assert millions == pytest.approx(PUBLISHED[name], rel=0.05)
    assert find_first_layers(backbone) == backbone.first_layers
    (first,) = backbone.first_layers
    layer = backbone.get_submodule(first)
    assert (layer.kernel_size, layer.stride, layer.padding) == ((3, 3), (1, 1), (1, 1))
    assert (layer.in_channels, layer.groups) == (3, 1)


@pytest.mark.parametrize("name", TRAINED)
def test_network_trains_with_tract(name):
    torch.manual_seed(0)
    backbone = build(name, **TRAINED[name]).train()
    images, inputs = torch.rand(2, 3, 32, 32), []
    layer = backbone.get_submodule(backbone.first_layers[0])
    layer.register_forward_pre_hook(lambda _module, args: inputs.append(args[0]))
    tract = TrAct(backbone, 0.1)
    features = backbone.pooled(images)
    assert features.shape == (2, backbone.feature_dim)
    features.square().mean().backward()
    plain = layer.weight.grad.clone()
    tract.step()
    assert layer.weight.grad.isfinite().all()
    assert not torch.equal(layer.weight.grad, plain)
    assert torch.equal(inputs[0], backbone.normalize(images))


def test_stochastic_depth_is_linear_in_depth():
    modules = build("stochasticdepth18").modules()
    rates = [m.drop_prob for m in modules if type(m).__name__ == "DropPath"]
    assert rates == pytest.approx([0.5 * index / 7 for index in range(1, 8)])


@torch.no_grad()
def test_nasnet_halving_sees_even_and_odd_positions():
    halve = HalfSize(1, 2).eval()
    halve.even.weight.fill_(1)
    halve.odd.weight.fill_(1)
    image = torch.arange(1.0, 17.0).view(1, 1, 4, 4)
    halves = halve(image) * (1 + halve.norm.eps) ** 0.5
    torch.testing.assert_close(halves[0, 0], torch.tensor([[1.0, 3.0], [9.0, 11.0]]))
    torch.testing.assert_close(halves[0, 1], torch.tensor([[6.0, 8.0], [14.0, 16.0]]))


def test_resnet18_differs_from_torchvision_only_in_its_stem():
    ours = build_backbone("cifar/resnet18").model.state_dict()
    theirs = torchvision.models.resnet18(num_classes=1).state_dict()
    shapes = {n: t.shape for n, t in theirs.items() if not n.startswith("fc.")}
    assert {n: t.shape for n, t in ours.items()} == {**shapes, "conv1.weight": (64, 3, 3, 3)}


@pytest.mark.parametrize("max_pool, strides", [(True, [1, 2, 4, 8, 16]), (False, [1, 2, 4, 8])])
def test_resnet18_keeps_its_pool_on_request(max_pool, strides):
    backbone = build_backbone("cifar/resnet18", args={"width": 8, "max_pool": max_pool})
    assert [info.stride for info in backbone.pyramid().values()] == strides
    assert isinstance(backbone.model.maxpool, nn.MaxPool2d) == max_pool


def test_vit_is_the_paper_s():
    """64 tokens of 4x4 px and a class token; 7 layers of width 384 with MLPs of that width."""
    args = {"img_size": 32, "patch_size": 4, "depth": 7, "num_heads": 12, "mlp_ratio": 1}
    with torch.device("meta"):
        vits = build_backbone("cifar/vit"), build_backbone("timm/vit_small_patch16_224", args=args)
    ours, theirs = ({name: t.shape for name, t in vit.state_dict().items()} for vit in vits)
    assert ours == theirs
    assert vits[0].model.blocks[0].attn.num_heads == 12


def test_docs_list_the_networks(networks):
    text = (ROOT / "docs/guides/models.md").read_text(encoding="utf-8")
    lines = []
    for name, backbone in networks.items():
        row, source = ZOO[name][:2] if name in ZOO else ("ResNet18", "timm/resnet18")
        first = backbone.first_layers[0]
        num_inputs = backbone.get_submodule(first).in_channels * 9
        published = f"{PUBLISHED[name]} M" if name in PUBLISHED else ""
        lines.append(
            f"| {row} | `cifar/{name}` | {source} | {num_parameters(backbone):,} | {published} | "
            f"`{first}` | {num_inputs} |"
        )
    missing = [line for line in lines if line not in text]
    assert not missing, "\n".join(["docs/guides/models.md lacks", *missing])
