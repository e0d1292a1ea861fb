"""What a layer has multiplied since the last step: x x^T, added up by a forward pre-hook."""

# R rows the layer multiplies, N inputs a row

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tract_transfer.tract.gram import gram_matrix


@dataclass
class WatchedLayer:
    """A treated layer and the sum over the rows of its training forwards.

    Forwards without gradient or in eval mode do not count; nor do those whose gradient was zeroed
    instead of being used, as it is after a step that a GradScaler skipped. Loops call
    `zero_grad()` before or after a forward. So its rows wait for its backward, which is the first
    to know whether the gradients of earlier ones are still there.
    """

    name: str
    layer: nn.Linear | nn.Conv2d
    counts: bool = True  # whether forwards are added now
    reached: bool = False
    waiting: Tensor | None = None  # (N N + 1,), x x^T and the number of rows, before a backward
    used: Tensor | None = None  # the same of the rows whose gradient the weight holds
    holds: bool | Tensor = False  # whether it held one when the backward now running came
    version: int | None = None  # of the gradient after the last backward
    handles: list[RemovableHandle] = field(default_factory=list)

    @property
    def num_inputs(self) -> int:
        """N."""
        return int(self.layer.weight.shape[1:].numel())

    def start(self) -> None:
        """Register the hooks."""
        # Prepended: what another hook makes of the input is the layer's own affair.
        forward = self.layer.register_forward_pre_hook(self.add_forward, with_kwargs=True)
        before = self.layer.weight.register_hook(self.look_at_gradient)
        after = self.layer.weight.register_post_accumulate_grad_hook(self.add_backward)
        self.handles = [forward, before, after]

    def stop(self) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def add_forward(
        self, module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]
    ) -> None:
        """The forward pre-hook."""
        if not (module.training and torch.is_grad_enabled()):
            return
        images = inputs[0] if inputs else named["input"]
        if not images.is_floating_point():
            raise TypeError(
                f"TrAct needs a floating-point input to {self.name}, got {images.dtype}."
            )
        self.reached = True
        if not self.counts:
            return
        with torch.no_grad():
            gram, num_rows = gram_matrix(self.layer, images)
            both = torch.cat([gram.flatten(), gram.new_full((1,), num_rows)])
            if self.waiting is None:
                self.waiting = both
            else:
                self.waiting.add_(both)

    def look_at_gradient(self, _: Tensor) -> None:
        """The weight's hook before a backward adds to its gradient."""
        gradient = self.layer.weight.grad
        if gradient is None or gradient._version == self.version:
            self.holds = gradient is not None
        else:  # Written to since the last backward: scaled, or zeroed in place.
            self.holds = gradient.any()

    def add_backward(self, weight: Tensor) -> None:
        """The weight's hook after a backward."""
        self.version = None if weight.grad is None else weight.grad._version
        if self.waiting is None:
            return
        if self.used is None or self.holds is False:
            self.used = self.waiting.clone()
        elif self.holds is True:
            self.used.add_(self.waiting)
        else:
            self.used = torch.where(self.holds, self.used, 0).add_(self.waiting)
        self.waiting.zero_()

    def forget(self) -> None:
        """Start anew."""
        self.reached = False
        self.used = None
        if self.waiting is not None:
            self.waiting.zero_()

    def take_mean(self, device: torch.device) -> Tensor:
        """Return x x^T / b over all processes, (N, N), and start anew.

        Raises:
            RuntimeError: no training forward reached the layer, and no other process may have one.
        """
        joined = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if not (self.reached or joined):
            raise RuntimeError(
                f"No training forward reached {self.name} since the last step. TrAct must be made "
                "on the module that runs, in train mode; call its step() once an iteration, and "
                "not at all where it is attached to an optimizer."
            )
        if self.waiting is None:  # of a process without images
            self.waiting = torch.zeros(self.num_inputs**2 + 1, device=device)
        both = self.waiting.clone() if self.used is None else self.used + self.waiting
        if joined:
            dist.all_reduce(both)
        self.forget()
        return (both[:-1] / both[-1]).view(self.num_inputs, self.num_inputs)
