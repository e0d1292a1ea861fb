"""What a killed suite has left at work: it is ended by checkpoints before anything begins."""

from collections.abc import Mapping

from tract_transfer.suite.journal import SuiteLock
from tract_transfer.suite.launchers import Handle, Launcher


def end_leftovers(launcher: Launcher, lock: SuiteLock, left: Mapping[str, Handle]) -> None:
    """Let what another process has left at work write a checkpoint and end.

    Whoever interrupts the wait leaves word of what was asked to end: a second signal would end it
    without a checkpoint.

    Args:
        lock: taken.
        left: what `lock.acquire` has returned: job -> how to find it.
    """
    handles = list(left.values())
    try:
        launcher.ask_leftovers(handles)
    finally:
        lock.tell(left)
    launcher.end_leftovers(handles)
    lock.tell({})
