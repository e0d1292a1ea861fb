"""What becomes of a step whose losses or gradient are not finite numbers."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate.utils import gather_object
from torch import Tensor

if TYPE_CHECKING:
    from tract_transfer.engine.trainer import Trainer

# A gradient scaler halves from 65,536 on overflow: 26 times in a row is no overflow.
SMALLEST_SCALE = 2.0**-10
NUM_NAMED = 8  # images in a message
logger = logging.getLogger(__name__)


class NonFiniteError(FloatingPointError):
    """A training came to a loss or a gradient that is not finite.

    Attributes:
        steps: a dict of each process that had it: `process`, `losses` (name -> text), `images`.
    """

    def __init__(self, message: str, steps: Sequence[Mapping[str, Any]]) -> None:
        super().__init__(message)
        self.steps = list(steps)


@dataclass
class StepGuard:
    """Lets a step change the weights only where its losses and its gradient are finite.

    Under float16 the gradient is the scaler's: an overflow makes it skip the step and halve its
    scale, which is no error until the scale is below 2^-10.

    Args:
        non_finite: `stop` raises; `skip` passes the step over: no weight and no buffer changes.
        max_skipped: how many steps of a run `skip` may pass over; one more raises.
        name_of: what an error calls an image of the training data, by its index.
    """

    non_finite: Literal["stop", "skip"] = "stop"
    max_skipped: int = 10
    name_of: Callable[[int], str] = str
    passed_over: list[dict[str, Any]] = field(default_factory=list)
    _buffers: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def remember(self, model: torch.nn.Module) -> None:
        """Keep the buffers that a step may have to be taken back from, such as BatchNorm's."""
        if self.non_finite == "skip":
            self._buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]

    def lets_pass(
        self,
        trainer: "Trainer",
        losses: Sequence[Mapping[str, Tensor]],
        indices: Sequence[Sequence[int]],
    ) -> bool:
        """Whether the step may change the weights; all processes of a group agree.

        Reads the device once.

        Args:
            losses: those of each micro-batch.
            indices: the images of each micro-batch.

        Raises:
            NonFiniteError: it may not, and `stop` or `max_skipped` ends the training here.
        """
        values = torch.stack([loss.detach() for each in losses for loss in each.values()])
        finite = values.isfinite().all()
        if not trainer.scaler.is_enabled():
            finite = finite & gradient_norm(trainer.model.parameters()).isfinite()
        if trainer.accelerator.num_processes > 1:
            finite = finite.int()
            torch.distributed.all_reduce(finite, torch.distributed.ReduceOp.MIN)
        if bool(finite):
            return True
        found = self._describe(trainer, losses, indices)
        message = f"{_cause(found)} in iteration {trainer.iteration + 1}. {images_of(found)}"
        if self.non_finite == "stop":
            raise NonFiniteError(f"{message} {_ADVICE}", found)
        if len(self.passed_over) == self.max_skipped:
            raise NonFiniteError(
                f"{message} It would be the run's step number {self.max_skipped + 1} to be passed "
                f"over, and engine.max_skipped is {self.max_skipped}. {_ADVICE}",
                found,
            )
        for buffer, before in self._buffers:
            buffer.copy_(before)
        self.passed_over.append({"iteration": trainer.iteration + 1, "processes": found})
        logger.warning("%s The step is passed over (engine.non_finite: skip).", message)
        return False

    def check_scale(self, trainer: "Trainer") -> None:
        """Raise NonFiniteError where the gradient scaler finds no scale without an overflow."""
        if trainer.scaler.is_enabled() and trainer.scaler.get_scale() < SMALLEST_SCALE:
            raise NonFiniteError(
                f"The gradient is not finite by iteration {trainer.iteration + 1}, at any scale: "
                f"the gradient scaler is at {trainer.scaler.get_scale():g}. {_ADVICE}",
                [],
            )

    def counted(self, trainer: "Trainer") -> dict[str, float]:
        """Return what a log line tells of steps without effect: how many, and float16's scale."""
        counts = {"skipped_steps": len(self.passed_over)} if self.non_finite == "skip" else {}
        scale = trainer.scaler
        return {**counts, **({"loss_scale": scale.get_scale()} if scale.is_enabled() else {})}

    def _describe(
        self,
        trainer: "Trainer",
        losses: Sequence[Mapping[str, Tensor]],
        indices: Sequence[Sequence[int]],
    ) -> list[dict[str, Any]]:
        """Return losses and images of the processes, and micro-batches, that had it."""
        broken = [any(not bool(value.isfinite()) for value in each.values()) for each in losses]
        # Where all losses are finite it is the gradient, which is that of all images.
        chosen = [which for which in range(len(losses)) if broken[which] or not any(broken)]
        own = {
            "process": trainer.accelerator.process_index,
            "broken": any(broken),
            # As text: JSON has no NaN.
            "losses": {
                name: f"{float(loss.detach()):g}" for name, loss in losses[chosen[0]].items()
            },
            "images": [self.name_of(index) for which in chosen for index in indices[which]],
        }
        everyone: list[dict[str, Any]] = gather_object([own])
        is_loss = any(each["broken"] for each in everyone)
        return [
            {**each, "broken": "loss" if is_loss else "gradient"}
            for each in everyone
            if each["broken"] or not is_loss
        ]


_ADVICE = (
    "Lower solver.lr, set engine.grad_clip, use precision bf16 instead of fp16, or pass such steps "
    "over with engine.non_finite: skip."
)


def gradient_norm(parameters: Iterable[torch.nn.Parameter]) -> Tensor:
    """Return the 2-norm of the whole gradient, a scalar; 0 without one."""
    from torch.distributed.tensor import DTensor

    gradients = [each.grad for each in parameters if each.grad is not None]
    norm: Tensor = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _cause(found: Sequence[Mapping[str, Any]]) -> str:
    first = found[0]
    losses = ", ".join(f"{name} {value}" for name, value in first["losses"].items())
    return f"The {first['broken']} is not finite ({losses})"


def images_of(found: Sequence[Mapping[str, Any]]) -> str:
    """Return a sentence a process: which images the step had, eight of them by name."""
    texts = []
    for each in found:
        named, more = each["images"][:NUM_NAMED], len(each["images"]) - NUM_NAMED
        of = f" of process {each['process']}" if len(found) > 1 or each["process"] else ""
        rest = f" and {more} more" if more > 0 else ""
        texts.append(f"Its images{of}: {', '.join(named)}{rest}.")
    return " ".join(texts)
