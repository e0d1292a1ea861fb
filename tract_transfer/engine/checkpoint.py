"""Checkpoints that are whole or not there.

`checkpoints/iter_0000500/` holds safetensors files and `state.json` with their hashes and its own.
It is written aside, synced and renamed, so a name without a leading dot is a whole checkpoint. One
that is not what was written is renamed `broken-iter_...` where the run goes on.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tract_transfer.files import (
    check_space,
    make_folder,
    remove_temporary_files,
    reports_full_disk,
    sha256_of,
    sync,
    write_json,
)

STATE_NAME, BEST_NAME = "state.json", "best.json"
logger = logging.getLogger(__name__)

# What reading a file raises that is not what was written.
_BROKEN = (
    OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError,
    RecursionError, OverflowError,
)  # fmt: skip
Tree = Any  # dicts, lists and plain values, with tensors among them


class Checkpointer:
    """Writes and finds the checkpoints of one run folder; keeps the last `keep` and the best.

    Only the process that holds the run folder may call `save`, `tidy` and those of the best.
    """

    def __init__(self, folder: Path, keep: int = 1) -> None:
        self.folder = folder
        self.keep = keep

    def save(self, iteration: int, parts: Mapping[str, Tree], state: Mapping[str, Any]) -> Path:
        """Write one checkpoint; one of this iteration that is whole stays.

        Args:
            parts: file name stem -> tree of tensors and plain values (a state dict).
            state: plain values; goes to state.json.

        Raises:
            DiskFullError: there is no room; the checkpoints before it stay.
        """
        final = self._path(iteration)
        if final.exists():
            if self._is_whole(final):
                return final
            self._set_aside(final)
        flat: dict[str, dict[str, Tensor]] = {name: {} for name in parts}
        layouts = {name: take_tensors(tree, name, flat[name]) for name, tree in parts.items()}
        needed = sum(tensor.nbytes for part in flat.values() for tensor in part.values())
        make_folder(self.folder)
        aside = self.folder / f".{final.name}"
        shutil.rmtree(aside, ignore_errors=True)
        check_space(self.folder, final.name, needed)
        try:
            with reports_full_disk(self.folder, final.name, needed):
                aside.mkdir()
                self._write(aside, iteration, flat, layouts, state)
                aside.rename(final)
                sync(self.folder)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        self._prune(iteration)
        return final

    def newest(self) -> Path | None:
        """Return the newest checkpoint that is whole; name and pass over broken ones."""
        return next((path for path in self._descending() if self._is_whole(path)), None)

    def tidy(self) -> None:
        """Clear what a killed process left half-written or half-removed; keep broken ones aside."""
        for leftover in self.folder.glob(".iter_*"):
            shutil.rmtree(leftover)
        if self.folder.is_dir():
            remove_temporary_files(self.folder)
        for path in self._descending():
            if self._is_whole(path):
                return
            self._set_aside(path)

    def load(self, path: Path) -> tuple[dict[str, Tree], dict[str, Any], int]:
        """Return (parts, state, iteration) of one checkpoint.

        Raises:
            ValueError: a file is missing or is not what was written.
        """
        content = verified(path)
        try:
            parts = {
                name: put_tensors(entry["layout"], load_file(path / f"{name}.safetensors"))
                for name, entry in content["parts"].items()
            }
            return parts, content["state"], int(content["iteration"])
        except _BROKEN as error:
            raise ValueError(f"Checkpoint {path} is broken: {error}.") from error

    def mark_best(self, iteration: int, value: float) -> None:
        """Remember that the checkpoint of `iteration` is the best so far; it will be kept."""
        write_json(self.folder / BEST_NAME, {"iteration": iteration, "value": value})
        self._prune(iteration)

    def best(self) -> Path | None:
        """Return the checkpoint that was marked best.

        Raises:
            ValueError: best.json is not what was written.
        """
        file = self.folder / BEST_NAME
        try:
            return self._path(int(json.loads(file.read_text())["iteration"]))
        except FileNotFoundError:
            return None
        except _BROKEN as error:
            raise ValueError(
                f"{file} is broken: {error}. --resume finds the best again, from the checkpoints."
            ) from error

    def repair_best(self, best: Mapping[str, float] | None, iteration: int) -> None:
        """Let best.json name a whole checkpoint again, after a resume.

        Args:
            best: iteration and value of the best, as the checkpoint resumed from knows it.
            iteration: of that checkpoint. What was marked after it will be evaluated again.

        Raises:
            ValueError: the best checkpoint itself is broken.
        """
        try:
            path = self.best()
        except ValueError as error:
            logger.warning("%s", error)
            self._set_aside(self.folder / BEST_NAME)
            path = None
        if path is not None and _number(path) > iteration and not self._is_whole(path):
            (self.folder / BEST_NAME).unlink()
            path = None
        if path is None and best is not None and self._path(int(best["iteration"])).exists():
            path = self._path(int(best["iteration"]))
            write_json(self.folder / BEST_NAME, dict(best))
        if path is None:
            return
        try:
            verified(path)
        except ValueError as error:
            raise ValueError(
                f"{error} It is the best of its run, which cannot be reported without it: put it "
                "back, or set another output_dir to train anew."
            ) from error

    def _write(
        self,
        folder: Path,
        iteration: int,
        flat: Mapping[str, dict[str, Tensor]],
        layouts: Mapping[str, Any],
        state: Mapping[str, Any],
    ) -> None:
        content: dict[str, Any] = {"iteration": iteration, "state": dict(state), "parts": {}}
        for name, tensors in flat.items():
            file = folder / f"{name}.safetensors"
            save_file(tensors, file)
            sync(file)
            content["parts"][name] = {"layout": layouts[name], "sha256": sha256_of(file)}
        write_json(folder / STATE_NAME, {"sha256": _sha256_of(content), **content})

    def _is_whole(self, path: Path) -> bool:
        try:
            verified(path)
        except ValueError as error:
            logger.warning("%s Passed over.", error)
            return False
        return True

    def _set_aside(self, path: Path) -> None:
        """Rename what is broken, so that it stands in nobody's way and is there to be looked at."""
        names = [f"broken-{path.name}", *(f"broken-{path.name}-{i}" for i in range(2, 100))]
        aside = next(self.folder / name for name in names if not (self.folder / name).exists())
        path.rename(aside)
        sync(self.folder)
        logger.warning("Kept as %s.", aside)

    def _descending(self) -> list[Path]:
        """The checkpoints, newest first, whole or not."""
        own = [path for path in self.folder.glob("iter_*") if _number(path) >= 0]
        return sorted(own, key=_number, reverse=True)

    def _prune(self, iteration: int) -> None:
        """Keep the last ones up to `iteration`, and the best."""
        best = self.best()
        own = [path for path in self._descending() if _number(path) <= iteration]
        for path in own[self.keep :]:
            if path != best:
                aside = self.folder / f".{path.name}"
                path.rename(aside)  # killed halfway it would be a broken one
                shutil.rmtree(aside)

    def _path(self, iteration: int) -> Path:
        return self.folder / f"iter_{iteration:07d}"


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint of ours, whole or not: others have a state.json too."""
    try:
        content = json.loads((folder / STATE_NAME).read_bytes())
        return isinstance(content, dict) and content.keys() >= {"sha256", "parts"}
    except (OSError, ValueError):
        return folder.name.startswith("iter_") and (folder / STATE_NAME).exists()


def verified(path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint's state.json, all of whose files are what was written.

    Raises:
        ValueError: a file is missing or is not what was written.
    """
    try:
        content: dict[str, Any] = json.loads((path / STATE_NAME).read_text())
        if content.pop("sha256") != _sha256_of(content):
            raise ValueError(f"{STATE_NAME} is not what was written")
        for name, entry in content["parts"].items():
            if Path(name).name != name:
                raise ValueError(f"the part {name!r} is no file name")
            file = path / f"{name}.safetensors"
            if sha256_of(file) != entry["sha256"]:
                raise ValueError(f"{file.name} is not what was written")
    except _BROKEN as error:
        raise ValueError(f"Checkpoint {path} is broken: {error}.") from error
    return content


