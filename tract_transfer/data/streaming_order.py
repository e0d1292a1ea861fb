"""Which rows of a stream an iteration sees: a function of the seed and the iteration alone.

The groups of rows are shuffled, and what they hold after each other is cut into equal stretches,
one for each reader. A block of iterations takes the next rows of every stretch and shuffles them
within each: that is the shuffle buffer. Every batch has as many rows of each stretch.
"""

# N rows, G groups, B rows a batch, Q readers

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tract_transfer.data.sampling import mix

DEFAULT_READERS = 8
DEFAULT_SHUFFLE_ROWS = 2048


class Span(NamedTuple):
    """`length` rows of a group, from its row `first` on."""

    group: int
    first: int
    length: int


class StreamOrder:
    """The batches of every epoch of a stream.

    An epoch shows every row once; what does not fill a batch at its end is dropped: the rows of
    other groups in every epoch.

    Args:
        counts: int64 (G,), the rows of each group.
        batch_size: B, the rows of an optimizer step over all processes.
        shuffle_rows: how many rows are in the shuffle buffer, over all processes; whole batches of
            them, but at least one. None is 2048.
        readers: Q, which divides B; None is the largest common divisor of 8 and B. The batches
            depend on it, and not on the number of processes, which divides it.

    Raises:
        ValueError: a batch is larger than the data, or no multiple of the readers.
    """

    def __init__(
        self,
        counts: np.ndarray,
        batch_size: int,
        seed: int,
        *,
        shuffle_rows: int | None = None,
        readers: int | None = None,
    ) -> None:
        num_rows = int(counts.sum())
        if not 1 <= batch_size <= num_rows:
            raise ValueError(
                f"data.batch_size must lie in 1..{num_rows}, the number of training images, got "
                f"{batch_size}. Set data.batch_size to {num_rows} or less."
            )
        self.readers = readers or math.gcd(DEFAULT_READERS, batch_size)
        if batch_size % self.readers:
            nearest = max(batch_size // self.readers, 1) * self.readers
            raise ValueError(
                f"data.readers must divide data.batch_size, and {self.readers} does not divide "
                f"{batch_size}. Set data.batch_size to {nearest}, or another data.readers."
            )
        self.batch_size = batch_size
        self.iters_per_epoch = num_rows // batch_size
        self.share = batch_size // self.readers  # rows of a batch from each reader
        self.block_iters = max(1, (shuffle_rows or DEFAULT_SHUFFLE_ROWS) // batch_size)
        self._counts = counts
        self._seed = seed

    def iters_of_block(self, block: int) -> int:
        """Return the iterations of a block of an epoch, of which the last may have fewer."""
        return min(self.block_iters, self.iters_per_epoch - block * self.block_iters)

    def spans(self, epoch: int, reader: int, block: int) -> list[Span]:
        """Return what a reader reads from a block on to the end of its stretch, in this order."""
        stretch = self.iters_per_epoch * self.share
        start = reader * stretch + block * self.block_iters * self.share
        stop = (reader + 1) * stretch
        order = self._permutation(len(self._counts), epoch).numpy()
        ends = np.cumsum(self._counts[order])
        spans = []
        for place in range(int(np.searchsorted(ends, start, side="right")), len(order)):
            begin = int(ends[place] - self._counts[order[place]])
            first, last = max(start, begin), min(stop, int(ends[place]))
            if first >= stop:
                break
            if last == first:
                continue
            spans.append(Span(int(order[place]), first - begin, last - first))
        return spans

    def places(self, epoch: int, reader: int, block: int) -> Tensor:
        """Return which of a reader's rows of a block each of its iterations takes, (iters, B/Q)."""
        iters = self.iters_of_block(block)
        return self._permutation(iters * self.share, epoch, block, reader).view(iters, self.share)

    def mixed(self, count: int, epoch: int, iteration: int) -> list[int]:
        """Return the order of `count` rows that one process has of a batch: neighbours in it, which
        mixup mixes, are not neighbours in the stream."""
        order: list[int] = self._permutation(count, epoch, iteration, -1, -1).tolist()
        return order

    def _permutation(self, count: int, *parts: int) -> Tensor:
        generator = torch.Generator().manual_seed(mix(self._seed, *parts))
        return torch.randperm(count, generator=generator)
