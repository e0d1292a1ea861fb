"""A training: from a built trainer to the results, and everything between that is written."""

import contextlib
import logging
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from tract_transfer.build.batches import build_eval_loader
from tract_transfer.build.data import Data, Dataset
from tract_transfer.build.model import TrainedTask, build_evaluated, build_evaluator
from tract_transfer.build.trainer import in_iterations
from tract_transfer.config.schema import Config, DetectionConfig
from tract_transfer.data.detection import DetectionDataset
from tract_transfer.engine.checkpoint import Checkpointer
from tract_transfer.engine.cost import CostMeter
from tract_transfer.engine.debug_batch import keep_debug_batch
from tract_transfer.engine.group import StopRequest, check_same, main_first
from tract_transfer.engine.hooks import (
    LogProgress,
    MetricsFile,
    PeriodicEvaluation,
    SaveCheckpoints,
    evaluate,
    format_metrics,
    share_buffers,
)
from tract_transfer.engine.run_folder import save_detections, write_results
from tract_transfer.engine.trainer import Hook, Trainer
from tract_transfer.models import Backbone
from tract_transfer.models.weights import save_backbone
from tract_transfer.run.results import card, find_overlap, label, log_weights, protocol

logger = logging.getLogger(__name__)


def train(
    config: TrainedTask,
    data: Data,
    trainer: Trainer,
    folder: Path,
    stop: StopRequest,
    meter: CostMeter,
) -> dict[str, Any]:
    """Train, or go on from the newest checkpoint in `folder`; return and write the results.

    Raises:
        Stopped: a signal came; the training goes on from its checkpoint.
    """
    accelerator = trainer.accelerator
    checkpointer = Checkpointer(folder / "checkpoints", config.engine.checkpoint.keep)
    board = config.engine.log.tensorboard and accelerator.is_main_process
    with contextlib.closing(MetricsFile(folder, tensorboard=board)) as metrics_file:
        started_from = log_weights(trainer.evaluated_model.get_submodule("backbone"))
        _go_on(trainer, checkpointer)
        whole = trainer.iteration == 0
        if accelerator.is_main_process:
            metrics_file.cut_after(trainer.iteration)
        leaks = find_overlap(data) if accelerator.is_main_process else None
        trainer.hooks = _hooks(config, data, trainer, checkpointer, metrics_file)
        trainer.stop = stop
        with stop.waits(), keep_debug_batch(trainer, folder):
            trainer.train()
            stop.check(accelerator)
            accelerator.wait_for_everyone()  # the main process may be marking the best
            results = _report(config, data, trainer, checkpointer, metrics_file)
            results["weights_match"], results["leaks"] = started_from, leaks
            results["cost"] = meter.read(whole=whole)
            if accelerator.is_main_process:
                write_results(folder, results)
    logger.info("%s %s", data.report[0], format_metrics(results["metrics"]))
    accelerator.wait_for_everyone()
    return results


def _go_on(trainer: Trainer, checkpointer: Checkpointer) -> None:
    """Take up the newest checkpoint, if there is one; every process the same.

    Raises:
        ValueError: it holds another model, or the processes see different ones.
    """
    accelerator = trainer.accelerator
    main_first(accelerator, checkpointer.tidy)
    newest = checkpointer.newest()
    if newest is not None:
        parts, state, iteration = checkpointer.load(newest)
        try:
            trainer.load_state(parts, state, iteration)
        except (KeyError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"{newest} is whole, but not of this model or of this version: {error}. Go on with "
                "the version that wrote it (environment.json), or set another output_dir."
            ) from error
        logger.info("Resumed from %s", newest)
    elif broken := sorted(checkpointer.folder.glob("broken-*")):
        logger.warning("No checkpoint but %s: the training starts anew.", broken[-1].name)
    check_same(trainer.iteration, "iterations to go on from")
    main_first(accelerator, lambda: checkpointer.repair_best(trainer.best, trainer.iteration))


def _report(
    config: TrainedTask,
    data: Data,
    trainer: Trainer,
    checkpointer: Checkpointer,
    metrics_file: MetricsFile,
) -> dict[str, Any]:
    """Measure the reported checkpoint; return the results and write all that goes with them."""
    reported = trainer.iteration
    if config.evaluation.report == "best":
        best = checkpointer.best()
        if best is None:
            raise ValueError(
                f"{checkpointer.folder} lost the best checkpoint, which evaluation.report: best "
                "is to report. Set another output_dir to train anew."
            )
        parts, _, reported = checkpointer.load(best)
        trainer.load_weights(parts)
    split, dataset = data.report
    metrics, details, skipped = measure(config, trainer, dataset, data.class_names)
    epochs = trainer.iteration / in_iterations(config, data.train).iters_per_epoch
    results = {
        **label(config),
        "metrics": metrics,
        "primary_metric": config.evaluation.metric,
        "details": details,
        "iterations": trainer.iteration,
        "reported_iteration": reported,
        "epochs": epochs,
        "early_stop": _early_stop(trainer),
        "train_seconds": trainer.seconds,
        "images_per_second": trainer.seen_images / max(trainer.seconds, 1e-9),
        "protocol": protocol(config, data, details),
        "skipped": sorted(set(gather_object([*trainer.skipped, *skipped]))),
        "skipped_steps": trainer.guard.skipped_steps,
        "mended_boxes": data.mended_boxes,
    }
    if trainer.accelerator.is_main_process:
        metrics_file.write(trainer.iteration, epochs, split, metrics)
        _write_model(config, data, trainer, checkpointer.folder.parent, results)
    return results


def _write_model(
    config: TrainedTask, data: Data, trainer: Trainer, folder: Path, results: dict[str, Any]
) -> None:
    """Write the backbone with its card, and what a detector finds in the first images."""
    backbone = trainer.evaluated_model.get_submodule("backbone")
    assert isinstance(backbone, Backbone)
    about = card(config, data, results["method"], results["reported_iteration"])
    save_backbone(folder, backbone, about)
    dataset = data.report[1]
    if isinstance(config, DetectionConfig) and isinstance(dataset, DetectionDataset):
        count = config.evaluation.save_detections
        model = build_evaluated(config, trainer.evaluated_model)
        save_detections(folder, model, dataset, count, trainer.accelerator.device)


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
            metrics_file,
        ),
        PeriodicEvaluation(
            lambda: measure(config, trainer, data.splits[watched], data.class_names)[0],
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


def measure(
    config: TrainedTask, trainer: Trainer, dataset: Dataset, class_names: list[str]
) -> tuple[dict[str, float], dict[str, Any], list[str]]:
    """Return metrics, details and undecodable items of the model as it stands.

    Raises:
        Stopped: a signal came in the middle of it.
    """
    evaluator = build_evaluator(config, class_names)
    share_buffers(trainer.evaluated_model, trainer.accelerator)
    skipped = evaluate(
        build_evaluated(config, trainer.evaluated_model),
        trainer.stop.watched(eval_batches(config, dataset, trainer.accelerator)),
        evaluator,
        device=trainer.accelerator.device,
        precision=trainer.precision,
    )
    trainer.stop.check(trainer.accelerator)
    metrics: dict[str, float] = evaluator.compute()
    return metrics, evaluator.details(), skipped


def eval_batches(config: Config, dataset: Dataset, accelerator: Accelerator) -> Any:
    """One pass over a process's share of `dataset`."""
    return build_eval_loader(
        config,
        dataset,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        pin_memory=accelerator.device.type == "cuda",
    )
