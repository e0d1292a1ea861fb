"""Which images an iteration sees: a function of the seed and the iteration alone.

It does not depend on the number of workers or processes, nor on where a run was resumed.
"""

# N images, M objects, B images a batch

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler

_GROUPS = ("wide or square", "tall")


class Sample(NamedTuple):
    """The `copy`-th showing of an image in an epoch, from 0."""

    epoch: int
    index: int  # type: ignore[assignment]  # hides tuple.index
    copy: int = 0


def mix(*parts: int) -> int:
    """Hash integers to 64 bits, so that neighboring seeds share nothing."""
    text = ",".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def aspect_groups(sizes: np.ndarray) -> np.ndarray:
    """Return int64 (N,): 1 where an image of `sizes` (N, 2) (height, width) is tall, else 0."""
    return np.asarray(sizes[:, 0] > sizes[:, 1], dtype=np.int64)


def repeat_factors(
    first: np.ndarray, labels: np.ndarray, num_classes: int, threshold: float
) -> np.ndarray:
    """Return how often an epoch shows each image, float64 (N,), at least 1 (LVIS, appendix B.2).

    The factor of a class in a fraction f of the images is max(1, sqrt(threshold / f)). An image has
    the largest factor of its classes, or 1 if it has no objects. Image i has the int64 labels
    `labels[first[i]:first[i + 1]]`; `threshold` is in (0, 1].
    """
    num_images = len(first) - 1
    image_of = np.repeat(np.arange(num_images), np.diff(first))
    pairs = np.unique(np.stack([image_of, labels]), axis=1)
    fractions = np.bincount(pairs[1], minlength=num_classes) / num_images
    of_class = np.sqrt(np.maximum(threshold / np.maximum(fractions, 1e-12), 1.0))
    factors = np.ones(num_images)
    np.maximum.at(factors, pairs[0], of_class[pairs[1]])
    return factors


