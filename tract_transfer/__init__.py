"""Does a backbone pre-trained with TrAct serve better downstream?

`from tract_transfer import TrAct` is all that a foreign training loop needs.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tract_transfer.data.augment import AUGMENTATIONS
    from tract_transfer.data.sources import SOURCES
    from tract_transfer.evaluation import EVALUATORS
    from tract_transfer.models import BACKBONES, DETECTORS, HEADS, Backbone
    from tract_transfer.tract import TrAct

__version__ = "0.1.0"
# Public name -> its module, which is imported only when somebody asks for the name.
_MODULES = {
    "AUGMENTATIONS": "data.augment",
    "BACKBONES": "models",
    "Backbone": "models",
    "DETECTORS": "models",
    "EVALUATORS": "evaluation",
    "HEADS": "models",
    "SOURCES": "data.sources",
    "TrAct": "tract",
}
__all__ = [
    "AUGMENTATIONS",
    "BACKBONES",
    "DETECTORS",
    "EVALUATORS",
    "HEADS",
    "SOURCES",
    "Backbone",
    "TrAct",
    "__version__",
]


def __getattr__(name: str) -> Any:
    """Import a public name; TrAct needs torch alone."""
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
