"""Files that are whole or not there: written aside, synced, renamed into place.

A kill at any moment leaves the old file or the new one, and beside it at most one that
`remove_leftovers` knows. So does a power failure where the disk keeps what it says is synced.
"""

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_ASIDE = ".part"
_FULL = (errno.ENOSPC, errno.EDQUOT)


class DiskFullError(OSError):
    """There is no room for a file; the one it was to replace is as it was."""


def aside_of(path: Path) -> Path:
    """Return a new name beside `path`, which `remove_leftovers` knows."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}{_ASIDE}")


@contextlib.contextmanager
def replacing(path: Path, needed_bytes: int | None = None) -> Iterator[Path]:
    """Yield a name beside `path` to write a file to, which then takes the place of `path`.

    Raises:
        DiskFullError: the disk or a quota is full; whatever fails, `path` stays as it was.
    """
    aside = aside_of(path)
    try:
        with naming_full_disk(path.parent, path.name, needed_bytes):
            yield aside
            sync(aside)
            aside.replace(path)
            sync(path.parent)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text: a reader sees the old file or the new."""
    with replacing(path, len(text.encode())) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write JSON: a reader sees the old file or the new.

    Raises:
        ValueError: a number is not finite, which JSON does not know.
    """
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def sha256_of(file: Path) -> str:
    """Return the sha256 (hex) of a file's bytes, read a block at a time."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, and wait until their names are on the disk."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync(folder.parent)


def remove_leftovers(folder: Path) -> None:
    """Remove what a process that was killed left aside in `folder`."""
    for aside in folder.glob(f".*{_ASIDE}"):
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def naming_full_disk(folder: Path, what: str, needed_bytes: int | None = None) -> Iterator[None]:
    """Turn the error of a full disk into one that names folder, file and what is missing."""
    try:
        yield
    except Exception as error:
        if not _is_full(error):
            raise
        free = shutil.disk_usage(folder).free
        need = "" if needed_bytes is None else f" needs {needed_bytes:,} bytes and"
        raise DiskFullError(
            f"No space left in {folder.absolute()}: {what}{need} found {free:,} free, or the end "
            "of a quota. What was there before is whole. Make room, and go on with --resume."
        ) from error


def check_space(folder: Path, what: str, needed_bytes: int) -> None:
    """Refuse before the first byte what cannot fit.

    Raises:
        DiskFullError: the disk of `folder` has fewer than `needed_bytes` free.
    """
    with naming_full_disk(folder, what, needed_bytes):
        if shutil.disk_usage(folder).free < needed_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _is_full(error: Exception) -> bool:
    """Whether it is the system's error, or the same one as safetensors words it."""
    if isinstance(error, OSError):
        return error.errno in _FULL
    return any(f"(os error {number})" in str(error) for number in _FULL)
