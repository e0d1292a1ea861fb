"""What all probes of frozen features share: extraction, checks, and the part to select on."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from tract_transfer.files import atomic_path, make_folder

Features = NDArray[np.float32]
Labels = NDArray[np.int64]
Scores = NDArray[np.floating[Any]]

_NAMED_ROWS = 5


class Rows(NamedTuple):
    """Features x (N, D) and what they show, y: classes (N,), or marks (N, K) of several labels.

    A mark is 1 where the class is there, -1 where it is not, and 0 where that is not counted.
    """

    x: Features
    y: Labels


class Selection(NamedTuple):
    """What a hyperparameter is chosen on: candidates are fitted to `fit` and judged on `val`."""

    fit: Rows
    val: Rows


@dataclass(frozen=True, eq=False)
class Fit:
    """What a probe found.

    Attributes:
        scores: (N, K) of the test images; the largest is the prediction.
        chosen: the hyperparameters selected, by name.
        details: JSON-able, such as what every candidate scored.
    """

    scores: Scores
    chosen: dict[str, Any] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)


@torch.inference_mode()
def extract_features(
    model_pooled: Callable[[Tensor], Tensor], batches: Iterable[Any], device: torch.device | str
) -> tuple[Features, Labels]:
    """Return features (N, D) and the indices (N,) of their images, on the CPU.

    Args:
        model_pooled: images on `device` to features (B, D); its model must be in eval mode.
        batches: each with `images` (B, 3, H, W) and `indices` (B,).
        device: where the model stands.

    Raises:
        ValueError: no batch, features that are not (B, D), or not finite.
    """
    features: list[Tensor] = []
    indices: list[Tensor] = []
    for batch in batches:
        pooled = model_pooled(batch.images.to(device, non_blocking=True))
        if pooled.ndim != 2:
            raise ValueError(f"Pooled features must be (B, D), got {tuple(pooled.shape)}.")
        features.append(pooled.float().cpu())
        indices.append(torch.as_tensor(batch.indices).cpu().long())
    if not features:
        raise ValueError("No batch to extract features from. Check that the split has rows.")
    x, index = torch.cat(features).numpy(), torch.cat(indices).numpy()
    check_finite("extracted", x, index)
    return x, index


def hold_out_selection(train: Rows, val_fraction: float, seed: int) -> Selection:
    """Split `train` by class into what candidates are fitted to and what they are judged on.

    Raises:
        ValueError: `val_fraction` is not in (0, 1), or leaves fewer than two classes to fit or no
            row to select on.
    """
    held_out = stratified_part(train.y, val_fraction, seed)
    num_classes = len(np.unique(train.y[~held_out]))
    if num_classes < 2 or not held_out.any():
        raise ValueError(
            f"A probe needs 2 classes to fit and a row to select on; {len(train.y)} rows split at "
            f"{val_fraction=} give {num_classes} classes and {held_out.sum()} rows. Give the probe "
            "more training images, evaluation.val_fraction another value, or set data.val."
        )
    fit, val = (Rows(train.x[part], train.y[part]) for part in (~held_out, held_out))
    return Selection(fit, val)


def stratified_part(labels: Labels, fraction: float, seed: int) -> NDArray[np.bool_]:
    """Return an (N,) mask of about N x fraction rows, within one row of that share in each class.

    Raises:
        ValueError: `fraction` is not in (0, 1).
    """
    if not 0 < fraction < 1:
        raise ValueError(f"The validation fraction must be in (0, 1), got {fraction}.")
    # Rows in class order, shuffled within a class; then every (1 / fraction)-th of them. This also
    # serves classes of too few rows for a share of their own.
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    steps = np.floor(np.arange(len(labels) + 1) * fraction + rng.random())
    mask = np.zeros(len(labels), np.bool_)
    mask[by_class] = np.diff(steps) > 0
    return mask


def accuracy(scores: Scores, labels: Labels) -> float:
    """Return the share of rows whose largest score (N, K) is their label's (N,)."""
    return float((scores.argmax(axis=1) == labels).mean())


def unit_rows(x: Features) -> Features:
    """Return (N, D) rows of length 1; a row of zeros stays."""
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    unit: Features = x / np.maximum(norms, np.finfo(np.float32).tiny)
    return unit


def check_probe(train: Rows, test_x: Features, num_classes: int) -> None:
    """Refuse what no probe can use.

    Raises:
        ValueError: shapes that do not fit, labels that are not in 0..num_classes - 1 or of fewer
            than two classes, or features that are not finite.
    """
    if train.x.ndim != 2 or test_x.ndim != 2 or train.x.shape[1] != test_x.shape[1]:
        raise ValueError(f"Need features (N, D) of one D: {train.x.shape}, {test_x.shape}.")
    if train.y.shape != train.x.shape[:1] or len(train.y) == 0:
        raise ValueError(f"Need a label a training row: {train.y.shape} for {train.x.shape}.")
    if train.y.min() < 0 or train.y.max() >= num_classes:
        raise ValueError(
            f"Training labels must be in 0..{num_classes - 1}, "
            f"got {train.y.min()}..{train.y.max()}."
        )
    if train.y.min() == train.y.max():
        raise ValueError(
            f"A probe needs 2 classes, and all {len(train.y)} training rows are of class "
            f"{train.y[0]}. Give data.train images of another class too."
        )
    check_finite("training", train.x)
    check_finite("test", test_x)


