"""The networks of the paper's table 1: what they are, what docs/models.md says, how they train."""

import csv
from pathlib import Path

import pytest
import torch

from tract_transfer import TrAct
from tract_transfer.models import ZOO, build_backbone
from tract_transfer.tract import find_first_layers

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
# The library's version is another one: see docs/models.md.
OTHERWISE = {"googlenet", "inceptionresnetv2", "nasnet"}
# Arguments that make a network small enough to train in a test, without changing its parts.
_FLAT = {"layers": (1, 1, 1, 1), "channels": (16, 16, 16, 16)}
SMALL = {
    **{name: _FLAT for name in PUBLISHED if name.startswith(("resnet", "seresnet"))},
    **{name: {"layers": (1, 1, 1, 1)} for name in ("resnext50", "resnext101", "resnext152")},
    **{f"stochasticdepth{depth}": _FLAT for depth in (18, 34, 50, 101)},
    "wideresnet": {"layers": (1, 1, 1), "channels": (16, 16, 16)},
    "nasnet": {"depth": 1, "width": 8},
    "resnet18": {"width": 8},
}
NAMES = ["resnet18", *ZOO]


def build(name, **args):
    own = {"max_pool": False, **args} if name == "resnet18" else args
    return build_backbone(f"cifar/{name}", args=own)


@pytest.fixture(scope="module")
def networks():
    with torch.device("meta"):
        return {name: build(name) for name in NAMES}


def num_parameters(backbone):
    """With a linear head of 100 classes."""
    return sum(p.numel() for p in backbone.parameters()) + 100 * (backbone.feature_dim + 1)


def test_there_is_a_network_for_each_row_of_the_table():
    table = ROOT / "../shared/paper/cifar100_table.csv"
    assert len(NAMES) == 36
    if not table.is_file():
        pytest.skip("no ../shared/paper")
    rows = [row["model"] for row in csv.DictReader(table.open())]
    assert {"ResNet18", *(net.row for net in ZOO.values())} == set(rows)


@pytest.mark.parametrize("name", NAMES)
def test_a_network_has_as_many_parameters_as_published(networks, name):
    found = num_parameters(networks[name]) / 1e6
    if name in OTHERWISE:
        assert found != pytest.approx(PUBLISHED[name], rel=0.02)
    elif name in PUBLISHED:
        assert found == pytest.approx(PUBLISHED[name], rel=0.05)


@pytest.mark.parametrize("name", NAMES)
def test_the_first_layer_is_a_3x3_convolution_of_stride_1(networks, name):
    backbone = networks[name]
    (first,) = find_first_layers(backbone)
    assert [first] == backbone.first_layers
    layer = backbone.get_submodule(first)
    assert (layer.kernel_size, layer.stride, layer.padding) == ((3, 3), (1, 1), (1, 1))
    assert (layer.in_channels, layer.groups) == (3, 1)


@pytest.mark.parametrize("name", NAMES)
def test_a_network_trains_with_and_without_tract(name):
    """A step without and one with it; TrAct treats the layer that reads the normalised image."""
    torch.manual_seed(0)
    backbone = build(name, **SMALL.get(name, {})).train()
    images, seen = torch.rand(4, 3, 32, 32), []
    layer = backbone.get_submodule(backbone.first_layers[0])
    handle = layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    for lam in (None, 0.1):
        tract = TrAct(backbone, lam) if lam else None
        optimizer = torch.optim.SGD(backbone.parameters(), lr=0.01)
        before = layer.weight.detach().clone()
        features = backbone.pooled(images)
        assert features.shape == (4, backbone.feature_dim)
        features.square().mean().backward()
        if tract:
            tract.step()
        optimizer.step()
        optimizer.zero_grad()
        assert layer.weight.isfinite().all()
        assert not torch.equal(layer.weight, before)
    assert torch.equal(seen[0], backbone.normalize(images))
    handle.remove()


@pytest.mark.parametrize("name", ["squeezenet", "shufflenet", "nasnet", "wideresnet", "vgg11"])
@torch.no_grad()
def test_maps_have_the_channels_and_strides_told(name):
    backbone = build(name, **SMALL.get(name, {})).eval()
    images = torch.rand(1, 3, 32, 32)
    strides = [info.stride for info in backbone.pyramid().values()]
    assert strides[:3] == [1, 2, 4]
    for map_name, info in backbone.pyramid().items():
        found = backbone.maps(images, [map_name])[map_name]
        assert found.shape == (1, info.channels, 32 // info.stride, 32 // info.stride)


def test_stochastic_depth_is_linear_in_depth():
    rates = [
        module.drop_prob
        for module in build("stochasticdepth18").modules()
        if type(module).__name__ == "DropPath"
    ]
    assert rates == pytest.approx([0.5 * index / 7 for index in range(1, 8)])


@torch.no_grad()
def test_nasnet_s_halving_sees_every_other_place_of_both_kinds():
    from tract_transfer.models.cifar import HalfSize

    halve = HalfSize(1, 2).eval()
    halve.even.weight.fill_(1)
    halve.odd.weight.fill_(1)
    image = torch.arange(1.0, 17.0).view(1, 1, 4, 4)
    found = halve(image) * (1 + halve.norm.eps) ** 0.5
    torch.testing.assert_close(found[0, 0], torch.tensor([[1.0, 3.0], [9.0, 11.0]]))
    torch.testing.assert_close(found[0, 1], torch.tensor([[6.0, 8.0], [14.0, 16.0]]))


# ------------------------------------------------------------------------------ docs/models.md


def table(networks):
    """The rows of docs/models.md."""
    lines = []
    for name, backbone in networks.items():
        source = ZOO[name].source if name in ZOO else "timm/resnet18"
        first = backbone.first_layers[0]
        layer = backbone.get_submodule(first)
        published = f"{PUBLISHED[name]} M" if name in PUBLISHED else ""
        row = ZOO[name].row if name in ZOO else "ResNet18"
        lines.append(
            f"| {row} | `cifar/{name}` | {source} | {num_parameters(backbone):,} | {published} | "
            f"`{first}` | {layer.in_channels * 9} |"
        )
    return lines


def test_the_document_says_what_the_networks_are(networks):
    text = (ROOT / "docs/models.md").read_text(encoding="utf-8")
    missing = [line for line in table(networks) if line not in text]
    assert not missing, "\n".join(["docs/models.md lacks", *missing])