class EpochOrder:
    """The batches of every epoch: their number is fixed, their images depend on (seed, epoch).

    An epoch is a permutation of the images. Images that do not fill a batch at its end are dropped.

    Args:
        batch_size: B, the images of an optimizer step over all processes.
        groups: int64 (N,) of 0 and 1; all images of a batch are of one group. Each group drops what
            does not fill a batch, and the batches are shuffled.
        factors: float64 (N,), at least 1; an image is shown floor or ceil of its factor times, with
            its factor as the mean. An epoch, or each group of it, has round(sum of factors) images,
            to which the factors are scaled.
        repeats: how often an image is shown, each time as another copy (repeated augmentation,
            Hoffer et al. 2020); not with groups or factors. As in DeiT, an epoch still has N
            images: all copies of the first N / repeats of the permutation. A batch has all first
            copies first, then all second ones and so on, so that processes, micro-batches and
            neighbors, which mixup mixes, have different images. If B is no multiple of `repeats`,
            neighboring batches may share the copies of an image.

    Raises:
        ValueError: the batch is larger than the data, or would only have copies of one image.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        seed: int,
        *,
        groups: np.ndarray | None = None,
        factors: np.ndarray | None = None,
        repeats: int = 1,
    ) -> None:
        assert repeats == 1 or (groups is None and factors is None)
        group_of = np.zeros(num_images, dtype=np.int64) if groups is None else groups
        weights = np.ones(num_images) if factors is None else factors
        self._lengths = {
            group: round(float(weights[group_of == group].sum())) for group in np.unique(group_of)
        }
        check_batch_size(batch_size, sum(self._lengths.values()))
        for group, length in self._lengths.items():
            if length < batch_size:
                raise ValueError(
                    f"data.group_by_aspect needs a batch of each shape, and an epoch has {length} "
                    f"images that are {_GROUPS[group]}: fewer than data.batch_size {batch_size}. "
                    "Set data.group_by_aspect: false, or a smaller data.batch_size."
                )
        if repeats > 1 and batch_size < 2 * repeats:
            raise ValueError(
                f"data.batch_size must be {2 * repeats} or more with data.repeats = {repeats}, got "
                f"{batch_size}: a batch would only have copies of one image. Set either."
            )
        self.batch_size = batch_size
        self.iters_per_epoch = sum(length // batch_size for length in self._lengths.values())
        self._seed, self._factors, self._repeats = seed, factors, repeats
        self._group_of = torch.from_numpy(group_of)

    def batches(self, epoch: int, first: int = 0) -> Iterator[list[Sample]]:
        """Yield the batches of an epoch from number `first`, B samples each."""
        generator = torch.Generator().manual_seed(mix(self._seed, epoch))
        order = torch.randperm(len(self._group_of), generator=generator)
        copies = torch.zeros_like(order)
        if self._factors is not None:
            order, copies = self._repeated(order, self._factors, generator)
        if self._repeats > 1:
            order, copies = self._copied(order)
        picked = torch.arange(self.iters_per_epoch * self.batch_size)
        if len(self._lengths) > 1:
            picked = self._grouped(order, generator)
        order, copies = order[picked], copies[picked]
        for start in range(first * self.batch_size, len(order), self.batch_size):
            part = slice(start, start + self.batch_size)
            pairs = zip(order[part].tolist(), copies[part].tolist(), strict=True)
            yield [Sample(epoch, index, copy) for index, copy in pairs]

    def _repeated(
        self, order: Tensor, factors: np.ndarray, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Return the images of an epoch with their repetitions, and the number of each repetition.

        Systematic sampling: an image is shown once for every integer (plus one random offset) in
        its part of a line along which the factors lie.
        """
        parts = []
        for group, length in self._lengths.items():
            members = order[self._group_of[order] == group]
            ends = np.cumsum(factors[members.numpy()])
            ends *= length / ends[-1]
            ends[-1] = length
            # A multiple of 2^-20 adds to integers without rounding, so factors of 1 stay exact.
            offset = int(torch.randint(2**20, (1,), generator=generator)) / 2**20
            counts = np.diff(np.floor(ends + offset), prepend=0.0)
            parts.append(members.repeat_interleave(torch.from_numpy(counts).long()))
        repeated = torch.cat(parts)
        repeated = repeated[torch.randperm(len(repeated), generator=generator)]
        by_image, places = torch.sort(repeated, stable=True)
        copies = torch.empty_like(repeated)
        copies[places] = torch.arange(len(repeated)) - torch.searchsorted(by_image, by_image)
        return repeated, copies

    def _copied(self, order: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images of an epoch, each `repeats` times, and the number of each copy."""
        places = torch.arange(self.iters_per_epoch * self.batch_size).view(-1, self.batch_size)
        by_copy = (places % self._repeats).argsort(dim=1, stable=True)
        places = places.gather(1, by_copy).flatten()
        return order[places // self._repeats], places % self._repeats

    def _grouped(self, order: Tensor, generator: torch.Generator) -> Tensor:
        """Return positions in `order`; all of a batch are of one group."""
        parts = []
        for group, length in self._lengths.items():
            used = length // self.batch_size * self.batch_size
            positions = (self._group_of[order] == group).nonzero().flatten()
            parts.append(positions[:used].view(-1, self.batch_size))
        batches = torch.cat(parts)
        return batches[torch.randperm(len(batches), generator=generator)].flatten()


def check_batch_size(batch_size: int, num_images: int) -> None:
    """Refuse a batch that is larger than the data."""
    if not 1 <= batch_size <= num_images:
        raise ValueError(
            f"data.batch_size must lie in 1..{num_images}, the number of training images, got "
            f"{batch_size}. Set data.batch_size to {num_images} or less."
        )


def check_divides(batch_size: int, world_size: int, accumulate: int) -> None:
    """Refuse a batch that cannot be divided among processes and micro-batches."""
    parts = world_size * accumulate
    if batch_size % parts:
        nearest = max(batch_size // parts, 1) * parts
        raise ValueError(
            f"data.batch_size must be divisible by processes x engine.accumulate = "
            f"{world_size} x {accumulate} = {parts}, got {batch_size}. "
            f"Set data.batch_size to {nearest}, or another engine.accumulate."
        )


class TrainBatchSampler:
    """The endless sequence of one process's micro-batches.

    A batch, the images of one optimizer step over all processes, is cut into `accumulate`
    micro-batches, and each of these into one part per process. The sequence from `start_iter` is
    the tail of the one from 0.
    """

    def __init__(
        self,
        order: EpochOrder,
        start_iter: int = 0,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
    ) -> None:
        assert 0 <= rank < world_size and start_iter >= 0
        check_divides(order.batch_size, world_size, accumulate)
        self._order = order
        self._start_iter = start_iter
        self._part = order.batch_size // accumulate // world_size
        self._starts = range(rank * self._part, order.batch_size, world_size * self._part)

    def __iter__(self) -> Iterator[list[Sample]]:
        epoch, position = divmod(self._start_iter, self._order.iters_per_epoch)
        while True:
            for batch in self._order.batches(epoch, position):
                for start in self._starts:
                    yield batch[start : start + self._part]
            epoch, position = epoch + 1, 0


def eval_batches(
    num_images: int, batch_size: int, rank: int = 0, world_size: int = 1
) -> BatchSampler:
    """Return batches of every `world_size`-th index from `rank`, each once; the last is smaller."""
    return BatchSampler(range(rank, num_images, world_size), batch_size, drop_last=False)
