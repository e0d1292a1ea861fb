"""Checkpoints that are whole or not there.

`checkpoints/iter_0000500/` holds safetensors files and `state.json` with their hashes and its own.
It is written aside, synced and renamed, so a name without a leading dot is a whole checkpoint.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

STATE_NAME, BEST_NAME = "state.json", "best.json"
logger = logging.getLogger(__name__)

# What reading a file raises that is not what was written.
_BROKEN = (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError)
Tree = Any  # dicts, lists and plain values, with tensors among them


class Checkpointer:
    """Writes and finds the checkpoints of one run folder; keeps the last `keep` and the best."""

    def __init__(self, folder: Path, keep: int = 1) -> None:
        self.folder = folder
        self.keep = keep

    def save(self, iteration: int, parts: Mapping[str, Tree], state: Mapping[str, Any]) -> Path:
        """Write one checkpoint.

        Args:
            parts: file name stem -> tree of tensors and plain values (a state dict).
            state: plain values; goes to state.json.
        """
        final = self._path(iteration)
        aside = self.folder / f".{final.name}"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        content: dict[str, Any] = {"iteration": iteration, "state": dict(state), "parts": {}}
        for name, tree in parts.items():
            tensors: dict[str, Tensor] = {}
            layout = _flatten(tree, name, tensors)
            file = aside / f"{name}.safetensors"
            save_file(tensors, file)
            sync(file)
            content["parts"][name] = {"layout": layout, "sha256": _sha256(file)}
        write_json(aside / STATE_NAME, {"sha256": _sha256_of(content), **content})
        sync(aside)
        if final.exists():
            shutil.rmtree(final)  # broken, or of the same bits
        aside.rename(final)
        sync(self.folder)
        self._prune(iteration)
        return final

    def newest(self) -> Path | None:
        """Return the newest checkpoint that is whole; name and pass over broken ones."""
        for path in sorted(self.folder.glob("iter_*"), key=_number, reverse=True):
            if self._is_whole(path):
                return path
        return None

    def _is_whole(self, path: Path) -> bool:
        try:
            self.load(path)
        except ValueError as error:
            logger.warning("%s Passed over.", error)
            return False
        return True

    def load(self, path: Path) -> tuple[dict[str, Tree], dict[str, Any], int]:
        """Return (parts, state, iteration) of one checkpoint.

        Raises:
            ValueError: a file is missing or is not what was written.
        """
        try:
            content = json.loads((path / STATE_NAME).read_text())
            if content.pop("sha256") != _sha256_of(content):
                raise ValueError(f"{STATE_NAME} is not what was written")
            parts = {}
            for name, entry in content["parts"].items():
                file = path / f"{name}.safetensors"
                if _sha256(file) != entry["sha256"]:
                    raise ValueError(f"{file.name} is not what was written")
                parts[name] = _unflatten(entry["layout"], load_file(file))
            return parts, content["state"], int(content["iteration"])
        except _BROKEN as error:
            raise ValueError(f"Checkpoint {path} is broken: {error}.") from error

    def mark_best(self, iteration: int, value: float) -> None:
        """Remember that the checkpoint of `iteration` is the best so far; it will be kept."""
        write_json(self.folder / BEST_NAME, {"iteration": iteration, "value": value})
        self._prune(iteration)

    def best(self) -> Path | None:
        """Return the checkpoint that was marked best."""
        file = self.folder / BEST_NAME
        if not file.is_file():
            return None
        return self._path(json.loads(file.read_text())["iteration"])

    def _prune(self, iteration: int) -> None:
        """Keep the last ones up to `iteration`: a later one is broken, the run having come back."""
        own = [path for path in self.folder.glob("iter_*") if 0 <= _number(path) <= iteration]
        for path in sorted(own, key=_number)[: -self.keep]:
            if path != self.best():
                shutil.rmtree(path)

    def _path(self, iteration: int) -> Path:
        return self.folder / f"iter_{iteration:07d}"


def write_json(path: Path, content: Any) -> None:
    """Write JSON aside, sync and rename it: a reader sees the old file or the new."""
    aside = path.with_name(f".{path.name}")
    aside.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
    sync(aside)
    aside.replace(path)


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flatten(tree: Tree, name: str, tensors: dict[str, Tensor]) -> Any:
    """Put the tensors of a tree into `tensors`; return the tree with names in their places."""
    if torch.is_tensor(tree):
        while name in tensors:  # {"a": {"b": x}, "a.b": y}
            name += "'"
        tensors[name] = tree.detach().contiguous().clone()
        return {"tensor": name}
    if isinstance(tree, Mapping):
        entries = [[key, _flatten(value, f"{name}.{key}", tensors)] for key, value in tree.items()]
        return {"dict": entries}
    if isinstance(tree, list | tuple):
        items = [_flatten(value, f"{name}.{i}", tensors) for i, value in enumerate(tree)]
        return {"list": items}
    if tree is None or isinstance(tree, bool | int | float | str):
        return {"value": tree}
    raise TypeError(f"{name}: a checkpoint holds tensors and plain values, not {type(tree)}.")


def _unflatten(layout: Any, tensors: Mapping[str, Tensor]) -> Tree:
    ((kind, content),) = layout.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _unflatten(value, tensors) for key, value in content}
    if kind == "list":
        return [_unflatten(value, tensors) for value in content]
    return content


def _number(path: Path) -> int:
    """The iteration in a checkpoint's name; -1 where there is none."""
    digits = path.name.removeprefix("iter_")
    return int(digits) if digits.isdecimal() else -1


def _sha256_of(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
