"""What happens to a step whose losses or gradient are not finite."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

# A gradient scaler starts from 65,536 and halves it on overflow: 26 times in a row is no overflow.
SMALLEST_SCALE = 2.0**-10
MAX_NAMED_IMAGES = 8  # in a message
_ADVICE = (
    "Lower solver.lr, set engine.grad_clip, use precision bf16 instead of fp16, or skip such steps "
    "with engine.non_finite: skip."
)
logger = logging.getLogger(__name__)


class NonFiniteError(FloatingPointError):
    """A loss or gradient is not finite; `steps` has `process`, `losses` and `images` of each."""

    def __init__(self, message: str, steps: Sequence[Mapping[str, Any]] = ()) -> None:
        super().__init__(message)
        self.steps = list(steps)


@dataclass
class StepGuard:
    """Lets a step change the weights only if its losses and its gradient are finite.

    With float16 the gradient is the scaler's business: on overflow it skips the step and halves its
    scale, which is an error only below 2^-10.

    Args:
        non_finite: `stop` raises; `skip` skips the step, which changes no weight and no buffer.
        max_skipped: how many steps of a run `skip` may skip; one more raises.
        name_of: returns the name of a training image, given its index, for messages.
    """

    non_finite: Literal["stop", "skip"] = "stop"
    max_skipped: int = 10
    name_of: Callable[[int], str] = str
    skipped_steps: list[dict[str, Any]] = field(default_factory=list)
    _buffers: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def remember(self, model: nn.Module) -> None:
        """Keep the buffers that a skipped step must restore, such as those of BatchNorm."""
        if self.non_finite == "skip":
            self._buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]

    def allows_step(
        self,
        model: nn.Module,
        losses: Sequence[Mapping[str, Tensor]],
        indices: Sequence[Sequence[int]],
        iteration: int,
        accelerator: Accelerator,
        scaler: torch.amp.GradScaler,
    ) -> bool:
        """Return whether the step may change the weights, the same on every process.

        Synchronizes with the device once.

        Args:
            losses: of each micro-batch, by name.
            indices: of the images of each micro-batch.
            iteration: number of the step, from 1.
        """
        every_loss = [loss.detach() for by_name in losses for loss in by_name.values()]
        finite = torch.stack(every_loss).isfinite().all()
        if not scaler.is_enabled():
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            finite = finite & nn.utils.get_total_norm(gradients).isfinite()
        if accelerator.num_processes > 1:
            finite = finite.int()
            torch.distributed.all_reduce(finite, torch.distributed.ReduceOp.MIN)
        if bool(finite):
            return True
        steps = self._describe(accelerator.process_index, losses, indices)
        values = ", ".join(f"{name} {value}" for name, value in steps[0]["losses"].items())
        message = (
            f"The {steps[0]['broken']} is not finite ({values}) in iteration {iteration}. "
            f"{describe_images(steps)}"
        )
        if self.non_finite == "stop":
            raise NonFiniteError(f"{message} {_ADVICE}", steps)
        if len(self.skipped_steps) == self.max_skipped:
            limit = f"{self.max_skipped} steps have been skipped already (engine.max_skipped)."
            raise NonFiniteError(f"{message} {limit} {_ADVICE}", steps)
        for buffer, before in self._buffers:
            buffer.copy_(before)
        self.skipped_steps.append({"iteration": iteration, "processes": steps})
        logger.warning("%s The step is skipped (engine.non_finite: skip).", message)
        return False

    def check_scale(self, scaler: torch.amp.GradScaler, iteration: int) -> None:
        """Raise NonFiniteError if the gradient scaler finds no scale without an overflow."""
        if scaler.is_enabled() and scaler.get_scale() < SMALLEST_SCALE:
            raise NonFiniteError(
                f"The gradient is not finite at any scale by iteration {iteration}: the gradient "
                f"scaler is at {scaler.get_scale():g}. {_ADVICE}"
            )

    def _describe(
        self, process: int, losses: Sequence[Mapping[str, Tensor]], indices: Sequence[Sequence[int]]
    ) -> list[dict[str, Any]]:
        """Return the losses and images of the processes and micro-batches that are to blame."""
        broken = [not all(bool(v.isfinite()) for v in by_name.values()) for by_name in losses]
        # If all losses are finite it is the gradient, which is that of all images.
        blamed = [micro for micro in range(len(losses)) if broken[micro] or not any(broken)]
        step = {
            "process": process,
            "broken": any(broken),
            "losses": {name: f"{loss.item():g}" for name, loss in losses[blamed[0]].items()},
            "images": [self.name_of(index) for micro in blamed for index in indices[micro]],
        }
        steps: list[dict[str, Any]] = gather_object([step])
        is_loss = any(step["broken"] for step in steps)
        return [
            {**step, "broken": "loss" if is_loss else "gradient"}
            for step in steps
            if step["broken"] or not is_loss
        ]


def describe_images(steps: Sequence[Mapping[str, Any]]) -> str:
    """Return a sentence a process that names up to eight images of the step."""
    sentences = []
    for step in steps:
        named, more = step["images"][:MAX_NAMED_IMAGES], len(step["images"]) - MAX_NAMED_IMAGES
        of = f" of process {step['process']}" if len(steps) > 1 or step["process"] else ""
        rest = f" and {more} more" if more > 0 else ""
        sentences.append(f"Images{of}: {', '.join(named)}{rest}.")
    return " ".join(sentences)
