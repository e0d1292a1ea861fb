"""The folder of a run: its lock, its config and environment, its log and its results."""

import contextlib
import errno
import fcntl
import importlib.metadata
import json
import logging
import os
import platform
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import psutil
import torch
import yaml
from accelerate import Accelerator

from tract_transfer import __version__
from tract_transfer.config.schema import Config, dump_config, load_config
from tract_transfer.engine.group import main_first
from tract_transfer.files import (
    CONFIG_NAME,
    ENVIRONMENT_NAME,
    RECIPE_NAME,
    RESULTS_NAME,
    make_folder,
    redact,
    remove_temporary_files,
    without_secrets,
    write_json,
    write_text,
)
from tract_transfer.models.weights import read_metadata
from tract_transfer.registry import plugin_hashes

PACKAGES = ("torch", "torchvision", "timm", "datasets", "accelerate", "numpy")
# Keys of environment.json that decide the bits of a run.
DECIDING = (
    "versions.", "git.commit", "hardware.processor", "hardware.gpus", "hardware.threads",
    "hardware.processes", "plugin_files",
)  # fmt: skip
# Keys that may differ on resume: they decide where and how fast, not what.
SAFE_ON_RESUME = (
    "output_dir", "engine.log", "engine.checkpoint", "data.num_workers", "data.cache",
    "data.undecodable", "data.feature_cache", "data.max_pixels", "paper", "plugins",
)  # fmt: skip
LABELS = ("name", "method")
logger = logging.getLogger(__name__)


class FolderInUseError(FileExistsError):
    """Another process holds the run folder, or may hold it."""


class Chosen(NamedTuple):
    """What chose a config: the text of recipe.yaml, and the lines that the log shows."""

    recipe_text: str
    lines: Sequence[str]


class RunFolder:
    """A run folder that this process group holds; `begin` makes it the run's own."""

    def __init__(
        self, path: Path, config: Config, accelerator: Accelerator, chosen: Chosen | None = None
    ) -> None:
        self.path, self.config, self.accelerator = path, config, accelerator
        self.chosen = chosen
        self.is_resumed = False
        self._stack = contextlib.ExitStack()

    def begin(self, fingerprints: Callable[[], Mapping[str, str]]) -> None:
        """Write config.yaml and environment.json, or compare them; log to log.txt from here on.

        A config that was chosen for a folder is written as recipe.yaml too, and what chose it to
        log.txt.

        Args:
            fingerprints: returns split -> fingerprint of its data; called on the main process.
        """

        def write() -> None:
            weights = weights_sha256(self.config.model.weights)
            plugins = plugin_hashes(self.config.plugins)
            now = environment(fingerprints(), weights, self.accelerator.num_processes, plugins)
            lines = () if self.chosen is None else self.chosen.lines
            self._stack.enter_context(_logging_to(self.path, lines))
            file = self.path / ENVIRONMENT_NAME
            if not self.is_resumed:
                write_text(self.path / CONFIG_NAME, dump_config(self.config))
                if self.chosen is not None:
                    write_text(self.path / RECIPE_NAME, self.chosen.recipe_text)
            elif then := _mapping(file.read_text):
                now = continue_environment(now, then)
            else:
                logger.warning("%s cannot be read, so the data cannot be compared.", file)
            write_json(file, now)
            for folder in (self.path, self.path / "features", self.path / "detections"):
                remove_temporary_files(folder)

        main_first(self.accelerator, write)


@contextlib.contextmanager
def open_run_folder(
    config: Config, accelerator: Accelerator, *, resume: bool, chosen: Chosen | None = None
) -> Iterator[RunFolder]:
    """Check and lock `config.output_dir` for this process group.

    A folder made here is removed again if the run ends before `RunFolder.begin`.

    Raises:
        FileExistsError, ValueError: as `check_run_folder`.
        FolderInUseError: another process holds the folder.
        OSError: the folder cannot be made or written to.
    """
    run_folder = RunFolder(Path(config.output_dir), config, accelerator, chosen)
    with run_folder._stack as stack:

        def enter() -> None:
            if not run_folder.path.exists():
                stack.callback(_remove_if_unused, run_folder.path)
            _make_output_dir(run_folder.path)
            stack.enter_context(lock_folder(run_folder.path))
            run_folder.is_resumed = check_run_folder(config, resume=resume)

        main_first(accelerator, enter)
        yield run_folder


