"""One optimizer made of several, each over parameters of its own."""

from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer


class JoinedOptimizer(Optimizer):
    """Steps several optimizers as one: the paper's first layer by SGD, and the rest by Adam.

        first = torch.optim.SGD(model.conv1.parameters(), lr=0.08, momentum=0.9)
        rest = torch.optim.Adam(others, lr=1e-3)
        optimizer = JoinedOptimizer([first, rest])

    Its `param_groups` are theirs, so that schedulers, clipping, gradient scalers and
    `TrAct.attach` see one optimizer.

    Raises:
        ValueError: none is given, or two hold the same parameter.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        if not optimizers:
            raise ValueError("JoinedOptimizer needs an optimizer at least.")
        self.optimizers = list(optimizers)
        super().__init__([group for each in optimizers for group in each.param_groups], {})
        self._see_theirs()

    def _see_theirs(self) -> None:
        self.param_groups = [group for each in self.optimizers for group in each.param_groups]
        self.state = _States(self.optimizers)  # type: ignore[assignment]

    def __getstate__(self) -> dict[str, Any]:
        return {"defaults": self.defaults, "optimizers": self.optimizers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "state": {}, "param_groups": []})
        self._see_theirs()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: which optimizer is to step it?"""
        if "state" in vars(self) and isinstance(self.state, _States):
            raise ValueError("Add a parameter group to one of .optimizers, before they are joined.")
        super().add_param_group(param_group)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Step each of them, after `closure` where there is one; return what it returned."""
        loss = closure() if closure is not None else None
        for each in self.optimizers:
            each.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the state of each, in order."""
        return {"optimizers": [each.state_dict() for each in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what `state_dict` returned.

        Raises:
            ValueError: it is of another number of optimizers, or of others.
        """
        states = state_dict.get("optimizers", [])
        if len(states) != len(self.optimizers):
            raise ValueError(
                f"This is the state of {len(states)} joined optimizers, and here are "
                f"{len(self.optimizers)}. Build it from the same config."
            )
        for each, state in zip(self.optimizers, states, strict=True):
            each.load_state_dict(state)
        self._see_theirs()


class _States(MutableMapping[Tensor, Any]):
    """The state of a parameter, in the optimizer that steps it."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._optimizers = optimizers

    def _of(self, parameter: Tensor) -> dict[Tensor, Any]:
        for each in self._optimizers:
            if any(parameter is held for group in each.param_groups for held in group["params"]):
                return each.state
        raise KeyError(parameter)

    def __getitem__(self, parameter: Tensor) -> Any:
        return self._of(parameter)[parameter]

    def __setitem__(self, parameter: Tensor, value: Any) -> None:
        self._of(parameter)[parameter] = value

    def __delitem__(self, parameter: Tensor) -> None:
        del self._of(parameter)[parameter]

    def __iter__(self) -> Iterator[Tensor]:
        return (parameter for each in self._optimizers for parameter in each.state)

    def __len__(self) -> int:
        return sum(len(each.state) for each in self._optimizers)


def keep_parameters(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Keep `parameters` alone in an optimizer that has not stepped yet; empty groups go."""
    kept = {id(parameter) for parameter in parameters}
    for group in optimizer.param_groups:
        group["params"] = [each for each in group["params"] if id(each) in kept]
    optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]
