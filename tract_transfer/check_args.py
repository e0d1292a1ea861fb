"""The bridge's check of `args`: what a config gives an entry, against the entry's signature."""

import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any, cast

import timm
import torch
import torchvision
from pydantic import ConfigDict, TypeAdapter, ValidationError, create_model
from pydantic.errors import PydanticUserError

from tract_transfer.config import Config
from tract_transfer.models import BACKBONES, ZOO
from tract_transfer.registry import did_you_mean


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
