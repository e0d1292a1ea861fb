"""The bridge of suites: where a SuiteConfig becomes planned runs, each with its whole config."""

import hashlib
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from tract_transfer.config import Config, check_config
from tract_transfer.config_file import ConfigError, Origins, Override, override, read_config_file
from tract_transfer.config_suite import OWN_KEYS, PRETRAIN, SuiteConfig
from tract_transfer.engine.resume_keys import deciding_keys
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
        from tract_transfer.build_weights import check_weights_are_there  # and torch with it

        check_weights_are_there(config)


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
