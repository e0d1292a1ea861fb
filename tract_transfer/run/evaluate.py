"""What is done with a model besides training it: measure, preview, replay a step."""

import logging
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast, send_to_device
from torch.utils.data import DataLoader

from tract_transfer.build.batches import build_eval_loader
from tract_transfer.build.data import Dataset, build_data
from tract_transfer.build.model import build_evaluated, build_evaluator, preflight
from tract_transfer.build.trainer import build_accelerator, build_trainer, train_length
from tract_transfer.config.schema import Config, ProbeConfig, TrainedTask
from tract_transfer.data.loader import Batch
from tract_transfer.engine.cost import dry_run, dry_run_features
from tract_transfer.engine.debug_batch import load_debug_batch, replay
from tract_transfer.engine.determinism import deterministic
from tract_transfer.engine.hooks import evaluate
from tract_transfer.engine.non_finite import describe_images
from tract_transfer.engine.run_folder import check_run_folder
from tract_transfer.engine.screen import ProgressLine
from tract_transfer.engine.trainer import Trainer
from tract_transfer.files import CONFIG_NAME, write_json
from tract_transfer.run.probe import build_probed
from tract_transfer.run.results import Measured
from tract_transfer.run.trained import fits, reported_checkpoint

logger = logging.getLogger(__name__)


def measure(
    config: TrainedTask, trainer: Trainer, dataset: Dataset, class_names: list[str]
) -> Measured:
    """Evaluate the trainer's model on `dataset`; a signal raises Stopped."""
    evaluator = build_evaluator(config, class_names)
    # Processes update BatchNorm's statistics apart; a checkpoint holds those of the main process.
    broadcast(list(trainer.evaluated_model.buffers()))
    batches = eval_batches(config, dataset, trainer.accelerator)
    with ProgressLine(f"evaluating {dataset.name}, batch", len(batches)) as line:
        skipped = evaluate(
            build_evaluated(config, trainer.evaluated_model),
            trainer.stop.watched(line.track(batches)),
            evaluator,
            device=trainer.accelerator.device,
            precision=trainer.precision,
        )
    trainer.stop.check(trainer.accelerator)
    metrics = evaluator.compute()
    if config.evaluation.metric not in metrics:  # a plug-in promised it
        message = f"{config.evaluation.metric} is missing in what compute returned: {[*metrics]}."
        raise config.error("evaluation.protocol", message)
    return Measured(metrics, evaluator.details(), skipped)


def eval_batches(config: Config, dataset: Dataset, accelerator: Accelerator) -> DataLoader[Batch]:
    """Return one pass over a process's share of `dataset`."""
    rank, world_size = accelerator.process_index, accelerator.num_processes
    return build_eval_loader(config, dataset, rank=rank, world_size=world_size)


def evaluate_run(config: Config) -> dict[str, float]:
    """Measure the reported checkpoint in `output_dir` again, and write evaluation.json.

    Returns the metrics, that of `evaluation.metric` first.
    """
    if isinstance(config, ProbeConfig):
        raise config.error("task", "a probe trains no model that --eval-only could measure again.")
    preflight(config)
    folder = Path(config.output_dir)
    path, parts = reported_checkpoint(config)
    data = build_data(config)
    trainer = build_trainer(config, data, build_accelerator(config))
    with fits(path, f"Use {folder / CONFIG_NAME}, and data of the same classes."):
        trainer.load_weights(parts)
    split, dataset = data.report
    logger.info("Evaluating %s on %s: %s, %d images", path.name, split, dataset.name, len(dataset))
    with deterministic(config.engine.deterministic):
        metrics, details, skipped = measure(config, trainer, dataset, data.class_names)
    if trainer.accelerator.is_main_process:
        results = {"checkpoint": path.name, "split": split, "metrics": metrics, "skipped": skipped}
        write_json(folder / "evaluation.json", {**results, "details": details})
    primary = config.evaluation.metric
    return {primary: metrics[primary], **metrics}


def preview(config: Config, *, resume: bool = False) -> dict[str, str]:
    """Build everything, run two steps and one evaluation batch; return what a run would cost.

    Each stage is logged. If a run would be refused for what its folder contains, that is a warning.
    """
    preflight(config)
    try:
        check_run_folder(config, resume=resume)
    except (ValueError, OSError) as error:
        logger.warning("A run would be refused: %s", error)
    data = build_data(config)
    accelerator = build_accelerator(config)
    logger.info("Building the model")
    _, dataset = data.report
    batches = eval_batches(config, dataset, accelerator)
    if isinstance(config, ProbeConfig):
        backbone = build_probed(config, data).to(accelerator.device)
        images = next(iter(batches)).images.to(accelerator.device)
        count = sum(len(split) for split in data.splits.values())
        logger.info("Extracting the features of %d images", len(images))
        return dry_run_features(backbone, backbone.pooled, images, count)
    length = train_length(config, data.train)
    every = length.evaluate_every
    return dry_run(
        build_trainer(config, data, accelerator, length),
        batches,
        lambda: build_evaluator(config, data.class_names),
        num_eval_batches=len(batches),
        num_evaluations=1 + (length.max_iters // every if every else 0),
    )


def replay_debug_batch(config: Config, file: Path) -> list[str]:
    """Run the step in `file` again with its weights; return lines on where it is not finite."""
    if isinstance(config, ProbeConfig):
        raise config.error("task", "a probe trains nothing and keeps no batch.")
    preflight(config)
    kept = load_debug_batch(file)
    with deterministic(config.engine.deterministic):
        trainer = build_trainer(config, build_data(config), build_accelerator(config))
        with fits(file, f"Use the {CONFIG_NAME} beside it."):
            trainer.accelerator.unwrap_model(trainer.model).load_state_dict(kept.model)
        device = trainer.accelerator.device
        batches = [Batch(**send_to_device(batch, device), skipped=[]) for batch in kept.batches]
        return [
            f"Iteration {kept.iteration + 1}. {describe_images([kept.about])}",
            *replay(trainer, kept, batches),
        ]
