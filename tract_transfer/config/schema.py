"""The configs of the three tasks, and loading them.

Each task has its own Config, so that a key which a task would ignore is an error.
"""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import Field, PrivateAttr, TypeAdapter, ValidationError

from tract_transfer.config import sections
from tract_transfer.config.data import ClassificationData, DetectionData, ProbeData
from tract_transfer.config.file import (
    ConfigError,
    Origins,
    Overrides,
    add_plugins,
    dump_yaml,
    explain,
    explain_all,
    override,
    read_config,
    read_overrides,
)
from tract_transfer.config.sections import Rules, Section
from tract_transfer.files import redact

# Rows of the paper's tables; t1 and t2 have one for each backbone and number of epochs.
PaperRow = Literal[
    "t1", "t2", "t3_small_400", "t3_small_800", "t3_base_400",
    "t4_cifar10", "t4_cifar100", "t4_flowers102", "t4_stanford_cars", "t5",
]  # fmt: skip


class BaseConfig(Section):
    """Keys of every task. `name` and `method` label the run in a report; null derives them.

    `paper`: the row of the paper's tables that a report compares the run with. `plugins`: modules
    and .py files, relative to the config's file, that register further entries.
    """

    output_dir: str
    seed: Annotated[int, Field(ge=0)] = 0
    name: str | None = None
    method: str | None = None
    paper: PaperRow | None = None
    plugins: list[str] = Field(default=[])
    _origins: Origins = PrivateAttr(default_factory=dict)

    def error(self, key: str, message: str) -> ConfigError:
        """Return an error about `key` that names the file and line that set it."""
        return ConfigError(explain(key, message, self._origins))


class TrainedConfig(BaseConfig):
    """Keys of the tasks that train."""

    tract: sections.TractConfig = sections.TractConfig()
    solver: sections.SolverConfig
    engine: sections.EngineConfig = sections.EngineConfig()
    if TYPE_CHECKING:  # each task has its own
        data: Any
        evaluation: Any

    def rules(self) -> Rules:
        evaluation, has_val, has_test = self.evaluation, bool(self.data.val), bool(self.data.test)
        example = "such as data.val: {source: train, fraction: 0.1}"
        message = "evaluation.report: best needs data.val to select on: never data.test. Set it, "
        yield has_val or evaluation.report != "best", message + example
        yield (
            not evaluation.patience or (has_val and has_test),
            "evaluation.patience chooses by data.val when to end, and needs data.test beside it to "
            f"report: never the same split. Set both, {example}",
        )
        yield has_val or has_test, "data.test or data.val is needed: nothing would be measured"


class ClassificationConfig(TrainedConfig):
    task: Literal["classification"]
    model: sections.ClassifierConfig
    data: ClassificationData
    evaluation: sections.ClassificationEvaluation = sections.ClassificationEvaluation()

    def rules(self) -> Rules:
        yield from super().rules()
        data = self.data
        for split in data.streamed:
            message = (
                f"data.cache: {data.cache} keeps all images, and {split} is streamed. Set none"
            )
            yield data.cache == "none", message
        if "data.train" in data.streamed:
            train = "data.train. Change it, or set data.train.streaming: false"
            yield data.repeats == 1, f"data.repeats: needs random access to {train}"
            for name, part in (("val", data.val), ("test", data.test)):
                is_held_out = part is not None and part.source == "train"
                yield not is_held_out, f"data.{name}: holds out images of {train}"
            message = f"model.backbone.stem: whitened needs a random sample of {train}"
            yield self.model.backbone.stem != "whitened", message


class DetectionConfig(TrainedConfig):
    task: Literal["detection"]
    model: sections.DetectorConfig
    data: DetectionData
    evaluation: sections.DetectionEvaluation = sections.DetectionEvaluation()


