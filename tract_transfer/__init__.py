"""Does a backbone pre-trained with TrAct serve better downstream?

`from tract_transfer import TrAct` is all that a foreign training loop needs; it imports torch
alone. Importing this package imports nothing: each name is imported when it is first used.
"""

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from tract_transfer.config.schema import load_config
    from tract_transfer.data.augment import AUGMENTATIONS
    from tract_transfer.data.sources import SOURCES
    from tract_transfer.evaluation import EVALUATORS
    from tract_transfer.models import BACKBONES, DETECTORS, HEADS, Backbone
    from tract_transfer.run.api import Run, create_backbone, evaluate, list_backbones, train
    from tract_transfer.run.trained import (
        Classification,
        Detections,
        TrainedClassifier,
        TrainedDetector,
        load,
    )
    from tract_transfer.tract import TrAct

__version__ = "0.2.0"
__all__ = [
    "AUGMENTATIONS", "BACKBONES", "DETECTORS", "EVALUATORS", "HEADS", "SOURCES", "Backbone",
    "Classification", "Detections", "Run", "TrAct", "TrainedClassifier", "TrainedDetector",
    "__version__", "create_backbone", "evaluate", "list_backbones", "load", "load_config", "train",
]  # fmt: skip
# Name -> the module that defines it.
_MODULES = {
    "TrAct": "tract",
    "AUGMENTATIONS": "data.augment",
    "BACKBONES": "models",
    "DETECTORS": "build.model",  # registers detectron2's
    "EVALUATORS": "evaluation",
    "HEADS": "models",
    "SOURCES": "data.sources",
    "Backbone": "models",
    "load_config": "config.schema",
    **dict.fromkeys(("Run", "create_backbone", "evaluate", "list_backbones", "train"), "run.api"),
    **dict.fromkeys(("Classification", "Detections", "load"), "run.trained"),
    **dict.fromkeys(("TrainedClassifier", "TrainedDetector"), "run.trained"),
}
# Modules whose package has another name.
_PACKAGES = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml"}
_Function = TypeVar("_Function", bound=Callable[..., Any])

if not TYPE_CHECKING:  # a type checker sees the imports above, and reports other names

    def __getattr__(name: str) -> Any:
        """Import a public name when it is first used."""
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return _import(name)


def __dir__() -> list[str]:
    return __all__


def names_missing_extra(function: _Function) -> _Function:
    """Add the pip command to the error of a package that is not installed."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except ModuleNotFoundError as error:
            if hint := install_hint(error):
                raise ModuleNotFoundError(hint, name=error.name) from error
            raise

    return call  # type: ignore[return-value]


def install_hint(error: ModuleNotFoundError, command: str | None = None) -> str | None:
    """Return which extra of this package installs a missing module, if one does.

    Args:
        command: the extra of that name is preferred.
    """
    module = (error.name or "").partition(".")[0]
    package = _PACKAGES.get(module, module).replace("_", "-").lower()
    extras = [
        extra
        for extra, packages in packages_of_extras().items()
        if package in (name.replace("_", "-").lower() for name in packages)
    ]
    if not extras:
        return None
    extra = command if command in extras else extras[0]
    return f"{module} is not installed: pip install 'tract_transfer[{extra}]'"


def packages_of_extras() -> dict[str, list[str]]:
    """Return the packages of each extra, and `[other]` for another extra that it names.

    They are the distribution's own metadata: a clone that is not installed has none.
    """
    import re
    from importlib import metadata

    try:
        requirements = metadata.requires(__name__) or []
    except metadata.PackageNotFoundError:
        return {}
    packages: dict[str, list[str]] = {}
    for requirement in requirements:
        # timm>=1.0.16; extra == "train"
        extra = re.search(r"extra == ['\"]([\w-]+)", requirement)
        package = re.match(r"([\w.-]+)\s*(?:\[([\w,\s-]+)\])?", requirement)
        if extra and package:
            others = (package[2] or "").replace(" ", "").split(",")
            is_own = package[1].replace("-", "_").lower() == __name__
            names = [f"[{other}]" for other in others] if is_own else [package[1]]
            packages.setdefault(extra[1], []).extend(names)
    return packages


@names_missing_extra
def _import(name: str) -> Any:
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value
