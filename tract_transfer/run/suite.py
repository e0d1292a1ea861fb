"""Plan a suite: from its config to runs with complete configs, checked before any run starts."""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from tract_transfer.build.data import build_data
from tract_transfer.build.model import build_features, build_model, check_entries, preflight
from tract_transfer.build.trainer import build_accelerator, build_tract, build_trainer
from tract_transfer.config.file import (
    ConfigError,
    Origins,
    Override,
    explain,
    override,
    read_config_file,
)
from tract_transfer.config.schema import Config, ProbeConfig, check_config
from tract_transfer.config.suite import OWN_KEYS, PRETRAIN, SuiteConfig
from tract_transfer.engine.run_folder import deciding_keys
from tract_transfer.files import sha256_of
from tract_transfer.models.weights import save_backbone, weights_file
from tract_transfer.registry import did_you_mean
from tract_transfer.suite.execute import refuse_others
from tract_transfer.suite.plan import PlannedRun, run_id
from tract_transfer.suite.state import Suite, inspect_folder

_sha256_of = cache(sha256_of)
_HUB_CLASSES = 20  # stands for the number of classes of data on the hub

Fingerprints = Mapping[str, str] | None  # of splits; None if only the run can compute them


class Draft(NamedTuple):
    """A run as its config describes it; the fingerprints of its data are not known yet."""

    run: PlannedRun
    config: Config


def open_suite(config: SuiteConfig, *, refuse: bool = False) -> Suite:
    """Plan a suite and recall what its folder has of it.

    Args:
        refuse: refuse folders whose config.yaml shows that they contain other runs, before any data
            are read.

    Raises:
        ConfigError: runs cannot work; lists the problems of all, one a line.
    """
    drafts = draft_runs(config)
    if refuse:
        contents = {run.folder: inspect_folder(run, backbone_known=False) for run, _ in drafts}
        refuse_others({path: c.why for path, c in contents.items() if c.state == "other"})
    with tempfile.TemporaryDirectory() as folder:
        return Suite(config, inspect_runs(drafts, Inspector(Path(folder)).inspect))


def list_plan(suite: Suite) -> list[str]:
    """Return a line for every run: its id, its folder and what would be done."""
    others = suite.take_stock()
    lines = []
    for job in suite.jobs:
        run = job.run
        action = "skip: finished" if job.state == "finished" else job.note or "run"
        if run.folder in others:
            action = f"contains another run: {others[run.folder]}"
        also = f" (also {', '.join(run.also)})" if run.also else ""
        lines.append(f"{run.id}  {run.folder}{also}  {action}")
    return lines


def draft_runs(suite: SuiteConfig) -> list[Draft]:
    """Return the runs of a suite by their configs; methods whose run is the same share one.

    Raises:
        ConfigError: lists the problems of all runs, one a line.
    """
    needs = _needs(suite)
    seeds = _seeds(suite, needs)
    _check_overrides(suite, needs)
    read = cache(read_config_file)
    drafts: dict[str, Draft] = {}  # by id
    ids: dict[tuple[str, int, str], str] = {}  # (method, seed, task) -> id
    problems: dict[str, None] = {}
    for seed in suite.seeds:
        for task in [task for task in needs if seed in seeds[task]]:
            for method in suite.methods:
                needed_id = ids.get((method, seed, needs[task] or ""))
                if needs[task] and needed_id is None:
                    continue  # the run that it needs has a problem
                needed = drafts[needed_id].run if needed_id else None
                with _collects(problems, task):
                    draft = _draft(suite, read(suite.path(task)), method, task, seed, needed)
                    _add(drafts, draft)
                    ids[method, seed, task] = draft.run.id
    _refuse(problems)
    _check_methods_differ(suite, ids)
    return list(drafts.values())


def inspect_runs(
    drafts: Sequence[Draft], inspect: Callable[[Config, Config | None], Fingerprints]
) -> list[PlannedRun]:
    """Return the drafted runs with the fingerprints of their data, which are part of their ids.

    Args:
        inspect: as `Inspector.inspect`.

    Raises:
        ConfigError: lists the problems of all runs, one a line.
    """
    configs = {run.folder: config for run, config in drafts}
    runs: dict[Path, PlannedRun] = {}
    problems: dict[str, None] = {}
    for run, config in drafts:
        if run.needs and run.needs not in runs:
            continue  # the run that it needs has a problem
        with _collects(problems, run.task):
            fingerprints = inspect(config, configs[run.needs] if run.needs else None)
            id_ = _id(config, runs[run.needs].id if run.needs else None, fingerprints)
            runs[run.folder] = replace(run, id=id_, fingerprints=fingerprints)
    _refuse(problems)
    return list(runs.values())


