"""Atomic checkpoints.

A checkpoint is a folder `checkpoints/iter_0000500/` of safetensors files and a `state.json`, which
holds their hashes and its own. It is written under a name with a leading dot, synced and renamed,
so a name without the dot is complete. On resume a damaged one is renamed to `broken-iter_...`.
"""

import contextlib
import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tract_transfer.files import (
    make_folder,
    remove_temporary_files,
    reports_full_disk,
    sha256_of,
    sync,
    write_json,
)

STATE_NAME, BEST_NAME = "state.json", "best.json"
Tree = Any  # nested dicts and lists of tensors and plain values
logger = logging.getLogger(__name__)


@contextlib.contextmanager
def reports_damage(file: str, advice: str = "") -> Iterator[None]:
    """Turn whatever reading a damaged file raises into a ValueError that names it."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{file} is broken: {error}.{advice}") from error


@dataclass
class Checkpointer:
    """Writes and reads the checkpoints of a run; keeps the last `keep` and the best."""

    folder: Path
    keep: int = 1

    def save(self, iteration: int, parts: Mapping[str, Tree], state: Mapping[str, Any]) -> Path:
        """Write a checkpoint and return its path.

        Args:
            parts: state dicts by the stem of their file name.
            state: plain values for state.json.
        """
        final = self._path(iteration)
        tensors: dict[str, dict[str, Tensor]] = {name: {} for name in parts}
        layouts = {name: take_tensors(tree, name, tensors[name]) for name, tree in parts.items()}
        needed = sum(tensor.nbytes for part in tensors.values() for tensor in part.values())
        make_folder(self.folder)
        temporary = self.folder / f".{final.name}"
        shutil.rmtree(temporary, ignore_errors=True)
        content: dict[str, Any] = {"iteration": iteration, "state": dict(state), "parts": {}}
        try:
            with reports_full_disk(self.folder, final.name, needed):
                temporary.mkdir()
                for name in parts:
                    file = temporary / f"{name}.safetensors"
                    save_file(tensors[name], file)
                    sync(file)
                    content["parts"][name] = {"layout": layouts[name], "sha256": sha256_of(file)}
                write_json(temporary / STATE_NAME, {"sha256": _hash(content), **content})
                temporary.rename(final)
                sync(self.folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        self._prune(iteration)
        return final

    def newest(self) -> Path | None:
        """Return the newest intact checkpoint; warn of damaged ones."""
        return next((path for path in self._newest_first() if self._is_intact(path)), None)

    def tidy(self) -> None:
        """Remove what a killed process left incomplete; archive damaged checkpoints."""
        for temporary in self.folder.glob(".iter_*"):
            shutil.rmtree(temporary)
        if self.folder.is_dir():
            remove_temporary_files(self.folder)
        for path in self._newest_first():
            if self._is_intact(path):
                return
            self._archive(path)

    def load(self, path: Path) -> tuple[dict[str, Tree], dict[str, Any], int]:
        """Return (parts, state, iteration) of a checkpoint; ValueError if it is damaged."""
        content = verified(path)
        with reports_damage(f"Checkpoint {path}"):
            parts = {
                name: put_tensors(part["layout"], load_file(path / f"{name}.safetensors"))
                for name, part in content["parts"].items()
            }
            return parts, content["state"], int(content["iteration"])

    def mark_best(self, iteration: int, value: float) -> None:
        """Record that the checkpoint of `iteration` is the best so far; it is kept."""
        write_json(self.folder / BEST_NAME, {"iteration": iteration, "value": value})
        self._prune(iteration)

    def best(self) -> Path | None:
        """Return the checkpoint that is marked best; ValueError if best.json is damaged."""
        file = self.folder / BEST_NAME
        if not file.exists():
            return None
        with reports_damage(str(file), " --resume restores it from the checkpoints."):
            return self._path(int(json.loads(file.read_text())["iteration"]))

    def repair_best(self, best: Mapping[str, float] | None, iteration: int) -> None:
        """Restore best.json for a run that resumes from `iteration` with this `best`.

        Raises:
            ValueError: the best checkpoint itself is damaged.
        """
        try:
            path = self.best()
        except ValueError as error:
            logger.warning("%s", error)
            self._archive(self.folder / BEST_NAME)
            path = None
        if path is None or _iteration(path) > iteration:
            (self.folder / BEST_NAME).unlink(missing_ok=True)
            path = None if best is None else self._path(int(best["iteration"]))
            if best is None or path is None or not path.exists():
                return
            write_json(self.folder / BEST_NAME, dict(best))
        try:
            verified(path)
        except ValueError as error:
            raise ValueError(
                f"{error} It is the best of its run, which cannot be reported without it. Restore "
                "it, or set another output_dir to train from scratch."
            ) from error

    def _is_intact(self, path: Path) -> bool:
        try:
            verified(path)
        except ValueError as error:
            logger.warning("%s Skipped.", error)
            return False
        return True

    def _archive(self, path: Path) -> None:
        """Rename something damaged to a free `broken-` name, for inspection."""
        names = [f"broken-{path.name}", *(f"broken-{path.name}-{i}" for i in range(2, 100))]
        archived = next(self.folder / name for name in names if not (self.folder / name).exists())
        path.rename(archived)
        sync(self.folder)
        logger.warning("Moved to %s.", archived)

    def _newest_first(self) -> list[Path]:
        paths = [path for path in self.folder.glob("iter_*") if _iteration(path) >= 0]
        return sorted(paths, key=_iteration, reverse=True)

    def _prune(self, iteration: int) -> None:
        """Remove checkpoints before `iteration` that are neither among the last nor the best."""
        best = self.best()
        paths = [path for path in self._newest_first() if _iteration(path) <= iteration]
        for path in paths[self.keep :]:
            if path != best:
                temporary = self.folder / f".{path.name}"
                path.rename(temporary)  # a kill during the removal must not leave a damaged one
                shutil.rmtree(temporary)

    def _path(self, iteration: int) -> Path:
        return self.folder / f"iter_{iteration:07d}"


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint, intact or not; other programs write a state.json too."""
    try:
        content = json.loads((folder / STATE_NAME).read_bytes())
        return isinstance(content, dict) and content.keys() >= {"sha256", "parts"}
    except (OSError, ValueError):
        return folder.name.startswith("iter_") and (folder / STATE_NAME).exists()


