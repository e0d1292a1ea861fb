"""From a config to a backbone: its name, its arguments, and what `model.weights` loads into it."""

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

# Arguments that change neither names nor what a weight computes at the size it was trained at.
FREE_ARGS = {
    "img_size", "image_size", "dynamic_img_size", "drop_rate", "drop_path_rate", "proj_drop_rate",
    "attn_drop_rate",
}  # fmt: skip
CONFIGS = Path(__file__).parents[2] / "configs"


def check_backbone(config: Config) -> None:
    """Refuse a backbone that does not exist, its arguments, or weights that do not exist.

    Raises:
        ConfigError: at the key that is wrong.
    """
    section = config.model
    backbone, weights = section.backbone, section.weights
    if weights not in (None, "pretrained"):
        path = Path(str(weights))
        try:
            check_weights_exist(path, backbone.name)
            if backbone.name is None:
                read_metadata(path)
            weights_file(path)
        except (FileNotFoundError, ValueError) as error:
            raise config.error("model.weights", str(error)) from error
    if backbone.name is not None:
        try:
            check_backbone_name(backbone.name)
        except KeyError as error:
            raise _backbone_error(config, error) from error
        if backbone.name in BACKBONES:  # libraries check the arguments of their own models
            signature = inspect.signature(BACKBONES.get(backbone.name))
            parameters = list(signature.parameters.values())
            if not any(p.kind is p.VAR_KEYWORD for p in parameters):
                key = "model.backbone.args"
                _check_args(parameters, backbone.name, backbone.args, key, config)


def build_with_weights(config: Config) -> Backbone:
    """Build the backbone of a config, with its weights.

    Raises:
        ConfigError: no such backbone, or weights that do not fit it; if a file was compared, the
            cause is a WeightsError with the report.
    """
    section = config.model
    wanted, path = section.backbone, Path(section.weights or "")
    is_pretrained = section.weights == "pretrained"
    is_file = section.weights is not None and not is_pretrained
    try:
        if is_file:
            check_weights_exist(path, wanted.name)
        metadata = read_metadata(path) if wanted.name is None else None
        if is_file and wanted.name is not None and has_metadata(path):
            _check_origin(read_metadata(path), wanted)
    except (FileNotFoundError, ValueError) as error:
        raise config.error("model.weights", str(error)) from error
    try:
        if metadata is not None:
            backbone = build_from_metadata(metadata)
        else:
            assert wanted.name is not None
            arguments = wanted.model_dump(include={"stem", "args"})
            backbone = build_backbone(wanted.name, pretrained=is_pretrained, **arguments)
    except (KeyError, ValueError) as error:
        raise _backbone_error(config, error) from error
    if is_file:
        options = section.model_dump(include={"ignore_missing", "adapt_stem"})
        try:
            if path.is_file() and is_checkpoint(path.parent):
                verified(path.parent)
            load_weights(backbone, path, **options)
        except (FileNotFoundError, ValueError) as error:
            key, message = "model.weights", str(error)
            if not isinstance(error, WeightsError) and message.startswith("model.ignore_missing: "):
                key, _, message = message.partition(": ")
            raise config.error(key, message) from error
    backbone.set_normalization(wanted.mean, wanted.std)
    return backbone


def _backbone_error(config: Config, error: KeyError | ValueError) -> ConfigError:
    """Return the error of a backbone that is not built, at the argument that causes it."""
    wanted, message = config.model.backbone, str(error.args[0])
    name, args = wanted.name, wanted.args
    if name and args and (wrong := wrong_argument(name, args, str(error.__cause__))):
        return config.error(f"model.backbone.args.{wrong[0]}", wrong[1])
    return config.error("model.backbone", message)


def _check_origin(metadata: Mapping[str, Any], wanted: BackboneConfig) -> None:
    """Refuse a backbone that the metadata of its weights contradict, even if shapes fit."""
    origin = {"name": metadata["name"], "stem": metadata["stem"], "args": metadata["args"]}
    given = wanted.model_dump(include=set(origin))

    def fixed(backbone: Mapping[str, Any]) -> dict[str, Any]:
        args = {key: value for key, value in backbone["args"].items() if key not in FREE_ARGS}
        return {**backbone, "args": args}

    if fixed(origin) != fixed(given):
        raise ValueError(
            f"the weights are those of {origin}, but model.backbone is {given}. Remove "
            "model.backbone: the weights describe their backbone. (Image size and drop rates may "
            "differ.)"
        )


# Arguments of registry entries, checked against the entry's signature.


