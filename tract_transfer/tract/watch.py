"""What a layer multiplies between two steps: hooks sum x x^T."""

# R rows the layer multiplies, N inputs a row

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import TensorWeakRef

from tract_transfer.tract.gram import gram_matrix
from tract_transfer.tract.lags import sum_dtype

logger = logging.getLogger(__name__)

Version = tuple[TensorWeakRef, int]  # a tensor at one time: writing to it in place counts up
# Without a step: no adversarial attack, and no GradScaler that skips steps, changes the weight or
# makes so many gradients.
MAX_UPDATES, MAX_GRADIENTS = 20, 100


@dataclass(eq=False, repr=False)
class WatchedLayer:
    """A treated layer, and the sum of x x^T over the rows of its training forwards.

    Forwards without gradient or in eval mode do not count. Neither do forwards whose gradient was
    zeroed instead of used, as after a step that a GradScaler skipped. `zero_grad()` may come
    before or after a forward, so the rows of a forward wait for its backward. Only then is it
    known whether the gradients of earlier forwards still exist.
    """

    name: str
    layer: nn.Linear | nn.Conv2d
    detach_all: Callable[[], None]  # detaches the TrAct that this belongs to
    alive: bool = False  # the hooks are on, and this is not a copy
    counts: bool = True  # whether forwards are summed in the current step
    reached: bool = False  # by a training forward since the last step
    waiting: Tensor | None = None  # (N N + 1,), x x^T and R of forwards before their backward
    used: Tensor | None = None  # the same of the rows whose gradient the weight holds
    weight: Tensor | None = None  # the parameter with the hooks
    unsharded: Tensor | None = None  # what FSDP puts in its place for a forward and a backward
    weight_version: int | None = None  # after the last backward
    last_gradient: Version | None = None  # after the last backward
    treated_gradient: Version | None = None  # after the last step
    holds_gradient: bool | Tensor = False  # when the current backward arrived, and not zero
    adds_to_treated: bool = False  # the current backward adds to a gradient that step() multiplied
    num_gradients: int = 0  # started from nothing since the last step
    num_updates: int = 0  # of the weight between two backwards since the last step
    has_warned: bool = False  # that no step comes
    wants_moments: bool = True  # measure the inputs of the next forward for a report
    input_moments: tuple[Tensor, Tensor] | None = None  # variance and mean, see `measure_inputs`
    handles: Sequence[RemovableHandle] = ()  # on the layer
    weight_handles: Sequence[RemovableHandle] = ()

    @property
    def title(self) -> str:
        """The name in messages; a layer that is the whole model has none."""
        return self.name or "the layer"

    def start(self) -> None:
        """Register the hooks, and detach an earlier TrAct on the layer: both would multiply."""
        for hook in list(self.layer._forward_hooks.values()):
            other = getattr(hook, "__self__", None)
            if isinstance(other, WatchedLayer) and other.alive:
                logger.warning("Detaching an earlier TrAct on %s.", self.title)
                other.detach_all()
        self.alive = True
        self.handles = [
            # After the forward, when other hooks have changed its input.
            self.layer.register_forward_hook(self.add_forward, with_kwargs=True),
            # load_state_dict(assign=True) replaces the parameter.
            self.layer.register_load_state_dict_post_hook(  # type: ignore[no-untyped-call]
                self.follow_weight
            ),
        ]
        self.follow_weight()

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in (*self.handles, *self.weight_handles):
            handle.remove()
        self.alive, self.handles, self.weight_handles = False, (), ()

    def __getstate__(self) -> dict[str, Any]:
        """Copies of the model, such as an average of its weights, are not treated."""
        return {"name": self.name, "layer": self.layer}

    def follow_weight(self, *_: Any) -> None:
        """Move the hooks to the layer's current parameter."""
        weight = self.layer.weight
        if weight is self.weight or not (self.alive and weight.requires_grad):
            return
        for handle in self.weight_handles:
            handle.remove()
        self.weight, self.unsharded = weight, None
        self.last_gradient = self.weight_version = None
        self.weight_handles = [
            weight.register_hook(self.before_backward),
            weight.register_post_accumulate_grad_hook(self.after_backward),
        ]

    def follow_unsharded(self) -> None:
        """Hook also the unsharded weight, of which FSDP keeps a shard."""
        weight = self.layer.weight
        if weight is self.unsharded or not weight.requires_grad:
            return
        self.unsharded = weight
        hook = self.before_backward if hasattr(self.weight, "to_local") else self.await_shard
        self.weight_handles = [*self.weight_handles[:2], weight.register_hook(hook)]

    def await_shard(self, _: Tensor) -> None:
        """FSDP was applied after TrAct: follow its parameter when the layer has it again."""

        def follow() -> None:
            self.follow_weight()
            if self.layer.weight.grad is not None:
                self.after_backward(self.layer.weight)

        torch.autograd.Variable._execution_engine.queue_callback(follow)

    def add_forward(
        self, module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor], _: Tensor
    ) -> None:
        """The layer's forward hook: sum x x^T of its input."""
        if not (self.alive and module.training and torch.is_grad_enabled()):
            return
        images = inputs[0] if inputs else next(iter(named.values()))
        if images.is_complex():
            raise TypeError(f"TrAct needs a real input to {self.title}, got {images.dtype}.")
        if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack():
            raise RuntimeError(
                f"{self.title} runs under a transform of torch.func (grad, vmap), where "
                "TrAct cannot sum inputs. Use backward() or torch.autograd.grad, or detach() TrAct."
            )
        self.reached = True
        if module.weight is not self.weight:
            self.follow_unsharded()
        if not self.counts:
            return
        with torch.no_grad():
            gram, num_rows = gram_matrix(self.layer, images)
            both = torch.cat([gram.flatten(), gram.new_full((1,), num_rows)])
            self.waiting = both if self.waiting is None else self.waiting.add_(both)
            # Not in a compiled graph, which would have to be compiled again without it.
            if not torch.compiler.is_compiling() and self.wants_moments and images.numel():
                self.measure_inputs(images)

    def measure_inputs(self, images: Tensor) -> None:
        """Keep variance and mean of each channel's pixels, or of each input of a Linear."""
        images = images.to(sum_dtype(images.dtype))
        if isinstance(self.layer, nn.Conv2d):
            dims = [dim for dim in range(images.ndim) if dim != images.ndim - 3]
            variance, mean = torch.var_mean(images, dims, correction=0)
        else:
            variance, mean = torch.var_mean(images.reshape(-1, images.shape[-1]), 0, correction=0)
        self.input_moments, self.wants_moments = (variance, mean), False

    def before_backward(self, _: Tensor) -> None:
        """The weight's hook, before a backward adds to its gradient."""
        gradient = None if self.weight is None else self.weight.grad
        if gradient is None:
            self.holds_gradient = self.adds_to_treated = False
            self.num_gradients += 1
            if self.num_gradients >= MAX_GRADIENTS:
                self.warn_of_no_step(f"{MAX_GRADIENTS} gradients")
            return
        self.adds_to_treated = self.reached and _is_unchanged(gradient, self.treated_gradient)
        # A gradient replaced or written to since the last backward may have been zeroed.
        is_last = _is_unchanged(gradient, self.last_gradient)
        self.holds_gradient = True if is_last else local(gradient).any()

    def after_backward(self, weight: Tensor) -> None:
        """The weight's hook after a backward, which `torch.autograd.grad` does not call."""
        if self.adds_to_treated and self.holds_gradient:  # not zeroed by way of .data
            raise RuntimeError(
                f"A backward adds to the gradient of {self.title}.weight after TrAct's step() "
                "multiplied it. Call step() once an update, after the last micro-batch, and "
                "zero_grad() after the optimizer's step."
            )
        version = local(weight)._version
        if self.reached and self.weight_version not in (None, version):
            self.num_updates += 1
            if self.num_updates >= MAX_UPDATES:
                self.warn_of_no_step(f"{MAX_UPDATES} updates")
        self.weight_version = version
        self.last_gradient = _version(weight.grad)
        if self.waiting is None:  # another backward through the same forwards
            return
        if self.used is None or self.holds_gradient is False:
            self.used = self.waiting.clone()  # the next run of a CUDA graph would overwrite it
        elif self.holds_gradient is True:
            self.used.add_(self.waiting)
        else:
            self.used = torch.where(self.holds_gradient, self.used, 0).add_(self.waiting)
        self.waiting = None

    def warn_of_no_step(self, what: str) -> None:
        """Log once that step() is not called."""
        if self.has_warned:
            return
        self.has_warned = True
        logger.warning(
            "%s got %s without TrAct's step(), so TrAct has no effect. Call step() before the "
            "optimizer's, or attach TrAct to the optimizer whose step() runs. A trainer may make "
            "its own model and optimizer, as Hugging Face's Trainer(model_init=...) does: use "
            "those. Otherwise detach() TrAct.",
            self.title,
            what,
        )

    def finish_step(self) -> None:
        """Remember the gradient that step() has multiplied, and start the next step."""
        self.treated_gradient = _version(self.layer.weight.grad)
        self.forget()

    def forget(self) -> None:
        """Do not count the forwards since the last step."""
        self.reached, self.num_gradients, self.num_updates = False, 0, 0
        self.used = self.waiting = self.weight_version = None

    def check_order(self) -> None:
        """Raise RuntimeError if the weight was written to between backward and step()."""
        weight = self.layer.weight
        is_followed = weight is self.weight and self.weight_version is not None
        if is_followed and local(weight)._version != self.weight_version:
            raise RuntimeError(
                f"{self.title}.weight was written to between its backward and TrAct's step(). Call "
                "TrAct's step() right after the backward, before the optimizer's."
            )

    def local_gradient(self) -> Tensor:
        """Return the rows of the weight's gradient that this process holds.

        Raises:
            RuntimeError: there is no gradient that TrAct can treat, or no forward was counted.
        """
        self.follow_weight()
        weight = self.layer.weight
        placements = getattr(weight.grad, "placements", ())
        if not isinstance(weight, nn.Parameter):
            problem = "is now computed from others (weight_norm, a parametrization): detach() TrAct"
        elif not weight.requires_grad:
            problem = "was frozen after TrAct was made: detach() TrAct"
        elif weight.grad is None:
            problem = "has no gradient. Call backward() before TrAct's step(), zero_grad() after it"
        elif any(placement.is_shard() and not placement.is_shard(0) for placement in placements):
            problem = f"is sharded along its inputs ({placements}). Shard it along dimension 0"
        elif not (self.reached or _has_processes()):  # other processes may have had all images
            problem = (
                "got no training forward since the last step. Make TrAct on the module that runs, "
                "in train mode; call step() once an update, and not at all after attach()"
            )
        else:
            return local(weight.grad)
        raise RuntimeError(f"{self.title}.weight {problem}.")

    def mean(self, device: torch.device) -> Tensor:
        """Return x x^T / b over all processes, (N, N)."""
        both = self.summed()
        if both is None:  # a process without images
            dtype = sum_dtype(self.layer.weight.dtype)
            size = self.layer.weight.shape[1:].numel() ** 2 + 1
            both = torch.zeros(size, dtype=dtype, device=device)
        if _has_processes():
            dist.all_reduce(both)
        return mean_of(both)

    def summed(self) -> Tensor | None:
        """Return x x^T and R of this process's forwards since the last step, (N N + 1,)."""
        sums = [both for both in (self.used, self.waiting) if both is not None]
        return sums[0] + sums[1] if len(sums) == 2 else sums[0] if sums else None

    def pending_gradient(self) -> Tensor | None:
        """Return the rows here of the gradient that the next step() would multiply, if any."""
        gradient = self.layer.weight.grad if self.layer.weight.is_leaf else None
        return None if gradient is None or self.weight_version is None else local(gradient)


def mean_of(both: Tensor) -> Tensor:
    """Return x x^T / R, (N, N), of x x^T and R."""
    num_inputs = math.isqrt(len(both) - 1)
    return (both[:-1] / both[-1]).view(num_inputs, num_inputs)


def local(tensor: Any) -> Tensor:
    """What this process holds of a tensor that FSDP may have sharded."""
    shard: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return shard


def _version(tensor: Tensor | None) -> Version | None:
    return None if tensor is None else (TensorWeakRef(tensor), local(tensor)._version)


def _is_unchanged(tensor: Tensor, version: Version | None) -> bool:
    return version is not None and version[0]() is tensor and version[1] == local(tensor)._version


def _has_processes() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
