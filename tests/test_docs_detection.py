"""docs/detection.md loads, and names every option, detector, protocol and policy."""

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
PAGE = (ROOT / "docs/detection.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)


def test_its_blocks_load(tmp_path):
    path = tmp_path / "detect.yaml"
    base = ROOT / "configs/detection/r18_fpn_voc07.yaml"
    path.write_text(f"_BASE_: {base}\n" + "".join(BLOCKS))
    config = load_config(path)
    assert config.data.repeat_threshold == 0.01


@pytest.mark.parametrize(("name", "defaults"), [("rpn", RpnOptions()), ("box", BoxOptions())])
def test_it_shows_every_option_with_its_default(name, defaults):
    told = yaml.safe_load(BLOCKS[1])["model"]["detector"]["args"][name]
    wanted = {
        option: list(value) if isinstance(value, tuple) else value
        for option, value in asdict(defaults).items()
    }
    assert {option: round_(value) for option, value in wanted.items()} == told


def round_(value):
    return round(value, 3) if isinstance(value, float) else value


def test_it_names_every_detector_and_protocol():
    for name in [name for registry in (DETECTORS, EVALUATORS) for name, _ in registry]:
        assert f"`{name}`" in PAGE, name


def test_it_names_every_key_of_detection_data():
    keys = [key for key in known_keys(DetectionConfig) if key.startswith("data.")]
    own = {key.rpartition(".")[2] for key in keys if key.count(".") == 1}
    shared = {"num_workers", "cache", "train", "val", "test", "transforms"}  # of every task
    untold = {key for key in own - shared if not re.search(rf"\b{key}\b", PAGE)}
    assert untold == set()
