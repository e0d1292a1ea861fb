"""The bridge for weights: the backbone a config names, and what `model.weights` puts into it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tract_transfer.config import Config
from tract_transfer.config_file import ConfigError, read_config_file
from tract_transfer.config_sections import BackboneConfig
from tract_transfer.engine.checkpoint import STATE_NAME, verified
from tract_transfer.models import Backbone, build_backbone
from tract_transfer.models.weights import (
    WeightsError,
    build_from_card,
    has_card,
    load_weights,
    read_card,
)

# Arguments that change neither names nor what a weight computes at the size it was trained at.
FREE_ARGS = {
    "img_size", "image_size", "dynamic_img_size", "drop_rate", "drop_path_rate", "proj_drop_rate",
    "attn_drop_rate",
}  # fmt: skip
CONFIGS = Path(__file__).parents[1] / "configs"


def build_with_weights(config: Config) -> Backbone:
    """Build the backbone of a config, with its weights.

    Raises:
        ConfigError: no such backbone, or weights that do not fit it; where a file was compared, a
            WeightsError with the report is its cause.
    """
    section = config.model
    wanted, path = section.backbone, Path(section.weights or "")
    published = section.weights == "pretrained"
    from_file = section.weights is not None and not published
    try:
        if from_file:
            check_is_there(path)
        card = read_card(path) if wanted.name is None else None
        if from_file and wanted.name is not None and has_card(path):
            check_card(read_card(path), wanted)
    except (FileNotFoundError, ValueError) as error:
        raise config.error("model.weights", str(error)) from error
    try:
        if card is not None:
            backbone = build_from_card(card)
        else:
            assert wanted.name is not None
            arguments = wanted.model_dump(include={"stem", "args"})
            backbone = build_backbone(wanted.name, pretrained=published, **arguments)
    except (KeyError, ValueError) as error:
        raise config.error("model.backbone", str(error.args[0])) from error
    if from_file:
        options = section.model_dump(include={"ignore_missing", "adapt_stem"})
        try:
            if path.is_file() and (path.parent / STATE_NAME).is_file():
                verified(path.parent)
            load_weights(backbone, path, **options)
        except (FileNotFoundError, ValueError) as error:
            raise _located(config, error) from error
    backbone.set_colours(wanted.mean, wanted.std)
    return backbone


def check_is_there(path: Path) -> None:
    """Refuse weights that are not there, and name the command that makes them where it is ours.

    Raises:
        FileNotFoundError: neither file nor folder.
    """
    if path.exists():
        return
    made = makes(str(path))
    fix = (
        f"python tools/train_net.py --config-file {made} makes it; "
        "model.backbone.name=timm/resnet18 model.weights=pretrained takes published ones instead."
    ) if made else (
        "Set model.weights to a file or run folder."
    )  # fmt: skip
    raise FileNotFoundError(f"No weights at {path}: there is no such file or folder. {fix}")


def check_weights_are_there(config: Config) -> None:
    """Refuse a config whose weights are not there, before anything else takes time.

    Raises:
        ConfigError: neither file nor folder.
    """
    weights = config.model.weights
    if weights in (None, "pretrained"):
        return
    try:
        check_is_there(Path(str(weights)))
    except FileNotFoundError as error:
        raise config.error("model.weights", str(error)) from error


def makes(output_dir: str, configs: Path = CONFIGS) -> str | None:
    """Return the config of this repository whose run writes to `output_dir`, if there is one."""
    for file in sorted(configs.glob("*/*.yaml")):
        if file.parent.name in ("base", "suites"):
            continue
        try:
            tree, _ = read_config_file(file)
        except ConfigError:
            continue
        if Path(str(tree.get("output_dir"))) == Path(output_dir):
            return str(file.relative_to(configs.parent))
    return None


def _located(config: Config, error: Exception) -> ConfigError:
    key = "model.ignore_missing"
    if not isinstance(error, WeightsError) and str(error).startswith(f"{key}: "):
        return config.error(key, str(error).removeprefix(f"{key}: "))
    return config.error("model.weights", str(error))


def check_card(card: Mapping[str, Any], wanted: BackboneConfig) -> None:
    """Refuse a backbone that the card of its weights contradicts, even where shapes fit."""
    told = {"name": card["name"], "stem": card["stem"], "args": card["args"]}
    given = wanted.model_dump(include=set(told))
    if _fixed(told) != _fixed(given):
        raise ValueError(
            f"the weights are those of {told}, and model.backbone says {given}. Leave "
            "model.backbone out: the weights say what they are. (Image size and drop rates may "
            "differ.)"
        )


def _fixed(origin: Mapping[str, Any]) -> dict[str, Any]:
    args = {key: value for key, value in origin["args"].items() if key not in FREE_ARGS}
    return {**origin, "args": args}
