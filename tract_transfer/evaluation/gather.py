"""Join what the processes of a group have collected."""

from collections.abc import Sequence
from typing import TypeVar

import torch.distributed as dist

Row = TypeVar("Row")


def all_rows(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of all processes in rank order, the same list on each of them.

    Without a process group these are `rows` themselves. A collective: every process must call it,
    also one without rows. Rows are pickled, so keep arrays in them on the CPU.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return list(rows)
    gathered: list[list[Row]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, list(rows))
    return [row for part in gathered for row in part]
