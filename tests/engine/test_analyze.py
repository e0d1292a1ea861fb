"""Costs are those one counts by hand."""

import pytest
import torch
from torch import nn

from tract_transfer.engine.cost import measure_blocks, measure_first_layers, saved_bytes


class Net(nn.Module):
    """A stem, a stage of two parts of which a method calls only the parts, and a head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.stage = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4))
        self.head = nn.Linear(4, 5)
        self.scale = nn.Parameter(torch.eye(5))

    def features(self, images):
        return self.stage[1](self.stage[0](self.stem(images)))

    def forward(self, images):
        return self.head(self.features(images).mean((2, 3))) @ self.scale


def test_blocks_are_counted_by_hand_and_add_up():
    net, images = Net(), torch.rand(2, 3, 8, 6)
    blocks = {block.name: block for block in measure_blocks(net, lambda: net(images))}
    pixels = 2 * 8 * 6
    flops = {
        "stem": 2 * pixels * 4 * 27,
        "stage": 2 * pixels * 4 * 4,  # its parts are called, it is not
        "head": 2 * 2 * 4 * 5,
        "(elsewhere)": 2 * 2 * 5 * 5,
    }
    assert {name: block.flops for name, block in blocks.items()} == flops
    parameters = {"stem": 4 * 27 + 4, "stage": 16 + 8, "head": 25, "(elsewhere)": 25}
    assert {name: block.parameters for name, block in blocks.items()} == parameters
    assert sum(parameters.values()) == sum(p.numel() for p in net.parameters())
    deep = measure_blocks(net, lambda: net(images), depth=2)
    assert [block.name for block in deep][:3] == ["stem", "stage.0", "stage.1"]
    assert sum(block.flops for block in deep) == sum(flops.values())


def test_a_method_is_measured_like_a_call_and_wrappers_are_opened():
    net = nn.ModuleDict({"backbone": nn.ModuleDict({"model": Net()})})
    images = torch.rand(2, 3, 8, 6)
    blocks = measure_blocks(net, lambda: net["backbone"]["model"].features(images))
    named = {block.name: block.flops for block in blocks}
    assert named["backbone.model.stem"] == 2 * 96 * 4 * 27
    assert named["backbone.model.head"] == 0


def test_first_layers_tell_rows_and_inputs():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Flatten(), nn.Linear(128, 5))
    images = torch.rand(6, 3, 8, 8)
    conv, linear = measure_first_layers(net, ["0", "2"], lambda: net(images), 6)
    assert (conv.inputs, conv.outputs, conv.rows) == (27, 8, 16)
    assert (linear.inputs, linear.outputs, linear.rows) == (128, 5, 1)


@pytest.mark.parametrize("images", [1, 3])
def test_what_a_backward_needs_is_counted_once_and_without_weights(images):
    net = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 4))
    x = torch.rand(images, 10)
    # the input for the first weight; the ReLU's output for itself and for the second weight
    assert saved_bytes(net, lambda: net(x)) == 4 * images * (10 + 20)
    assert saved_bytes(net.requires_grad_(False), lambda: net(x)) == 0
