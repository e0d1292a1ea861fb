"""The registry that backbones, heads, detectors and evaluators share.

Each registry stands in the module that holds its entries (`BACKBONES` in models/backbones.py),
so that importing a registry fills it: none is ever empty.
"""

from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Any, TypeVar

from fvcore.common.registry import Registry as FvcoreRegistry

Entry = TypeVar("Entry", bound=Callable[..., Any])


class Registry(FvcoreRegistry):  # type: ignore[misc]
    """fvcore's Registry with free names, whose miss names the nearest entry and all known."""

    def register(self, name: str) -> Callable[[Entry], Entry]:
        """Register the decorated class or function as `name`; a name can be taken once."""

        def add(entry: Entry) -> Entry:
            self._do_register(name, entry)
            return entry

        return add

    def get(self, name: str) -> Any:
        """Return the entry registered as `name`.

        Raises:
            KeyError: `name` is not registered; the message lists what is.
        """
        if name not in self:
            known = sorted(key for key, _ in self)
            raise KeyError(
                f"{self._name} has no {name!r}.{did_you_mean(name, known)} Known: {known}"
            )
        return super().get(name)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` for the nearest of `known`, or an empty string."""
    near = get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""
