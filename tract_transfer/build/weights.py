"""From a config to a backbone: its name, its arguments, and what `model.weights` loads into it."""

import contextlib
import inspect
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import ConfigDict, ValidationError, create_model
from pydantic.errors import PydanticUserError

from tract_transfer.config.file import ConfigError, config_names, read_config_file
from tract_transfer.config.schema import Config
from tract_transfer.config.sections import BackboneConfig, ComponentConfig
from tract_transfer.engine.checkpoint import is_checkpoint, verified
from tract_transfer.models import BACKBONES, Backbone, build_backbone, weights
from tract_transfer.models.backbones import check_backbone_name
from tract_transfer.registry import Registry, did_you_mean, load_plugins

# Arguments that change neither names nor what a weight computes at the size it was trained at.
FREE_ARGS = {
    "img_size", "image_size", "dynamic_img_size", "drop_rate", "drop_path_rate", "proj_drop_rate",
    "attn_drop_rate",
}  # fmt: skip
_Kinds = type[Exception] | tuple[type[Exception], ...]


def use_plugins(config: Config) -> None:
    """Import the plug-ins of a config; a second time costs nothing."""
    with errors_at(config, "plugins"):
        load_plugins(config.plugins)


def check_backbone(config: Config) -> None:
    """Refuse a backbone that does not exist, its arguments, or weights that do not exist."""
    backbone, path = config.model.backbone, config.model.weights_path
    use_plugins(config)
    if path is not None:
        with errors_at(config, "model.weights"):
            check_weights_exist(path)
            if backbone.name is None or weights.has_metadata(path):
                weights.import_plugins_of(weights.read_metadata(path), config.plugins)
            weights.weights_file(path)
    if backbone.name is not None:
        with errors_at(config, "model.backbone", KeyError):
            check_backbone_name(backbone.name)
        if backbone.name in BACKBONES:  # libraries check the arguments of their own models
            signature = inspect.signature(BACKBONES.get(backbone.name))
            parameters = list(signature.parameters.values())
            if not _takes_any(backbone.name):
                _check_args(config, "model.backbone.args", backbone.name, parameters, backbone.args)


def build_with_weights(config: Config) -> Backbone:
    """Build the backbone of a config, with its weights.

    Raises:
        ConfigError: no such backbone, or weights that do not fit it; if a file was compared, the
            cause is a WeightsError with the report.
    """
    model, section, path = config.model, config.model.backbone, config.model.weights_path
    use_plugins(config)
    metadata = None
    if path is not None and (section.name is None or weights.has_metadata(path)):
        with errors_at(config, "model.weights"):
            metadata = weights.read_metadata(path)
            weights.import_plugins_of(metadata, config.plugins)
            if section.name is not None:
                check_origin(metadata, section)
    with errors_at(config, "model.backbone", (KeyError, ValueError)):
        try:
            if section.name is None:
                backbone = weights.build_from_metadata(cast(dict[str, Any], metadata))
            else:
                arguments = section.model_dump(include={"stem", "args"})
                is_pretrained = model.weights == "pretrained"
                backbone = build_backbone(section.name, pretrained=is_pretrained, **arguments)
        except ValueError as error:
            if wrong := wrong_argument(section.name, section.args, str(error.__cause__)):
                raise config.error(f"model.backbone.args.{wrong[0]}", wrong[1]) from error
            raise
    if path is not None:
        options = model.model_dump(include={"ignore_missing", "adapt_stem"})
        with errors_at(config, "model.weights", prefix=r"model\.ignore_missing"):
            if path.is_file() and is_checkpoint(path.parent):
                verified(path.parent)
            weights.load_weights(backbone, path, **options)
    backbone.set_normalization(section.mean, section.std)
    return backbone


def check_origin(metadata: Mapping[str, Any], section: BackboneConfig) -> None:
    """Refuse a backbone that the metadata of its weights contradict, even if shapes fit."""
    origin = {key: metadata[key] for key in ("name", "stem", "args")}
    given = section.model_dump(include=set(origin))

    def fixed(backbone: Mapping[str, Any]) -> dict[str, Any]:
        args = {key: value for key, value in backbone["args"].items() if key not in FREE_ARGS}
        return {**backbone, "args": args}

    if fixed(origin) != fixed(given):
        raise ValueError(
            f"the weights are those of {origin}, but model.backbone is {given}. Remove "
            "model.backbone: the weights describe their backbone. (Image size and drop rates may "
            "differ.)"
        )


# Errors at the key of a config, and arguments checked against the signature of a registry's entry.


@contextlib.contextmanager
def errors_at(
    config: Config, key: str, kinds: _Kinds = (ValueError, FileNotFoundError), prefix: str = ""
) -> Iterator[None]:
    """Convert errors of `kinds` to ConfigErrors at `key`.

    Args:
        prefix: a pattern of keys. A message that starts with one, as `data.batch_size must be ...`,
            becomes an error at that key.
    """
    try:
        yield
    except ConfigError:
        raise
    except kinds as error:
        message = str(error.args[0]) if isinstance(error, KeyError) else str(error)
        start = re.match(rf"({prefix}):? ", message) if prefix else None
        if start:
            key, message = start[1], message[start.end() :]
        raise config.error(key, message) from error


