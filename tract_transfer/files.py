"""Atomic files, and the redaction of secrets in what is written to them.

A file is written under a temporary name, synced and renamed. A kill at any moment leaves the old
file or the new one, and at most one temporary file, which `remove_temporary_files` removes. So does
a power failure, if the disk keeps what it reports as synced.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# Names of a run folder's files, and the format of results.json.
CONFIG_NAME, RESULTS_NAME, ENVIRONMENT_NAME = "config.yaml", "results.json", "environment.json"
RECIPE_NAME = "recipe.yaml"
METRICS_NAME = "metrics.jsonl"
RESULTS_FORMAT = 1
SUITE_NAME, SUITE_FORMAT = "suite.json", 1  # a suite's state
# Exit codes of commands and runs; after a signal it is 128 + its number.
FAILED, REFUSED = 1, 2
_TEMPORARY = ".part"
# In the message of the system's error, and of safetensors' own.
_DISK_FULL = re.compile(rf"(?:Errno|os error) (?:{errno.ENOSPC}|{errno.EDQUOT})\b")


class DiskFullError(OSError):
    """There is no space for a file; the file that it was to replace is unchanged."""


@contextlib.contextmanager
def atomic_path(path: Path, needed_bytes: int | None = None) -> Iterator[Path]:
    """Yield a temporary path to write to; without an error, rename it to `path` at the end."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_TEMPORARY}")
    try:
        with reports_full_disk(path.parent, path.name, needed_bytes):
            yield temporary
            sync(temporary)
            temporary.replace(path)
            sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(path, len(text.encode())) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically; ValueError for a number that is not finite."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def num_cores() -> int:
    """Return how many CPU cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # only on Linux
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def sha256_of(file: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
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
    """Create a folder and its parents, and wait until they are on the disk."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync(folder.parent)


def remove_temporary_files(folder: Path) -> None:
    """Remove the temporary files of killed processes from `folder`."""
    for temporary in folder.glob(f".*{_TEMPORARY}"):
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def reports_full_disk(folder: Path, name: str, needed_bytes: int | None = None) -> Iterator[None]:
    """Turn the error of a full disk into a DiskFullError that names folder, file and bytes."""
    try:
        yield
    except Exception as error:
        if not _DISK_FULL.search(str(error)):
            raise
        free = shutil.disk_usage(folder).free
        needs = "" if needed_bytes is None else f" needs {needed_bytes:,} bytes, and"
        raise DiskFullError(
            f"No space left in {folder.absolute()}: {name}{needs} {free:,} bytes are free, or a "
            "quota is used up. The files written before are intact. Free some space, then resume "
            "with --resume."
        ) from error


# Secrets.

HIDDEN = "***"
_NAME = (
    r"(?:[\w.-]*(?:token|secret|passw(?:or)?d|passphrase|credentials?|(?:api|access|private)_?key)"
    r"|(?:[\w.-]*[._-])?(?:key|auth))"
)
_SECRET_NAME = re.compile(_NAME, re.IGNORECASE)
# hub.token=x, {token: x}, ?token=x&y, --api-key=x, auth: Bearer x
_NAMED_VALUE = re.compile(
    rf"(?<![\w.-])({_NAME}['\"]?\s*[:=]\s*['\"]?)((?:(?:bearer|basic)\s+)?[^\s,}}&'\"]+)",
    re.IGNORECASE,
)
# Logins in URLs; tokens of Hugging Face, GitHub, GitLab and AWS.
_LOGIN_OR_TOKEN = re.compile(
    r"(?<=://)[^/@\s]+(?=@)"
    r"|\b(?:hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{22,}|glpat-[\w-]{20,}"
    r"|A[KS]IA[0-9A-Z]{16})"
)
_HARMLESS = re.compile(r"true|false|null|none|-?[0-9]{0,6}(?:\.[0-9]+)?", re.IGNORECASE)
_SHORTEST = 12  # characters of an environment variable's value that counts as a secret


def redact(content: Any, *, by_name: bool = True) -> Any:
    """Return a text, or nested plain values, with *** in place of secrets.

    Secrets are: a value named like a token, key, secret, password or credential (`hub.token=x`);
    the value of an environment variable with such a name; a login in a URL; and a token with the
    prefix of Hugging Face, GitHub, GitLab or AWS. Numbers, booleans and null are never secrets.

    Args:
        by_name: False keeps values that only have a secret's name, such as `class_token: mean`.
    """
    if isinstance(content, str):
        values = [value for name, value in os.environ.items() if _SECRET_NAME.fullmatch(name)]
        for secret in sorted(values, key=len, reverse=True):
            if len(secret) >= _SHORTEST and not _HARMLESS.fullmatch(secret):
                content = content.replace(secret, HIDDEN)
        content = _LOGIN_OR_TOKEN.sub(HIDDEN, content)
        if not by_name:
            return content
        return _NAMED_VALUE.sub(lambda match: match[1] + _hide(match[2]), content)
    if isinstance(content, Mapping):
        if not by_name:
            return {key: redact(value, by_name=False) for key, value in content.items()}
        return {key: _redact_after(str(key), value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [redact(value, by_name=by_name) for value in content]
    return content


def without_secrets(words: Sequence[str]) -> list[str]:
    """Redact the words of a command; `abc` in `--api-key abc` is a secret too."""
    return [_redact_after(before, word) for before, word in itertools.pairwise(["", *words])]


def _redact_after(name: str, value: Any) -> Any:
    is_secret = isinstance(value, str) and _SECRET_NAME.fullmatch(name)
    return _hide(value) if is_secret else redact(value)


def _hide(value: str) -> str:
    return value if _HARMLESS.fullmatch(value) else HIDDEN


def as_yaml(settings: Mapping[str, object]) -> str:
    """Return nested plain values as YAML on one line: `lr: 0.1, steps: [2, 4], clip: null`."""
    import yaml  # not needed by what only writes files

    plain = json.loads(json.dumps(settings, default=str))
    text = yaml.safe_dump(
        plain, default_flow_style=True, sort_keys=False, allow_unicode=True, width=float("inf")
    )
    return text.strip().removeprefix("{").removesuffix("}")
