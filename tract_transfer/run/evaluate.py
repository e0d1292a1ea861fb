"""What is done with a model besides training it: measure, predict, preview, replay a step."""

import contextlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, send_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tract_transfer.build.batches import build_eval_loader, build_transforms
from tract_transfer.build.data import Dataset, build_data
from tract_transfer.build.model import build_evaluated, build_evaluator, build_model, preflight
from tract_transfer.build.trainer import PRECISIONS, build_accelerator, build_trainer, train_length
from tract_transfer.config.schema import (
    Config,
    DetectionConfig,
    ProbeConfig,
    TrainedTask,
    load_config,
)
from tract_transfer.config.sections import BackboneConfig
from tract_transfer.data.loader import Batch
from tract_transfer.engine.checkpoint import Checkpointer
from tract_transfer.engine.cost import dry_run, dry_run_features
from tract_transfer.engine.debug_batch import load_debug_batch, replay
from tract_transfer.engine.determinism import deterministic
from tract_transfer.engine.hooks import evaluate, evaluating
from tract_transfer.engine.non_finite import describe_images
from tract_transfer.engine.run_folder import check_run_folder
from tract_transfer.engine.screen import ProgressLine
from tract_transfer.engine.trainer import Trainer
from tract_transfer.files import CONFIG_NAME, RESULTS_NAME, write_json
from tract_transfer.models.weights import has_metadata, read_metadata
from tract_transfer.run.probe import build_probed
from tract_transfer.run.results import Measured

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
    return Measured(evaluator.compute(), evaluator.details(), skipped)


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
    with _fits(path, f"Use {folder / CONFIG_NAME}, and data of the same classes."):
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
        with _fits(file, f"Use the {CONFIG_NAME} beside it."):
            trainer.accelerator.unwrap_model(trainer.model).load_state_dict(kept.model)
        device = trainer.accelerator.device
        batches = [Batch(**send_to_device(batch, device), skipped=[]) for batch in kept.batches]
        return [
            f"Iteration {kept.iteration + 1}. {describe_images([kept.about])}",
            *replay(trainer, kept, batches),
        ]


@dataclass
class Trained:
    """A run's reported model on its device, with the K class names and its checkpoint."""

    config: TrainedTask
    model: nn.Module
    class_names: list[str]
    checkpoint: Path
    device: torch.device

    @property
    def detects(self) -> bool:
        """Whether predictions are boxes."""
        return isinstance(self.config, DetectionConfig)

    def predict(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """Predict for images, uint8 RGB (3, H, W) of any size, transformed as in the evaluation.

        Returns:
            A dict an image, on the CPU. A detector: boxes (n, 4) xyxy in the image's own pixels,
            scores (n,) descending, labels (n,). A classifier: scores (K,), probabilities
            descending, and their labels (K,).
        """
        precision, device = PRECISIONS[self.config.engine.precision], self.device
        autocast = torch.autocast(device.type, precision, enabled=precision is not None)
        with evaluating(self.model), autocast:
            if self.detects:
                detections = self.model([image.to(device) for image in images])
                return [{key: rows.cpu() for key, rows in one.items()} for one in detections]
            _, transform = build_transforms(self.config)
            batch = torch.stack([transform(image) for image in images]).to(device)
            scores, labels = self.model(batch).float().softmax(dim=1).cpu().sort(1, descending=True)
        return [{"scores": s, "labels": k} for s, k in zip(scores, labels, strict=True)]


def reported_checkpoint(config: TrainedTask) -> tuple[Path, dict[str, Any]]:
    """Return path and tensors of the checkpoint that a run in `output_dir` reports."""
    checkpointer = Checkpointer(Path(config.output_dir) / "checkpoints")
    path = checkpointer.best() if config.evaluation.report == "best" else checkpointer.newest()
    if path is None:
        raise FileNotFoundError(
            f"No complete checkpoint in {checkpointer.folder}. Train first, or set output_dir."
        )
    return path, checkpointer.load(path)[0]


def run_config(folder: Path, overrides: Sequence[str] = ()) -> Config:
    """Return the config of the run in `folder`, which may have been moved.

    Raises:
        FileNotFoundError: no run folder.
    """
    if not (folder / CONFIG_NAME).is_file():
        raise FileNotFoundError(f"{folder} is not a run folder: it contains no {CONFIG_NAME}.")
    return load_config(folder / CONFIG_NAME, [f"output_dir={json.dumps(str(folder))}", *overrides])


def load_trained(folder: Path, overrides: Sequence[str] = ()) -> Trained:
    """Load the model that the run in `folder` reports, or would report at its newest checkpoint.

    A finished run needs neither its data nor the weights it started from.

    Args:
        overrides: of the run's own config.yaml, such as `engine.device=cpu`.

    Raises:
        FileNotFoundError: no run folder, or no complete checkpoint in it.
        ValueError: a probe's folder, or a checkpoint of another model than the config's.
    """
    config = run_config(folder, overrides)
    if isinstance(config, ProbeConfig):
        raise config.error("task", "a probe trains no model. Give another run.")
    checkpoint, parts = reported_checkpoint(config)
    try:
        results = json.loads((folder / RESULTS_NAME).read_text(encoding="utf-8"))
        class_names = [str(name) for name in results["details"]["class_names"]]
    except OSError:  # not finished
        class_names = build_data(config).class_names
    model = build_model(_without_weights(config, folder), len(class_names))
    with _fits(checkpoint, f"Put back the {CONFIG_NAME} that the run wrote."):
        model.load_state_dict(parts.get("ema", parts["model"]))
    device = build_accelerator(config).device
    model = build_evaluated(config, model.to(device))
    return Trained(config, model, class_names, checkpoint, device)


@contextlib.contextmanager
def _fits(file: Path, fix: str) -> Iterator[None]:
    """Explain an error of load_state_dict, or that there is no average to load."""
    try:
        yield
    except (RuntimeError, KeyError) as error:
        raise ValueError(f"{file} holds another model than this config. {fix} ({error})") from error


def _without_weights(config: TrainedTask, folder: Path) -> TrainedTask:
    """Return the config of the same model without its initial weights."""
    backbone = config.model.backbone
    if backbone.name is None and has_metadata(folder):
        metadata = read_metadata(folder)
        origin = {key: metadata[key] for key in ("name", "stem", "args")}
        backbone = BackboneConfig(**origin, mean=backbone.mean, std=backbone.std)
    if backbone.name is None:
        return config
    model = config.model.model_copy(update={"backbone": backbone, "weights": None})
    return config.model_copy(update={"model": model})