def check_finite(what: str, x: Features, indices: Labels | None = None) -> None:
    """Raise ValueError where a row of `x` (N, D) has nan or inf; `indices` (N,) are its images."""
    rows = np.flatnonzero((~np.isfinite(x)).any(axis=1))
    if not len(rows):
        return
    named = (rows if indices is None else indices[rows]).tolist()
    listed = ", ".join(map(str, named[:_NAMED_ROWS])) + (
        ", ..." if len(named) > _NAMED_ROWS else ""
    )
    raise ValueError(
        f"Features must be finite: {len(rows)} of {len(x)} {what} rows hold nan or inf (images "
        f"{listed}). Check the weights of the backbone, or set engine.precision: fp32."
    )


# --- Features on disk: extracted once for a backbone's weights, transforms and images.

logger = logging.getLogger(__name__)
_VERSION = 1


class Extracted(NamedTuple):
    """Features (N, D), the indices (N,) of their images, and what could not be decoded.

    `was_kept`: they were extracted before, and read now.
    """

    features: Features
    indices: Labels
    skipped: list[str]
    was_kept: bool = False


def feature_key(
    described: Mapping[str, Any], state: Mapping[str, Tensor], image_hashes: Iterable[str]
) -> str:
    """Return the sha256 (hex) of all that features depend on.

    Args:
        described: JSON-able, such as the architecture, the transforms and the precision.
        state: the backbone's weights and buffers.
        image_hashes: one for each image, in order.
    """
    digest = hashlib.sha256(json.dumps([_VERSION, described], sort_keys=True).encode())
    for name, tensor in sorted(state.items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(
            tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    for image_hash in image_hashes:
        digest.update(image_hash.encode())
    return digest.hexdigest()


def cached_features(folder: Path, key: str, extract: Callable[[], Extracted]) -> Extracted:
    """Return the features kept in `folder` under `key`, or extract and keep them.

    A file that cannot be read is named in the log and written anew; a reader sees a whole one
    or none.
    """
    path = folder / f"{key}.safetensors"
    if path.is_file():
        try:
            found = _read(path, key)
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            logger.warning("%s is no whole file of features: extracted anew. (%s)", path, error)
        else:
            logger.info("Features read from %s", path)
            return found
    made = extract()
    make_folder(folder)
    arrays: dict[str, NDArray[Any]] = {"features": made.features, "indices": made.indices}
    about = json.dumps({"key": key, "skipped": made.skipped})
    with atomic_path(path, sum(array.nbytes for array in arrays.values())) as aside:
        save_file(arrays, aside, metadata={"about": about})
    return made


def _read(path: Path, key: str) -> Extracted:
    with safe_open(path, framework="numpy") as stored:
        about = json.loads((stored.metadata() or {})["about"])
        if about["key"] != key:
            raise ValueError(f"it says it holds {about['key']}")
        features, indices = stored.get_tensor("features"), stored.get_tensor("indices")
    return Extracted(features, indices, about["skipped"], was_kept=True)


# --- Weighted nearest neighbours on frozen features.

# Similarities held at once; with the indices of the partition about 12 bytes each.
_MAX_SIMILARITIES = 2**24


def knn_predict(
    train: Rows,
    test_x: Features,
    *,
    ks: Sequence[int],
    temperature: float,
    num_classes: int,
) -> dict[int, Scores]:
    """Return k -> (N, K) the share of each class in the vote of the k nearest training images.

    A neighbour of cosine similarity s votes with weight exp(s / temperature) (Wu et al. 2018,
    as in DINO). Weights are taken relative to the nearest one, so no temperature overflows them.
    A zero feature vector has similarity 0 to everything. The similarities are computed once for
    all `ks`, a block of test images at a time.

    Raises:
        ValueError: no k or one not in 1..len(train.x), temperature <= 0, shapes or labels that do
            not fit, or features that are not finite.
    """
    check_probe(train, test_x, num_classes)
    check_ks(ks, len(train.x))
    if not temperature > 0:
        raise ValueError(f"The temperature of kNN must be > 0, got {temperature}.")
    train_unit, test_unit = unit_rows(train.x), unit_rows(test_x)
    scores = {k: np.empty((len(test_x), num_classes), np.float32) for k in ks}
    most, step = max(ks), max(1, _MAX_SIMILARITIES // len(train.x))
    for start in range(0, len(test_x), step):
        similarity = test_unit[start : start + step] @ train_unit.T
        nearest = np.argpartition(similarity, -most, axis=1)[:, -most:]
        near = np.take_along_axis(similarity, nearest, axis=1).astype(np.float64)
        order = np.argsort(-near, axis=1, kind="stable")
        nearest = np.take_along_axis(nearest, order, axis=1)
        near = np.take_along_axis(near, order, axis=1)
        weights = np.exp((near - near[:, :1]) / temperature)
        cells = np.arange(len(near))[:, None] * num_classes + train.y[nearest]
        for k, found in scores.items():
            votes = weights[:, :k] / weights[:, :k].sum(axis=1, keepdims=True)
            sums = np.bincount(
                cells[:, :k].ravel(), votes.ravel(), minlength=len(near) * num_classes
            )
            found[start : start + step] = sums.reshape(len(near), num_classes)
    return scores


def check_ks(ks: Sequence[int], num_train: int) -> None:
    """Raise ValueError where `ks` is empty or has one that is not in 1..num_train."""
    if len(ks) == 0 or not all(1 <= k <= num_train for k in ks):
        raise ValueError(
            f"evaluation.knn.ks must be in 1..{num_train}, the number of training images; got "
            f"{list(ks)}. Leave out what is larger, or give the probe more training images."
        )
