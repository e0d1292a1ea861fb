"""What `tract_transfer` offers in Python beside TrAct: train, evaluate, load, build a backbone."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeAlias, TypeGuard

import timm
import torch
import torchvision

from tract_transfer import names_missing_extra
from tract_transfer.build.weights import check_origin, check_weights_exist, wrong_argument
from tract_transfer.config.file import Overrides, config_names
from tract_transfer.config.schema import Config, load_config
from tract_transfer.config.sections import BackboneConfig
from tract_transfer.models import BACKBONES, Backbone, build_backbone
from tract_transfer.models.weights import (
    build_from_metadata,
    has_metadata,
    import_plugins_of,
    load_weights,
    read_metadata,
)
from tract_transfer.registry import load_plugins
from tract_transfer.run import run as runs
from tract_transfer.run.evaluate import evaluate_run
from tract_transfer.run.recipe import Options, config_for
from tract_transfer.run.trained import TrainedClassifier, TrainedDetector, load, run_config

ConfigLike: TypeAlias = str | os.PathLike[str] | Mapping[str, Any] | Config


@dataclass(frozen=True)
class Run(os.PathLike[str]):
    """A finished run. It can be given wherever a run folder can.

    Attributes:
        folder: the run folder.
        metrics: those of results.json, by name: fractions, and losses in nats.
        results: the content of results.json: metrics, details, protocol, cost and more.
    """

    folder: Path
    metrics: dict[str, float]
    results: dict[str, Any] = field(repr=False)

    def load(
        self, *, device: str | torch.device = "auto", plugins: Sequence[str] = ()
    ) -> TrainedClassifier | TrainedDetector:
        """Load the model that the run reports; see `tract_transfer.load`."""
        return load(self, device=device, plugins=plugins)

    def __fspath__(self) -> str:
        return str(self.folder)


@names_missing_extra
def train(
    config: ConfigLike,
    *,
    overrides: Overrides = (),
    resume: bool = False,
    plugins: Sequence[str] = (),
) -> Run:
    """Pre-train, fine-tune, probe or train a detector; write the run folder.

    Progress is logged to the loggers of `tract_transfer` at level INFO, and to `log.txt` in the
    folder.

    Args:
        config: the name of a packaged config (`quickstart/pretrain`), a path to a YAML file, a
            dict of its keys, or what `load_config` returned. Or a folder of images, for which a
            config is chosen as by `tract-transfer train FOLDER`, logged with the reasons, and saved
            as `recipe.yaml` in the run folder.
        overrides: dotted keys and values, `{"solver.lr": 0.1}`, or words, `["solver.lr=0.1"]`.
        resume: continue the run in `output_dir` if it contains one; a finished run is measured
            again. False refuses such a folder.
        plugins: modules and .py files that register further backbones, sources, ...; they are added
            to `plugins` of the config.

    Raises:
        ConfigError: a ValueError; the config is wrong by itself, or its data, weights or names do
            not fit. The message names key, problem, fix and line.
        FileExistsError: `output_dir` contains a run, and `resume` is False; or another process
            holds it.
        FileNotFoundError, ValueError: data are missing or broken.
        NonFiniteError: a RuntimeError; a loss or gradient is not finite.
        TypeError: an argument of another type.
        ModuleNotFoundError: a package is not installed; the message has the pip command.
    """
    if not isinstance(resume, bool):
        raise TypeError(f"resume: must be True or False, got {resume!r}.")
    chosen = None
    if _is_folder(config):
        load_plugins(plugins)
        loaded, recipe = config_for(config, Options(), overrides, plugins, continues=resume)
        chosen = None if recipe is None else recipe.chosen(overrides, plugins)
    else:
        loaded = load_config(config, overrides, plugins)
    results = runs.run(loaded, resume=resume, chosen=chosen)
    return Run(Path(loaded.output_dir), results["metrics"], results)


def _is_folder(config: ConfigLike) -> TypeGuard[str]:
    """Whether a config is a folder of images; the name of a packaged config is none."""
    is_path = isinstance(config, str | os.PathLike) and Path(config).is_dir()
    return is_path and str(config) not in config_names()


@names_missing_extra
def evaluate(
    run: ConfigLike, *, overrides: Overrides = (), plugins: Sequence[str] = ()
) -> dict[str, float]:
    """Measure the checkpoint that a run reports again; write `evaluation.json` into its folder.

    Args:
        run: a run folder, a Run, or a config (as for `train`) whose `output_dir` is the run.
        overrides: `data.test` and `evaluation` may differ from the run's: see `train`.
        plugins: as in `load`.

    Returns:
        A dict of metrics. Each is a fraction, or a loss in nats.

    Raises:
        FileNotFoundError: no run folder, no complete checkpoint in it, or no data.
        ConfigError, ValueError: a probe's run, or a config of another model.
        TypeError: an argument of another type.
    """
    if isinstance(run, str | os.PathLike) and Path(run).is_dir():
        return evaluate_run(run_config(Path(run), overrides, plugins))
    return evaluate_run(load_config(run, overrides, plugins))


@names_missing_extra
def create_backbone(
    name: str | None = None,
    *,
    pretrained: bool = False,
    weights: str | os.PathLike[str] | None = None,
    stem: str = "default",
    args: Mapping[str, Any] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    ignore_missing: Sequence[str] = (),
    adapt_stem: bool = False,
    plugins: Sequence[str] = (),
) -> Backbone:
    """Build a backbone with random weights, its library's published ones, or those of a file.

    A Backbone is an nn.Module in training mode. It takes RGB images (B, 3, H, W), uint8 or floating
    in [0, 1], and normalizes them itself: `backbone.pooled(images)` returns (B, feature_dim), and
    `backbone.maps(images, names)` a dict of feature maps, whose names are those of `map_info`.

    Args:
        name: `timm/<model>`, `torchvision/<model>`, or an entry of BACKBONES such as
            `cifar/resnet18`; see `list_backbones`. None: the backbone that `weights` describe.
        pretrained: load the weights that timm or torchvision publish for it (a download).
        weights: a run folder, or a `.safetensors`, `.pth`, `.pt`, `.bin` or `.pkl` file. Nothing in
            it is executed. All of the backbone's weights must be in it.
        stem: the first layer: `default`, `cifar`, `patch_norm`, `dual_patch_norm`, or with weights
            `whitened`.
        args: arguments of the model's constructor.
        mean, std: normalization per channel in [0, 1], in place of the model's or the weights' own.
        ignore_missing: patterns (`conv1.*`) of names that the file may lack; they stay random.
        adapt_stem: resample the patch embedding of the weights to the model's patch size.
        plugins: what registers it; files that only the weights name are not imported.

    Raises:
        ValueError: no such name, arguments that do not fit, or weights that do not.
        FileNotFoundError: no such weights.
        TypeError: an argument of another type.
    """
    _check_backbone_arguments(name, pretrained, weights, stem, args, ignore_missing, adapt_stem)
    load_plugins(plugins)
    path = None if weights is None else Path(weights)
    metadata: dict[str, Any] = {}
    if path is not None:
        check_weights_exist(path)
        if name is None or has_metadata(path):
            metadata = read_metadata(path)
            import_plugins_of(metadata, plugins)
    if name is None:
        backbone = build_from_metadata(metadata)
    else:
        arguments = dict(args or {})
        if metadata:
            check_origin(metadata, BackboneConfig(name=name, stem=stem, args=arguments))  # type: ignore[arg-type]
        backbone = _build(name, stem, arguments, pretrained)
    if path is not None:
        load_weights(backbone, path, ignore_missing=list(ignore_missing), adapt_stem=adapt_stem)
    _check_normalization(mean=mean, std=std)
    backbone.set_normalization(mean, std)
    return backbone


def _check_normalization(**given: Sequence[float] | None) -> None:
    for what, values in given.items():
        if values is not None and (len(values) != 3 or not all(0 <= v <= 1 for v in values)):
            raise ValueError(f"{what}: must be three numbers in [0, 1], got {list(values)}.")


def _check_backbone_arguments(
    name: Any, pretrained: Any, weights: Any, stem: Any, args: Any, missing: Any, adapt_stem: Any
) -> None:
    kinds = {
        "name": (name, str | None, "a string such as 'timm/resnet50'"),
        "pretrained": (pretrained, bool, "True or False; a file is given as weights"),
        "weights": (weights, str | os.PathLike | None, "the path of a run folder or a file"),
        "stem": (stem, str, "a string such as 'cifar'"),
        "args": (args, Mapping | None, "a dict of the model's arguments"),
        "adapt_stem": (adapt_stem, bool, "True or False"),
    }
    for argument, (value, kind, text) in kinds.items():
        if not isinstance(value, kind):
            raise TypeError(f"{argument}: must be {text}, got {value!r}.")
    if isinstance(missing, str) or not all(isinstance(pattern, str) for pattern in missing):
        raise TypeError(f"ignore_missing: must be a list of patterns, got {missing!r}.")
    if name is None and weights is None:
        raise ValueError("name: give the name of a backbone, or weights that describe theirs.")
    if name is None and (stem != "default" or args):
        raise ValueError(
            "stem and args: these weights have their own. Leave them out, or give name."
        )
    if pretrained and weights is not None:
        raise ValueError("pretrained and weights: give one of them.")
    if weights is None and (missing or adapt_stem):
        raise ValueError("ignore_missing and adapt_stem: they are for weights. Leave them out.")
    if weights is None and stem == "whitened":
        raise ValueError(
            "stem: the filters of whitened are computed from training images by a training. Give "
            "the folder of such a run as weights."
        )


def _build(name: str, stem: str, args: dict[str, Any], pretrained: bool) -> Backbone:
    try:
        return build_backbone(name, stem=stem, args=args, pretrained=pretrained)
    except KeyError as error:
        raise ValueError(f"name: {error.args[0]}") from error
    except ValueError as error:
        if wrong := wrong_argument(name, args, str(error.__cause__)):
            raise ValueError(f"args[{wrong[0]!r}]: {wrong[1]}") from error
        raise


@names_missing_extra
def list_backbones(pattern: str = "*") -> list[str]:
    """Return the names for `create_backbone` and `model.backbone.name` that match a pattern.

    Args:
        pattern: with the wildcards of a shell, such as `cifar/*` or `*/resnet50*`.
    """
    if not isinstance(pattern, str):
        raise TypeError(f"pattern: must be a string such as 'cifar/*', got {pattern!r}.")
    models = torchvision.models
    names = [
        *sorted(name for name, _ in BACKBONES if name not in ("timm", "torchvision")),
        *(f"timm/{name}" for name in timm.list_models()),
        *(f"torchvision/{name}" for name in models.list_models(module=models)),
    ]
    return [name for name in names if fnmatchcase(name, pattern)]
