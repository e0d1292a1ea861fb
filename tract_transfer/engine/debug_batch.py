"""Debug batches: the images and weights of a step that is not finite, saved to replay it."""

import contextlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._pytree import tree_leaves

from tract_transfer.data.loader import Batch
from tract_transfer.engine.checkpoint import put_tensors, reports_damage, take_tensors
from tract_transfer.engine.determinism import seed_all
from tract_transfer.engine.non_finite import NonFiniteError
from tract_transfer.engine.trainer import Trainer
from tract_transfer.files import CONFIG_NAME, atomic_path

DEBUG_NAME = "debug_batch.safetensors"


class DebugBatch(NamedTuple):
    """A step that is not finite, the state dict of the model before it, and its micro-batches."""

    iteration: int  # steps before it
    process: int  # rank of the process whose images these are
    about: dict[str, Any]  # an entry of `NonFiniteError.steps`
    model: dict[str, Tensor]
    batches: list[dict[str, Any]]


@contextlib.contextmanager
def keep_debug_batch(trainer: Trainer, folder: Path) -> Iterator[None]:
    """On a NonFiniteError, save the step in `folder` and add the command that replays it.

    Each process that is to blame saves its own file.
    """
    try:
        yield
    except NonFiniteError as error:
        process = trainer.accelerator.process_index
        about = next((step for step in error.steps if step["process"] == process), None)
        if about is None:
            raise
        file = folder / (DEBUG_NAME if process == 0 else f"debug_batch_{process}.safetensors")
        try:
            save_debug_batch(file, trainer, about)
            message = (
                f"To find the layer, run: tract-transfer train --config-file "
                f"{folder / CONFIG_NAME} --debug-batch {file}"
            )
        except Exception as problem:  # must not hide the error that ended the training
            message = f"The step could not be saved: {problem}"
        raise NonFiniteError(f"{error} {message}", error.steps) from error


def save_debug_batch(file: Path, trainer: Trainer, about: Mapping[str, Any]) -> None:
    """Save the current step of `trainer` atomically; its images are loaded again."""
    batches = itertools.islice(trainer.batches(trainer.iteration), trainer.accumulate)
    tree = {
        "model": trainer.unwrapped.state_dict(),
        "batches": [
            {name: getattr(batch, name) for name in ("images", "targets", "indices")}
            for batch in batches
        ],
    }
    tensors: dict[str, Tensor] = {}
    content = {
        "iteration": trainer.iteration,
        "process": trainer.accelerator.process_index,
        "about": dict(about),
        "layout": take_tensors(tree, "step", tensors),
    }
    with atomic_path(file, sum(tensor.nbytes for tensor in tensors.values())) as temporary:
        save_file(tensors, temporary, {"debug_batch": json.dumps(content)})


def load_debug_batch(file: Path) -> DebugBatch:
    """Load a debug batch; FileNotFoundError if it is missing, ValueError if it is damaged."""
    if not file.is_file():
        raise FileNotFoundError(
            f"No debug batch at {file}. A run saves one if a step is not finite."
        )
    with reports_damage(f"The debug batch {file}"), safe_open(file, "pt") as opened:
        content = json.loads(opened.metadata()["debug_batch"])
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        tree = put_tensors(content["layout"], tensors)
        iteration, process = int(content["iteration"]), int(content["process"])
        return DebugBatch(iteration, process, content["about"], tree["model"], tree["batches"])


def replay(trainer: Trainer, kept: DebugBatch, batches: Sequence[Batch]) -> list[str]:
    """Run a saved step again, and return in lines where it is not finite.

    Torch's anomaly detection prints the forward calls of the operation whose gradient is NaN.

    Args:
        batches: the micro-batches, on the trainer's device; the caller loads the weights.
    """
    trainer.iteration = kept.iteration
    model = trainer.unwrapped.train()
    parameters = list(model.named_parameters())
    lines = [f"{n} is not finite before the step" for n, p in parameters if not _is_finite(p)]
    seed_all(trainer.seed, kept.iteration, kept.process)
    for number, batch in enumerate(batches, start=1):
        of = f" of micro-batch {number}" if len(batches) > 1 else ""
        with torch.autograd.set_detect_anomaly(True):
            with _watch_outputs(model) as outputs, trainer.autocast():
                losses = trainer.losses(batch)
                loss = torch.stack(list(losses.values())).sum()
            values = [f"{name} {value.item():g}" for name, value in losses.items()]
            lines.append(f"The losses{of}: {', '.join(values)}")
            lines += [f"{output}{of}" for output in outputs[:1]]
            try:
                loss.backward()
            except RuntimeError as error:
                lines.append(f"Backward: {str(error).splitlines()[0]}{of}")
    if all(_is_finite(loss) for loss in losses.values()):
        lines += [
            f"The gradient of {n} is not finite" for n, p in parameters if not _is_finite(p.grad)
        ]
    return lines


@contextlib.contextmanager
def _watch_outputs(model: nn.Module) -> Iterator[list[str]]:
    """Yield a list that collects, in the order of calls, layers whose output is not finite."""
    names = {module: name or "the model" for name, module in model.named_modules()}
    lines: list[str] = []

    def look(module: nn.Module, inputs: Any, output: Any) -> None:
        if module in names and not _is_finite(output):
            what = "The first output that is not finite:"
            if not _is_finite(inputs):
                what = "Not finite: the input of"
            lines.append(f"{what} {names[module]} ({type(module).__name__})")

    with register_module_forward_hook(look):
        yield lines


def _is_finite(tree: Any) -> bool:
    return all(bool(leaf.isfinite().all()) for leaf in tree_leaves(tree) if torch.is_tensor(leaf))