def _needs(suite: SuiteConfig) -> dict[str, str | None]:
    """Return task -> the task whose backbone it takes; each comes after the one it needs."""
    needs: dict[str, str | None] = {PRETRAIN: None} if suite.pretrain else {}
    for name, section in suite.tasks.items():
        by_default = suite.pretrain is None and "needs" not in section.model_fields_set
        needs[name] = None if by_default else section.needs
    for task, needed in needs.items():
        if needed is not None and needed not in needs:
            hint = f"{did_you_mean(needed, needs)} null keeps the weights of the task's config."
            message = f"{needed!r} is not one of the tasks {list(needs)}.{hint}"
            raise suite.error(f"tasks.{task}.needs", message)
    ordered: dict[str, str | None] = {}
    for task in needs:
        chain = [task]
        while (needed := needs[chain[-1]]) is not None and needed not in ordered:
            if needed in chain:
                circle = " needs ".join([*chain[chain.index(needed) :], needed])
                message = f"circular: {circle}. Break the circle."
                raise suite.error(f"tasks.{task}.needs", message)
            chain.append(needed)
        ordered |= {name: needs[name] for name in reversed(chain)}
    return ordered


def _seeds(suite: SuiteConfig, needs: Mapping[str, str | None]) -> dict[str, list[int]]:
    """Return task -> its seeds, which must be seeds of the task it needs."""
    seeds = dict.fromkeys(needs, suite.seeds)
    seeds |= {name: task.seeds for name, task in suite.tasks.items() if task.seeds}
    for task, needed in needs.items():
        available = suite.seeds if needed is None else seeds[needed]
        if len(set(seeds[task]) & set(available)) < len(seeds[task]):
            raise suite.error(
                f"tasks.{task}.seeds",
                f"{seeds[task]} must be different seeds of {needed or 'the suite'}, {available}: a "
                "run pairs with the runs of the same seed, and takes the backbone of that seed.",
            )
    return seeds


def _check_overrides(suite: SuiteConfig, needs: Mapping[str, str | None]) -> None:
    """Refuse overrides that apply to no run, or of keys that the suite sets."""
    for name, method in suite.methods.items():
        if method.pretrain and suite.pretrain is None:
            raise suite.error(f"methods.{name}.pretrain", "the suite has no pretrain.")
        if method.downstream and not suite.tasks:
            raise suite.error(f"methods.{name}.downstream", "the suite has no tasks.")
        for task in method.tasks.keys() - suite.tasks.keys():
            message = f"not one of the tasks {list(suite.tasks)}."
            raise suite.error(f"methods.{name}.tasks.{task}", message)
        for task, needed in needs.items():
            reserved = (*OWN_KEYS, "model.weights") if needed else OWN_KEYS
            for key, _, place in suite.overrides(name, task):
                if key == "plugins":
                    message = "plugins are not overridden. Set those of the suite or of a config."
                    raise ConfigError(explain(f"methods.{name}", message, {}, place))
                if key in reserved:
                    message = (
                        f"{key} is set by the suite itself in {task}, so that runs pair by seed "
                        "and take their own backbone. Remove it."
                    )
                    raise ConfigError(explain(f"methods.{name}", message, {}, place))


def _draft(
    suite: SuiteConfig,
    tree: tuple[dict[str, Any], Origins],
    method: str,
    task: str,
    seed: int,
    needed: PlannedRun | None,
) -> Draft:
    """Return a run: the config of its task, a method's overrides, and what the suite sets."""
    folder = Path(suite.output_dir) / method / task / f"seed{seed}"
    values: dict[str, Any] = {
        "name": task,
        "method": method,
        "seed": seed,
        "output_dir": str(folder),
    }
    if needed is not None:
        values["model.weights"] = str(needed.folder)
    plugins = [*suite.plugins, *(needed.config["plugins"] if needed else [])]
    if plugins:  # also those of the backbone's own run
        values["plugins"] = [*dict.fromkeys([*plugins, *tree[0].get("plugins", [])])]
    overrides = suite.overrides(method, task)
    overrides += [Override(key, value, "the suite") for key, value in values.items()]
    config = check_config(*override(*tree, overrides))
    if needed is None:
        preflight(config)
    run = PlannedRun(
        id=_id(config, needed.id if needed else None, None),
        method=method,
        task=task,
        seed=seed,
        config=config.model_dump(),
        folder=folder,
        needs=needed.folder if needed else None,
        resources=suite.resources_of(task),
    )
    return Draft(run, config)


def _id(config: Config, needed_id: str | None, fingerprints: Fingerprints) -> str:
    deciding = {**deciding_keys(config.model_dump()), "fingerprints": fingerprints}
    weights = config.model.weights
    if needed_id is not None:
        deciding["model.weights"] = needed_id
    elif weights not in (None, "pretrained"):
        deciding["model.weights"] = _sha256_of(weights_file(Path(str(weights))))
    return run_id(deciding)


