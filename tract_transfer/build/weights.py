"""The bridge for weights: the backbone a config names, and what `model.weights` puts into it."""

import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import timm
import torch
import torchvision
from pydantic import ConfigDict, TypeAdapter, ValidationError, create_model
from pydantic.errors import PydanticUserError

from tract_transfer.config.file import ConfigError, read_config_file
from tract_transfer.config.schema import Config
from tract_transfer.config.sections import BackboneConfig
from tract_transfer.engine.checkpoint import is_checkpoint, verified
from tract_transfer.models import BACKBONES, ZOO, Backbone, build_backbone
from tract_transfer.models.backbones import check_backbone_name
from tract_transfer.models.weights import (
    WeightsError,
    build_from_metadata,
    has_metadata,
    load_weights,
    read_metadata,
    weights_file,
)
from tract_transfer.registry import did_you_mean

# --- The bridge's check of `args`: what a config gives an entry, against the entry's signature.


def call_checked(
    entry: Callable[..., Any],
    name: str,
    args: Mapping[str, Any],
    key: str,
    config: Config,
    positional: tuple[Any, ...] = (),
) -> Any:
    """Call `entry` with the args that `key` holds, checked against its keyword-only arguments.

    Raises:
        ConfigError: an argument is unknown, of another type or out of range; `name` and its
            arguments are named.
    """
    keywords = [
        parameter
        for parameter in inspect.signature(entry).parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    _check(keywords, name, args, key, config)
    try:
        return entry(*positional, **args)
    except (ValueError, ImportError) as error:
        argument, colon, message = str(error).partition(": ")
        known = [keyword.name for keyword in keywords]
        if colon and argument.partition(".")[0] in known:  # as `rpn.nms_iou: must be ...`
            raise config.error(f"{key}.{argument}", message) from error
        raise config.error(key.removesuffix(".args"), str(error)) from error


def check_backbone_args(config: Config) -> None:
    """Check the args of a backbone that is an entry of ours; a library checks those of its own.

    Raises:
        ConfigError: an argument is unknown or of another type.
    """
    wanted = config.model.backbone
    if wanted.name is None or wanted.name not in BACKBONES:
        return
    parameters = list(inspect.signature(BACKBONES.get(wanted.name)).parameters.values())
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        _check(parameters, wanted.name, wanted.args, "model.backbone.args", config)


def wrong_argument(name: str, args: Mapping[str, Any], refusal: str) -> tuple[str, str] | None:
    """Return which argument a library's constructor refused, and what it must be, if it tells.

    Args:
        refusal: the constructor's words. A function between the name and the class may take more
            than the class does, so what the class does not know must be named there.
    """
    types = _constructor_types(name)
    for argument, value in args.items():
        if argument not in types:
            if types and f"'{argument}'" in refusal:
                near = did_you_mean(argument, types) or f" Known: {list(types)}."
                return argument, f"unknown.{near}"
            continue
        try:
            own = TypeAdapter(types[argument], config=ConfigDict(arbitrary_types_allowed=True))
            own.validate_python(value)
        except ValidationError:
            wanted = inspect.formatannotation(types[argument])
            return argument, f"{name} takes {wanted}, got {value!r}."
        except PydanticUserError:  # an annotation that is no type to compare with
            continue
    return None


def _constructor_types(name: str) -> dict[str, Any]:
    """Return the arguments of the model class that a backbone is of, with their annotations.

    Empty where there is no such model, or the class is ours.
    """
    kind, _, model_name = name.partition("/")
    if kind == "cifar" and model_name in ZOO:
        kind, _, model_name = ZOO[model_name].source.partition("/")
    with torch.device("meta"):  # for its class alone, without memory
        if kind == "timm" and timm.is_model(model_name):
            model = timm.create_model(model_name)
        elif kind == "torchvision" and model_name in torchvision.models.list_models():
            model = torchvision.models.get_model(model_name)
        else:
            return {}
    return {
        each.name: Any if each.annotation is each.empty else each.annotation
        for each in inspect.signature(type(model)).parameters.values()
        if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)
    }