def call_checked(
    entry: Callable[..., Any],
    name: str,
    args: Mapping[str, Any],
    key: str,
    config: Config,
    positional: tuple[Any, ...] = (),
) -> Any:
    """Call `entry` with the args at `key`, checked against its keyword-only arguments.

    Raises:
        ConfigError: an argument is unknown, of another type or out of range.
    """
    parameters = inspect.signature(entry).parameters.values()
    keywords = [parameter for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    _check_args(keywords, name, args, key, config)
    try:
        return entry(*positional, **args)
    except (ValueError, ImportError) as error:
        argument, colon, message = str(error).partition(": ")
        names = [keyword.name for keyword in keywords]
        if colon and argument.partition(".")[0] in names:  # as `rpn.nms_iou: must be ...`
            raise config.error(f"{key}.{argument}", message) from error
        raise config.error(key.removesuffix(".args"), str(error)) from error


def _check_args(
    parameters: list[inspect.Parameter],
    name: str,
    args: Mapping[str, Any],
    key: str,
    config: Config,
) -> None:
    fields = {
        p.name: (
            Any if p.annotation is p.empty else p.annotation,
            ... if p.default is p.empty else p.default,
        )
        for p in parameters
        if p.kind is not p.VAR_POSITIONAL
    }
    strict = ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=True)
    schema = create_model("Args", __config__=strict, **cast(Mapping[str, Any], fields))
    try:
        schema.model_validate_json(json.dumps(dict(args)))  # JSON's lists may be tuples
    except ValidationError as error:
        problem = error.errors()[0]
        wrong = ".".join(str(part) for part in problem["loc"])
        reason = problem["msg"].replace("an object", "a mapping").replace("valid array", "list")
        message = f"{reason}, got {problem['input']!r}."
        if problem["type"] == "extra_forbidden":
            message = f"unknown.{did_you_mean(wrong, fields)}"
        message = f"{message} {name} takes {list(fields)}."
        raise config.error(f"{key}.{wrong}", message) from error


def wrong_argument(name: str, args: Mapping[str, Any], refusal: str) -> tuple[str, str] | None:
    """Return the argument that a library's constructor refused, and why, if that is clear.

    Args:
        refusal: the constructor's message. A function between name and class may take more than
            the class, so an argument unknown to the class must be named in it.
    """
    types = _constructor_types(name)
    for argument, value in args.items():
        if argument not in types:
            if types and f"'{argument}'" in refusal:
                hint = did_you_mean(argument, types) or f" Known: {list(types)}."
                return argument, f"unknown.{hint}"
            continue
        try:
            adapter = TypeAdapter(types[argument], config=ConfigDict(arbitrary_types_allowed=True))
            adapter.validate_python(value)
        except ValidationError:
            wanted = inspect.formatannotation(types[argument])
            return argument, f"{name} takes {wanted}, got {value!r}."
        except PydanticUserError:  # an annotation that is not a type
            continue
    return None


def _constructor_types(name: str) -> dict[str, Any]:
    """Return the arguments of a library's model class, with their annotations; {} if none."""
    library, _, model_name = name.partition("/")
    if library == "cifar" and model_name in ZOO:
        library, _, model_name = ZOO[model_name].source.partition("/")
    with torch.device("meta"):  # for its class only, without memory
        if library == "timm" and timm.is_model(model_name):
            model = timm.create_model(model_name)
        elif library == "torchvision" and model_name in torchvision.models.list_models():
            model = torchvision.models.get_model(model_name)
        else:
            return {}
    return {
        p.name: Any if p.annotation is p.empty else p.annotation
        for p in inspect.signature(type(model)).parameters.values()
        if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    }


# Weights that do not exist: where they would come from.


def check_weights_exist(path: Path, backbone_name: str | None = None) -> None:
    """Refuse a path without weights, and say what would make them, if that is known.

    Raises:
        FileNotFoundError: neither file nor folder.
    """
    if path.exists():
        return
    fixes = ["Set model.weights to a file or run folder."]
    if maker := _config_that_writes(path):
        file, backbone_name = maker
        fixes = [f"python tools/train_net.py --config-file {file} makes it."]
    if run := _run_of_suite(path):
        fixes.append(f"A suite has made its own: set model.weights={run}, for example.")
    if published := _published_name(backbone_name):
        fixes.append(
            f"Or use published weights: model.backbone.name={published} model.weights=pretrained."
        )
    raise FileNotFoundError(
        f"No weights at {path}: there is no such file or folder. {' '.join(fixes)}"
    )


def _published_name(name: str | None) -> str | None:
    """Return the backbone of timm or torchvision that has published weights for `name`."""
    library, _, model = (name or "").partition("/")
    if library in ("timm", "cifar") and timm.is_model_pretrained(model):
        return f"timm/{model}"
    if library == "torchvision" and model in torchvision.models.list_models(torchvision.models):
        return name
    return None


def _run_of_suite(path: Path) -> Path | None:
    """Return a run that a suite made in place of the one at `path`, preferably vanilla's."""
    runs = [file.parent for file in path.parent.glob(f"*/{path.name}/seed*/model.json")]
    return min(runs, key=lambda run: ("vanilla" not in run.parts, str(run)), default=None)


def _config_that_writes(output_dir: Path) -> tuple[str, str | None] | None:
    """Return the config in configs/ whose run writes to `output_dir`, and its backbone."""
    for file in sorted(CONFIGS.glob("*/*.yaml")):
        if file.parent.name in ("base", "suites"):
            continue
        try:
            tree, _ = read_config_file(file)
        except ConfigError:
            continue
        if Path(str(tree.get("output_dir"))) == output_dir:
            name = tree.get("model", {}).get("backbone", {}).get("name")
            return str(file.relative_to(CONFIGS.parent)), name
    return None
