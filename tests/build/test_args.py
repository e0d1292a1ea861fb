"""Arguments of registry entries are checked against the entries' signatures."""

from pathlib import Path

import pytest
import torch
from torch import nn

from tract_transfer.build.weights import check_backbone, wrong_argument
from tract_transfer.config.file import ConfigError
from tract_transfer.config.schema import Config, load_config
from tract_transfer.models import BACKBONES

ROOT = Path(__file__).parents[2]


def a_net(*sizes, depths: tuple[int, ...], free=1):
    """A third-party entry with every kind of parameter."""
    return nn.Identity(), sizes, depths, free


@pytest.fixture
def check(monkeypatch):
    monkeypatch.setitem(BACKBONES._obj_map, "own/net", a_net)

    def run(args: str) -> Config:
        backbone = f"model.backbone={{name: own/net, args: {args}}}"
        config = load_config(ROOT / "configs/quickstart/pretrain.yaml", [backbone])
        check_backbone(config)
        return config

    return run


def test_args_fit_any_signature(check):
    assert check("{depths: [1, 2], free: anything}").model.backbone.args["depths"] == [1, 2]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("{depths: [1, two]}", r"args\.depths\.1: .*valid integer.*'two'"),
        ("{depths: 3}", r"args\.depths: Input should be a list, got 3"),
        ("{free: 2}", r"args\.depths: Field required"),
        ("{depth: [1], depths: [1]}", r"args\.depth: unknown.*depths"),
    ],
)
def test_wrong_args_are_refused_at_their_key(check, args, message):
    with pytest.raises(ConfigError, match=message):
        check(args)


def test_naming_a_wrong_argument_allocates_no_model(monkeypatch):
    devices = []
    new = nn.Parameter.__new__

    def record(cls, data=None, *rest, **named):
        devices.append(data.device.type if isinstance(data, torch.Tensor) else "cpu")
        return new(cls, data, *rest, **named)

    monkeypatch.setattr(nn.Parameter, "__new__", record)
    key, message = wrong_argument("timm/resnet18", {"depth": 3}, "unexpected keyword 'depth'")
    assert key == "depth"
    assert "unknown" in message
    assert set(devices) == {"meta"}
