"""Costs: the memory and energy of a run alone, and FLOPs and memory computed by hand."""

import sys

import numpy as np
import pytest
import timm
import torch
from torch import nn

from tract_transfer.engine import cost
from tract_transfer.engine.cost import (
    CostMeter,
    count_flops,
    measure_blocks,
    measure_first_layers,
    saved_bytes,
)

MIB = 2**20
CPU = torch.device("cpu")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can reset the peak")
def test_peak_memory_is_that_since_the_meter_started():
    def peak(meter):
        return meter.read(whole=True)["peak_memory_bytes"]["process"]

    before, meter = peak(CostMeter(CPU)), CostMeter(CPU)
    block = np.ones(200 * MIB, np.uint8)
    del block
    highest = peak(meter)
    assert 150 * MIB < highest - before < 260 * MIB
    assert meter.read(whole=False)["peak_memory_bytes"] is None, "a part of a run is not the run"
    assert peak(CostMeter(CPU)) < highest - 100 * MIB, "an earlier peak does not count"


def write_counter(folder, microjoules):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "name").write_text("package-0\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")


def test_energy_is_the_difference_of_the_counters(tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "_POWERCAP", tmp_path)
    write_counter(tmp_path / "intel-rapl:0", 5_000_000)
    (tmp_path / "intel-rapl:1").mkdir()  # not readable
    meter = CostMeter(CPU)
    write_counter(tmp_path / "intel-rapl:0", 47_500_000)
    assert meter.read(whole=True)["energy_joules"] == {"package-0 intel-rapl:0": 42.5}
    assert meter.read(whole=False)["energy_joules"] is None, "a part of a run is not the run"
    write_counter(tmp_path / "intel-rapl:0", 12)
    assert meter.read(whole=True)["energy_joules"] is None, "the counter wrapped"
    monkeypatch.setattr(cost, "_SELF", tmp_path / "nowhere")
    assert CostMeter(CPU).read(whole=True)["peak_memory_bytes"] is None, "Linux alone has a peak"


class Net(nn.Module):
    """A stem, a stage whose two parts are called but not itself, and a head."""

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


def test_blocks_have_the_cost_counted_by_hand_and_add_up():
    net, images = Net(), torch.rand(2, 3, 8, 6)
    blocks = {block.name: block for block in measure_blocks(net, lambda: net(images))}
    pixels = 2 * 8 * 6
    flops = {
        "stem": 2 * pixels * 4 * 27,
        "stage": 2 * pixels * 4 * 4,
        "head": 2 * 2 * 4 * 5,
        "(elsewhere)": 2 * 2 * 5 * 5,
    }
    assert {name: block.flops for name, block in blocks.items()} == flops
    parameters = {"stem": 4 * 27 + 4, "stage": 16 + 8, "head": 25, "(elsewhere)": 25}
    assert {name: block.parameters for name, block in blocks.items()} == parameters
    assert sum(parameters.values()) == sum(p.numel() for p in net.parameters())
    # A method is measured like a call, and wrappers are no level.
    wrapped = nn.ModuleDict({"backbone": nn.ModuleDict({"model": net})})
    deep = measure_blocks(wrapped, lambda: net.features(images), depth=2)
    names = [f"backbone.model.{name}" for name in ("stem", "stage.0", "stage.1", "head")]
    assert [block.name for block in deep[:4]] == names
    assert [block.flops for block in deep[:4]] == [flops["stem"], flops["stage"], 0, 0]


def test_attention_counts_on_every_device():
    attention = timm.layers.Attention(dim=8, num_heads=2).eval()
    flops = count_flops(attention, lambda: attention(torch.rand(1, 10, 8)))
    layers = 2 * 10 * 8 * (3 * 8 + 8)
    products = 2 * (2 * 10 * 10 * 8)  # queries with keys, and weights with values
    assert flops[""] == layers + products
    assert attention.fused_attn


def test_first_layers_have_rows_and_inputs():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Flatten(), nn.Linear(128, 5))
    images = torch.rand(6, 3, 8, 8)
    conv, linear = measure_first_layers(net, ["0", "2"], lambda: net(images), 6)
    assert (conv.inputs, conv.outputs, conv.rows) == (27, 8, 16)
    assert (linear.inputs, linear.outputs, linear.rows) == (128, 5, 1)


@pytest.mark.parametrize("images", [1, 3])
def test_saved_bytes_count_each_tensor_once_and_no_weights(images):
    net = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 4))
    x = torch.rand(images, 10)
    # The input for the first weight; the ReLU's output for itself and for the second weight.
    assert saved_bytes(net, lambda: net(x)) == 4 * images * (10 + 20)
    assert saved_bytes(net.requires_grad_(False), lambda: net(x)) == 0