def _add(drafts: dict[str, Draft], draft: Draft) -> None:
    """Add a run, or its method to the same run of another method."""
    run, _ = draft
    shared, config = drafts.setdefault(run.id, draft)
    if shared.task != run.task:
        raise ValueError(
            f"tasks {shared.task} and {run.task} are the same run: same config, same data. "
            "Remove one."
        )
    if shared is not run:
        drafts[run.id] = Draft(replace(shared, also=(*shared.also, run.method)), config)


def _check_methods_differ(suite: SuiteConfig, ids: Mapping[tuple[str, int, str], str]) -> None:
    methods: dict[frozenset[str], str] = {}
    for method in suite.methods:
        runs = frozenset(id_ for (name, _, _), id_ in ids.items() if name == method)
        other = methods.setdefault(runs, method)
        if other != method:
            raise suite.error(
                f"methods.{method}",
                f"has the same runs as {other} in every task, so there is nothing to compare. Give "
                "it an override (methods.<name>.pretrain, .downstream or .tasks), or remove it.",
            )


@contextmanager
def _collects(problems: dict[str, None], task: str) -> Iterator[None]:
    """Collect the error of a run, a line at a time and each line once."""
    try:
        yield
    except (ValueError, OSError) as error:
        problems.update(dict.fromkeys(f"{task}: {line}" for line in str(error).splitlines()))


def _refuse(problems: Mapping[str, None]) -> None:
    if problems:
        raise ConfigError("\n".join(problems))


class Inspector:
    """Checks that configs, data and models fit; what decides the result is inspected only once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder  # for the stand-ins
        self._fingerprints: dict[str, Fingerprints] = {}
        self._backbones: dict[str | None, str] = {}  # output_dir -> stand-in for its backbone

    def inspect(self, config: Config, needed: Config | None) -> Fingerprints:
        """Return the fingerprints of a run's data; None for data on the hub, which are not read.

        Args:
            needed: config of the run whose backbone it takes, which may not have run yet.

        Raises:
            ValueError, OSError: config, data and backbone do not fit.
        """
        keys = deciding_keys(config.model_dump())
        val = getattr(config.data, "val", None)
        if val is None or val.source != "train":
            keys.pop("seed")  # only a val split held out from train depends on it
        if needed is not None:
            keys["model.weights"] = needed.model.model_dump()
        key = run_id(keys)
        if key not in self._fingerprints:
            weights = config.model.weights if needed is None else self._stand_in(needed)
            try:
                self._fingerprints[key] = _build(_on_any_machine(config, weights))
            except (ValueError, OSError) as error:  # it must name the run's own weights
                text = str(error).replace(str(weights), str(config.model.weights))
                raise ValueError(text) from error
        return self._fingerprints[key]

    def _stand_in(self, config: Config) -> str:
        """Return a folder with an untrained backbone, as the run of `config` would write it."""
        if config.output_dir not in self._backbones:
            weights = self._backbones.get(config.model.weights, config.model.weights)
            folder = self._folder / str(len(self._backbones))
            folder.mkdir()
            save_backbone(folder, build_features(_on_any_machine(config, weights)), {})
            self._backbones[config.output_dir] = str(folder)
        return self._backbones[config.output_dir]


def _build(config: Config) -> Fingerprints:
    """Build data and model as a run would; return the fingerprints of the data."""
    check_entries(config)
    splits = (getattr(config.data, name, None) for name in ("train", "val", "test"))
    if any(split is not None and _is_on_hub(split) for split in splits):
        model = build_model(config, _HUB_CLASSES)
        if not isinstance(config, ProbeConfig):
            build_tract(config, model)
        return None
    data = build_data(config)
    if isinstance(config, ProbeConfig):
        build_model(config, len(data.class_names))
    else:
        build_trainer(config, data, build_accelerator(config))
    return {name: dataset.fingerprint() for name, dataset in data.splits.items()}


def _is_on_hub(split: Any) -> bool:
    """Return whether a path does not exist here, but could be a name on the Hugging Face hub."""
    if split.source != "huggingface" or Path(split.path).exists():
        return False
    return split.path.count("/") <= 1 and not split.path.startswith((".", "/", "~"))


def _on_any_machine(config: Config, weights: str | None) -> Config:
    """Return a config that can be built on any machine, with other weights; none if pretrained."""
    weights = None if weights == "pretrained" else weights
    model = config.model.model_copy(update={"weights": weights})
    if weights is None:
        model = model.model_copy(update={"ignore_missing": [], "adapt_stem": False})
    data = config.data.model_copy(update={"cache": "none", "num_workers": 0})
    engine = config.engine.model_copy(update={"device": "cpu", "precision": "fp32"})
    return config.model_copy(update={"model": model, "data": data, "engine": engine})
