"""One run, from a config to results: preflight, data, model, training, results."""

import contextlib
import logging
from functools import partial
from pathlib import Path
from typing import Any

from tract_transfer.build.data import Data, build_data
from tract_transfer.build.model import preflight
from tract_transfer.build.trainer import TrainLength, build_accelerator, build_trainer, train_length
from tract_transfer.config.schema import Config, ProbeConfig, TrainedTask
from tract_transfer.engine import group, hooks
from tract_transfer.engine.checkpoint import Checkpointer
from tract_transfer.engine.cost import CostMeter
from tract_transfer.engine.debug_batch import keep_debug_batch
from tract_transfer.engine.determinism import deterministic
from tract_transfer.engine.run_folder import (
    Chosen,
    flatten,
    open_run_folder,
    repeat_hint,
    resume_hint,
)
from tract_transfer.engine.screen import log_rows
from tract_transfer.engine.trainer import Hook, Trainer
from tract_transfer.run.evaluate import measure
from tract_transfer.run.probe import run_probe
from tract_transfer.run.results import (
    find_overlap,
    log_weights,
    save_model,
    training_results,
    write_results,
)
from tract_transfer.run.summary import outcome, training_header

logger = logging.getLogger(__name__)


def run(config: Config, *, resume: bool = False, chosen: Chosen | None = None) -> dict[str, Any]:
    """Train or probe, and return the results; `config.output_dir` then contains all of the run.

    Args:
        chosen: how the config was chosen for a folder, to log and to save as recipe.yaml.

    Raises:
        ConfigError, ValueError, FileNotFoundError: before training wherever possible.
        FileExistsError: the folder contains a run and `resume` is off; before data are read.
        FolderInUseError: another process holds the folder; before data are read.
        NonFiniteError: a loss or gradient is not finite; the step's batch is kept in the folder.
        Stopped: a signal ended the run; the message says how to resume.
    """
    for line in () if chosen is None else chosen.lines:
        logger.info(line)
    preflight(config)
    hint = partial(resume_hint, Path(config.output_dir))
    with deterministic(config.engine.deterministic), group.stop_on_signals(hint) as stop:
        accelerator = build_accelerator(config)
        group.check_same_config(flatten(config.model_dump(mode="json")))
        cost = CostMeter(accelerator.device)
        opened = open_run_folder(config, accelerator, resume=resume, chosen=chosen)
        with group.reports_lost_processes(accelerator), opened as run_folder:
            data = build_data(config)
            if isinstance(config, ProbeConfig):
                results = run_probe(config, data, run_folder, cost)
            else:
                logger.info("Building the model")
                length = train_length(config, data.train)
                trainer = build_trainer(config, data, accelerator, length)
                trainer.stop = stop
                run_folder.begin(data.fingerprints)
                results = train(config, data, length, trainer, run_folder.path, cost)
            if chosen is not None:
                logger.info(repeat_hint(run_folder.path))
            return results


def train(
    config: TrainedTask,
    data: Data,
    length: TrainLength,
    trainer: Trainer,
    folder: Path,
    cost: CostMeter,
) -> dict[str, Any]:
    """Train, from the newest checkpoint if there is one; write and return the results."""
    accelerator, stop = trainer.accelerator, trainer.stop
    is_main, (split, dataset) = accelerator.is_main_process, data.report
    checkpointer = Checkpointer(folder / "checkpoints", config.engine.checkpoint.keep)
    metrics_file = hooks.MetricsFile(folder, tensorboard=config.engine.log.tensorboard and is_main)
    with contextlib.closing(metrics_file):
        weights_match = log_weights(trainer.evaluated_model.get_submodule("backbone"))
        load_newest(trainer, checkpointer)
        is_new, overlap = trainer.iteration == 0, None
        if is_main:
            metrics_file.cut_after(trainer.iteration)
            overlap = find_overlap(data)
            log_rows(logger, training_header(config, data, length, trainer, cost.seconds))
        trainer.hooks = build_hooks(config, data, length, trainer, checkpointer, metrics_file)
        with stop.waits(), keep_debug_batch(trainer, folder):
            trainer.train()
            stop.check(accelerator)
            accelerator.wait_for_everyone()  # the main process may be writing the best checkpoint
            reported = load_reported(config, trainer, checkpointer)
            measured = measure(config, trainer, dataset, data.class_names)
            results = {
                **training_results(config, data, length, trainer, reported, measured),
                "weights_match": weights_match,
                "leaks": overlap,
            }
            if is_main:
                metrics_file.write(trainer.iteration, results["epochs"], split, measured.metrics)
                save_model(config, data, trainer, folder, results)
            results["cost"] = cost.read(whole=is_new)
            if is_main:
                write_results(folder, results)
                rows = outcome(config, split, results)
                log_rows(logger, rows, highlight=rows[0][0])
    accelerator.wait_for_everyone()
    return results


def load_newest(trainer: Trainer, checkpointer: Checkpointer) -> None:
    """Load the newest checkpoint, if there is one; the same on every process."""
    group.main_first(trainer.accelerator, checkpointer.tidy)
    newest = checkpointer.newest()
    if newest is not None:
        parts, state, iteration = checkpointer.load(newest)
        try:
            trainer.load_state(parts, state, iteration)
        except (KeyError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"{newest} is complete, but of another model or version: {error}. Resume with the "
                "version that wrote it (environment.json), or set another output_dir."
            ) from error
        logger.info("Resumed from %s", newest)
    elif broken := sorted(checkpointer.folder.glob("broken-*")):
        logger.warning("No checkpoint but %s: training starts from scratch.", broken[-1].name)
    group.check_same(trainer.iteration, "iterations to resume from")
    repair_best = partial(checkpointer.repair_best, trainer.best, trainer.iteration)
    group.main_first(trainer.accelerator, repair_best)


def load_reported(config: TrainedTask, trainer: Trainer, checkpointer: Checkpointer) -> int:
    """Load the weights of the best checkpoint if it is reported; return the reported iteration."""
    if config.evaluation.report != "best":
        return trainer.iteration
    best = checkpointer.best()
    if best is None:
        raise ValueError(
            f"The best checkpoint is missing in {checkpointer.folder}, and evaluation.report: best "
            "reports it. Set another output_dir to train from scratch."
        )
    parts, _, iteration = checkpointer.load(best)
    trainer.load_weights(parts)
    return iteration


def build_hooks(
    config: TrainedTask,
    data: Data,
    length: TrainLength,
    trainer: Trainer,
    checkpointer: Checkpointer,
    metrics_file: hooks.MetricsFile,
) -> list[Hook]:
    """Return what watches a training: its log, then its checkpoints, then its evaluations."""
    watched = "val" if data.val is not None else data.report[0]
    selects, per_epoch = config.evaluation.report == "best", length.iters_per_epoch
    log_every, evaluate_every = config.engine.log.every_iters, length.evaluate_every
    return [
        hooks.LogProgress(metrics_file, every_iters=log_every, iters_per_epoch=per_epoch),
        hooks.SaveCheckpoints(
            checkpointer, [length.checkpoint_every, evaluate_every], metrics_file
        ),
        hooks.PeriodicEvaluation(
            lambda: measure(config, trainer, data.splits[watched], data.class_names)[0],
            every_iters=evaluate_every,
            at_end=watched != data.report[0] or selects,
            split=watched,
            metric=config.evaluation.metric,
            metrics=metrics_file,
            iters_per_epoch=per_epoch,
            checkpointer=checkpointer if selects else None,
            selects=config.evaluation.patience is not None,
        ),
    ]
