"""Config of a suite: methods x tasks x seeds, and the resources of each run."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PrivateAttr, ValidationError

from tract_transfer.config.file import (
    ConfigError,
    Origins,
    Override,
    explain,
    explain_all,
    find_config,
    place_of,
    read_config_file,
)
from tract_transfer.config.schema import known_keys
from tract_transfer.config.sections import Count, Positive, Section

PRETRAIN = "pretrain"
# Keys that the suite sets in every run.
OWN_KEYS = ("output_dir", "name", "method", "seed")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+=-]*")
_Overrides = dict[str, Any]
_Seed = Annotated[int, Field(ge=0)]


class ResourcesConfig(Section):
    """Resources of one run.

    `gpus` below 1 is a share of one GPU; null is one GPU if the machine has any. `hours`,
    `partition` and `account` apply to Slurm only.
    """

    cpus: Count | None = None
    gpus: Annotated[float, Field(ge=0)] | None = None
    memory_gb: Positive | None = None
    hours: Positive | None = None
    partition: str | None = None
    account: str | None = None

    def rules(self) -> Iterator[tuple[bool, str]]:
        is_count_or_share = self.gpus is None or self.gpus < 1 or self.gpus % 1 == 0
        yield is_count_or_share, f"gpus: {self.gpus} must be a whole number, or a share below 1"


class MethodConfig(Section):
    """Overrides (dotted key -> value) of a method: for its pre-training, for all downstream tasks,
    and for single tasks by name."""

    pretrain: _Overrides = Field(default={})
    downstream: _Overrides = Field(default={})
    tasks: dict[str, _Overrides] = Field(default={})


class PretrainConfig(Section):
    """The pre-training; `config` is a path relative to the suite's file, or a packaged config."""

    config: str
    resources: ResourcesConfig = ResourcesConfig()


class TaskConfig(PretrainConfig):
    """A downstream task.

    `needs` is the task whose backbone it takes (`pretrain` or another task); null keeps the weights
    of its own config. `seeds` is a subset of the suite's seeds.
    """

    needs: str | None = PRETRAIN
    seeds: Annotated[list[int], Field(min_length=1)] | None = None


def _as_section(value: Any) -> Any:
    """Read a plain path as `{config: path}`."""
    return {"config": value} if isinstance(value, str) else value


class SuiteConfig(Section):
    """A suite of methods x tasks x seeds, with `workers` runs at a time (see docs/suite.md).

    Every run gets `plugins` beside those of its own config.
    """

    output_dir: str
    title: str = "Does the backbone transfer?"
    baseline: str
    seeds: Annotated[list[_Seed], Field(min_length=1)]
    methods: Annotated[dict[str, MethodConfig], Field(min_length=1)]
    pretrain: Annotated[PretrainConfig, BeforeValidator(_as_section)] | None = None
    tasks: dict[str, Annotated[TaskConfig, BeforeValidator(_as_section)]] = Field(default={})
    resources: ResourcesConfig = ResourcesConfig()
    workers: Count | None = None
    retries: Annotated[int, Field(ge=0)] = 1
    plugins: list[str] = Field(default=[])
    _origins: Origins = PrivateAttr(default_factory=dict)
    _folder: Path = PrivateAttr(default=Path())

    def rules(self) -> Iterator[tuple[bool, str]]:
        unknown = f"baseline {self.baseline!r} is not one of the methods {list(self.methods)}"
        yield self.baseline in self.methods, unknown
        reserved = "tasks.pretrain: the name is reserved for the pre-training"
        yield PRETRAIN not in self.tasks, reserved
        is_empty = self.pretrain is None and not self.tasks
        yield not is_empty, "there is nothing to run: set pretrain, tasks or both"
        twice = f"seeds {self.seeds} contain a seed twice"
        yield len(set(self.seeds)) == len(self.seeds), twice
        for name in (*self.methods, *self.tasks):
            yield (
                _NAME.fullmatch(name) is not None,
                f"{name!r} names a folder, so it must consist of letters, digits and _ . + = -, "
                "and start with a letter or digit",
            )

    def error(self, key: str, message: str) -> ConfigError:
        """Return an error about `key` that names the line of the suite's file that sets it."""
        return ConfigError(explain(key, message, self._origins))

    def path(self, task: str) -> Path:
        """Return the config file of a task, or of `pretrain`."""
        return find_config(self._section(task).config, self._folder)

    def overrides(self, method: str, task: str) -> list[Override]:
        """Return what a method overrides in a task, each with its line in the suite's file."""
        section = self.methods[method]
        parts = {"downstream": section.downstream, f"tasks.{task}": section.tasks.get(task, {})}
        if task == PRETRAIN:
            parts = {"pretrain": section.pretrain}
        return [
            Override(key, value, place_of(f"methods.{method}.{part}.{key}", self._origins))
            for part, values in parts.items()
            for key, value in values.items()
        ]

    def resources_of(self, task: str) -> ResourcesConfig:
        """Return the suite's resources, overridden by the task's own."""
        resources = self._section(task).resources.model_dump(exclude_unset=True)
        return self.resources.model_copy(update=resources)

    def _section(self, task: str) -> PretrainConfig:
        section = self.pretrain if task == PRETRAIN else self.tasks[task]
        assert section is not None
        return section


def load_suite(
    path: str | Path, overrides: Sequence[str] = (), plugins: Sequence[str] = ()
) -> SuiteConfig:
    """Read a suite's YAML file and `key=value` overrides; `plugins` are added to the file's.

    Raises:
        ConfigError: lists the problems, one a line.
    """
    tree, origins = read_config_file(Path(path), overrides, plugins)
    try:
        suite = SuiteConfig.model_validate(tree)
    except ValidationError as error:
        keys = {"suite": _known_keys(tree)}
        raise ConfigError(explain_all(error, {**tree, "task": "suite"}, origins, keys)) from None
    suite._origins.update(origins)
    suite._folder = find_config(path).parent
    return suite


def _known_keys(tree: dict[str, Any]) -> list[str]:
    """List the dotted keys of a suite with the methods and tasks that `tree` names."""
    keys = [key for key in known_keys(SuiteConfig) if not key.startswith(("methods.", "tasks."))]
    for kind, schema in (("methods", MethodConfig), ("tasks", TaskConfig)):
        named = tree.get(kind)
        for name in named if isinstance(named, dict) else ():
            keys += known_keys(schema, f"{kind}.{name}.")
    return keys
