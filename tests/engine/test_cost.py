"""What a run says of its memory and energy is of that run alone."""

import sys

import numpy as np
import pytest
import torch

from tract_transfer.engine import cost
from tract_transfer.engine.cost import CostMeter

MIB = 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="the peak can be reset on Linux alone")
def test_peak_memory_is_that_since_the_meter_began():
    before = CostMeter(torch.device("cpu")).read(whole=True)["peak_memory_bytes"]["process"]
    meter = CostMeter(torch.device("cpu"))
    block = np.ones(200 * MIB, np.uint8)
    del block
    found = meter.read(whole=True)["peak_memory_bytes"]["process"]
    assert 150 * MIB < found - before < 260 * MIB
    after = CostMeter(torch.device("cpu")).read(whole=True)["peak_memory_bytes"]["process"]
    assert after < found - 100 * MIB, "an earlier run's peak is not this one's"


def write_counter(folder, microjoules):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "name").write_text("package-0\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")


def test_energy_is_the_difference_of_the_counters(tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "_POWERCAP", tmp_path)
    write_counter(tmp_path / "intel-rapl:0", 5_000_000)
    (tmp_path / "intel-rapl:1").mkdir()  # one that may not be read
    meter = CostMeter(torch.device("cpu"))
    write_counter(tmp_path / "intel-rapl:0", 47_500_000)
    assert meter.read(whole=True)["energy_joules"] == {"package-0 intel-rapl:0": 42.5}
    assert meter.read(whole=False)["energy_joules"] is None, "a part's energy is not the run's"
    write_counter(tmp_path / "intel-rapl:0", 12)
    assert meter.read(whole=True)["energy_joules"] is None, "the counter began anew"


@pytest.mark.skipif(sys.platform != "linux", reason="the peak can be reset on Linux alone")
def test_the_memory_of_a_part_is_not_the_run_s():
    """A run that was resumed for its last evaluation has seen no training."""
    meter = CostMeter(torch.device("cpu"))
    assert meter.read(whole=True)["peak_memory_bytes"] is not None
    assert meter.read(whole=False)["peak_memory_bytes"] is None


def test_without_what_can_be_read_there_is_no_number(tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "_POWERCAP", tmp_path)
    monkeypatch.setattr(cost, "_SELF", tmp_path / "nowhere")
    found = CostMeter(torch.device("cpu")).read(whole=True)
    assert found["peak_memory_bytes"] is None
    assert found["energy_joules"] is None
    assert found["seconds"] > 0
