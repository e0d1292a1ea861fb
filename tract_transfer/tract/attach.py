"""TrAct's step, called by an optimizer's own hooks."""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


class Attached:
    """A `step` that comes before every update of `optimizer`; `remove()` takes it off.

    Where the optimizer is given a closure that runs forward and backward, as Lightning and L-BFGS
    do, `step` follows each of its runs.

    Args:
        is_due: whether a forward has come since `step` was last called.

    Raises:
        ValueError: no optimizer, or one whose step calls no hooks.
    """

    def __init__(
        self, optimizer: Optimizer, step: Callable[[], None], is_due: Callable[[], bool]
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise ValueError(f"attach takes a torch optimizer, got {type(optimizer).__name__}.")
        # Of the class or, as with detectron2's clipping ones, of the parent whose step it calls.
        steps = [vars(each).get("step") for each in type(optimizer).__mro__]
        if not any(getattr(method, "hooked", False) for method in steps):
            raise ValueError(
                f"The step of {type(optimizer).__name__} calls no hooks. Attach to the optimizer "
                "that it wraps."
            )
        self.optimizer = optimizer
        self._step = step
        self._is_due = is_due
        self._is_stepping = False
        self._treated: Callable[[], Any] | None = None  # the closure of the step that runs
        self._handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @property
    def is_on(self) -> bool:
        """Whether it has not been removed."""
        return bool(self._handles)

    def _before(
        self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        # args begins with the optimizer itself.
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        # A class whose step calls its parent's runs the hooks of both.
        is_done = not self._is_due() if closure is None else closure is self._treated
        if self._is_stepping and is_done:
            return None
        self._is_stepping = True
        if closure is None:
            self._step()
            return None

        def treated() -> Any:
            with torch.enable_grad():
                loss = closure()
            self._step()
            return loss

        self._treated = treated
        if "closure" in kwargs:
            return args, {**kwargs, "closure": treated}
        return (args[0], treated, *args[2:]), kwargs

    def _after(self, *_: Any) -> None:
        self._is_stepping, self._treated = False, None
