"""The bridge back: a trained model from its run folder, ready to answer."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tract_transfer.build.batches import build_transforms
from tract_transfer.build.data import build_data
from tract_transfer.build.model import TrainedTask, build_evaluated, build_model
from tract_transfer.build.trainer import PRECISIONS, build_accelerator
from tract_transfer.config.schema import DetectionConfig, ProbeConfig, load_config
from tract_transfer.config.sections import BackboneConfig
from tract_transfer.engine.checkpoint import Checkpointer
from tract_transfer.engine.hooks import evaluating
from tract_transfer.engine.run_folder import CONFIG_NAME, RESULTS_NAME
from tract_transfer.models.weights import has_metadata, read_metadata


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
        """Whether it answers with boxes."""
        return isinstance(self.config, DetectionConfig)

    def predict(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """Answer for images, uint8 RGB (3, H, W) of any size, transformed as in the evaluation.

        Returns:
            A dict an image, on the CPU. A detector: boxes (n, 4) xyxy in the image's own pixels,
            scores (n,) descending, labels (n,). A classifier: scores (K,), probabilities
            descending, and their labels (K,).
        """
        precision = PRECISIONS[self.config.engine.precision]
        device = self.device
        with (
            evaluating(self.model),
            torch.autocast(device.type, precision, enabled=precision is not None),
        ):
            if self.detects:
                found = self.model([image.to(device) for image in images])
                return [{key: rows.cpu() for key, rows in one.items()} for one in found]
            _, transform = build_transforms(self.config)
            batch = torch.stack([transform(image) for image in images]).to(device)
            scores, labels = self.model(batch).float().softmax(dim=1).cpu().sort(1, descending=True)
        return [{"scores": s, "labels": k} for s, k in zip(scores, labels, strict=True)]


def reported_checkpoint(config: TrainedTask) -> tuple[Path, dict[str, Any]]:
    """Return path and parts of the checkpoint that a run in `output_dir` reports.

    Raises:
        FileNotFoundError: there is no whole checkpoint.
    """
    checkpointer = Checkpointer(Path(config.output_dir) / "checkpoints")
    path = checkpointer.best() if config.evaluation.report == "best" else checkpointer.newest()
    if path is None:
        raise FileNotFoundError(
            f"No whole checkpoint in {checkpointer.folder}: train first, or set output_dir."
        )
    return path, checkpointer.load(path)[0]


def load_trained(folder: Path, overrides: Sequence[str] = ()) -> Trained:
    """Load the model that the run in `folder` reports, or would as it stands.

    Neither its data nor the weights it started from are needed once it is finished.

    Args:
        overrides: over the run's own config.yaml, such as `engine.device=cpu`.

    Raises:
        FileNotFoundError: no run folder, or no whole checkpoint in it.
        ValueError: a probe's folder, or a checkpoint of another model than the config's.
    """
    if not (folder / CONFIG_NAME).is_file():
        raise FileNotFoundError(f"No {CONFIG_NAME} in {folder}: it is no run folder.")
    here = f"output_dir={json.dumps(str(folder))}"  # the folder may have been moved
    config = load_config(folder / CONFIG_NAME, [here, *overrides])
    if isinstance(config, ProbeConfig):
        raise config.error("task", "a probe trains nothing that could answer. Give another run.")
    checkpoint, parts = reported_checkpoint(config)
    class_names = _class_names(config, folder)
    model = build_model(_without_weights(config, folder), len(class_names))
    try:
        model.load_state_dict(parts.get("ema", parts["model"]))
    except (RuntimeError, KeyError) as error:
        raise ValueError(
            f"{checkpoint} holds another model than {folder / CONFIG_NAME}: {error}"
        ) from error
    device = build_accelerator(config).device
    model = build_evaluated(config, model.to(device))
    return Trained(config, model, class_names, checkpoint, device)


def _class_names(config: TrainedTask, folder: Path) -> list[str]:
    """Those of the results; before there are any, those of the data."""
    try:
        results = json.loads((folder / RESULTS_NAME).read_text(encoding="utf-8"))
    except OSError:
        return build_data(config).class_names
    return [str(name) for name in results["details"]["class_names"]]


def _without_weights(config: TrainedTask, folder: Path) -> TrainedTask:
    """Return the config of the same model that does not look for its first weights."""
    backbone = config.model.backbone
    if backbone.name is None and has_metadata(folder):
        card = read_metadata(folder)
        told = {key: card[key] for key in ("name", "stem", "args")}
        backbone = BackboneConfig(**told, mean=backbone.mean, std=backbone.std)
    if backbone.name is None:
        return config
    model = config.model.model_copy(update={"backbone": backbone, "weights": None})
    return config.model_copy(update={"model": model})
