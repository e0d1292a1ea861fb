"""A small dataset on its device: decoded once, augmented a batch at a time.

The random numbers of an image are a hash of (seed, epoch, index, copy): the law of loader.py, by
other numbers. No worker is needed, and where a run was resumed does not show.
"""

# N images in the dataset, B in a batch, P their side

import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torchvision.transforms import InterpolationMode, v2

from tract_transfer.data.batch_augment import BatchAugment
from tract_transfer.data.images import UndecodableImage
from tract_transfer.data.loader import Batch, ImageDataset
from tract_transfer.data.sampling import Sample, mix

_GOLDEN = 0x9E3779B97F4A7C15


class ResidentImages:
    """The images of a classification dataset as one uint8 tensor (N, 3, P, P) on `device`.

    Args:
        size_px: P; the short side is resized to it once, and must then be the long one too. None:
            all images are of one size, and stay so.
        interpolation: of that resizing: nearest, bilinear or bicubic.
        undecodable: `skip` leaves those out that cannot be decoded, and every batch says so.

    Raises:
        UndecodableImage: the first that cannot be decoded, where they are not to be skipped.
        ValueError: an image is not square, or not of the others' size; or there is not enough
            memory.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        size_px: int | None,
        device: torch.device,
        *,
        interpolation: str = "bilinear",
        undecodable: str = "error",
    ) -> None:
        side = size_px or _first_side(dataset, undecodable)
        shape = (len(dataset), 3, side, side)
        needed, available = math.prod(shape), _available_bytes(device)
        if needed > available:
            raise ValueError(
                f"data.cache: device needs {needed / 2**30:.1f} GiB for {len(dataset)} images of "
                f"{side} px, and {device} has {available / 2**30:.1f} GiB. Set data.cache: none."
            )
        self.images = torch.zeros(shape, dtype=torch.uint8, device=device)
        self.skipped: dict[int, str] = {}
        resize = v2.Resize(side, InterpolationMode(interpolation))
        for index in range(len(dataset)):
            try:
                image = dataset.image(index)
            except UndecodableImage as error:
                if undecodable != "skip":
                    raise
                self.skipped[index] = f"{error.item}: {error.reason}"
                continue
            image = resize(image) if size_px else image
            if image.shape[1:] != shape[2:]:
                wanted = (
                    "square images" if size_px else f"images of one size, here {side} px square"
                )
                raise ValueError(
                    f"data.cache: device needs {wanted}, and image {index} is {image.shape[2]} x "
                    f"{image.shape[1]} px{f' with its short side at {side}' if size_px else ''}. "
                    "Set data.cache: none or ram."
                )
            self.images[index] = image.to(device)
        labels = [dataset.target(index) for index in range(len(dataset))]
        self.labels = torch.tensor(labels, dtype=torch.int64, device=device)


def resident_batches(
    data: ResidentImages,
    sampler: Iterable[Sequence[Sample]],
    *,
    seed: int,
    augment: BatchAugment,
) -> Iterator[Batch]:
    """Yield the micro-batches of `sampler`, each image augmented by its own numbers."""
    for samples in sampler:
        whole, skipped = samples, []
        if data.skipped:
            skipped = [data.skipped[s.index] for s in samples if s.index in data.skipped]
            whole = [s for s in samples if s.index not in data.skipped]
        # (B, 3); np.array of the tuples takes four times as long.
        rows = np.fromiter(itertools.chain.from_iterable(whole), np.int64).reshape(-1, 3)
        indices = rows[:, 1].tolist()
        if not whole:
            yield Batch([], [], indices, skipped)
            continue
        chosen = torch.from_numpy(rows[:, 1].copy()).to(data.images.device)
        draws = hashed_uniform(seed, rows.view(np.uint64), augment.num_draws)
        images = augment(data.images.index_select(0, chosen), draws)
        yield Batch(images, data.labels.index_select(0, chosen), indices, skipped)


def _first_side(dataset: ImageDataset, undecodable: str) -> int:
    """Return the height of the first image that can be decoded."""
    passed_over = (UndecodableImage,) if undecodable == "skip" else ()
    for index in range(len(dataset)):
        with contextlib.suppress(*passed_over):
            return dataset.image(index).shape[1]
    raise ValueError("data.cache: device found no image that can be decoded.")


def _available_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)


def hashed_uniform(seed: int, rows: NDArray[np.uint64], count: int) -> NDArray[np.float64]:
    """Return `count` numbers in [0, 1) for each of `rows` (B, P): a function of seed and row.

    Each part is added to the state and scrambled by the finaliser of SplitMix64 (Steele, Lea,
    Flood, OOPSLA 2014).

    Returns:
        (B, count).
    """
    state = np.full((len(rows), 1), mix(seed), dtype=np.uint64)
    for part in rows.T:
        state = _scramble(state + part[:, None] + np.uint64(1))
    steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    # 53 bits: what a float64 holds.
    draws: NDArray[np.float64] = (_scramble(state + steps) >> np.uint64(11)) / 2.0**53
    return draws


def _scramble(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    state = state * np.uint64(_GOLDEN)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    scrambled: NDArray[np.uint64] = state ^ (state >> np.uint64(31))
    return scrambled
