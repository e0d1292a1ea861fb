"""One run a folder: a lock that ends with its process, and a word on whose it is."""

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TextIO

import psutil

LOCK_NAME = ".lock"
_HELD = (errno.EACCES, errno.EAGAIN)
_UNKNOWN = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
logger = logging.getLogger(__name__)


class FolderInUseError(FileExistsError):
    """Another process holds the run folder, or may."""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process.

    The lock is the kernel's, by process (`fcntl.lockf`): it ends with the process however that
    ends, data workers do not inherit it, and NFS passes it on to the server. For file systems
    without locks, and for hosts that do not see each other's, `folder/.lock` says who holds it:
    process id, the time it started, host. An owner of this host that has ended is succeeded.

    Raises:
        FolderInUseError: another process holds it, or one of another host may.
    """
    with (folder / LOCK_NAME).open("a+", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                raise _in_use(folder, _read(file)) from None
            if error.errno not in _UNKNOWN:
                raise
            logger.warning(
                "The file system of %s knows no locks: a second run that starts at the same "
                "moment would not be noticed.", folder,
            )  # fmt: skip
        _succeed(folder, _read(file))
        _write(file, _facts())
        try:
            yield
        finally:
            _write(file, {})


def check_free(folder: Path) -> None:
    """Refuse a folder that another process says it holds; nothing is taken or changed.

    Not to be called by the process that holds it: to close the file is to let it go.

    Raises:
        FolderInUseError: another process holds it, or one of another host may.
    """
    try:
        with (folder / LOCK_NAME).open(encoding="utf-8") as file:
            owner = _read(file)
    except FileNotFoundError:
        return
    _check_has_ended(folder, owner)


def _succeed(folder: Path, owner: dict[str, Any]) -> None:
    """Take over from an owner that has ended."""
    _check_has_ended(folder, owner)
    if owner:
        logger.info("%s was held by %s, which has ended: taken over.", folder, _named(owner))


def _check_has_ended(folder: Path, owner: dict[str, Any]) -> None:
    """Refuse an owner that is alive, or of another host, where nobody can tell from here."""
    if not owner:
        return
    here = socket.gethostname()
    if owner.get("host") != here:
        raise FolderInUseError(
            f"{folder} is held by {_named(owner)}, and from {here} nobody can tell whether it "
            f"still runs. If it does not, remove {folder / LOCK_NAME} and start again."
        )
    if _is_alive(owner):
        raise _in_use(folder, owner)


def _in_use(folder: Path, owner: dict[str, Any]) -> FolderInUseError:
    return FolderInUseError(
        f"{folder} is in use by {_named(owner)}. Wait for it or end it, or set another output_dir."
    )


def _named(owner: dict[str, Any]) -> str:
    if not owner:
        return "another process"
    return "process {} on {} since {}".format(*map(owner.get, ("pid", "host", "since")))


def _facts() -> dict[str, Any]:
    since = datetime.now(timezone.utc).isoformat(timespec="seconds")
    started = psutil.Process().create_time()
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": since, "started": started}


def _is_alive(owner: dict[str, Any]) -> bool:
    """Whether the owner runs on this host: a process of its id that started when it did."""
    try:
        started: float = psutil.Process(int(owner["pid"])).create_time()
        return abs(started - float(owner["started"])) < 1
    except psutil.AccessDenied:
        return True
    except (psutil.NoSuchProcess, KeyError, TypeError, ValueError):
        return False


def _read(file: TextIO) -> dict[str, Any]:
    """Return what the lock file says; a kill may have cut it off."""
    file.seek(0)
    try:
        owner = json.loads(file.read())
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _write(file: TextIO, owner: dict[str, Any]) -> None:
    file.seek(0)
    file.truncate()
    if owner:
        json.dump(owner, file)
    file.flush()
    os.fsync(file.fileno())