def check_run_folder(config: Config, *, resume: bool) -> bool:
    """Return whether `config.output_dir` contains a run, which then is this config's to resume.

    Raises:
        FileExistsError: the folder contains a run, and this is no resume.
        ValueError: the run has another config, other initial weights, or no readable config.yaml.
    """
    folder = Path(config.output_dir)
    if not (folder / RESULTS_NAME).exists() and not any(folder.glob("checkpoints/iter_*")):
        return False
    if not resume:
        raise FileExistsError(
            f"{folder} already contains a run. Resume it with --resume, or set another output_dir."
        )
    file = folder / CONFIG_NAME
    try:
        old = yaml.safe_load(dump_config(load_config(file)))
    except ValueError as error:
        raise ValueError(
            f"{folder} cannot be resumed: {file} is not a valid config of this version: {error} "
            "Put back the file that the run wrote, or set another output_dir."
        ) from error
    if changed := changed_keys(old, yaml.safe_load(dump_config(config))):
        raise ValueError(
            f"{folder} cannot be resumed with another config: {'; '.join(changed)}. Resume with "
            f"{file}, or set another output_dir."
        )
    then = _mapping((folder / ENVIRONMENT_NAME).read_text)
    _check_input("model.weights", then.get("weights"), weights_sha256(config.model.weights))
    return True


def weights_metadata(weights: str | None) -> dict[str, Any]:
    """Return the metadata beside `model.weights`; {} without any."""
    if weights in (None, "pretrained"):
        return {}
    try:
        return read_metadata(Path(str(weights)))
    except FileNotFoundError:
        return {}


def weights_sha256(weights: str | None) -> str | None:
    """Return the hash of `model.weights` from their metadata: it identifies their training."""
    return weights_metadata(weights).get("sha256")


def _mapping(read: Callable[[], str]) -> dict[str, Any]:
    """Return the mapping in a json text; {} if it is missing, truncated or no mapping."""
    try:
        content = json.loads(read())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def resume_hint(folder: Path) -> str:
    """Return what to do about the run in `folder` after it was stopped."""
    if _mapping((folder / RESULTS_NAME).read_text):
        return f"the run is finished (output_dir {folder})."
    if any(folder.glob("checkpoints/iter_*")):
        return f"checkpoint written. Resume with --resume (output_dir {folder})."
    return f"no checkpoint yet. Give the same command again (output_dir {folder})."


def repeat_hint(folder: Path) -> str:
    """Return how to repeat the run in `folder`, whose config was chosen, with other keys."""
    file = shlex.quote(str(folder / RECIPE_NAME))
    command = f"tract-transfer train --config-file {file} output_dir=NEW_FOLDER"
    return f"Repeat or change it: {command}"


# Which keys of a config decide a run's numbers, and which may differ when it is resumed.


