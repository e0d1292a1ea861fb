"""Files that are whole or not there: written aside, synced, renamed into place.

A kill at any moment leaves the old file or the new one, and beside it at most one that
`remove_temporary_files` knows. So does a power failure where the disk keeps what it says is synced.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

# Names of a run folder's files, and the format of results.json.
CONFIG_NAME, RESULTS_NAME, ENVIRONMENT_NAME = "config.yaml", "results.json", "environment.json"
METRICS_NAME = "metrics.jsonl"
RESULTS_FORMAT = 1
# Exit codes of commands and runs; a signal's is 128 + its number.
FAILED, REFUSED = 1, 2
_ASIDE = ".part"
_FULL = (errno.ENOSPC, errno.EDQUOT)


class DiskFullError(OSError):
    """There is no room for a file; the one it was to replace is as it was."""


def temporary_path(path: Path) -> Path:
    """Return a new name beside `path`, which `remove_temporary_files` knows."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}{_ASIDE}")


@contextlib.contextmanager
def atomic_path(path: Path, needed_bytes: int | None = None) -> Iterator[Path]:
    """Yield a name beside `path` to write a file to, which then takes the place of `path`.

    Raises:
        DiskFullError: the disk or a quota is full; whatever fails, `path` stays as it was.
    """
    aside = temporary_path(path)
    try:
        with reports_full_disk(path.parent, path.name, needed_bytes):
            yield aside
            sync(aside)
            aside.replace(path)
            sync(path.parent)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text: a reader sees the old file or the new."""
    with atomic_path(path, len(text.encode())) as aside:
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


def remove_temporary_files(folder: Path) -> None:
    """Remove what a process that was killed left aside in `folder`."""
    for aside in folder.glob(f".*{_ASIDE}"):
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def reports_full_disk(folder: Path, what: str, needed_bytes: int | None = None) -> Iterator[None]:
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
    with reports_full_disk(folder, what, needed_bytes):
        if shutil.disk_usage(folder).free < needed_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _is_full(error: Exception) -> bool:
    """Whether it is the system's error, or the same one as safetensors words it."""
    if isinstance(error, OSError):
        return error.errno in _FULL
    return any(f"(os error {number})" in str(error) for number in _FULL)


# --- What is not for a file: texts that are secrets, or are named like them.

HIDDEN = "***"
_LONG = r"token|secret|passw(?:or)?d|passphrase|credentials?|api_?key|access_?key|private_?key"
_NAME = rf"(?:[\w.-]*(?:{_LONG})|(?:[\w.-]*[._-])?(?:key|auth))"
_SECRET_NAME = re.compile(rf"(?i)-*{_NAME}")
# hub.token=x, {token: x}, ?token=x&y, --api-key=x: what follows such a name.
_NAMED = re.compile(rf"(?i)(?<![\w.-])(-*{_NAME}['\"]?\s*[:=]\s*['\"]?)([^\s,}}&'\"]+)")
_LOGIN = re.compile(r"(?<=://)[^/@\s]+(?=@)")
# As Hugging Face, GitHub, GitLab and AWS give them out.
_TOKEN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{22,}|glpat-[\w-]{20,}"
    r"|A[KS]IA[0-9A-Z]{16})"
)
_PLAIN = re.compile(r"(?i)(?:true|false|null|none|-?[0-9]{0,6}(?:\.[0-9]+)?)")
# "The key: more data" is a sentence: the name alone, and a word of letters after the space.
_SENTENCE = re.compile(
    r"(?i)(?<![\w.-])(?:key|token|secret|auth|credential)s?: +(?!bearer|basic)[^\W\d_]{1,19}"
    r"(?=[\s.,;:!?)]|$)"
)
_SHORTEST = 12  # characters of a secret in the environment that is looked for


def without_secrets(words: Sequence[str]) -> list[str]:
    """Return a command's words with *** for its secrets.

    These are values named like a token, key, secret, password or credential, values of environment
    variables of such names, logins in addresses, and tokens that are known by their beginning.
    Numbers and true, false and null are none.
    """
    shown: list[str] = []
    hide = False
    for word in words:
        is_name = _SECRET_NAME.fullmatch(word) is not None
        shown.append(HIDDEN if hide and not _PLAIN.fullmatch(word) else _hidden(word))
        hide = is_name and not hide
    return shown


def has_secret(text: str) -> bool:
    """Whether a text holds a login, a known token, or what `without_secrets` hides by its name.

    A sentence such as "The key: more data" does not: passwords and values with digits still do.
    """
    rest = _SENTENCE.sub("", text)
    return _hidden(rest) != rest


def _hidden(word: str) -> str:
    for secret in _of_environment():
        word = word.replace(secret, HIDDEN)
    word = _TOKEN.sub(HIDDEN, _LOGIN.sub(HIDDEN, word))
    return _NAMED.sub(
        lambda m: m[0] if _PLAIN.fullmatch(m[2]) else f"{m[1]}{HIDDEN}",
        word,
    )


def _of_environment() -> list[str]:
    """Return the values of environment variables that are named like secrets, the longest first."""
    values = [value for name, value in os.environ.items() if _SECRET_NAME.fullmatch(name)]
    secrets = [value for value in values if len(value) >= _SHORTEST and not _PLAIN.fullmatch(value)]
    return sorted(secrets, key=len, reverse=True)


# --- Settings on one line, as YAML names them: `lr: 0.1, steps: [2, 4], clip: null`.


def as_yaml(settings: Mapping[str, object]) -> str:
    """Return nested plain values as flow YAML, without the outer braces."""
    plain = json.loads(json.dumps(settings, default=str))
    text = yaml.safe_dump(
        plain, default_flow_style=True, sort_keys=False, allow_unicode=True, width=float("inf")
    )
    return text.strip().removeprefix("{").removesuffix("}")
