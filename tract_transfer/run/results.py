"""What a result says of itself: its labels, and its protocol in words."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from tract_transfer.build.data import Data
from tract_transfer.build.model import TrainedTask
from tract_transfer.config.schema import Config, ProbeConfig
from tract_transfer.data.findings import size_checks
from tract_transfer.data.images import content_hashes, estimated_bytes
from tract_transfer.data.streaming import Stream
from tract_transfer.engine.run_folder import RESULTS_FORMAT
from tract_transfer.files import as_yaml
from tract_transfer.models.weights import read_metadata
from tract_transfer.models.weights_match import MatchReport

logger = logging.getLogger(__name__)

TRAINED_DIFFICULT = {
    "keep": "trained on like all others",
    "drop": "not trained on: background",
    "ignore": "not trained on: neither object nor background",
}


def label(config: Config) -> dict[str, Any]:
    """Return what a run is: format, task, name, method, role, seed, weights and tract.

    The method is the config's, or `tract` where TrAct trains or pre-trained the first layer.
    """
    method = config.method
    own = not isinstance(config, ProbeConfig) and config.tract.enabled
    if method is None:
        method = "tract" if own else _method_of_weights(config.model.weights)
    return {
        "format": RESULTS_FORMAT,
        "task": config.task,
        "name": config.name or config.task,
        "method": method,
        "role": "downstream" if config.model.weights else "pretrain",
        "seed": config.seed,
        "weights": config.model.weights,
        "weights_sha256": sha256_of_weights(config.model.weights),
        "tract": config.tract.model_dump() if own else None,  # type: ignore[union-attr]
    }


def log_weights(backbone: nn.Module) -> dict[str, Any] | None:
    """Log what became of the weights file a backbone was loaded from; return it for the results."""
    report = backbone.loaded
    if not isinstance(report, MatchReport):
        return None
    for line in report.lines():
        logger.info(line)
    return report.summary()


def protocol(config: Config, data: Data, details: dict[str, Any]) -> dict[str, str]:
    """Return what a reader must know beside the number, one sentence a subject.

    All runs that are compared should have it in common, so method and seed are not in it.
    """
    split, reported = data.report
    lines = {
        "train": f"{data.train.name}: {len(data.train)} images, {len(data.class_names)} classes",
        split: f"{reported.name}: {len(reported)} images",
        "transforms": as_yaml(config.data.transforms.model_dump(exclude_none=True)),
        "precision": config.engine.precision,
    }
    if sizes := dict.fromkeys(check.text for check in size_checks(data.splits).values()):
        lines["official splits"] = "; ".join(sizes)
    if isinstance(config, ProbeConfig):
        lines["probe"] = "features of the frozen backbone in eval mode, test transforms throughout"
        return lines
    lines |= _training_lines(config)
    if config.task == "detection":
        lines["sampling"] = as_yaml(
            config.data.model_dump(
                include={"empty_images", "invalid_boxes", "group_by_aspect", "repeat_threshold"}
            )
        )
        policy = config.model.detector.args.get("difficult_in_training", "keep")
        lines["difficult objects"] = TRAINED_DIFFICULT[policy]
    if config.evaluation.flip:
        joined = "detections joined by NMS" if config.task == "detection" else "logits averaged"
        lines["views"] = f"each image and its mirror image, {joined}"
    if isinstance(details.get("protocol"), str):
        lines["metric"] = details["protocol"]
    return lines


def _training_lines(config: TrainedTask) -> dict[str, str]:
    """Return what the weights of a training depend on beside its data, and how they are chosen."""
    engine, lines = config.engine, {}
    lines["optimization"] = as_yaml(config.solver.model_dump(exclude_none=True))
    clipped = "not clipped" if engine.grad_clip is None else f"clipped at {engine.grad_clip}"
    lines["batch"] = f"{config.data.batch_size} images a step, gradient norm {clipped}"
    lines["model"] = as_yaml(config.model.model_dump(exclude={"backbone", "weights"}))
    if config.task == "classification":
        mixing = config.data.model_dump(include={"mixup", "repeats"})
        if mixing != {"mixup": None, "repeats": 1}:
            lines["mixing"] = as_yaml(mixing)
    if (drop_path := config.model.backbone.drop_path) is not None:
        lines["stochastic depth"] = f"rate {drop_path.rate}, {drop_path.mode}"
    if config.evaluation.report == "best":
        lines["selection"] = f"best {config.evaluation.metric} on val"
    else:
        lines["selection"] = "none: the last checkpoint is reported"
    if config.evaluation.patience is not None:
        lines["early stopping"] = (
            f"after {config.evaluation.patience} evaluations on val without a better "
            f"{config.evaluation.metric}"
        )
    if config.solver.ema_decay:
        lines["average"] = f"exponential moving average, decay {config.solver.ema_decay}"
    return lines


def card(config: TrainedTask, data: Data, method: str, iterations: int) -> dict[str, Any]:
    """Return what a saved backbone's card says of its training."""
    tract = config.tract
    return {
        "method": method,
        "lam": tract.lam if tract.enabled else None,
        "lam_mode": tract.lam_mode if tract.enabled else None,
        "task": config.task,
        "seed": config.seed,
        "iterations": iterations,
        "data": {
            "train": data.train.name,
            "classes": data.class_names,
            "hub_ids": hub_ids(data),
        },
    }


