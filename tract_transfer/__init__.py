"""Does a backbone pre-trained with TrAct serve better downstream?

`from tract_transfer import TrAct` is all that a foreign training loop needs.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tract_transfer.tract import TrAct

__version__ = "0.1.0"
__all__ = ["TrAct", "__version__"]


def __getattr__(name: str) -> Any:
    """Import TrAct, and torch with it, only when somebody asks for it."""
    if name == "TrAct":
        from tract_transfer.tract import TrAct

        return TrAct
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
