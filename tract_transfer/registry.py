"""The registry class of backbones, heads, detectors, evaluators and other open sets.

Each registry lives in the module that defines its entries (`BACKBONES` in models/backbones.py), so
importing a registry also fills it.
"""

from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Any, TypeVar

from fvcore.common.registry import Registry as FvcoreRegistry

Entry = TypeVar("Entry", bound=Callable[..., Any])


class Registry(FvcoreRegistry):  # type: ignore[misc]
    """fvcore's Registry with arbitrary names, and an error that suggests the nearest one."""

    def register(self, name: str) -> Callable[[Entry], Entry]:
        """Register the decorated class or function as `name`, which must be new."""

        def add(entry: Entry) -> Entry:
            self._do_register(name, entry)
            return entry

        return add

    def get(self, name: str) -> Any:
        """Return the entry registered as `name`.

        Raises:
            KeyError: there is none; the message lists all names.
        """
        if name not in self:
            names = sorted(key for key, _ in self)
            raise KeyError(
                f"{self._name} has no {name!r}.{did_you_mean(name, names)} Known: {names}"
            )
        return super().get(name)


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` for the nearest name in `names`, or an empty string."""
    near = get_close_matches(name, list(names), n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""
