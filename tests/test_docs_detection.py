"""The configs in docs/guides/detection.md load; it names every option, detector and protocol."""

import re
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from tract_transfer.config.schema import DetectionConfig, known_keys, load_config
from tract_transfer.evaluation import EVALUATORS
from tract_transfer.models import DETECTORS
from tract_transfer.models.detection.roi_heads import BoxOptions
from tract_transfer.models.detection.rpn import RpnOptions

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/guides/detection.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)


def test_configs_load(tmp_path):
    path = tmp_path / "detect.yaml"
    base = ROOT / "configs/detection/r18_fpn_voc07.yaml"
    path.write_text(f"_BASE_: {base}\n" + "".join(BLOCKS))
    config = load_config(path)
    assert config.data.repeat_threshold == 0.01


@pytest.mark.parametrize(("name", "defaults"), [("rpn", RpnOptions()), ("box", BoxOptions())])
def test_every_option_is_shown_with_its_default(name, defaults):
    shown = yaml.safe_load(BLOCKS[1])["model"]["detector"]["args"][name]
    expected = {
        option: list(value) if isinstance(value, tuple) else value
        for option, value in asdict(defaults).items()
    }
    assert {option: round_(value) for option, value in expected.items()} == shown


def round_(value):
    return round(value, 3) if isinstance(value, float) else value


def test_every_detector_and_protocol_is_named():
    for name in [name for registry in (DETECTORS, EVALUATORS) for name, _ in registry]:
        assert f"`{name}`" in PAGE, name


def test_every_data_key_of_detection_is_named():
    keys = [key for key in known_keys(DetectionConfig) if key.startswith("data.")]
    names = {key.rpartition(".")[2] for key in keys if key.count(".") == 1}
    shared = {"num_workers", "cache", "train", "val", "test", "transforms"}  # common to all tasks
    missing = {name for name in names - shared if not re.search(rf"\b{name}\b", PAGE)}
    assert missing == set()