def verified(path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint's state.json; ValueError if a hash does not match."""
    with reports_damage(f"Checkpoint {path}"):
        content: dict[str, Any] = json.loads((path / STATE_NAME).read_text())
        if content.pop("sha256") != _hash(content):
            raise ValueError(f"{STATE_NAME} does not match its hash")
        for name, part in content["parts"].items():
            if Path(name).name != name:
                raise ValueError(f"the part {name!r} is not a file name")
            file = path / f"{name}.safetensors"
            if sha256_of(file) != part["sha256"]:
                raise ValueError(f"{file.name} does not match its hash")
    return content


def take_tensors(tree: Tree, name: str, tensors: dict[str, Tensor]) -> Any:
    """Copy the tensors of a tree into `tensors`; return its layout, with names in their places."""
    if torch.is_tensor(tree):
        while name in tensors:  # {"a": {"b": x}, "a.b": y}
            name += "'"
        # Copied to the CPU: the GPU may have no memory for a second copy.
        tensors[name] = tree.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        return {"tensor": name}
    if isinstance(tree, Mapping):
        return {"dict": [[k, take_tensors(v, f"{name}.{k}", tensors)] for k, v in tree.items()]}
    if isinstance(tree, list | tuple):
        return {"list": [take_tensors(v, f"{name}.{i}", tensors) for i, v in enumerate(tree)]}
    if tree is None or isinstance(tree, bool | int | float | str):
        return {"value": tree}
    raise TypeError(f"{name}: a checkpoint holds tensors and plain values, not {type(tree)}.")


def put_tensors(layout: Any, tensors: Mapping[str, Tensor]) -> Tree:
    """Return the tree of a layout from `take_tensors`; its tuples have become lists."""
    ((kind, content),) = layout.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: put_tensors(value, tensors) for key, value in content}
    if kind == "list":
        return [put_tensors(value, tensors) for value in content]
    return content


def _iteration(path: Path) -> int:
    """Return the iteration in a checkpoint's name, or -1."""
    digits = path.name.removeprefix("iter_")
    return int(digits) if digits.isdecimal() else -1


def _hash(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