def take_tensors(tree: Tree, name: str, tensors: dict[str, Tensor]) -> Any:
    """Put the tensors of a tree into `tensors`; return the tree with names in their places."""
    if torch.is_tensor(tree):
        while name in tensors:  # {"a": {"b": x}, "a.b": y}
            name += "'"
        # A copy in the CPU's memory: that of a GPU may have no room for another one.
        here = tree.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        tensors[name] = here
        return {"tensor": name}
    if isinstance(tree, Mapping):
        entries = [
            [key, take_tensors(value, f"{name}.{key}", tensors)] for key, value in tree.items()
        ]
        return {"dict": entries}
    if isinstance(tree, list | tuple):
        items = [take_tensors(value, f"{name}.{i}", tensors) for i, value in enumerate(tree)]
        return {"list": items}
    if tree is None or isinstance(tree, bool | int | float | str):
        return {"value": tree}
    raise TypeError(f"{name}: a checkpoint holds tensors and plain values, not {type(tree)}.")


def put_tensors(layout: Any, tensors: Mapping[str, Tensor]) -> Tree:
    """Return the tree that `take_tensors` was given; tuples have become lists."""
    ((kind, content),) = layout.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: put_tensors(value, tensors) for key, value in content}
    if kind == "list":
        return [put_tensors(value, tensors) for value in content]
    return content


def _number(path: Path) -> int:
    """The iteration in a checkpoint's name; -1 where there is none."""
    digits = path.name.removeprefix("iter_")
    return int(digits) if digits.isdecimal() else -1


def _sha256_of(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
