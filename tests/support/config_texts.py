"""A config as its users write it, where tests put it, and what is said of one that must fail."""

from pathlib import Path

import pytest

from tract_transfer.config.schema import ConfigError, load_config

CLASSIFICATION = """\
task: classification
output_dir: out
model: {backbone: {name: cifar/resnet18, args: {width: 16}}}
data:
  train: {source: digits, split: train}
  test: {source: digits, split: test}
  transforms: {size_px: 32}
  batch_size: 64
solver:
  optimizer: sgd
  lr: 1e-3
  max_epochs: 2
"""


def writer_to(folder: Path):
    """Return what writes a config beside the others in `folder`, and returns its path."""

    def write_file(text: str, name: str = "x.yaml") -> Path:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write_file


def failing_in(write):
    """Return what tells the message of a config that must fail."""

    def message(text: str = CLASSIFICATION, *overrides: str) -> str:
        with pytest.raises(ConfigError) as error:
            load_config(write(text), overrides)
        return str(error.value)

    return message
