"""The bridge of suites: where a SuiteConfig becomes planned runs, each with its whole config."""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from tract_transfer import __version__
from tract_transfer.config.file import ConfigError, Origins, Override, override, read_config_file
from tract_transfer.config.schema import Config, ProbeConfig, check_config
from tract_transfer.config.suite import OWN_KEYS, PRETRAIN, SuiteConfig
from tract_transfer.engine.run_folder import deciding_keys
from tract_transfer.files import make_folder, write_json
from tract_transfer.suite.plan import PlannedRun, Resources, join_same, order_tasks, run_id

# (config, the config of the run whose backbone it takes) -> fingerprints of its data, or None
# where only the run can tell; raises ValueError or OSError where it cannot be run.
Inspect = Callable[[Config, Config | None], Mapping[str, str] | None]


# The runs as far as they are known before their data are -> nothing; raises ConfigError.
Glance = Callable[[list["Draft"]], None]


class Draft(NamedTuple):
    """A run before its data are looked at: its id is of its config alone."""

    run: PlannedRun
    config: Config
    needed: Config | None


def plan_suite(
    suite: SuiteConfig, inspect: Inspect, glance: Glance | None = None
) -> list[PlannedRun]:
    """Return the runs of a suite in an order they can be run in: whole seeds, one after another.

    Args:
        glance: called before any data are read, with the runs that will be.

    Raises:
        ConfigError: of all runs, what is wrong with them, one line a problem; what their configs
            tell comes before any data are read.
    """
    drafts = _drafts(suite)
    joined = {run.folder for run in _joined(suite, [draft.run for draft in drafts])}
    if glance is not None:
        glance([draft for draft in drafts if draft.run.folder in joined])
    planned: dict[Path, PlannedRun] = {}
    problems: dict[str, None] = {}
    for draft in drafts:
        run = draft.run
        needed = planned.get(run.needs) if run.needs else None
        if run.needs and needed is None:
            continue  # it has a problem of its own
        try:
            fingerprints = inspect(draft.config, draft.needed)
        except (ValueError, OSError) as error:
            problems |= dict.fromkeys(_explained(error, suite, run.method, run.task))
            continue
        planned[run.folder] = _planned(
            suite, draft.config, run.method, run.task, needed, fingerprints
        )
    if problems:
        raise ConfigError("\n".join(problems))
    return _joined(suite, list(planned.values()))


def _drafts(suite: SuiteConfig) -> list[Draft]:
    """Return the runs as their configs tell them.

    Raises:
        ConfigError: of all runs, what is wrong with them, one line a problem.
    """
    needs = _needs(suite)
    try:
        tasks = order_tasks(needs)
    except ValueError as error:
        key, _, message = str(error).partition(": ")
        raise suite.error(key, message) from None
    seeds = _seeds(suite, needs)
    _check_keys(suite, needs)
    drafts: dict[tuple[int, str, str], Draft] = {}
    problems: dict[str, None] = {}
    files = _Files()
    for seed in suite.seeds:
        for task in (task for task in tasks if seed in seeds[task]):
            for method in suite.methods:
                needed = drafts.get((seed, needs[task] or "", method))
                if needs[task] and needed is None:
                    continue  # it has a problem of its own
                first = needed.run if needed else None
                try:
                    config = _config(suite, files, method, task, seed, first)
                    if first is None:
                        _check_weights(config)
                    run = _planned(suite, config, method, task, first, None)
                except (ValueError, OSError) as error:
                    problems |= dict.fromkeys(_explained(error, suite, method, task))
                    continue
                drafts[seed, task, method] = Draft(run, config, needed and needed.config)
    if problems:
        raise ConfigError("\n".join(problems))
    return list(drafts.values())


def _check_weights(config: Config) -> None:
    """Refuse weights of a task's own that are not there."""
    if config.model.weights not in (None, "pretrained"):
        from tract_transfer.build.weights import check_backbone

        check_backbone(config)


def _joined(suite: SuiteConfig, runs: list[PlannedRun]) -> list[PlannedRun]:
    try:
        return join_same(runs)
    except ValueError as error:
        raise suite.error("", str(error)) from None


def _needs(suite: SuiteConfig) -> dict[str, str | None]:
    """Task -> the task whose backbone it takes."""
    needs: dict[str, str | None] = {PRETRAIN: None} if suite.pretrain else {}
    for name, task in suite.tasks.items():
        unsaid = suite.pretrain is None and "needs" not in task.model_fields_set
        needs[name] = None if unsaid else task.needs
    return needs


def _seeds(suite: SuiteConfig, needs: Mapping[str, str | None]) -> dict[str, list[int]]:
    """Task -> its seeds, each of them one of the task it needs."""
    seeds = dict.fromkeys(needs, suite.seeds)
    seeds |= {name: task.seeds for name, task in suite.tasks.items() if task.seeds}
    for name, own in seeds.items():
        needed = needs[name]
        known = suite.seeds if needed is None else seeds[needed]
        alone = sorted(set(own) - set(known))
        if alone or len(set(own)) < len(own):
            of = "the suite" if needed is None else needed
            raise suite.error(
                f"tasks.{name}.seeds",
                f"{own} must be different seeds of {of}, {known}: a run pairs with that of the "
                "same seed, and begins with its backbone.",
            )
    return seeds


