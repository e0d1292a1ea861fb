"""A run from config to results: data, model, training, evaluation, and the folder that tells all.

`run` trains or probes and reports, `evaluate_run` measures a run's checkpoint again, `preview`
says what a run would cost.
"""

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from tract_transfer.build import build_accelerator, build_trainer, in_iterations
from tract_transfer.build_data import Data, build_data
from tract_transfer.build_model import build_evaluator, build_model
from tract_transfer.config import Config, ProbeConfig, dump_config
from tract_transfer.engine.cost import CostMeter
from tract_transfer.engine.dry_run import dry_run, dry_run_features
from tract_transfer.engine.run_folder import (
    CONFIG_NAME,
    ENVIRONMENT_NAME,
    RESULTS_NAME,
    environment,
    is_finished,
    log_to,
    open_run_folder,
)
from tract_transfer.engine.signals import Stopped
from tract_transfer.files import write_json
from tract_transfer.models import Backbone
from tract_transfer.results import label
from tract_transfer.run_probe import run_probe
from tract_transfer.run_training import eval_batches, measure, train
from tract_transfer.trained import reported_checkpoint

logger = logging.getLogger(__name__)


def run(config: Config, *, resume: bool = False) -> dict[str, Any]:
    """Carry out a run and return its results; `output_dir` then holds all of it.

    Raises:
        ConfigError, ValueError, FileNotFoundError: before training, wherever that can be known.
        FileExistsError: the folder holds another run, and `resume` is off.
        Stopped: a signal ended the training; its checkpoint is written.
    """
    folder = Path(config.output_dir)
    accelerator = build_accelerator(config)
    meter = CostMeter(accelerator.device)
    data = build_data(config)
    if isinstance(config, ProbeConfig):
        with _run_folder(config, folder, data, accelerator, resume=resume):
            return run_probe(config, data, folder, accelerator, meter)
    trainer = build_trainer(config, data, accelerator)
    with _run_folder(config, folder, data, accelerator, resume=resume):
        return train(config, data, trainer, folder, meter)


def is_done(config: Config) -> bool:
    """Whether the run in `output_dir` is finished.

    Raises:
        ValueError: it is, but was run with another config or with other weights.
    """
    folder = Path(config.output_dir)
    if not is_finished(folder):
        return False
    open_run_folder(folder, dump_config(config), resume=True)
    results = json.loads((folder / RESULTS_NAME).read_text())
    now = label(config)["weights_sha256"]
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
    folder = Path(config.output_dir)
    data = build_data(config)
    trainer = build_trainer(config, data, build_accelerator(config))
    path, parts = reported_checkpoint(config)
    try:
        trainer.load_weights(parts)
    except (RuntimeError, KeyError) as error:  # what load_state_dict raises, or no average in it
        raise ValueError(
            f"{path} holds another model than this config, or one of other classes. Use "
            f"{folder / CONFIG_NAME}. ({error})"
        ) from error
    split, dataset = data.report
    metrics, details, skipped = measure(config, trainer, dataset, data.class_names)
    if trainer.accelerator.is_main_process:
        found = {"checkpoint": path.name, "split": split, "metrics": metrics, "skipped": skipped}
        write_json(folder / "evaluation.json", {**found, "details": details})
    return metrics


def preview(config: Config) -> dict[str, str]:
    """Build everything, run two steps and one evaluation batch; return what a run would cost."""
    data = build_data(config)
    accelerator = build_accelerator(config)
    if isinstance(config, ProbeConfig):
        backbone = build_model(config, len(data.class_names)).to(accelerator.device)
        assert isinstance(backbone, Backbone)
        batch = next(iter(eval_batches(config, data.report[1], accelerator)))
        images = batch.images.to(accelerator.device)
        count = sum(len(dataset) for dataset in data.splits.values())
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


@contextmanager
def _run_folder(
    config: Config, folder: Path, data: Data, accelerator: Accelerator, *, resume: bool
) -> Iterator[None]:
    """Enter the run folder: config.yaml and environment.json in it, the log going to it."""
    with accelerator.main_process_first():
        open_run_folder(
            folder, dump_config(config), resume=resume or not accelerator.is_main_process
        )
    if not accelerator.is_main_process:
        yield
        return
    fingerprints = {name: dataset.fingerprint() for name, dataset in data.splits.items()}
    write_json(folder / ENVIRONMENT_NAME, environment(fingerprints))
    handler = log_to(folder)
    try:
        yield
    except Stopped:
        raise
    except Exception:
        # For the file alone: who called gets the error itself.
        failed = (logger.name, logging.ERROR, __file__, 0, "The run failed.", (), sys.exc_info())
        handler.handle(logger.makeRecord(*failed))
        raise
    finally:
        logging.getLogger("tract_transfer").removeHandler(handler)
        handler.close()