def changed_keys(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return `key: old then, new now` for each key that differs and may not on resume."""
    old, new = flatten(then), flatten(now)
    return [
        f"{key}: {old.get(key)!r} then, {new.get(key)!r} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not _may_differ(key, old.get(key), new.get(key))
    ]


def deciding_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return dotted keys and values of a config without its labels and what may differ."""
    items = flatten(config).items()
    return {k: v for k, v in items if k not in LABELS and not _may_differ(k, v, v)}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return dotted keys and their values."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _may_differ(key: str, old: Any, new: Any) -> bool:
    # A device cache augments with other random numbers.
    is_device_cache = key == "data.cache" and "device" in (old, new)
    return key.startswith(SAFE_ON_RESUME) and not is_device_cache


# Where a run takes place: versions, hardware, git, data; and what changed before a resume.


def environment(
    fingerprints: Mapping[str, str],
    weights: str | None = None,
    num_processes: int = 1,
    plugins: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return versions, hardware, git state and inputs; no environment variables."""
    versions = {"python": platform.python_version(), "tract_transfer": __version__}
    versions |= {package: importlib.metadata.version(package) for package in PACKAGES}
    hardware = {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "processes": str(num_processes),
    }
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        hardware["gpus"] = ", ".join(names)
    return {
        "versions": versions,
        "hardware": hardware,
        "git": _git_state(),
        "data": dict(fingerprints),
        "weights": weights,
        **({"plugin_files": dict(plugins)} if plugins else {}),
        "command": " ".join(without_secrets(sys.argv)),
    }


def continue_environment(now: Mapping[str, Any], then: Mapping[str, Any]) -> dict[str, Any]:
    """Return the environment of a resumed run; warn if it decides other bits.

    Its `earlier` lists the environments before, without their inputs.

    Raises:
        ValueError: the data changed.
    """
    for split, fingerprint in now["data"].items():
        _check_input(f"data.{split}", (then.get("data") or {}).get(split), fingerprint)
    changes = [line for line in changed_keys(then, now) if line.startswith(DECIDING)]
    if changes:
        logger.warning(
            "This run is resumed in another environment, so not to the same bits: %s.",
            "; ".join(changes),
        )
    earlier = list(then.get("earlier") or [])
    if any(then.get(key) != now[key] for key in ("versions", "hardware", "git")):
        earlier.append({key: then.get(key) for key in ("versions", "hardware", "git", "command")})
    return {**now, "earlier": earlier} if earlier else dict(now)


def _check_input(key: str, old: str | None, new: str | None) -> None:
    """Refuse data or weights other than those the run started with, unless these are unknown."""
    if old is not None and old != new:
        raise ValueError(
            f"{key} changed since the run started (fingerprint {old[:12]} then, "
            f"{str(new)[:12]} now). Put back what it started with, or set another output_dir."
        )


def _git_state() -> dict[str, str]:
    """Return commit of the package's repository and whether it was changed; {} without one."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return {"commit": git("rev-parse", "HEAD"), "changed": "yes" if changed else "no"}
    except (OSError, subprocess.CalledProcessError):
        return {}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    name = re.search(r"^model name\s*: (.*\S)", info.read_text(), re.M) if info.exists() else None
    return name[1] if name else platform.processor()


# The lock of a run folder.

LOCK_NAME = ".lock"
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process.

    The lock is the kernel's, by process (`fcntl.lockf`): it ends with the process however that
    ends, data workers do not inherit it, and NFS forwards it to the server. For file systems
    without locks, and for hosts that do not see each other's, `folder/.lock` names the owner:
    process id, its start time, host. An owner on this host that has ended is replaced.

    Raises:
        FolderInUseError: another process holds it, or one of another host may.
    """
    with (folder / LOCK_NAME).open("a+", encoding="utf-8") as file:
        is_held = False
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            is_held = True
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            logger.warning("%s has no file locks: a second run could go unnoticed.", folder)
        file.seek(0)  # opened again and closed, the file would lose its lock
        owner, host = _mapping(file.read), socket.gethostname()
        name = "process {} on {} since {}".format(*map(owner.get, ("pid", "host", "since")))
        if is_held or (owner and owner.get("host") == host and _is_alive(owner)):
            raise FolderInUseError(
                f"{folder} is in use by {name if owner else 'another process'}. Wait for it or end "
                "it, or set another output_dir."
            )
        if owner and owner.get("host") != host:
            raise FolderInUseError(
                f"{folder} is held by {name}, and {host} cannot tell whether that process still "
                f"runs. If it does not, remove {folder / LOCK_NAME} and start again."
            )
        if owner:
            logger.info("%s was held by %s, which has ended.", folder, name)
        started = psutil.Process().create_time()
        since = datetime.now(timezone.utc).isoformat(timespec="seconds")
        identity = {"pid": os.getpid(), "host": host, "since": since, "started": started}
        _write(file, json.dumps(identity))
        try:
            yield
        finally:
            _write(file, "")


def _is_alive(owner: dict[str, Any]) -> bool:
    """Whether the owner runs on this host: a process with its id that started when it did."""
    try:
        started: float = psutil.Process(int(owner["pid"])).create_time()
        return abs(started - float(owner["started"])) < 1
    except psutil.AccessDenied:
        return True
    except (psutil.NoSuchProcess, KeyError, TypeError, ValueError):
        return False


def _write(file: TextIO, text: str) -> None:
    file.seek(0)
    file.truncate()
    file.write(text)
    file.flush()
    os.fsync(file.fileno())


def _make_output_dir(folder: Path) -> None:
    """Create a folder for a run, with a lock file to see whether it can be written to."""
    try:
        make_folder(folder)
        (folder / LOCK_NAME).touch()
    except OSError as error:
        raise type(error)(f"output_dir: {error}. Set another output_dir.") from error


def _remove_if_unused(folder: Path) -> None:
    """Remove a folder that holds nothing but its lock."""
    if folder.is_dir() and [path.name for path in folder.iterdir()] == [LOCK_NAME]:
        (folder / LOCK_NAME).unlink()
        folder.rmdir()


class _RedactingFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return str(redact(super().format(record)))


@contextlib.contextmanager
def _logging_to(folder: Path, before: Sequence[str] = ()) -> Iterator[None]:
    """Write the package's log, and the error that ends the run, to `folder/log.txt`.

    Args:
        before: lines that were logged before the file was opened.
    """
    path = folder / "log.txt"
    if path.exists() and not path.read_bytes().endswith(b"\n"):
        with path.open("a") as file:  # truncated by a kill
            file.write("\n")
    handler, package = logging.FileHandler(path), logging.getLogger("tract_transfer")
    handler.setFormatter(_RedactingFormatter("%(asctime)s %(levelname)s %(message)s"))
    package.addHandler(handler)
    if package.getEffectiveLevel() > logging.INFO:
        package.setLevel(logging.INFO)
    for line in before:
        handler.handle(logger.makeRecord(logger.name, logging.INFO, __file__, 0, line, (), None))
    try:
        yield
    except Exception:
        # Only to the file: the caller gets the error itself.
        failure = (logger.name, logging.ERROR, __file__, 0, "The run failed.", (), sys.exc_info())
        handler.handle(logger.makeRecord(*failure))
        raise
    finally:
        package.removeHandler(handler)
        handler.close()