def _check(
    parameters: list[inspect.Parameter],
    name: str,
    args: Mapping[str, Any],
    key: str,
    config: Config,
) -> None:
    keywords = {
        each.name: (
            Any if each.annotation is each.empty else each.annotation,
            ... if each.default is each.empty else each.default,
        )
        for each in parameters
        if each.kind is not each.VAR_POSITIONAL
    }
    strict = ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=True)
    schema = create_model("Args", __config__=strict, **cast(Mapping[str, Any], keywords))
    try:
        schema.model_validate_json(json.dumps(dict(args)))  # JSON's lists may be tuples
    except ValidationError as error:
        problem = error.errors()[0]
        wrong = ".".join(str(part) for part in problem["loc"])
        told = problem["msg"].replace("an object", "a mapping").replace("valid array", "list")
        message = f"{told}, got {problem['input']!r}."
        if problem["type"] == "extra_forbidden":
            message = f"unknown.{did_you_mean(wrong, keywords)}"
        message = f"{message} {name} takes {list(keywords)}."
        raise config.error(f"{key}.{wrong}", message) from error


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
    check_backbone(config)
    try:
        card = read_metadata(path) if wanted.name is None else None
        if from_file and wanted.name is not None and has_metadata(path):
            check_card(read_metadata(path), wanted)
    except (FileNotFoundError, ValueError) as error:
        raise config.error("model.weights", str(error)) from error
    try:
        if card is not None:
            backbone = build_from_metadata(card)
        else:
            assert wanted.name is not None
            arguments = wanted.model_dump(include={"stem", "args"})
            backbone = build_backbone(wanted.name, pretrained=published, **arguments)
    except (KeyError, ValueError) as error:
        raise _refused_backbone(config, error) from error
    if from_file:
        options = section.model_dump(include={"ignore_missing", "adapt_stem"})
        try:
            if path.is_file() and is_checkpoint(path.parent):
                verified(path.parent)
            load_weights(backbone, path, **options)
        except (FileNotFoundError, ValueError) as error:
            raise _located(config, error) from error
    backbone.set_normalization(wanted.mean, wanted.std)
    return backbone


def check_is_there(path: Path, name: str | None = None) -> None:
    """Refuse weights that are not there, and say where such weights come from, if that is known.

    Args:
        name: of the backbone that is asked for, where it is.

    Raises:
        FileNotFoundError: neither file nor folder.
    """
    if path.exists():
        return
    maker = maker_of(str(path))
    fixes = ["Set model.weights to a file or run folder."]
    if maker is not None:
        file, name = maker
        fixes = [f"python tools/train_net.py --config-file {file} makes it."]
    if left := left_by_suite(path):
        fixes.append(f"A suite made its own: model.weights={left} takes one of them.")
    if there := published_name(name):
        fixes.append(
            f"model.backbone.name={there} model.weights=pretrained takes published ones instead."
        )
    raise FileNotFoundError(
        f"No weights at {path}: there is no such file or folder. {' '.join(fixes)}"
    )


def check_backbone(config: Config) -> None:
    """Refuse, before anything else takes time, a backbone that is unknown, or whose weights are
    not there.

    Raises:
        ConfigError: as `check_weights_are_there`; or no such backbone, or an argument it has not.
    """
    check_weights_are_there(config)
    if config.model.backbone.name is not None:
        try:
            check_backbone_name(config.model.backbone.name)
        except KeyError as error:
            raise _refused_backbone(config, error) from error
    check_backbone_args(config)


def check_weights_are_there(config: Config) -> None:
    """Refuse a config whose weights are not there, before anything else takes time.

    Raises:
        ConfigError: there is neither file nor folder, no weights in the folder, or nothing says
            what backbone they are of.
    """
    section = config.model
    if section.weights in (None, "pretrained"):
        return
    path = Path(str(section.weights))
    try:
        check_is_there(path, section.backbone.name)
        if section.backbone.name is None:
            read_metadata(path)
        weights_file(path)
    except (FileNotFoundError, ValueError) as error:
        raise config.error("model.weights", str(error)) from error


def published_name(name: str | None) -> str | None:
    """Return the backbone of timm or torchvision that has published weights for `name`, if any.

    Of a `cifar/` network that is timm's of the same name, at its usual size.
    """
    source, _, model = (name or "").partition("/")
    if source in ("timm", "cifar") and timm.is_model_pretrained(model):
        return f"timm/{model}"
    if source == "torchvision" and model in torchvision.models.list_models(torchvision.models):
        return name
    return None


def left_by_suite(path: Path) -> Path | None:
    """Return a run that a suite made in place of the one at `path`, vanilla's before others."""
    runs = [card.parent for card in path.parent.glob(f"*/{path.name}/seed*/model.json")]
    return min(runs, key=lambda run: ("vanilla" not in run.parts, str(run)), default=None)


def maker_of(output_dir: str, configs: Path = CONFIGS) -> tuple[str, str | None] | None:
    """Return the config of this repository whose run writes to `output_dir`, and its backbone."""
    for file in sorted(configs.glob("*/*.yaml")):
        if file.parent.name in ("base", "suites"):
            continue
        try:
            tree, _ = read_config_file(file)
        except ConfigError:
            continue
        if Path(str(tree.get("output_dir"))) == Path(output_dir):
            name = tree.get("model", {}).get("backbone", {}).get("name")
            return str(file.relative_to(configs.parent)), name
    return None


def _refused_backbone(config: Config, error: KeyError | ValueError) -> ConfigError:
    """Return the error of a backbone that is not built, at the argument it comes from."""
    wanted, message = config.model.backbone, str(error.args[0])
    if wanted.name is not None and wanted.args:
        found = wrong_argument(wanted.name, wanted.args, str(error.__cause__))
        if found is not None:
            return config.error(f"model.backbone.args.{found[0]}", found[1])
    return config.error("model.backbone", message)


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
