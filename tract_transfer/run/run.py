"""A run from config to results: data, model, training, evaluation, and the folder that tells all.

`run` trains or probes and reports, `evaluate_run` measures a run's checkpoint again, `preview`
says what a run would cost.
"""

import json
import logging
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import send_to_device

from tract_transfer.build.data import Data, build_data
from tract_transfer.build.model import build_evaluator
from tract_transfer.build.trainer import build_accelerator, build_trainer, in_iterations
from tract_transfer.build.weights import check_backbone
from tract_transfer.config.schema import Config, ProbeConfig, dump_config, load_config
from tract_transfer.data.loader import Batch
from tract_transfer.engine.cost import CostMeter, dry_run, dry_run_features
from tract_transfer.engine.debug_batch import load_debug_batch, replay
from tract_transfer.engine.determinism import deterministic
from tract_transfer.engine.group import main_first, reports_lost_processes, stop_on_signals
from tract_transfer.engine.non_finite import describe_images
from tract_transfer.engine.run_folder import (
    CONFIG_NAME,
    RESULTS_NAME,
    Inputs,
    check_before_data,
    check_run_folder,
    is_finished,
    open_run_folder,
    resume_hint,
)
from tract_transfer.files import write_json
from tract_transfer.run.probe import build_probed, run_probe
from tract_transfer.run.results import sha256_of_weights
from tract_transfer.run.train import eval_batches, measure, train
from tract_transfer.run.trained import reported_checkpoint

logger = logging.getLogger(__name__)


def run(config: Config, *, resume: bool = False) -> dict[str, Any]:
    """Carry out a run and return its results; `output_dir` then holds all of it.

    Raises:
        ConfigError, ValueError, FileNotFoundError: before training, wherever that can be known.
        FileExistsError: the folder holds another run, and `resume` is off; told before data are
            read, as is all that the folder can tell.
        NonFiniteError: a loss or gradient is not finite; the step is kept in the folder.
        FolderInUseError: another process holds the folder.
        Stopped: a signal ended the run; the message says how to go on.
    """
    check_backbone(config)
    folder = Path(config.output_dir)
    on_stop = stop_on_signals(partial(resume_hint, folder))
    with deterministic(config.engine.deterministic), on_stop as stop:
        accelerator = build_accelerator(config)
        meter = CostMeter(accelerator.device)
        with reports_lost_processes(accelerator):
            main_first(accelerator, partial(_check_folder, config, resume=resume))
            data = build_data(config)
            if isinstance(config, ProbeConfig):
                backbone = build_probed(config, data)
                with _run_folder(config, data, accelerator, resume=resume):
                    return run_probe(config, data, backbone, folder, accelerator, meter)
            trainer = build_trainer(config, data, accelerator)
            with _run_folder(config, data, accelerator, resume=resume):
                return train(config, data, trainer, folder, stop, meter)


def is_done(config: Config) -> bool:
    """Whether the run in `output_dir` is finished.

    Raises:
        ValueError: it is, but was run with another config or with other weights.
    """
    folder = Path(config.output_dir)
    if not is_finished(folder):
        return False
    check_run_folder(folder, dump_config(config), resume=True, read_config=_read_config)
    results = json.loads((folder / RESULTS_NAME).read_text())
    now = sha256_of_weights(config.model.weights)
    if results.get("weights_sha256") != now:
        raise ValueError(
            f"{folder} is finished, but its weights {config.model.weights} have been trained anew "
            f"since (sha256 {now}). Remove {folder} to run it again."
        )
    return True


def evaluate_run(config: Config) -> dict[str, float]:
    """Measure the reported checkpoint in `output_dir` again; writes evaluation.json.

    Raises:
        FileNotFoundError: there is no whole checkpoint.
        ValueError: it holds another model than the config's.
    """
    if isinstance(config, ProbeConfig):
        raise config.error("task", "a probe trains nothing that --eval-only could measure again.")
    check_backbone(config)
    folder = Path(config.output_dir)
    path, parts = reported_checkpoint(config)
    data = build_data(config)
    trainer = build_trainer(config, data, build_accelerator(config))
    try:
        trainer.load_weights(parts)
    except (RuntimeError, KeyError) as error:  # what load_state_dict raises, or no average in it
        raise ValueError(
            f"{path} holds another model than this config, or one of other classes. Use "
            f"{folder / CONFIG_NAME}. ({error})"
        ) from error
    split, dataset = data.report
    with deterministic(config.engine.deterministic):
        metrics, details, skipped = measure(config, trainer, dataset, data.class_names)
    if trainer.accelerator.is_main_process:
        found = {"checkpoint": path.name, "split": split, "metrics": metrics, "skipped": skipped}
        write_json(folder / "evaluation.json", {**found, "details": details})
    return metrics