def _check_keys(suite: SuiteConfig, needs: Mapping[str, str | None]) -> None:
    """Refuse overrides that reach no run, or set what the suite sets."""
    for name, method in suite.methods.items():
        if method.pretrain and suite.pretrain is None:
            raise suite.error(f"methods.{name}.pretrain", "the suite has no pretrain.")
        if method.downstream and not suite.tasks:
            raise suite.error(f"methods.{name}.downstream", "the suite has no tasks.")
        for task in method.tasks:
            if task not in suite.tasks:
                known = list(suite.tasks)
                raise suite.error(f"methods.{name}.tasks.{task}", f"is no task of {known}.")
        for task, needed in needs.items():
            own = (*OWN_KEYS, "model.weights") if needed else OWN_KEYS
            for key, _, place in suite.overrides(name, task):
                if key in own:
                    where = f" ({place})" if place else ""
                    raise ConfigError(
                        f"methods.{name}: {key} is set by the suite itself in {task}, so that runs "
                        f"pair by seed and begin with their own backbone. Leave it out{where}."
                    )


class _Files:
    """Config files, each read once."""

    def __init__(self) -> None:
        self._read: dict[Path, tuple[dict[str, Any], Origins]] = {}

    def load(self, path: Path, overrides: list[Override]) -> Config:
        if path not in self._read:
            self._read[path] = read_config_file(path)
        return check_config(*override(*self._read[path], overrides))


def _config(
    suite: SuiteConfig,
    files: _Files,
    method: str,
    task: str,
    seed: int,
    needed: PlannedRun | None,
) -> Config:
    folder = Path(suite.output_dir) / method / task / f"seed{seed}"
    values = {"name": task, "method": method, "seed": seed, "output_dir": str(folder)}
    if needed is not None:
        values["model.weights"] = str(needed.folder)
    place = "the suite"
    own = [Override(key, value, place) for key, value in values.items()]
    return files.load(suite.path(task), [*suite.overrides(method, task), *own])


def _planned(
    suite: SuiteConfig,
    config: Config,
    method: str,
    task: str,
    needed: PlannedRun | None,
    fingerprints: Mapping[str, str] | None,
) -> PlannedRun:
    keys = config.model_dump()
    weights = config.model.weights
    deciding = {**deciding_keys(keys), "fingerprints": fingerprints}
    if needed is not None:
        deciding["model.weights"] = needed.id
    elif weights not in (None, "pretrained"):
        deciding["model.weights"] = _sha256_of(Path(str(weights)))
    return PlannedRun(
        id=run_id(deciding),
        method=method,
        task=task,
        seed=config.seed,
        config=keys,
        folder=Path(config.output_dir),
        needs=needed.folder if needed else None,
        fingerprints=fingerprints,
        resources=Resources(**suite.resources_of(task).model_dump()),
    )


@cache
def _sha256_of(weights: Path) -> str:
    """The hash of a weights file; of a folder, that of its weights."""
    files = sorted(weights.glob("*.safetensors")) + sorted(weights.glob("*.bin"))
    digest = hashlib.sha256()
    for file in files if weights.is_dir() else [weights]:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _explained(error: Exception, suite: SuiteConfig, method: str, task: str) -> list[str]:
    """Return an error's lines, each naming the task, and the method if it is the method's."""
    own = {place for _, _, place in suite.overrides(method, task) if place}
    lines = str(error).splitlines()
    return [
        f"{task}, {method}: {line}" if any(place in line for place in own) else f"{task}: {line}"
        for line in lines
    ]


# --- The bridge that looks at a suite's runs before the first one: data, model, and how they fi

# Sources that are there, or are made, without the network. Their keys that hold paths:
_PATHS = {"huggingface": ("path",), "voc": ("root",), "coco": ("images", "annotations")}
_PATHS |= {"digits": (), "digit_scenes": (), "train": ()}
_SPLITS = ("train", "val", "test")
_HUB_CLASSES = 20  # stands for what a hub's data would tell

Fingerprints = dict[str, str] | None


