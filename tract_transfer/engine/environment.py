"""Where a run takes place: versions, hardware, git, data; and what changed before a resume."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tract_transfer import __version__
from tract_transfer.redact import without_secrets

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
