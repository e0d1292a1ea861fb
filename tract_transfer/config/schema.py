"""A config: what a task can be told, read from YAML and checked.

Each task has its own Config, so that a key which a task would ignore is an error.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, PrivateAttr, TypeAdapter, ValidationError, model_validator

from tract_transfer.config.data import ClassificationData, DetectionData, ProbeData, ProbeEvaluation
from tract_transfer.config.file import (
    ConfigError,
    Origins,
    dump_yaml,
    explain,
    explain_all,
    read_config_file,
)
from tract_transfer.config.sections import (
    ClassificationEvaluation,
    ClassifierConfig,
    DetectionEvaluation,
    DetectorConfig,
    DeviceConfig,
    EngineConfig,
    FeatureModelConfig,
    Section,
    SolverConfig,
    TractConfig,
)
from tract_transfer.files import has_secret

# Rows of the paper's tables; those of t1 and t2 are found by the backbone's name and the epochs.
PaperRow = Literal[
    "t1", "t2", "t3_small_400", "t3_small_800", "t3_base_400",
    "t4_cifar10", "t4_cifar100", "t4_flowers102", "t4_stanford_cars", "t5",
]  # fmt: skip


class BaseConfig(Section):
    """What all tasks share. `name` and `method` label the run in a report; null derives them.

    `paper`: the row of the paper's tables that a report sets beside the run.
    """

    output_dir: str
    seed: Annotated[int, Field(ge=0)] = 0
    name: str | None = None
    method: str | None = None
    paper: PaperRow | None = None
    _origins: Origins = PrivateAttr(default_factory=dict)

    def error(self, key: str, message: str) -> ConfigError:
        """Return an error about `key` that says where it was set."""
        return ConfigError(explain(key, message, self._origins))


class TrainedConfig(BaseConfig):
    """A task that trains."""

    tract: TractConfig = TractConfig()
    solver: SolverConfig
    engine: EngineConfig = EngineConfig()

    @model_validator(mode="after")
    def _selection_has_its_own_data(self) -> "TrainedConfig":
        data, evaluation = getattr(self, "data", None), getattr(self, "evaluation", None)
        if evaluation and data and evaluation.report == "best" and data.val is None:
            raise ValueError(
                "evaluation.report: best selects a checkpoint, and needs data.val to select on: "
                "never data.test. Set data.val, such as {source: train, fraction: 0.1}"
            )
        if evaluation and data and evaluation.patience and None in (data.val, data.test):
            raise ValueError(
                "evaluation.patience chooses by data.val when to end, and needs data.test beside "
                "it to report: never the same split. Set both, such as data.val: {source: train, "
                "fraction: 0.1}"
            )
        if data and data.val is None and data.test is None:
            raise ValueError("data.test or data.val is needed: nothing would be measured")
        return self


class ClassificationConfig(TrainedConfig):
    task: Literal["classification"]
    model: ClassifierConfig
    data: ClassificationData
    evaluation: ClassificationEvaluation = ClassificationEvaluation()


class DetectionConfig(TrainedConfig):
    task: Literal["detection"]
    model: DetectorConfig
    data: DetectionData
    evaluation: DetectionEvaluation = DetectionEvaluation()


class ProbeConfig(BaseConfig):
    task: Literal["probe"]
    model: FeatureModelConfig
    data: ProbeData
    evaluation: ProbeEvaluation = ProbeEvaluation()
    engine: DeviceConfig = DeviceConfig()

    @model_validator(mode="after")
    def _probes_fit_the_data(self) -> "ProbeConfig":
        self.evaluation.check(self.data)
        if self.model.backbone.drop_path is not None:
            raise ValueError("model.backbone.drop_path has no use here: a probe trains no backbone")
        return self


Config = ClassificationConfig | DetectionConfig | ProbeConfig
TASKS: Mapping[str, type[Config]] = {
    "classification": ClassificationConfig,
    "detection": DetectionConfig,
    "probe": ProbeConfig,
}
_ADAPTER: TypeAdapter[Config] = TypeAdapter(Annotated[Config, Field(discriminator="task")])


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file with its `_BASE_`s, apply `key=value` or `key value` overrides, check all.

    Raises:
        ConfigError: what is wrong, one line a problem: key, problem, fix, file and line.
    """
    return check_config(*read_config_file(Path(path), overrides))


def check_config(tree: dict[str, Any], origins: Origins) -> Config:
    """Make a Config of what `read_config_file` returned, `override`n or not.

    Raises:
        ConfigError: as `load_config`.
    """
    _refuse_secrets(tree, origins)
    try:
        config = _ADAPTER.validate_python(tree)
    except ValidationError as error:
        known = {task: known_keys(schema) for task, schema in TASKS.items()}
        raise ConfigError(explain_all(error, tree, origins, known)) from None
    config._origins.update(origins)
    return config


def _refuse_secrets(tree: Any, origins: Origins) -> None:
    """Refuse what a run would write into its folder, whose readers it is not for."""
    texts = dict(_texts(tree))
    if not has_secret("\n".join(texts.values())):  # all at once: it is asked a thousand times
        return
    for key in [key for key, text in texts.items() if has_secret(text)]:
        message = (
            "holds a login or a secret, which a run's folder would keep. Give it by the "
            "environment, such as HF_TOKEN, or by ~/.netrc. Where it is none, leave out the : or = "
            "behind a word such as key."
        )
        raise ConfigError(explain(key, message, origins))


def _texts(tree: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield the dotted keys of a tree, places in lists included, whose values are texts."""
    if isinstance(tree, str):
        yield key, tree
    elif isinstance(tree, dict | list):
        for name, part in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _texts(part, f"{key}.{name}" if key else str(name))


def dump_config(config: Config) -> str:
    """Return the whole config as YAML, defaults included; `load_config` reads the same from it."""
    return dump_yaml(config.model_dump())


def known_keys(schema: Any, prefix: str = "") -> list[str]:
    """List the dotted keys of a section, those of its sections included."""
    keys = []
    for name, field in schema.model_fields.items():
        keys.append(prefix + name)
        for part in _sections(field.annotation):
            keys += known_keys(part, f"{prefix}{name}.")
    return list(dict.fromkeys(keys))


def _sections(annotation: Any) -> list[type[Section]]:
    """The sections in a field's type, through unions and annotations."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections(part)]
