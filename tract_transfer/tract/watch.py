"""What a layer has multiplied since the last step: x x^T, added up by a forward hook."""

# R rows the layer multiplies, N inputs a row

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import TensorWeakRef

from tract_transfer.tract.gram import gram_matrix
from tract_transfer.tract.lags import sum_dtype

logger = logging.getLogger(__name__)

MANY = 100  # gradients without a step(): no scaler skips so often


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
    detach_all: Callable[[], None]  # of the TrAct that it is of
    alive: bool = False  # its hooks are on, and it is no copy
    counts: bool = True  # whether forwards are added now
    reached: bool = False
    waiting: Tensor | None = None  # (N N + 1,), x x^T and the number of rows, before a backward
    used: Tensor | None = None  # the same of the rows whose gradient the weight holds
    holds: bool | Tensor = False  # whether it held one when the backward now running came
    weight: Tensor | None = None  # the parameter that has the hooks
    whole: Tensor | None = None  # what FSDP puts in its place for a forward and a backward
    gradient: TensorWeakRef | None = None  # after the last backward
    version: int | None = None  # of it
    weight_version: int | None = None  # of the weight then
    treated: tuple[TensorWeakRef, int] | None = None  # the gradient that step() left, its version
    adds_to_treated: bool = False  # the backward now running, of a new forward
    moved: bool = False  # whether the layer has another parameter than at first
    num_gradients: int = 0  # begun anew since the last step
    handles: list[RemovableHandle] = field(default_factory=list)  # on the layer
    weight_handles: list[RemovableHandle] = field(default_factory=list)

    @property
    def title(self) -> str:
        """What messages call it: the layer may be all of the model, which has no name."""
        return self.name or "the layer"

    @property
    def num_inputs(self) -> int:
        """N."""
        return int(self.layer.weight.shape[1:].numel())

    def start(self) -> None:
        """Register the hooks; an earlier TrAct on the layer goes, for two would both multiply."""
        for hook in list(self.layer._forward_hooks.values()):
            other = getattr(hook, "__self__", None)
            if isinstance(other, WatchedLayer) and other.alive:
                logger.warning("An earlier TrAct on %s is detached now.", self.title)
                other.detach_all()
        self.alive = True
        self.handles = [
            self.layer.register_forward_pre_hook(self.check_input, with_kwargs=True),
            # After the forward, which knows what other hooks made of its input.
            self.layer.register_forward_hook(self.add_forward, with_kwargs=True),
            # With assign=True it replaces the parameter.
            self.layer.register_load_state_dict_post_hook(  # type: ignore[no-untyped-call]
                self.follow_weight
            ),
        ]
        self.follow_weight()

    def follow_weight(self, *_: Any) -> None:
        """Put the hooks on the layer's parameter, where that is another one than before."""
        weight = self.layer.weight
        if weight is self.weight or not (self.alive and weight.requires_grad):
            return
        for handle in self.weight_handles:
            handle.remove()
        self.moved = self.weight is not None
        self.weight, self.whole, self.gradient, self.weight_version = weight, None, None, None
        self.weight_handles = [
            weight.register_hook(self.look_at_gradient),
            weight.register_post_accumulate_grad_hook(self.add_backward),
        ]

    def follow_whole(self) -> None:
        """Look also when the gradient of the whole weight comes, of which FSDP keeps a shard."""
        weight = self.layer.weight
        if weight is self.whole or not weight.requires_grad:
            return
        self.whole = weight
        hook = self.look_at_gradient if _is_sharded(self.weight) else self.await_backward
        self.weight_handles = [*self.weight_handles[:2], weight.register_hook(hook)]

    def await_backward(self, _: Tensor) -> None:
        """The hook of a weight whose parameter is not known: FSDP came after TrAct.

        At the end of the backward the layer has its shard again, with the gradient.
        """
        torch.autograd.Variable._execution_engine.queue_callback(self.take_over)

    def take_over(self) -> None:
        """Follow the layer's parameter, which has been through a backward."""
        self.follow_weight()
        if self.layer.weight.grad is not None:
            self.add_backward(self.layer.weight)

    def stop(self) -> None:
        """Remove the hooks."""
        for handle in (*self.handles, *self.weight_handles):
            handle.remove()
        self.handles, self.weight_handles, self.alive = [], [], False

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the model, such as an average of its weights, is not treated."""
        names = ("waiting", "used", "weight", "whole", "gradient", "treated")
        dead = {"alive": False, "detach_all": _nothing, "handles": [], "weight_handles": []}
        return {**vars(self), **dead, **dict.fromkeys(names)}

    def check_input(
        self, _: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]
    ) -> None:
        """The forward pre-hook."""
        images = inputs[0] if inputs else next(iter(named.values()))
        if self.alive and not images.is_floating_point():
            raise TypeError(
                f"TrAct needs a floating-point input to {self.title}, got {images.dtype}."
            )

    def add_forward(
        self, module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor], _: Tensor
    ) -> None:
        """The forward hook."""
        if not (self.alive and module.training and torch.is_grad_enabled()):
            return
        images = inputs[0] if inputs else next(iter(named.values()))
        _refuse_transforms(self.title)
        self.reached = True
        if module.weight is not self.weight:
            self.follow_whole()
        if not self.counts:
            return
        with torch.no_grad():
            gram, num_rows = gram_matrix(self.layer, images)
            both = torch.cat([gram.flatten(), gram.new_full((1,), num_rows)])
            self.waiting = both if self.waiting is None else self.waiting.add_(both)

    def look_at_gradient(self, _: Tensor) -> None:
        """The weight's hook before a backward adds to its gradient."""
        gradient = None if self.weight is None else self.weight.grad
        if gradient is None:
            self.holds = self.adds_to_treated = False
            self.num_gradients += 1
            if self.num_gradients == MANY:
                logger.warning(
                    "%d gradients of %s went by without TrAct's step(). Call it before the "
                    "optimizer's, or attach TrAct to the optimizer whose step() runs.",
                    MANY,
                    self.title,
                )
            return
        left, version = self.treated or (None, None)
        is_left = left is not None and left() is gradient and local(gradient)._version == version
        self.adds_to_treated = self.reached and is_left
        last = None if self.gradient is None else self.gradient()
        if gradient is last and local(gradient)._version == self.version:
            self.holds = True
        else:  # Replaced or written to since the last backward: scaled, or zeroed in place.
            self.holds = local(gradient).any()

    def add_backward(self, weight: Tensor) -> None:
        """The weight's hook after a backward; `torch.autograd.grad` does not call it."""
        if self.adds_to_treated and self.holds:  # not zeroed by way of .data
            raise RuntimeError(
                f"A backward adds to the gradient of {self.title}.weight that TrAct's step() has "
                "multiplied already. Call step() once an update, after the last micro-batch, and "
                "zero_grad() after the optimizer's step."
            )
        self.weight_version = local(weight)._version
        if weight.grad is not None:
            self.gradient, self.version = TensorWeakRef(weight.grad), local(weight.grad)._version
        if self.waiting is None:  # the same forwards, gone back through once more
            return
        if self.used is None or self.holds is False:
            self.used = self.waiting.clone()  # a CUDA graph's next run would write over it
        elif self.holds is True:
            self.used.add_(self.waiting)
        else:
            self.used = torch.where(self.holds, self.used, 0).add_(self.waiting)
        self.waiting = None

    def keep_treated(self) -> None:
        """Know the gradient again that step() has multiplied."""
        if (gradient := self.layer.weight.grad) is not None:
            self.treated = TensorWeakRef(gradient), local(gradient)._version

    def forget(self) -> None:
        """Start anew."""
        self.reached, self.num_gradients = False, 0
        self.used = self.waiting = self.weight_version = None

    def gradient_rows(self) -> Tensor:
        """Return the rows that this process holds of the weight's gradient, or RuntimeError."""
        weight = self.layer.weight
        if not isinstance(weight, nn.Parameter):
            raise RuntimeError(
                f"{self.title}.weight is computed from other parameters now (weight_norm, a "
                "parametrization), which TrAct cannot treat. detach() TrAct."
            )
        if not weight.requires_grad:
            raise RuntimeError(
                f"{self.title}.weight was frozen after TrAct was made. detach() TrAct for as long."
            )
        if weight.grad is None:
            raise RuntimeError(
                f"{self.title}.weight has no gradient. Call backward() before TrAct's step(), and "
                "zero_grad() after it."
            )
        placements = getattr(weight.grad, "placements", ())
        if any(place.is_shard() and not place.is_shard(0) for place in placements):
            raise RuntimeError(
                f"{self.title}.weight is sharded along its inputs ({placements}); TrAct needs all "
                "inputs of an output in one place. Shard it along dimension 0."
            )
        return local(weight.grad)

    def check_order(self) -> None:
        """Raise RuntimeError where the optimizer, or another, wrote to the weight too early."""
        weight = self.layer.weight
        known = weight is self.weight and self.weight_version is not None
        if known and local(weight)._version != self.weight_version:
            raise RuntimeError(
                f"{self.title}.weight was written to between its backward and TrAct's step(). Call "
                "TrAct's step() right after the backward, before the optimizer's."
            )

    def check_reached(self) -> None:
        """Raise RuntimeError where no forward has come; other processes may have had all."""
        if not (self.reached or _is_joined()):
            raise RuntimeError(
                f"No training forward reached {self.title} since the last step. TrAct must be made "
                "on the module that runs, in train mode; call its step() once an iteration, and "
                "not at all where it is attached to an optimizer."
            )

    def mean(self, device: torch.device) -> Tensor:
        """Return x x^T / b over all processes, (N, N)."""
        held = [each for each in (self.used, self.waiting) if each is not None]
        if held:
            both = held[0] if len(held) == 1 else held[0] + held[1]
        else:  # a process without images
            dtype = sum_dtype(self.layer.weight.dtype)
            both = torch.zeros(self.num_inputs**2 + 1, dtype=dtype, device=device)
        if _is_joined():
            dist.all_reduce(both)
        return (both[:-1] / both[-1]).view(self.num_inputs, self.num_inputs)


def local(tensor: Any) -> Tensor:
    """What this process holds of a tensor that FSDP may have sharded."""
    held: Tensor = tensor.to_local() if _is_sharded(tensor) else tensor
    return held


def _is_sharded(tensor: Any) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def _refuse_transforms(name: str) -> None:
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is None:
        return
    raise RuntimeError(
        f"{name} runs under a transform of torch.func (grad, vmap), whose inputs TrAct cannot add "
        "up. Use backward() or torch.autograd.grad, or detach() TrAct for as long."
    )


def _nothing() -> None:
    pass


def _is_joined() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