def hub_ids(data: Data) -> dict[str, str]:
    """Return the Hugging Face ids of the splits that came from the hub."""
    ids = {split: dataset.origin.hub_id for split, dataset in data.splits.items()}
    return {split: hub_id for split, hub_id in ids.items() if hub_id}


def sha256_of_weights(weights: str | None) -> str | None:
    """Return the hash in the weights' card: of which training they are, not only which folder."""
    if weights in (None, "pretrained"):
        return None
    try:
        return str(read_metadata(Path(str(weights))).get("sha256"))
    except FileNotFoundError:
        return None


def _method_of_weights(weights: str | None) -> str:
    if weights in (None, "pretrained"):
        return "vanilla"
    try:
        return str(read_metadata(Path(weights)).get("method", "vanilla"))
    except FileNotFoundError:
        return "vanilla"


# --- Images to train or select on that are reported on too: told by the hash of their bytes.

MAX_COMPARED, MAX_BYTES = 100_000, 2**31  # of all splits together: above, it takes too long
_NAMED = 10


def find_leaks(
    data: Data, hashes: Mapping[str, Sequence[str]], rows: Mapping[str, Sequence[int]]
) -> dict[str, dict[str, Any]]:
    """Return, for train and val, how many of its images are reported on too, and the first ones.

    They stay; a warning is logged.

    Args:
        hashes: split -> the hash of each image's stored bytes.
        rows: split -> the images that count.
    """
    reported, tested = data.report
    first_with: dict[str, int] = {}
    for row in rows[reported]:
        first_with.setdefault(hashes[reported][row], row)
    found: dict[str, dict[str, Any]] = {}
    for name, split in data.splits.items():
        if name == reported:
            continue
        own = [row for row in rows[name] if hashes[name][row] in first_with]
        pairs = [
            [split.item(row), tested.item(first_with[hashes[name][row]])] for row in own[:_NAMED]
        ]
        found[name] = {f"images_in_{reported}": len(own), "first": pairs}
        if own:
            logger.warning(
                "%d of the %d images of %s are in %s too, the first: %s is %s. They stay; the "
                "result is that much too good.",
                len(own), len(rows[name]), name, reported, *pairs[0],
            )  # fmt: skip
    return found


def find_overlap(data: Data) -> dict[str, dict[str, Any]] | None:
    """Return `find_leaks` of all images; None where they are streamed or too many to read first."""
    splits = {name: each for name, each in data.splits.items() if not isinstance(each, Stream)}
    if len(splits) < len(data.splits) or _takes_long(splits):
        logger.info(
            "Not looked for: images of train in %s. tools/check_data.py does.", data.report[0]
        )
        return None
    hashes = {name: content_hashes(split.encoded, len(split)) for name, split in splits.items()}
    return find_leaks(data, hashes, {name: range(len(each)) for name, each in hashes.items()})


def _takes_long(splits: Mapping[str, Any]) -> bool:
    """Whether reading all images would hold up the start of a training: every one does it."""
    if sum(len(split) for split in splits.values()) > MAX_COMPARED:
        return True
    sizes = [estimated_bytes(split.encoded, len(split)) for split in splits.values()]
    return sum(sizes) > MAX_BYTES
