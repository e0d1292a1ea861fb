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
from accelerate.utils import gather_object

from tract_transfer.build import build_accelerator, build_trainer, in_iterations
from tract_transfer.build_batches import build_eval_loader
from tract_transfer.build_data import Data, Dataset, build_data
from tract_transfer.build_model import TrainedTask, build_evaluated, build_evaluator, build_model
from tract_transfer.config import Config, DetectionConfig, ProbeConfig, dump_config
from tract_transfer.data.detection import DetectionDataset
from tract_transfer.engine.checkpoint import Checkpointer
from tract_transfer.engine.cost import CostMeter
from tract_transfer.engine.dry_run import dry_run, dry_run_features
from tract_transfer.engine.evaluate import evaluate, share_buffers
from tract_transfer.engine.hooks import (
    LogProgress,
    MetricsFile,
    PeriodicEvaluation,
    SaveCheckpoints,
    format_metrics,
)
from tract_transfer.engine.run_folder import (
    CONFIG_NAME,
    ENVIRONMENT_NAME,
    RESULTS_NAME,
    environment,
    is_finished,
    log_to,
    open_run_folder,
    save_detections,
    write_results,
)
from tract_transfer.engine.signals import Stopped, stop_on_signals
from tract_transfer.engine.trainer import Hook, Trainer
from tract_transfer.files import write_json
from tract_transfer.models import Backbone
from tract_transfer.models.weights import save_backbone
from tract_transfer.results import card, label, log_weights, protocol
from tract_transfer.run_probe import run_probe
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
        return _train(config, data, trainer, folder, meter)


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
    metrics, details, skipped = _measure(config, trainer, dataset, data.class_names)
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
        batch = next(iter(_eval_batches(config, data.report[1], accelerator)))
        images = batch.images.to(accelerator.device)
        count = sum(len(dataset) for dataset in data.splits.values())
        return dry_run_features(backbone, backbone.pooled, images, count)
    trainer = build_trainer(config, data, accelerator)
    _, dataset = data.report
    batches = _eval_batches(config, dataset, accelerator)
    every = in_iterations(config, data.train).evaluate_every
    return dry_run(
        trainer,
        batches,
        lambda: build_evaluator(config, data.class_names),
        num_eval_batches=len(batches),
        num_evaluations=1 + (trainer.max_iters // every if every else 0),
    )


def _train(
    config: TrainedTask, data: Data, trainer: Trainer, folder: Path, meter: CostMeter
) -> dict[str, Any]:
    accelerator = trainer.accelerator
    labels = label(config)
    started_from = log_weights(trainer.evaluated_model.get_submodule("backbone"))
    length = in_iterations(config, data.train)
    checkpointer = Checkpointer(folder / "checkpoints", config.engine.checkpoint.keep)
    metrics_file = MetricsFile(
        folder, tensorboard=config.engine.log.tensorboard and accelerator.is_main_process
    )
    if newest := checkpointer.newest():
        trainer.load_state(*checkpointer.load(newest))
        logger.info("Resumed from %s", newest)
    if accelerator.is_main_process:
        metrics_file.cut_after(trainer.iteration)
    trainer.hooks = _hooks(config, data, trainer, checkpointer, metrics_file)
    with stop_on_signals(trainer):
        trainer.train()
    if trainer.stop_signal is not None:
        raise Stopped(trainer.stop_signal, str(folder))
    accelerator.wait_for_everyone()  # the main process may be marking the best
    reported = trainer.iteration
    if config.evaluation.report == "best" and (best := checkpointer.best()):
        parts, _, reported = checkpointer.load(best)
        trainer.load_weights(parts)
    split, dataset = data.report
    metrics, details, skipped = _measure(config, trainer, dataset, data.class_names)
    epochs = trainer.iteration / length.iters_per_epoch
    results = {
        **labels,
        "weights_match": started_from,
        "metrics": metrics,
        "primary_metric": config.evaluation.metric,
        "details": details,
        "iterations": trainer.iteration,
        "reported_iteration": reported,
        "epochs": epochs,
        "early_stop": _early_stop(trainer),
        "train_seconds": trainer.seconds,
        "images_per_second": trainer.seen_images / max(trainer.seconds, 1e-9),
        "cost": meter.read(whole=newest is None),
        "protocol": protocol(config, data, details),
        "skipped": sorted(set(gather_object([*trainer.skipped, *skipped]))),
        "mended_boxes": data.mended_boxes,
    }
    if accelerator.is_main_process:
        metrics_file.write(trainer.iteration, epochs, split, metrics)
        backbone = trainer.evaluated_model.get_submodule("backbone")
        assert isinstance(backbone, Backbone)
        save_backbone(folder, backbone, card(config, data, labels["method"], reported))
        if isinstance(config, DetectionConfig) and isinstance(dataset, DetectionDataset):
            count = config.evaluation.save_detections
            model = build_evaluated(config, trainer.evaluated_model)
            save_detections(folder, model, dataset, count, accelerator.device)
        write_results(folder, results)
    metrics_file.close()
    logger.info("%s %s", split, format_metrics(metrics))
    accelerator.wait_for_everyone()
    return results


def _early_stop(trainer: Trainer) -> dict[str, float] | None:
    """Where patience ended the training, and the best it had seen on val; None where it did not."""
    if not trainer.stopped_early or trainer.best is None:
        return None
    best = trainer.best
    return {
        "iteration": trainer.iteration,
        "best_iteration": best["iteration"],
        "best_value": best["value"],
    }


def _hooks(
    config: TrainedTask,
    data: Data,
    trainer: Trainer,
    checkpointer: Checkpointer,
    metrics_file: MetricsFile,
) -> list[Hook]:
    """Return what watches a training: its log, then its checkpoints, then its evaluations."""
    length = in_iterations(config, data.train)
    watched = "val" if data.val is not None else data.report[0]
    selects = config.evaluation.report == "best"
    patient = config.evaluation.patience is not None
    return [
        LogProgress(
            metrics_file,
            every_iters=config.engine.log.every_iters,
            iters_per_epoch=length.iters_per_epoch,
        ),
        SaveCheckpoints(
            checkpointer,
            [length.checkpoint_every, length.evaluate_every],
        ),
        PeriodicEvaluation(
            lambda: _measure(config, trainer, data.splits[watched], data.class_names)[0],
            every_iters=length.evaluate_every,
            at_end=watched != data.report[0] or selects,
            split=watched,
            metric=config.evaluation.metric,
            metrics=metrics_file,
            iters_per_epoch=length.iters_per_epoch,
            checkpointer=checkpointer if selects else None,
            selects=patient,
        ),
    ]


def _measure(
    config: TrainedTask, trainer: Trainer, dataset: Dataset, class_names: list[str]
) -> tuple[dict[str, float], dict[str, Any], list[str]]:
    """Return metrics, details and undecodable items of the model as it stands."""
    evaluator = build_evaluator(config, class_names)
    share_buffers(trainer.evaluated_model, trainer.accelerator)
    skipped = evaluate(
        build_evaluated(config, trainer.evaluated_model),
        _eval_batches(config, dataset, trainer.accelerator),
        evaluator,
        device=trainer.accelerator.device,
        precision=trainer.precision,
    )
    metrics: dict[str, float] = evaluator.compute()
    return metrics, evaluator.details(), skipped


def _eval_batches(config: Config, dataset: Dataset, accelerator: Accelerator) -> Any:
    """One pass over a process's share of `dataset`."""
    return build_eval_loader(
        config,
        dataset,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        pin_memory=accelerator.device.type == "cuda",
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
