"""The configs in docs/guides/training.md load, and it names every option of the transforms."""

import re
from pathlib import Path

from tract_transfer.config.schema import ClassificationConfig, known_keys, load_config

PAGE = (Path(__file__).parents[1] / "docs/guides/training.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)


def test_recipe_loads(tmp_path):
    block, _ = BLOCKS
    path = tmp_path / "recipe.yaml"
    path.write_text(block)
    config = load_config(path)
    assert config.solver.end_factor * config.solver.lr == 1e-5
    assert config.solver.warmup_start * config.solver.lr == 1e-6
    assert config.data.repeats == 3


def test_streaming_config_loads(tmp_path):
    """On top of a quickstart config, whose other keys also work with a stream."""
    _, block = BLOCKS
    base = Path(__file__).parents[1] / "configs/quickstart/pretrain.yaml"
    path = tmp_path / "stream.yaml"
    path.write_text(f"_BASE_: {base}\n{block}")
    section = load_config(path).data
    assert section.train.streaming
    assert (section.cache, section.shuffle_rows, section.readers) == ("none", 2048, 8)


def test_every_option_of_the_transforms_is_named():
    keys = [key for key in known_keys(ClassificationConfig) if key.startswith("data.transforms.")]
    section = PAGE.partition("## Images")[2].partition("## Batches")[0]
    names = {key.rpartition(".")[2] for key in keys}
    missing = {name for name in names if f"`{name}" not in section}
    assert missing <= {"flip_prob", "crop_ratio"}  # shown in the recipe
