"""What the processes of a group have to agree on, and what becomes of it when one is lost."""

import contextlib
from collections.abc import Callable, Iterator

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

# How gloo, torch's store and NCCL say that the other end is gone.
_LOST = (
    "closed by peer", "reset by peer", "Broken pipe", "Connection refused", "recvValue failed",
    "ncclRemoteError",
)  # fmt: skip


def main_first(accelerator: Accelerator, work: Callable[[], object]) -> None:
    """Do `work` on the main process while the others wait; where it fails, all of them do.

    Raises:
        RuntimeError: on the others, with the main one's error in words.
    """
    failure: Exception | None = None
    if accelerator.is_main_process:
        try:
            work()
        except Exception as error:  # else the others would wait for a process that has gone
            failure = error
    (told,) = broadcast_object_list([failure and f"{type(failure).__name__}: {failure}"])
    if failure is not None:
        raise failure
    if told is not None:
        raise RuntimeError(f"The main process failed. {told}")


def check_same(value: int, what: str) -> None:
    """Refuse processes that would go on from different places.

    Raises:
        ValueError: `value` is not the same on all of them.
    """
    values = gather_object([value])
    if len(set(values)) > 1:
        raise ValueError(
            f"The processes of the group see different {what}: {values}. All of them need the same "
            "output_dir, on a file system that they share."
        )


@contextlib.contextmanager
def telling_of_lost_processes(accelerator: Accelerator) -> Iterator[None]:
    """Say in words when this process fails because another one of the group has ended."""
    try:
        yield
    except RuntimeError as error:
        if accelerator.num_processes == 1 or not any(text in str(error) for text in _LOST):
            raise
        first = str(error).splitlines()[0]
        raise RuntimeError(
            f"Process {accelerator.process_index} ends because another of the "
            f"{accelerator.num_processes} processes of the group has ended; its own message or the "
            f"launcher says why. Go on with --resume. ({first})"
        ) from error