def preview(config: Config, *, resume: bool = False) -> dict[str, str]:
    """Build everything, run two steps and one evaluation batch; return what a run would cost.

    What it is about to do is logged, a line a stage: each may take minutes. So is why a run would
    be refused for what its folder holds, which is no reason not to preview it.
    """
    check_backbone(config)
    try:
        _check_folder(config, resume=resume)
    except (ValueError, OSError) as error:
        logger.warning("A run would be refused: %s", error)
    data = build_data(config)
    accelerator = build_accelerator(config)
    logger.info("Building the model")
    if isinstance(config, ProbeConfig):
        backbone = build_probed(config, data).to(accelerator.device)
        batch = next(iter(eval_batches(config, data.report[1], accelerator)))
        images = batch.images.to(accelerator.device)
        count = sum(len(dataset) for dataset in data.splits.values())
        logger.info("Extracting the features of %d images", len(images))
        return dry_run_features(backbone, backbone.pooled, images, count)
    trainer = build_trainer(config, data, accelerator)
    _, dataset = data.report
    batches = eval_batches(config, dataset, accelerator)
    every = in_iterations(config, data.train).evaluate_every
    return dry_run(
        trainer,
        batches,
        lambda: build_evaluator(config, data.class_names),
        num_eval_batches=len(batches),
        num_evaluations=1 + (trainer.max_iters // every if every else 0),
    )


def _check_folder(config: Config, *, resume: bool) -> None:
    """Refuse what the folder of a run can tell before its data are read."""
    check_before_data(
        Path(config.output_dir),
        dump_config(config),
        lambda: sha256_of_weights(config.model.weights),
        resume=resume,
        read_config=_read_config,
    )


def _run_folder(
    config: Config, data: Data, accelerator: Accelerator, *, resume: bool
) -> AbstractContextManager[None]:
    """Return the hold on a run's folder; see `open_run_folder`."""

    def inputs() -> Inputs:
        fingerprints = {name: dataset.fingerprint() for name, dataset in data.splits.items()}
        return Inputs(fingerprints, sha256_of_weights(config.model.weights))

    return open_run_folder(
        Path(config.output_dir),
        dump_config(config),
        accelerator,
        resume=resume,
        read_config=_read_config,
        inputs=inputs,
    )


def _read_config(file: Path) -> str:
    """Return a run's own config.yaml, with their defaults for keys that came after it."""
    return dump_config(load_config(file))


# --- The bridge to a step that was not finite: it is run again, watched.


def replay_debug_batch(config: Config, file: Path) -> list[str]:
    """Run the step in `file` with the weights it had; tell in lines where it is not finite.

    Raises:
        ConfigError: the config is a probe's, which trains nothing.
        FileNotFoundError: there is no such file.
        ValueError: it is no debug batch, or of another model than the config's.
    """
    if isinstance(config, ProbeConfig):
        raise config.error("task", "a probe trains nothing, and keeps no batch to run again.")
    kept = load_debug_batch(file)
    with deterministic(config.engine.deterministic):
        trainer = build_trainer(config, build_data(config), build_accelerator(config))
        try:
            trainer.accelerator.unwrap_model(trainer.model).load_state_dict(kept.model)
        except RuntimeError as error:
            raise ValueError(
                f"{file} is of another model than this config's. Use the config.yaml beside it. "
                f"({error})"
            ) from error
        device = trainer.accelerator.device
        batches = [Batch(**send_to_device(each, device), skipped=[]) for each in kept.batches]
        return [
            f"Iteration {kept.iteration + 1}. {describe_images([kept.about])}",
            *replay(trainer, kept, batches),
        ]
