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

    Forwards without gradient or in eval mode do not count; nor do those whose gradient was thrown
    away by `zero_grad()` instead of being used, as a GradScaler does that skips a step.
    """

    name: str
    layer: nn.Linear | nn.Conv2d
    counts: bool = True  # whether forwards are added now
    reached: bool = False
    has_gradient: bool = False  # a backward has come since the last step
    gram: Tensor | None = None  # (N, N), the sum of x x^T
    num_rows: Tensor | None = None  # (1,), in gram's type
    handles: list[RemovableHandle] = field(default_factory=list)

    @property
    def num_inputs(self) -> int:
        """N."""
        return int(self.layer.weight.shape[1:].numel())

    def start(self) -> None:
        """Register the hooks."""
        # Prepended: what another hook makes of the input is the layer's own affair.
        forward = self.layer.register_forward_pre_hook(self.add_forward, with_kwargs=True)
        backward = self.layer.weight.register_post_accumulate_grad_hook(self.note_gradient)
        self.handles = [forward, backward]

    def stop(self) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def note_gradient(self, _: Tensor) -> None:
        """The weight's hook after a backward."""
        self.has_gradient = True

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
        if self.has_gradient and self.layer.weight.grad is None:
            self.forget()
            self.reached = True
        with torch.no_grad():
            gram, num_rows = gram_matrix(self.layer, images)
            if self.gram is None or self.num_rows is None:
                self.gram, self.num_rows = gram, gram.new_full((1,), num_rows)
            else:
                self.gram.add_(gram)
                self.num_rows.add_(num_rows)

    def forget(self) -> None:
        """Start anew."""
        self.reached = self.has_gradient = False
        if self.gram is not None and self.num_rows is not None:
            self.gram.zero_()
            self.num_rows.zero_()

    def take_mean(self, device: torch.device) -> Tensor:
        """Return x x^T / b over all processes, (N, N), and start anew.

        Raises:
            RuntimeError: no training forward reached the layer, and no other process may have one.
        """
        joined = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if not (self.reached or joined):
            raise RuntimeError(
                f"No training forward reached {self.name} since the last step. TrAct must be made "
                "on the module that runs, in train mode; call its step() once an iteration."
            )
        if self.gram is None or self.num_rows is None:  # of a process without images
            self.gram = torch.zeros(self.num_inputs, self.num_inputs, device=device)
            self.num_rows = torch.zeros(1, device=device)
        if joined:
            both = torch.cat([self.gram.flatten(), self.num_rows])
            dist.all_reduce(both)
            mean = both[:-1].view_as(self.gram) / both[-1]
        else:
            mean = self.gram / self.num_rows
        self.forget()
        return mean
