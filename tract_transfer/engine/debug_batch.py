"""The step at which a training stopped, kept to be run again: its images and its weights."""

import contextlib
import itertools
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tract_transfer.engine.checkpoint import put_tensors, take_tensors
from tract_transfer.engine.determinism import seed_all
from tract_transfer.engine.non_finite import NonFiniteError
from tract_transfer.engine.trainer import Trainer
from tract_transfer.files import atomic_path

DEBUG_NAME = "debug_batch.safetensors"
_FORWARD_CALLS = "Traceback of forward call that caused the error:"
_TOLD = (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError)


class DebugBatch(NamedTuple):
    """A step that was not finite.

    Attributes:
        iteration: steps done before it.
        process: the rank of the process whose images these are.
        about: the losses and the images' names, as NonFiniteError has them.
        model: the state dict before the step.
        batches: a dict of `images`, `targets` and `indices` for each micro-batch.
    """

    iteration: int
    process: int
    about: dict[str, Any]
    model: dict[str, Tensor]
    batches: list[dict[str, Any]]


@contextlib.contextmanager
def keep_debug_batch(trainer: Trainer, folder: Path) -> Iterator[None]:
    """Where the training inside is not finite, keep its step in `folder` and say how to replay it.

    Each process whose images had it keeps its own, those behind the first by a number.
    """
    try:
        yield
    except NonFiniteError as error:
        process = trainer.accelerator.process_index
        own = [step for step in error.steps if step["process"] == process]
        if not own:
            raise
        name = DEBUG_NAME if process == 0 else DEBUG_NAME.replace(".", f"_{process}.")
        file = folder / name
        try:
            save_debug_batch(file, trainer, own[0])
        except Exception as problem:  # what ended the training is the first to be told
            raise NonFiniteError(f"{error} The step is not kept: {problem}", error.steps) from error
        raise NonFiniteError(
            f"{error} To see where it begins: python tools/train_net.py --config-file "
            f"{folder / 'config.yaml'} --debug-batch {file}",
            error.steps,
        ) from error


def save_debug_batch(file: Path, trainer: Trainer, about: Mapping[str, Any]) -> None:
    """Write the step that `trainer` is at, whole or not at all: it loads the same images again."""
    again = itertools.islice(trainer.batches(trainer.iteration), trainer.accumulate)
    tree = {
        "model": trainer.accelerator.unwrap_model(trainer.model).state_dict(),
        "batches": [
            {"images": batch.images, "targets": batch.targets, "indices": batch.indices}
            for batch in again
        ],
    }
    tensors: dict[str, Tensor] = {}
    content = {
        "iteration": trainer.iteration,
        "process": trainer.accelerator.process_index,
        "about": dict(about),
        "layout": take_tensors(tree, "step", tensors),
    }
    with atomic_path(file, sum(tensor.nbytes for tensor in tensors.values())) as aside:
        save_file(tensors, aside, {"debug_batch": json.dumps(content)})


def load_debug_batch(file: Path) -> DebugBatch:
    """Read what `save_debug_batch` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is another file, or broken.
    """
    if not file.is_file():
        raise FileNotFoundError(f"No debug batch at {file}: a run writes one where it stops.")
    try:
        with safe_open(file, "pt") as opened:
            content = json.loads(opened.metadata()["debug_batch"])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        tree = put_tensors(content["layout"], tensors)
        iteration, process = int(content["iteration"]), int(content["process"])
        return DebugBatch(iteration, process, content["about"], tree["model"], tree["batches"])
    except _TOLD as error:
        raise ValueError(f"{file} is no debug batch, or a broken one: {error!r}.") from error


def replay(trainer: Trainer, kept: DebugBatch, batches: list[Any]) -> list[str]:
    """Run a kept step again, and tell in lines where it stops being finite.

    Args:
        batches: the micro-batches, on the trainer's device; the weights are the caller's to load.

    Returns:
        What was found, a line each; then, where torch tells it, the calls of the forward that
        computed what the backward fails at.
    """
    calls: list[str] = []
    trainer.iteration = kept.iteration
    model = trainer.accelerator.unwrap_model(trainer.model).train()
    lines = [
        f"{name} is not finite before the step"
        for name, parameter in model.named_parameters()
        if not bool(parameter.isfinite().all())
    ]
    seed_all(trainer.seed, kept.iteration, kept.process)
    for number, batch in enumerate(batches, start=1):
        place = f" of micro-batch {number}" if len(batches) > 1 else ""
        with torch.autograd.set_detect_anomaly(True):  # in the forward too: it tells the line
            with _first_output(model) as found, trainer.autocast():
                losses = trainer.losses(batch)
                loss = torch.stack(list(losses.values())).sum()
            told = ", ".join(f"{name} {value:g}" for name, value in _numbers(losses).items())
            lines += [f"The losses{place}: {told}", *(f"{text}{place}" for text in found)]
            failure, stack = _backward(loss)
            lines += [f"{text}{place}" for text in failure]
            calls = calls or stack
    if all(bool(loss.isfinite()) for loss in losses.values()):
        lines += [
            f"The gradient of {name} is not finite"
            for name, parameter in model.named_parameters()
            if parameter.grad is not None and not bool(parameter.grad.isfinite().all())
        ]
    return [*lines, *calls]


def _numbers(losses: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: float(loss.detach()) for name, loss in losses.items()}


def _backward(loss: Tensor) -> tuple[list[str], list[str]]:
    """Go back through the step; return which operation's gradient is the first with a NaN, and
    the calls of its forward, which torch has only as a warning.
    """
    found: list[str] = []
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            loss.backward()
        except RuntimeError as error:
            found = [f"Backward: {str(error).splitlines()[0]}"]
    calls: list[str] = []
    for each in warned:
        _, is_it, stack = str(each.message).partition(_FORWARD_CALLS)
        if is_it:
            calls = ["The calls of its forward:", *_below_trainer(stack.splitlines())]
        else:
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
    return found, calls


def _below_trainer(stack: list[str]) -> list[str]:
    """Return the calls of a traceback below the training loop, without those by which torch calls
    a module.
    """
    calls: list[list[str]] = []
    for line in stack:
        if line.startswith("  File "):
            calls.append([])
        if calls and line.strip() and "(Triggered internally" not in line:
            calls[-1].append(line)
    loops = [number for number, call in enumerate(calls) if "engine/trainer.py" in call[0]]
    below = calls[loops[-1] :] if loops else calls
    return [line for call in below if "torch/nn/modules/module.py" not in call[0] for line in call]


@contextlib.contextmanager
def _first_output(model: nn.Module) -> Iterator[list[str]]:
    """Collect the first layer whose output is not finite while its inputs are."""
    found: list[str] = []

    def look(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if found or all(map(_is_finite, _tensors(output))):
            return
        kind = type(module).__name__
        if all(map(_is_finite, _tensors(inputs))):
            found.append(f"The first output that is not finite: {name or 'the model'} ({kind})")
        else:
            found.append(f"The input of {name or 'the model'} ({kind}) is not finite")

    handles = [
        module.register_forward_hook(
            lambda module, inputs, output, name=name: look(name, module, inputs, output)
        )
        for name, module in model.named_modules()
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)
