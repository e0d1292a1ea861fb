"""TrAct's step at the start of an optimizer's steps, by the optimizer's own hooks."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from tract_transfer.tract.watch import WatchedLayer


class Attached:
    """Calls `step` at the start of every `optimizer.step()`, until `remove()`.

    If the optimizer gets a closure that runs forward and backward (Lightning, L-BFGS), `step` runs
    after each call of it. Updates without gradients at the watched layers skip `step`: Lightning
    makes one where `training_step` returned None. For errors see `TrAct.attach`.

    Attributes:
        tract: the TrAct, for `attached.tract.report()`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        watched: Sequence[WatchedLayer],
        step: Callable[[], None],
        tract: Any,
    ) -> None:
        self.tract = tract
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        self._optimizer = optimizer
        self._watched, self._step = watched, step
        self._is_stepping = False
        self._treated: Callable[[], Any] | None = None  # the closure of the current step, wrapped
        kind = type(optimizer).__name__
        if not isinstance(optimizer, Optimizer):
            raise ValueError(f"attach takes a torch optimizer, got {kind}.")
        if any(group.get("line_search_fn") for group in optimizer.param_groups):
            raise ValueError(
                f"The line search of {kind} compares losses with the slope along the gradient, "
                "which TrAct changes. Set line_search_fn=None."
            )
        # Detectron2's clipping classes call the hooked step of their parent.
        steps = [vars(base).get("step") for base in type(optimizer).__mro__]
        if not any(getattr(method, "hooked", False) for method in steps):
            raise ValueError(
                f"The step of {kind} calls no hooks. Attach to the optimizer that it wraps."
            )
        for hook in optimizer._optimizer_step_pre_hooks.values():
            other = getattr(hook, "__self__", None)
            if isinstance(other, Attached) and other.tract is tract:
                raise ValueError("This TrAct is already attached to this optimizer.")
        if missing := self._missing():
            raise ValueError(f"The optimizer does not hold {missing[0]}.weight.")
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _missing(self) -> list[str]:
        """The layers whose current weight the optimizer does not hold."""
        held = {id(weight) for group in self._optimizer.param_groups for weight in group["params"]}
        return [watched.title for watched in self._watched if id(watched.layer.weight) not in held]

    def _before(
        self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The step's pre-hook; args begins with the optimizer itself."""
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        # A class whose step calls its parent's step runs the hooks of both.
        is_nested, self._is_stepping = self._is_stepping, True
        if closure is None:
            if not is_nested or any(watched.reached for watched in self._watched):
                self._step_if_used()
            return None
        if closure is self._treated:
            return None

        def treated() -> Any:
            with torch.enable_grad():
                loss = closure()
            self._step_if_used()
            return loss

        self._treated = treated
        if "closure" in kwargs:
            return args, {**kwargs, "closure": treated}
        return (args[0], treated, *args[2:]), kwargs

    def _after(self, *_: Any) -> None:
        self._is_stepping, self._treated = False, None

    def _step_if_used(self) -> None:
        if all(watched.layer.weight.grad is None for watched in self._watched):
            for watched in self._watched:
                watched.forget()
            return
        if missing := self._missing():
            raise RuntimeError(
                f"{missing[0]}.weight is another parameter than when TrAct was attached, and the "
                "optimizer does not hold it. Create and attach the optimizer after anything that "
                "replaces parameters, such as load_state_dict(assign=True)."
            )
        self._step()