class Inspector:
    """Looks at configs; `kept` is the file in which it remembers, or None."""

    def __init__(self, kept: Path | None) -> None:
        self._kept = kept
        self._known: dict[str, Fingerprints] = _read(kept)
        self._is_new = False
        self._keys: dict[str, str] = {}  # output_dir -> what its config is known by
        self._stands_in: dict[str, Path] = {}
        self._stat: dict[str, list[Any]] = {}
        self._temporary: tempfile.TemporaryDirectory[str] | None = None

    def inspect(self, config: Config, needed: Config | None) -> Fingerprints:
        """Return the fingerprints of a config's data; None of data that are on the hub.

        Args:
            needed: the config of the run whose backbone it takes, which need not have been run.

        Raises:
            ValueError, OSError: the data do not load, or the config fits neither them nor the
                backbone. Data on the hub are not looked at.
        """
        key = self._key(config, needed)
        if key not in self._known:
            self._known[key] = self._look(config, needed)
            self._is_new = True
        return self._known[key]

    def knows(self, config: Config, needed: Config | None) -> bool:
        """Whether `inspect` would answer without a look at data or model."""
        return self._key(config, needed) in self._known

    def _key(self, config: Config, needed: Config | None) -> str:
        if (key := self._keys.get(config.output_dir)) is not None:
            return key
        keys = deciding_keys(config.model_dump())
        if getattr(config.data, "val", None) is None or config.data.val.source != "train":  # type: ignore[union-attr]
            keys.pop("seed")  # only a carved val depends on it
        if needed is not None:
            keys["model.weights"] = needed.model.model_dump()
        key = run_id({**keys, "version": __version__, "files": self._files(config)})
        self._keys[config.output_dir] = key
        return key

    def keep(self) -> None:
        """Remember what was looked at, for the next process."""
        if self._kept is not None and self._is_new:
            make_folder(self._kept.parent)
            write_json(self._kept, self._known)

    def close(self) -> None:
        """Remove what stood in for backbones."""
        if self._temporary is not None:
            self._temporary.cleanup()

    def _files(self, config: Config) -> list[Any]:
        """Names, sizes and times of the files its splits are read from."""
        paths = [path for split in _splits(config) for path in _paths(split)]
        for path in paths:
            if path not in self._stat:
                self._stat[path] = list(_stat(Path(path)))
        return [self._stat[path] for path in paths]

    def _look(self, config: Config, needed: Config | None) -> Fingerprints:
        from tract_transfer.build.data import build_data
        from tract_transfer.build.model import build_model
        from tract_transfer.build.trainer import (
            build_accelerator,
            build_tract,
            build_trainer,
        )

        weights = None if config.model.weights == "pretrained" else config.model.weights
        if needed is not None:
            weights = str(self._stand_in(needed))
        here = _here(config, weights)
        with _named(weights, config.model.weights):
            if any(_is_on_hub(split) for split in _splits(config)):
                model = build_model(here, _HUB_CLASSES)
                if not isinstance(here, ProbeConfig):
                    build_tract(here, model)
                return None
            data = build_data(here)
            if isinstance(here, ProbeConfig):
                build_model(here, len(data.class_names))
            else:
                build_trainer(here, data, build_accelerator(here))
        return {name: dataset.fingerprint() for name, dataset in data.splits.items()}

    def _stand_in(self, config: Config) -> Path:
        """Return a folder with a new backbone, as the run of `config` would leave it."""
        from tract_transfer.build.model import build_features
        from tract_transfer.models.weights import save_backbone

        model = config.model
        earlier = self._stands_in.get(str(model.weights))
        key = str(config.output_dir)
        if key not in self._stands_in:
            if self._temporary is None:
                self._temporary = tempfile.TemporaryDirectory()
            weights = model.weights
            if weights is not None:
                weights = None if weights == "pretrained" else str(earlier or weights)
            folder = Path(self._temporary.name) / str(len(self._stands_in))
            folder.mkdir()
            save_backbone(folder, build_features(_here(config, weights)), {})
            self._stands_in[key] = folder
        return self._stands_in[key]


def _splits(config: Config) -> list[Any]:
    named = (getattr(config.data, name, None) for name in _SPLITS)
    return [split for split in named if split is not None]


def _paths(split: Any) -> list[str]:
    return [getattr(split, key) for key in _PATHS[split.source]]


def _is_on_hub(split: Any) -> bool:
    """Whether a split's path is none here, and could be a name on the Hugging Face hub."""
    if split.source != "huggingface" or Path(split.path).exists():
        return False
    return split.path.count("/") <= 1 and not split.path.startswith((".", "/", "~"))


def _stat(path: Path) -> Iterator[tuple[str, int, int]]:
    """Yield name, size and time of a file, or of all files below a folder."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    for file in files:
        try:
            told = file.stat()
        except OSError:
            continue  # what is not there is told by who reads it
        yield str(file), told.st_size, told.st_mtime_ns


def _here(config: Config, weights: str | None) -> Config:
    """Return the config as it can be built on any machine, with other weights."""
    model = config.model.model_copy(update={"weights": weights})
    if weights is None:
        model = model.model_copy(update={"ignore_missing": [], "adapt_stem": False})
    data = config.data.model_copy(update={"cache": "none", "num_workers": 0})
    engine = config.engine.model_copy(update={"device": "cpu", "precision": "fp32"})
    return config.model_copy(update={"model": model, "data": data, "engine": engine})


@contextmanager
def _named(weights: str | None, name: str | None) -> Iterator[None]:
    """Let errors name the run whose backbone stood in."""
    try:
        yield
    except (ValueError, OSError) as error:
        if weights is None or weights == name or weights not in str(error):
            raise
        raise ValueError(str(error).replace(weights, str(name))) from error


def _read(file: Path | None) -> dict[str, Fingerprints]:
    """Return what was kept; nothing where it cannot be read."""
    try:
        kept: dict[str, Fingerprints] = json.loads(file.read_text()) if file else {}
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}
