"""A run's folder: what goes in first, what comes out last, and whose it is."""

import contextlib
import errno
import fcntl
import importlib.metadata
import json
import logging
import os
import platform
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
from torch import nn
from torchvision.io import write_png

from tract_transfer import __version__
from tract_transfer.engine.group import main_first
from tract_transfer.engine.hooks import evaluating
from tract_transfer.files import (
    atomic_path,
    make_folder,
    remove_temporary_files,
    without_secrets,
    write_json,
    write_text,
)

# --- Where a run takes place: versions, hardware, git, data; and what changed before a resume.

ENVIRONMENT_NAME = "environment.json"
PACKAGES = ("torch", "torchvision", "timm", "datasets", "accelerate", "numpy")


class Inputs(NamedTuple):
    """What a run starts from: split -> fingerprint, and the sha256 of the weights, where known."""

    data: Mapping[str, str]
    weights: str | None = None


def environment(inputs: Inputs, num_processes: int = 1) -> dict[str, Any]:
    """Return versions, hardware, git state and inputs. No environment variables."""
    versions = {"python": platform.python_version(), "tract_transfer": __version__}
    for package in PACKAGES:
        versions[package] = importlib.metadata.version(package)
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
        "data": dict(inputs.data),
        "weights": inputs.weights,
        "command": " ".join(without_secrets(sys.argv)),
    }


