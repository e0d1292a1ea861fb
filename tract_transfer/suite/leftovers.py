"""What a killed suite has left at work: it is ended by checkpoints before anything begins."""

from collections.abc import Mapping

from tract_transfer.suite.journal import SuiteLock
from tract_transfer.suite.launchers import Handle, Launcher, find_launcher


def end_leftovers(launcher: Launcher, lock: SuiteLock, left: Mapping[str, Handle]) -> None:
    """Let what another process has left at work write a checkpoint and end.

    Whoever interrupts the wait leaves word of what was asked to end: a second signal would end it
    without a checkpoint.

    Args:
        lock: taken.
        left: what `lock.acquire` has returned: job -> how to find it.

    Raises:
        FileExistsError: another launcher has started some of it; nothing was ended.
    """
    _refuse_others(launcher, lock, left)
    handles = list(left.values())
    try:
        launcher.ask_leftovers(handles)
    finally:
        lock.tell(left)
    launcher.end_leftovers(handles)
    lock.tell({})


def _refuse_others(launcher: Launcher, lock: SuiteLock, left: Mapping[str, Handle]) -> None:
    """Refuse what this launcher cannot end: it would run beside the same run, started again."""
    owners = {job: find_launcher(handle) for job, handle in left.items()}
    others = [job for job, name in owners.items() if name not in (None, launcher.name)]
    if others:
        name = owners[others[0]]
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise FileExistsError(
            f"{others[0]}{more}: started by --launcher {name}, under which run_suite was killed, "
            f"and maybe at work still. Nothing was started. Use --launcher {name}: it lets them "
            f"write a checkpoint and goes on. If they have ended, remove {lock.owner_file}."
        )
