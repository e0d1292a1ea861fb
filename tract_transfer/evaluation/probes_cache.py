"""Features on disk: extracted once for a backbone's weights, transforms and images."""

# N images, D features

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from tract_transfer.evaluation.probes import Features, Labels
from tract_transfer.files import make_folder, replacing

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
    with replacing(path, sum(array.nbytes for array in arrays.values())) as aside:
        save_file(arrays, aside, metadata={"about": about})
    return made


def _read(path: Path, key: str) -> Extracted:
    with safe_open(path, framework="numpy") as stored:
        about = json.loads((stored.metadata() or {})["about"])
        if about["key"] != key:
            raise ValueError(f"it says it holds {about['key']}")
        features, indices = stored.get_tensor("features"), stored.get_tensor("indices")
    return Extracted(features, indices, about["skipped"], was_kept=True)
