"""A process's batches of a stream: what it reads, and in which order it gives it away."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

from tract_transfer.data.row_groups import Row
from tract_transfer.data.sampling import Sample, check_divides
from tract_transfer.data.streaming import Stream, StreamedSample
from tract_transfer.data.streaming_order import Span, StreamOrder

Numbered = tuple[int, Row]


class StreamBatches:
    """The endless sequence of one process's micro-batches of a stream.

    A process owns as many readers as others, and reads one block ahead. The sequence from
    `start_iter` is the tail of the one from 0; of the block that it begins in, all is read.

    Raises:
        ValueError: the batch does not divide among processes and micro-batches, or the readers
            among processes.
    """

    def __init__(
        self,
        stream: Stream,
        order: StreamOrder,
        start_iter: int = 0,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
    ) -> None:
        assert 0 <= rank < world_size
        assert start_iter >= 0
        check_divides(order.batch_size, world_size, accumulate)
        if order.readers % world_size:
            raise ValueError(
                f"data.readers must be a multiple of the number of processes, {world_size}, got "
                f"{order.readers}. Set data.readers to {world_size}, or to a multiple of it that "
                "divides data.batch_size."
            )
        self._stream = stream
        self._order = order
        self._start_iter = start_iter
        own = order.readers // world_size
        self._readers = range(rank * own, (rank + 1) * own)
        self._micro_size = order.batch_size // world_size // accumulate

    def __iter__(self) -> Iterator[list[StreamedSample]]:
        order = self._order
        first_epoch, position = divmod(self._start_iter, order.iters_per_epoch)
        first_block, done = divmod(position, order.block_iters)
        for epoch, block, rows in self._blocks(first_epoch, first_block):
            places = [order.places(epoch, reader, block) for reader in self._readers]
            for iteration in range(done, order.iters_of_block(block)):
                batch = [
                    StreamedSample(Sample(epoch, own[place][0]), own[place][1])
                    for own, taken in zip(rows, places, strict=True)
                    for place in taken[iteration].tolist()
                ]
                at = block * order.block_iters + iteration
                mixed = [batch[place] for place in order.mixed(len(batch), epoch, at)]
                for start in range(0, len(mixed), self._micro_size):
                    yield mixed[start : start + self._micro_size]
            done = 0
            rows.clear()  # before the next but one is read

    def _blocks(self, epoch: int, block: int) -> Iterator[tuple[int, int, list[list[Numbered]]]]:
        """Yield each block's epoch, number, and the rows of every reader."""
        order = self._order
        num_blocks = -(-order.iters_per_epoch // order.block_iters)
        with ThreadPoolExecutor(len(self._readers), "stream") as pool:
            ahead = None
            while True:
                streams = [
                    _rows(self._stream, order.spans(epoch, reader, block))
                    for reader in self._readers
                ]
                for number in range(block, num_blocks):
                    count = order.iters_of_block(number) * order.share
                    reading = [pool.submit(_take, rows, count) for rows in streams]
                    if ahead is not None:
                        yield ahead
                    ahead = epoch, number, [future.result() for future in reading]
                epoch, block = epoch + 1, 0


class StreamEvalBatches:
    """One pass over a process's share of a stream, in order, each image once."""

    def __init__(self, stream: Stream, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        assert 0 <= rank < world_size
        self._stream = stream
        self._batch_size = batch_size
        self._first = rank * len(stream) // world_size
        self._count = (rank + 1) * len(stream) // world_size - self._first

    def __len__(self) -> int:
        return -(-self._count // self._batch_size)

    def __iter__(self) -> Iterator[list[StreamedSample]]:
        rows = islice(self._stream.read_from(self._first), self._count)
        samples = (StreamedSample(Sample(0, index), row) for index, row in rows)
        while batch := list(islice(samples, self._batch_size)):
            yield batch


def _rows(stream: Stream, spans: list[Span]) -> Iterator[Numbered]:
    for span in spans:
        yield from islice(stream.read(span.group, span.first), span.length)


def _take(rows: Iterator[Numbered], count: int) -> list[Numbered]:
    taken = list(islice(rows, count))
    assert len(taken) == count, "a group of rows holds fewer than its footer says"
    return taken