def continued(now: Mapping[str, Any], then: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the environment of a run that goes on, and in words what is not as it was.

    Its `earlier` lists those the run had before, without their inputs.

    Raises:
        ValueError: a split or the weights are others than the run began with.
    """
    check_inputs(now, then)
    before = {key: then.get(key) for key in ("versions", "hardware", "git", "command")}
    earlier = list(then.get("earlier") or [])
    if then and any(before[key] != now[key] for key in ("versions", "hardware", "git")):
        earlier.append(before)
    changes = [
        f"{name} {old} then, {_deciding(now).get(name)} now"
        for name, old in _deciding(then).items()
        if old != _deciding(now).get(name)
    ]
    return {**now, "earlier": earlier} if earlier else dict(now), changes


def check_inputs(now: Mapping[str, Any], then: Mapping[str, Any]) -> None:
    """Refuse other `data` (split -> fingerprint) and `weights` than a run began with.

    Raises:
        ValueError: a split or the weights are others; what is not known of either is not compared.
    """
    data = then.get("data") or {}
    pairs = [(f"data.{split}", data.get(split), found) for split, found in now["data"].items()]
    pairs.append(("model.weights", then.get("weights"), now["weights"]))
    for key, old, new in pairs:
        if old is not None and old != new:
            raise ValueError(
                f"{key} is not what the run began with, under the same config (fingerprint "
                f"{old[:12]} then, {str(new)[:12]} now): its results would be of neither. Put back "
                "what it began with, or set another output_dir."
            )


def _deciding(environment: Mapping[str, Any]) -> dict[str, Any]:
    """Return what decides the bits: code, packages, processor, GPUs, threads and processes."""
    hardware, git = environment.get("hardware") or {}, environment.get("git") or {}
    kinds = ("processor", "threads", "processes", "gpus")
    return {
        **({"commit": git["commit"]} if "commit" in git else {}),
        **(environment.get("versions") or {}),
        **{kind: hardware[kind] for kind in kinds if kind in hardware},
    }


def _git_state() -> dict[str, str]:
    """Commit of the repository the package is in, and whether it was changed; {} without one."""
    here = Path(__file__).parent

    def ask(arguments: Sequence[str]) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = ask(["status", "--porcelain", "--untracked-files=no"])
        return {"commit": ask(["rev-parse", "HEAD"]), "changed": "yes" if changed else "no"}
    except (OSError, subprocess.CalledProcessError):
        return {}


def _processor() -> str:
    """The processor's name, from Linux's own list where there is one."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


# --- Which keys of a config decide a run's numbers, and which may differ when it is resumed.

# Keys that may differ on resume: they decide where and how fast, not what.
SAFE_ON_RESUME = (
    "output_dir", "engine.log", "engine.checkpoint", "data.num_workers", "data.cache",
    "data.undecodable", "data.feature_cache", "data.max_pixels", "paper",
)  # fmt: skip
LABELS = ("name", "method")


def changed_keys(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return `key: old then, new now` for each key that may not differ on resume, and does."""
    old, new = flatten(then), flatten(now)
    return [
        f"{key}: {old.get(key)!r} then, {new.get(key)!r} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not _may_differ(key, old.get(key), new.get(key))
    ]


def deciding_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return dotted keys and values of a config without its labels and what may differ."""
    return {
        key: value
        for key, value in flatten(config).items()
        if key not in LABELS and not _may_differ(key, value, value)
    }


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
    if key == "data.cache" and "device" in (old, new):
        return False  # it augments by other random numbers
    return key.startswith(SAFE_ON_RESUME)


# --- One run a folder: a lock that ends with its process, and a word on whose it is.

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


CONFIG_NAME, RESULTS_NAME = "config.yaml", "results.json"
RESULTS_FORMAT = 1  # of results.json; what reads it refuses another


@contextlib.contextmanager
def open_run_folder(
    folder: Path,
    config_yaml: str,
    accelerator: Accelerator,
    *,
    resume: bool,
    read_config: Callable[[Path], str],
    inputs: Callable[[], Inputs],
) -> Iterator[None]:
    """Hold a run folder: new, with its config.yaml, or the one to resume; its log in log.txt.

    Args:
        read_config: returns the YAML of a run's own config.yaml, with a value for every key that
            there is today.
        inputs: returns what the run starts from; called on the main process.

    Raises:
        FileExistsError, ValueError: as `check_run_folder`; or other inputs under the same config.
        FolderInUseError: another process holds it.
    """
    with contextlib.ExitStack() as stack:

        def enter() -> None:
            check_run_folder(folder, config_yaml, resume=resume, read_config=read_config)
            make_folder(folder)
            stack.enter_context(locked(folder))
            # Again, for whoever held it until now may have changed it.
            used = check_run_folder(folder, config_yaml, resume=resume, read_config=read_config)
            now = environment(inputs(), accelerator.num_processes)
            changes: list[str] = []
            if used:
                now, changes = continued(now, _environment_of(folder))
            else:
                write_text(folder / CONFIG_NAME, config_yaml)
            write_json(folder / ENVIRONMENT_NAME, now)
            for place in (folder, folder / "features", folder / "detections"):
                remove_temporary_files(place)
            stack.enter_context(_logging_to(folder))
            if changes:
                logger.warning(
                    "This run goes on elsewhere than it began, and not to the same bits: %s.",
                    "; ".join(changes),
                )

        main_first(accelerator, enter)
        yield


def check_before_data(
    folder: Path,
    config_yaml: str,
    weights_sha256: Callable[[], str | None],
    *,
    resume: bool,
    read_config: Callable[[Path], str],
) -> None:
    """Refuse, before a run reads its data, what `open_run_folder` would refuse after them.

    Nothing is written and the folder is not held: until it is, others may still come first.

    Args:
        weights_sha256: returns that of the weights to begin with; called where a run goes on.

    Raises:
        OSError: no folder can be made there, or none be written to.
        FolderInUseError, FileExistsError, ValueError: as `open_run_folder`, but for other data.
    """
    above = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not above.is_dir():
        raise NotADirectoryError(f"output_dir {folder}: {above} is a file. Set another output_dir.")
    if not os.access(above, os.W_OK | os.X_OK):
        raise PermissionError(
            f"output_dir {folder}: {above} cannot be written to. Set another output_dir."
        )
    check_free(folder)
    if check_run_folder(folder, config_yaml, resume=resume, read_config=read_config):
        then, _ = _read_environment(folder)
        check_inputs({"data": {}, "weights": weights_sha256()}, then)


def check_run_folder(
    folder: Path, config_yaml: str, *, resume: bool, read_config: Callable[[Path], str]
) -> bool:
    """Return whether `folder` holds a run, which is then this config's to go on with.

    Raises:
        FileExistsError: the folder holds a run, and this is no resume.
        ValueError: the run to resume has another config, and the message lists the keys; or its
            config.yaml is missing or cannot be read.
    """
    if not (folder / RESULTS_NAME).exists() and not any(folder.glob("checkpoints/iter_*")):
        return False
    if not resume:
        raise FileExistsError(
            f"{folder} holds a run already. Go on with it (--resume), or set another output_dir."
        )
    file = folder / CONFIG_NAME
    if not file.is_file():
        raise ValueError(
            f"{folder} holds a run, but no {CONFIG_NAME}, which says what run it is. Put that "
            "file back, or set another output_dir."
        )
    try:
        old = yaml.safe_load(read_config(file))
    except ValueError as error:
        raise ValueError(
            f"{file} is no whole config of this version, so {folder} cannot be resumed by it: "
            f"{error} Put back the file that the run wrote, or set another output_dir."
        ) from error
    changed = changed_keys(old, yaml.safe_load(config_yaml))
    if changed:
        longer = any(line.startswith("solver.max_") for line in changed)
        schedule = " Its schedule fits its length: a longer run begins anew." if longer else ""
        raise ValueError(
            f"{folder} cannot be resumed with another config: {'; '.join(changed)}. "
            f"Resume with {file}, or set another output_dir.{schedule}"
        )
    return True


def resume_hint(folder: Path) -> str:
    """Say what to do about the run in `folder` after it was stopped."""
    if is_finished(folder):
        return f"the run is finished (output_dir {folder})."
    if any(folder.glob("checkpoints/iter_*")):
        return f"checkpoint written. Go on with --resume (output_dir {folder})."
    return f"nothing to go on from yet. Give the same command again (output_dir {folder})."


@contextlib.contextmanager
def _logging_to(folder: Path) -> Iterator[None]:
    """Let the package's log go to `folder/log.txt`, and what ends the run too."""
    path = folder / "log.txt"
    if path.exists() and not path.read_bytes().endswith(b"\n"):
        with path.open("a") as file:  # cut off by a kill: the next line must not be its end
            file.write("\n")
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    package = logging.getLogger("tract_transfer")
    package.addHandler(handler)
    if package.getEffectiveLevel() > logging.INFO:
        package.setLevel(logging.INFO)
    try:
        yield
    except Exception:
        # For the file alone: who called gets the error itself.
        failed = (logger.name, logging.ERROR, __file__, 0, "The run failed.", (), sys.exc_info())
        handler.handle(logger.makeRecord(*failed))
        raise
    finally:
        package.removeHandler(handler)
        handler.close()


def _environment_of(folder: Path) -> dict[str, Any]:
    """Return the environment the run had before; {} where its file is lost, which is warned of."""
    then, problem = _read_environment(folder)
    if problem:
        logger.warning(
            "%s cannot be read (%s): whether the data are those the run began with is not known.",
            folder / ENVIRONMENT_NAME, problem,
        )  # fmt: skip
    return then


def _read_environment(folder: Path) -> tuple[dict[str, Any], str]:
    """Return what environment.json holds and ""; or {} and why it cannot be read."""
    try:
        then = json.loads((folder / ENVIRONMENT_NAME).read_text())
    except (OSError, ValueError) as problem:
        return {}, str(problem)
    if isinstance(then, dict):
        return then, ""
    return {}, f"{type(then).__name__} in place of a mapping"


def write_results(folder: Path, results: Mapping[str, Any]) -> None:
    """Write results.json: with it a run is finished. Tell of images that it had to leave out."""
    write_json(folder / RESULTS_NAME, results)
    if skipped := results.get("skipped"):
        logger.warning(
            "Images left out, for they cannot be decoded (data.undecodable: skip): %d. %s lists "
            "them; the first: %s",
            len(skipped),
            folder / RESULTS_NAME,
            skipped[0],
        )


def save_detections(
    folder: Path, model: nn.Module, dataset: Any, count: int, device: torch.device
) -> None:
    """Write the first `count` images as PNG, and detections.json with what was found and is there.

    Args:
        dataset: has `image(index)`, `target(index)` and `class_names`; an image that raises
            ValueError because it cannot be decoded is left out.
    """
    entries = []
    names = dataset.class_names
    make_folder(folder / "detections")
    for index in range(min(count, len(dataset))):
        try:
            image, target = dataset.image(index), dataset.target(index)
        except ValueError:
            continue
        with evaluating(model):
            (found,) = model([image.to(device)])
        path = f"detections/{index:04d}.png"
        with atomic_path(folder / path) as aside:
            write_png(image, str(aside))
        entries.append(
            {
                "image": path,
                "boxes": found["boxes"].tolist(),
                "scores": found["scores"].tolist(),
                "labels": [names[label] for label in found["labels"].tolist()],
                "truth_boxes": target["boxes"].tolist(),
                "truth_labels": [names[label] for label in target["labels"].tolist()],
            }
        )
    write_json(folder / "detections.json", entries)


def is_finished(folder: Path) -> bool:
    """Whether the run in `folder` has written its results."""
    try:
        return isinstance(json.loads((folder / RESULTS_NAME).read_bytes()), dict)
    except (OSError, ValueError):
        return False
