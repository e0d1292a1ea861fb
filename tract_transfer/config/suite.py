"""A suite's config: methods x tasks x seeds, and what each of their runs is given."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PrivateAttr, ValidationError, model_validator

from tract_transfer.config.file import (
    ConfigError,
    Origins,
    Override,
    explain,
    explain_all,
    read_config_file,
)
from tract_transfer.config.schema import known_keys
from tract_transfer.config.sections import Count, Positive, Section

PRETRAIN = "pretrain"
# What the suite itself sets in every run.
OWN_KEYS = ("output_dir", "name", "method", "seed")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+=-]*")
_Overrides = dict[str, Any]


class ResourcesConfig(Section):
    """What one run is given. `gpus` below 1 is a share of one; null is one where there are any.

    `hours`, `partition` and `account` are asked of Slurm, and have no meaning elsewhere.
    """

    cpus: Count | None = None
    gpus: Annotated[float, Field(ge=0)] | None = None
    memory_gb: Positive | None = None
    hours: Positive | None = None
    partition: str | None = None
    account: str | None = None

    @model_validator(mode="after")
    def _gpus_are_whole_or_one_shared(self) -> "ResourcesConfig":
        if self.gpus is not None and self.gpus > 1 and self.gpus % 1:
            raise ValueError(f"resources.gpus: {self.gpus} is neither whole nor a share of one")
        return self


class MethodConfig(Section):
    """What a method changes: dotted key -> value, for its pre-training, for every task after it,
    and for tasks by name."""

    pretrain: _Overrides = Field(default={})
    downstream: _Overrides = Field(default={})
    tasks: dict[str, _Overrides] = Field(default={})


class PretrainConfig(Section):
    """The config of the pre-training, a path from the suite's file."""

    config: str
    resources: ResourcesConfig = ResourcesConfig()


class TaskConfig(PretrainConfig):
    """`needs`: whose backbone it takes, `pretrain` or another task; null keeps the weights that
    its own config names. `seeds`: some of the suite's."""

    needs: str | None = PRETRAIN
    seeds: Annotated[list[int], Field(min_length=1)] | None = None


def _as_section(value: Any) -> Any:
    """A path alone is `{config: path}`."""
    return {"config": value} if isinstance(value, str) else value


class SuiteConfig(Section):
    """Methods x tasks x seeds, of which `workers` are run at a time, and again after a failure up
    to `retries` times. `workers: null` is one on this machine, and all on a cluster."""

    output_dir: str
    title: str = "Does the backbone transfer?"
    baseline: str
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    methods: Annotated[dict[str, MethodConfig], Field(min_length=1)]
    pretrain: Annotated[PretrainConfig, BeforeValidator(_as_section)] | None = None
    tasks: dict[str, Annotated[TaskConfig, BeforeValidator(_as_section)]] = Field(default={})
    resources: ResourcesConfig = ResourcesConfig()
    workers: Count | None = None
    retries: Annotated[int, Field(ge=0)] = 1
    _origins: Origins = PrivateAttr(default_factory=dict)
    _folder: Path = PrivateAttr(default=Path())

    @model_validator(mode="after")
    def _names_fit(self) -> "SuiteConfig":
        if self.baseline not in self.methods:
            raise ValueError(f"baseline {self.baseline!r} is none of methods {list(self.methods)}")
        if PRETRAIN in self.tasks:
            raise ValueError("tasks.pretrain: the name is taken by the pre-training itself")
        if self.pretrain is None and not self.tasks:
            raise ValueError("give pretrain, tasks or both: there is nothing to run")
        for kind in ("methods", "tasks"):
            _check_names(kind, list(getattr(self, kind)))
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {self.seeds} repeat one")
        return self

    def error(self, key: str, message: str) -> ConfigError:
        """Return an error about `key` that says where in the suite it was set."""
        return ConfigError(explain(key, message, self._origins))

    def place(self, key: str) -> str:
        """Return where a key was set: `configs/suites/x.yaml line 9`."""
        while key and key not in self._origins:
            key = key.rpartition(".")[0]
        return self._origins.get(key, "")

    def path(self, task: str) -> Path:
        """Return the config file of a task, or of `pretrain`."""
        section = self.pretrain if task == PRETRAIN else self.tasks[task]
        assert section is not None
        return self._folder / section.config

    def overrides(self, method: str, task: str) -> list[Override]:
        """Return what a method changes in a task, each with its line in the suite's file."""
        section = self.methods[method]
        keys = [PRETRAIN] if task == PRETRAIN else ["downstream", f"tasks.{task}"]
        parts = [section.pretrain] if task == PRETRAIN else [section.downstream]
        parts += [] if task == PRETRAIN else [section.tasks.get(task, {})]
        return [
            Override(name, value, self.place(f"methods.{method}.{key}.{name}"))
            for key, part in zip(keys, parts, strict=True)
            for name, value in part.items()
        ]

    def resources_of(self, task: str) -> ResourcesConfig:
        """Return the suite's resources, with a task's own over them."""
        section = self.pretrain if task == PRETRAIN else self.tasks[task]
        assert section is not None
        return self.resources.model_copy(update=section.resources.model_dump(exclude_unset=True))


def load_suite(path: str | Path, overrides: Sequence[str] = ()) -> SuiteConfig:
    """Read a suite's YAML file; as `load_config` does with a run's.

    Raises:
        ConfigError: what is wrong, one line a problem.
    """
    tree, origins = read_config_file(Path(path), overrides)
    try:
        suite = SuiteConfig.model_validate(tree)
    except ValidationError as error:
        known = {"suite": _known_keys(tree)}
        raise ConfigError(explain_all(error, {**tree, "task": "suite"}, origins, known)) from None
    suite._origins.update(origins)
    suite._folder = Path(path).parent
    return suite


def _known_keys(tree: dict[str, Any]) -> list[str]:
    """List the dotted keys of a suite that names these methods and tasks."""
    keys = [key for key in known_keys(SuiteConfig) if not key.startswith(("methods.", "tasks."))]
    for kind, schema in (("methods", MethodConfig), ("tasks", TaskConfig)):
        named = tree.get(kind)
        for name in named if isinstance(named, dict) else ():
            keys += known_keys(schema, f"{kind}.{name}.")
    return keys


def _check_names(kind: str, names: list[str]) -> None:
    """Refuse names that make no folder, or the same one as another."""
    seen: dict[str, str] = {}
    for name in names:
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"{kind}.{name}: a name is of letters, digits and _ . + = -, beginning with one "
                "of the first two: it names a folder"
            )
        other = seen.setdefault(name.lower(), name)
        if other != name:
            raise ValueError(f"{kind}: {other} and {name} are one folder on some disks")