def call_entry(
    config: Config,
    registry: Registry,
    key: str,
    entry: ComponentConfig,
    *positional: Any,
    subkeys: tuple[str, str] = (".name", ".args"),
) -> Any:
    """Call a registry's entry with args that are checked by `find_entry`."""
    function, names = find_entry(config, registry, key, entry, subkeys=subkeys)
    try:
        return function(*positional, **entry.args)
    except (ValueError, ImportError) as error:
        argument, colon, message = str(error).partition(": ")
        if colon and argument.partition(".")[0] in names:  # as `rpn.nms_iou: must be ...`
            raise config.error(f"{key}{subkeys[1]}.{argument}", message) from error
        raise config.error(key, str(error)) from error


def find_entry(
    config: Config,
    registry: Registry,
    key: str,
    entry: ComponentConfig,
    *,
    subkeys: tuple[str, str] = (".name", ".args"),
) -> tuple[Callable[..., Any], list[str]]:
    """Return a registry's entry and the names of its keyword-only arguments, which args must fit.

    Args:
        key, subkeys: the entry's name has the config key `key` + `subkeys[0]`, its args the other.
    """
    name_key, args_key = (key + subkey for subkey in subkeys)
    with errors_at(config, name_key, KeyError):
        function = registry.get(entry.name)
    parameters = inspect.signature(function).parameters.values()
    keywords = [parameter for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    _check_args(config, args_key, entry.name, keywords, entry.args)
    return function, [keyword.name for keyword in keywords]


def _check_args(
    config: Config,
    key: str,
    name: str,
    parameters: Sequence[inspect.Parameter],
    args: Mapping[str, Any],
) -> None:
    if misfit := _find_misfit(name, parameters, args):
        raise config.error(f"{key}.{misfit[0]}", misfit[1])


def _find_misfit(
    name: str, parameters: Iterable[inspect.Parameter], args: Mapping[str, Any]
) -> tuple[str, str] | None:
    """Return the first of `args` that does not fit the signature of `name`, and why."""
    fields = {
        p.name: (
            Any if p.annotation is p.empty else p.annotation,
            ... if p.default is p.empty else p.default,
        )
        for p in parameters
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    }
    strict = ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=True)
    schema = create_model("Args", __config__=strict, **cast(Mapping[str, Any], fields))
    try:
        schema.model_validate_json(json.dumps(dict(args)))  # JSON's lists may be tuples
    except ValidationError as error:
        problem = error.errors()[0]
        argument = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            hint = did_you_mean(argument, fields)
            return argument, f"unknown.{hint} {name} takes {list(fields)}."
        reason = problem["msg"].replace("an object", "a mapping").replace("valid array", "list")
        return argument, f"{reason}, got {problem['input']!r}."
    return None


def wrong_argument(
    name: str | None, args: Mapping[str, Any], refusal: str
) -> tuple[str, str] | None:
    """Return the argument that a library's constructor refused, and why, if that is clear.

    Args:
        refusal: the constructor's message. A function between name and class may take more than
            the class, so an argument unknown to the class must be named in it.
    """
    library = (name or "").partition("/")[0]
    if not args or (library not in ("timm", "torchvision") and not _takes_any(str(name))):
        return None
    with torch.device("meta"):  # for its class only, without memory
        model = build_backbone(str(name)).model
    parameters = inspect.signature(type(model)).parameters.values()
    of_class = {parameter.name for parameter in parameters}
    suspects = {key: args[key] for key in args if key in of_class or f"'{key}'" in refusal}
    optional = [
        inspect.Parameter(
            p.name, p.KEYWORD_ONLY, default=None, annotation=p.annotation if p.name in args else Any
        )
        for p in parameters
    ]
    with contextlib.suppress(PydanticUserError, NameError):  # an annotation that is not a type
        return _find_misfit(str(name), optional, suspects)
    return None


def _takes_any(name: str) -> bool:
    """Whether a registered backbone passes any arguments on to the constructor of its model."""
    parameters = inspect.signature(BACKBONES.get(name)).parameters.values()
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


def check_weights_exist(path: Path) -> None:
    """Refuse a path without weights; the message names the packaged config that makes them."""
    if path.exists():
        return
    fix = "Set model.weights to a file or run folder"
    if config := _config_that_writes(path):
        fix = f"tract-transfer train --config-file {config} makes it"
    raise FileNotFoundError(
        f"No weights at {path}: there is no such file or folder. {fix}, or use published weights: "
        "model.backbone.name=timm/resnet50 model.weights=pretrained, for example."
    )


def _config_that_writes(output_dir: Path) -> str | None:
    for config in config_names():
        tree, _ = read_config_file(Path(config))
        if "task" in tree and Path(str(tree.get("output_dir"))) == output_dir:
            return config
    return None