class ProbeConfig(BaseConfig):
    task: Literal["probe"]
    model: sections.FeatureModelConfig
    data: ProbeData
    evaluation: sections.ProbeEvaluation = sections.ProbeEvaluation()
    engine: sections.DeviceConfig = sections.DeviceConfig()

    def rules(self) -> Rules:
        data, evaluation, few_shot = self.data, self.evaluation, self.evaluation.few_shot
        no_val, drop_path = data.val is None, self.model.backbone.drop_path
        for split in data.streamed:
            yield False, f"{split}.streaming: a probe needs random access. Set it to false"
        yield no_val or evaluation.selects, f"data.val has no use here: {sections.SELECTION_ONLY}"
        one = "give one of data.val and evaluation.val_fraction to select on"
        yield no_val or evaluation.val_fraction is None, one
        no_use = "model.backbone.drop_path has no use here: a probe trains no backbone"
        yield drop_path is None, no_use
        kinds: tuple[str, ...] = ("top1", "top5", "mean_per_class")
        if data.has_many_labels:
            kinds = ("map_11point", "map_area")
            has = f"data.train: {data.train.source} has several labels an image"
            for name in ("knn", "logistic_regression", "linear"):
                fix = f"Set evaluation.{name}: null, and evaluation.svm"
                message = f"{has}, and evaluation.{name} takes one. {fix}"
                yield getattr(evaluation, name) is None, message
            is_svm = few_shot is None or few_shot.classifier == "svm"
            yield is_svm, f"{has}. Set evaluation.few_shot.classifier: svm"
        metrics = [f"{probe}_{kind}" for probe in evaluation.probes() for kind in kinds]
        yield (
            evaluation.metric in metrics,
            f"evaluation.metric is {evaluation.metric}, and its probe is left out; measured are: "
            f"{', '.join(metrics) or 'none: every probe is null'}",
        )


TrainedTask = ClassificationConfig | DetectionConfig
Config = TrainedTask | ProbeConfig
TASKS: Mapping[str, type[Config]] = {
    "classification": ClassificationConfig,
    "detection": DetectionConfig,
    "probe": ProbeConfig,
}
_ADAPTER: TypeAdapter[Config] = TypeAdapter(Annotated[Config, Field(discriminator="task")])


def load_config(
    config: str | os.PathLike[str] | Mapping[str, Any] | Config,
    overrides: Overrides = (),
    plugins: Sequence[str] = (),
) -> Config:
    """Read a config, apply overrides and check it.

    Args:
        config: the name of a packaged config (`quickstart/pretrain`), a path to a YAML file, a
            dict of its keys, or a config that this function returned. `_BASE_` files are merged.
        overrides: dotted keys and values, `{"solver.lr": 0.1}`, or words, `["solver.lr=0.1"]`.
        plugins: modules and .py files, added to `plugins` of the config. Nothing is imported before
            the config is used.

    Returns:
        A ClassificationConfig, DetectionConfig or ProbeConfig, as `task` is.

    Raises:
        ConfigError: one line a problem: key, problem, fix, file and line.
        TypeError: an argument of another type.
    """
    if isinstance(config, BaseConfig):
        changes = read_overrides(overrides)
        tree, origins = override(config.model_dump(), config._origins, changes)
        return check_config(*add_plugins(tree, origins, plugins))
    return check_config(*read_config(config, overrides, plugins))


def check_config(tree: dict[str, Any], origins: Origins) -> Config:
    """Return the Config of a tree that `read_config_file` or `override` returned."""
    try:
        config = _ADAPTER.validate_python(tree)
    except ValidationError as error:
        keys_by_task = {task: known_keys(schema) for task, schema in TASKS.items()}
        raise ConfigError(explain_all(error, tree, origins, keys_by_task)) from None
    config._origins.update(origins)
    return config


def dump_config(config: Config) -> str:
    """Return the whole config as YAML, defaults included and secrets hidden."""
    return dump_yaml(redact(config.model_dump(), by_name=False))


def known_keys(schema: type[Section], prefix: str = "") -> list[str]:
    """List the dotted keys of a section and of the sections in it."""
    keys = []
    for name, field in schema.model_fields.items():
        keys.append(prefix + name)
        for part in _sections(field.annotation):
            keys += known_keys(part, f"{prefix}{name}.")
    return list(dict.fromkeys(keys))


def _sections(annotation: Any) -> list[type[Section]]:
    """Return the sections in a field's type, through unions and annotations."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections(part)]
