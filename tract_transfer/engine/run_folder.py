"""A run's folder: what goes in first, what comes out last, and whose it is."""

import importlib.metadata
import json
import logging
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from torchvision.io import write_png

from tract_transfer import __version__
from tract_transfer.engine.evaluate import evaluating
from tract_transfer.files import write_json

CONFIG_NAME, RESULTS_NAME, ENVIRONMENT_NAME = "config.yaml", "results.json", "environment.json"
RESULTS_FORMAT = 1  # of results.json; what reads it refuses another
PACKAGES = ("torch", "torchvision", "timm", "datasets", "accelerate", "numpy")
# Keys that may differ on resume: they decide where and how fast, not what.
SAFE_ON_RESUME = (
    "output_dir", "engine.log", "engine.checkpoint", "data.num_workers", "data.cache",
    "data.undecodable", "data.feature_cache", "paper",
)  # fmt: skip


def open_run_folder(folder: Path, config_yaml: str, *, resume: bool) -> None:
    """Make a run folder with its config.yaml, or enter the one to resume.

    Raises:
        FileExistsError: the folder holds another run, and this is no resume.
        ValueError: the run to resume has another config; the message lists the keys.
    """
    file = folder / CONFIG_NAME
    used = (folder / RESULTS_NAME).exists() or any(folder.glob("checkpoints/iter_*"))
    if used and not resume:
        raise FileExistsError(
            f"{folder} holds another run. Go on with it (--resume), or set another output_dir."
        )
    if used:
        old = flatten(yaml.safe_load(file.read_text()))
        new = flatten(yaml.safe_load(config_yaml))
        changed = [
            f"{key}: {old.get(key)!r} then, {new.get(key)!r} now"
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key) and not _may_differ(key, old.get(key), new.get(key))
        ]
        if changed:
            longer = any(line.startswith("solver.max_") for line in changed)
            schedule = " Its schedule fits its length: a longer run begins anew." if longer else ""
            raise ValueError(
                f"{folder} cannot be resumed with another config: {'; '.join(changed)}. "
                f"Resume with {file}, or set another output_dir.{schedule}"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(config_yaml)


def log_to(folder: Path) -> logging.Handler:
    """Let the package's log go to `folder/log.txt`; the caller removes the handler."""
    handler = logging.FileHandler(folder / "log.txt")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    package = logging.getLogger("tract_transfer")
    package.addHandler(handler)
    if package.getEffectiveLevel() > logging.INFO:
        package.setLevel(logging.INFO)
    return handler


def environment(fingerprints: Mapping[str, str]) -> dict[str, Any]:
    """Return versions, hardware, git state and data fingerprints. No environment variables."""
    versions = {"python": platform.python_version(), "tract_transfer": __version__}
    for package in PACKAGES:
        versions[package] = importlib.metadata.version(package)
    hardware = {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
    }
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        hardware["gpus"] = ", ".join(names)
    return {
        "versions": versions,
        "hardware": hardware,
        "git": _git_state(),
        "data": dict(fingerprints),
        "command": " ".join(sys.argv),
    }


def _may_differ(key: str, old: Any, new: Any) -> bool:
    if key == "data.cache" and "device" in (old, new):
        return False  # it augments by other random numbers
    return key.startswith(SAFE_ON_RESUME)


def write_results(folder: Path, results: Mapping[str, Any]) -> None:
    """Write results.json: with it a run is finished."""
    write_json(folder / RESULTS_NAME, results)


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
    (folder / "detections").mkdir(exist_ok=True)
    for index in range(min(count, len(dataset))):
        try:
            image, target = dataset.image(index), dataset.target(index)
        except ValueError:
            continue
        with evaluating(model):
            (found,) = model([image.to(device)])
        path = f"detections/{index:04d}.png"
        write_png(image, str(folder / path))
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


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return dotted keys and their values."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def is_finished(folder: Path) -> bool:
    """Whether the run in `folder` has written its results."""
    try:
        json.loads((folder / RESULTS_NAME).read_text())
    except (OSError, json.JSONDecodeError):
        return False
    return True


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
