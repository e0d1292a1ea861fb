"""Frozen features: extraction, a cache on disk, a part to select on, and the k-NN probe."""

# N rows, D features, K classes

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from tract_transfer.files import atomic_path, make_folder

logger = logging.getLogger(__name__)

Features = NDArray[np.float32]
Labels = NDArray[np.int64]
Scores = NDArray[np.floating[Any]]

_CACHE_VERSION = 1
_MAX_SIMILARITIES = 2**24  # computed at once, about 12 bytes each


class Rows(NamedTuple):
    """Features x (N, D) and their labels y: classes (N,), or marks (N, K) of several labels.

    A mark is 1 if the image shows the class, -1 if not, and 0 if the class excludes the image.
    """

    x: Features
    y: Labels


class Selection(NamedTuple):
    """Data to choose a hyperparameter on: candidates are fitted to `fit` and compared on `val`."""

    fit: Rows
    val: Rows


class Fit(NamedTuple):
    """A probe's scores (N, K) of the test images, its hyperparameters, and JSON-able details."""

    scores: Scores
    chosen: Mapping[str, Any] = {}
    details: Mapping[str, Any] = {}


@torch.inference_mode()
def extract_features(
    model_pooled: Callable[[Tensor], Tensor], batches: Iterable[Any], device: torch.device | str
) -> tuple[Features, Labels]:
    """Return features (N, D) and the indices (N,) of their images, on the CPU.

    Args:
        model_pooled: images on `device` to features (B, D); its model must be in eval mode.
        batches: each with `images` (B, 3, H, W) and `indices` (B,).
    """
    features: list[Features] = []
    indices: list[int] = []
    for batch in batches:
        pooled = model_pooled(batch.images.to(device, non_blocking=True))
        features.append(pooled.float().cpu().numpy())
        indices += map(int, batch.indices)
    if not features:
        raise ValueError("No batch to extract features from. Check that the split has rows.")
    x, index = np.concatenate(features), np.array(indices, np.int64)
    invalid = index[(~np.isfinite(x)).any(axis=1)].tolist()
    if invalid:
        listed = ", ".join(map(str, invalid[:5])) + ", ..." * (len(invalid) > 5)
        raise ValueError(
            f"Features must be finite: {len(invalid)} of {len(x)} rows hold nan or inf (images "
            f"{listed}). Check the weights of the backbone, or set engine.precision: fp32."
        )
    return x, index


class Extracted(NamedTuple):
    """Features (N, D), the indices (N,) of their images, and the items that cannot be decoded."""

    features: Features
    indices: Labels
    skipped: list[str]
    was_kept: bool = False  # read from the cache


def feature_key(
    described: Mapping[str, Any], state: Mapping[str, Tensor], image_hashes: Iterable[str]
) -> str:
    """Return the sha256 (hex) of everything that features depend on.

    Args:
        described: JSON-able, such as the architecture, the transforms and the precision.
        state: the backbone's weights and buffers.
        image_hashes: one for each image, in order.
    """
    digest = hashlib.sha256(json.dumps([_CACHE_VERSION, described], sort_keys=True).encode())
    for name, tensor in sorted(state.items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    digest.update("".join(image_hashes).encode())
    return digest.hexdigest()


def cached_features(folder: Path, key: str, extract: Callable[[], Extracted]) -> Extracted:
    """Return the features stored in `folder` under `key`; extract and store missing ones."""
    path = folder / f"{key}.safetensors"
    if path.is_file():
        try:
            with safe_open(path, framework="numpy") as file:
                skipped = json.loads((file.metadata() or {})["about"])["skipped"]
                features, indices = file.get_tensor("features"), file.get_tensor("indices")
            logger.info("Features read from %s", path)
            return Extracted(features, indices, skipped, was_kept=True)
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            logger.warning("%s is not an intact feature file, extracting again: %s", path, error)
    extracted = extract()
    make_folder(folder)
    features, indices = extracted.features, extracted.indices
    about = json.dumps({"key": key, "skipped": extracted.skipped})
    with atomic_path(path, features.nbytes + indices.nbytes) as temporary:
        save_file({"features": features, "indices": indices}, temporary, metadata={"about": about})
    return extracted


def hold_out_selection(train: Rows, val_fraction: float, seed: int) -> Selection:
    """Split `train`, stratified by class, into a part to fit and a part to select on.

    Raises:
        ValueError: fewer than two classes to fit, or no row to select on.
    """
    # Rows in class order, shuffled within a class; then every (1 / val_fraction)-th of them. So
    # each class gives its share within one row, and classes with too few rows for a share are used.
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(train.y))
    by_class = shuffled[np.argsort(train.y[shuffled], kind="stable")]
    steps = np.floor(np.arange(len(train.y) + 1) * val_fraction + rng.random())
    held_out = np.zeros(len(train.y), np.bool_)
    held_out[by_class] = np.diff(steps) > 0
    num_classes = len(np.unique(train.y[~held_out]))
    if num_classes < 2 or not held_out.any():
        raise ValueError(
            f"A probe needs at least 2 classes to fit and a row to select on; splitting "
            f"{len(train.y)} rows at {val_fraction=} leaves {num_classes} classes and "
            f"{held_out.sum()} rows. Use more training images, change evaluation.val_fraction, or "
            "set data.val."
        )
    fit, val = (Rows(train.x[part], train.y[part]) for part in (~held_out, held_out))
    return Selection(fit, val)


def unit_rows(x: Features) -> Features:
    """Return (N, D) rows of length 1; a row of zeros stays zero."""
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    unit: Features = x / np.maximum(norms, np.finfo(np.float32).tiny)
    return unit


def knn_predict(
    train: Rows, test_x: Features, *, ks: Sequence[int], temperature: float, num_classes: int
) -> dict[int, Scores]:
    """Return k -> (N, K) the share of each class in the vote of the k nearest training images.

    A neighbour with cosine similarity s votes with weight exp(s / temperature) (Wu et al. 2018, as
    in DINO). Weights are relative to the nearest neighbour's, so they do not overflow. A zero
    vector has similarity 0 to everything.
    """
    check_ks(ks, len(train.x))
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
        for k, of_k in scores.items():
            votes = weights[:, :k] / weights[:, :k].sum(axis=1, keepdims=True)
            size = len(near) * num_classes
            sums = np.bincount(cells[:, :k].ravel(), votes.ravel(), minlength=size)
            of_k[start : start + step] = sums.reshape(len(near), num_classes)
    return scores


def check_ks(ks: Sequence[int], num_train: int) -> None:
    """Raise ValueError if `ks` contains a k that is not in 1..num_train."""
    if not all(1 <= k <= num_train for k in ks):
        raise ValueError(
            f"evaluation.knn.ks must be in 1..{num_train}, the number of training images; got "
            f"{list(ks)}. Remove larger values, or use more training images."
        )
