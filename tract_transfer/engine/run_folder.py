"""A run's folder: what goes in first, what comes out last, and whose it is."""

import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from torch import nn
from torchvision.io import write_png

from tract_transfer.engine.environment import (
    ENVIRONMENT_NAME,
    Inputs,
    check_inputs,
    continued,
    environment,
)
from tract_transfer.engine.evaluate import evaluating
from tract_transfer.engine.group import main_first
from tract_transfer.engine.resume_keys import changed_keys
from tract_transfer.engine.run_lock import check_free, locked
from tract_transfer.files import make_folder, remove_leftovers, replacing, write_json, write_text

CONFIG_NAME, RESULTS_NAME = "config.yaml", "results.json"
RESULTS_FORMAT = 1  # of results.json; what reads it refuses another
logger = logging.getLogger(__name__)


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
                remove_leftovers(place)
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


def how_to_go_on(folder: Path) -> str:
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
        with replacing(folder / path) as aside:
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
