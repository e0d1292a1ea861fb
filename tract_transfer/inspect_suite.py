"""The bridge that looks at a suite's runs before the first one: data, model, and how they fit.

What was looked at is kept beside the suite, so that the next look costs nothing: torch and the data
are loaded only for what is new.
"""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tract_transfer import __version__
from tract_transfer.config import Config, ProbeConfig
from tract_transfer.engine.resume_keys import deciding_keys
from tract_transfer.files import make_folder, write_json
from tract_transfer.suite.plan import run_id

# Sources that are there, or are made, without the network. Their keys that hold paths:
_PATHS = {"huggingface": ("path",), "voc": ("root",), "coco": ("images", "annotations")}
_PATHS |= {"digits": (), "digit_scenes": (), "train": ()}
_SPLITS = ("train", "val", "test")
_HUB_CLASSES = 20  # stands for what a hub's data would tell

Fingerprints = dict[str, str] | None


class Inspector:
    """Looks at configs; `kept` is the file in which it remembers, or None."""

    def __init__(self, kept: Path | None) -> None:
        self._kept = kept
        self._known: dict[str, Fingerprints] = _read(kept)
        self._is_new = False
        self._keys: dict[str, str] = {}  # output_dir -> what its config is known by
        self._stands_in: dict[str, Path] = {}
        self._stat: dict[str, list[Any]] = {}
        self._temporary: tempfile.TemporaryDirectory[str] | None = None

    def inspect(self, config: Config, needed: Config | None) -> Fingerprints:
        """Return the fingerprints of a config's data; None of data that are on the hub.

        Args:
            needed: the config of the run whose backbone it takes, which need not have been run.

        Raises:
            ValueError, OSError: the data do not load, or the config fits neither them nor the
                backbone. Data on the hub are not looked at.
        """
        key = self._key(config, needed)
        if key not in self._known:
            self._known[key] = self._look(config, needed)
            self._is_new = True
        return self._known[key]

    def knows(self, config: Config, needed: Config | None) -> bool:
        """Whether `inspect` would answer without a look at data or model."""
        return self._key(config, needed) in self._known

    def _key(self, config: Config, needed: Config | None) -> str:
        if (key := self._keys.get(config.output_dir)) is not None:
            return key
        keys = deciding_keys(config.model_dump())
        if getattr(config.data, "val", None) is None or config.data.val.source != "train":  # type: ignore[union-attr]
            keys.pop("seed")  # only a carved val depends on it
        if needed is not None:
            keys["model.weights"] = needed.model.model_dump()
        key = run_id({**keys, "version": __version__, "files": self._files(config)})
        self._keys[config.output_dir] = key
        return key

    def keep(self) -> None:
        """Remember what was looked at, for the next process."""
        if self._kept is not None and self._is_new:
            make_folder(self._kept.parent)
            write_json(self._kept, self._known)

    def close(self) -> None:
        """Remove what stood in for backbones."""
        if self._temporary is not None:
            self._temporary.cleanup()

    def _files(self, config: Config) -> list[Any]:
        """Names, sizes and times of the files its splits are read from."""
        paths = [path for split in _splits(config) for path in _paths(split)]
        for path in paths:
            if path not in self._stat:
                self._stat[path] = list(_stat(Path(path)))
        return [self._stat[path] for path in paths]

    def _look(self, config: Config, needed: Config | None) -> Fingerprints:
        from tract_transfer.build import build_accelerator, build_tract, build_trainer
        from tract_transfer.build_data import build_data
        from tract_transfer.build_model import build_model

        weights = None if config.model.weights == "pretrained" else config.model.weights
        if needed is not None:
            weights = str(self._stand_in(needed))
        here = _here(config, weights)
        with _named(weights, config.model.weights):
            if any(_is_on_hub(split) for split in _splits(config)):
                model = build_model(here, _HUB_CLASSES)
                if not isinstance(here, ProbeConfig):
                    build_tract(here, model)
                return None
            data = build_data(here)
            if isinstance(here, ProbeConfig):
                build_model(here, len(data.class_names))
            else:
                build_trainer(here, data, build_accelerator(here))
        return {name: dataset.fingerprint() for name, dataset in data.splits.items()}

    def _stand_in(self, config: Config) -> Path:
        """Return a folder with a new backbone, as the run of `config` would leave it."""
        from tract_transfer.build_model import build_features
        from tract_transfer.models.weights import save_backbone

        model = config.model
        earlier = self._stands_in.get(str(model.weights))
        key = str(config.output_dir)
        if key not in self._stands_in:
            if self._temporary is None:
                self._temporary = tempfile.TemporaryDirectory()
            weights = model.weights
            if weights is not None:
                weights = None if weights == "pretrained" else str(earlier or weights)
            folder = Path(self._temporary.name) / str(len(self._stands_in))
            folder.mkdir()
            save_backbone(folder, build_features(_here(config, weights)), {})
            self._stands_in[key] = folder
        return self._stands_in[key]


def _splits(config: Config) -> list[Any]:
    named = (getattr(config.data, name, None) for name in _SPLITS)
    return [split for split in named if split is not None]


def _paths(split: Any) -> list[str]:
    return [getattr(split, key) for key in _PATHS[split.source]]


def _is_on_hub(split: Any) -> bool:
    """Whether a split's path is none here, and could be a name on the Hugging Face hub."""
    if split.source != "huggingface" or Path(split.path).exists():
        return False
    return split.path.count("/") <= 1 and not split.path.startswith((".", "/", "~"))


def _stat(path: Path) -> Iterator[tuple[str, int, int]]:
    """Yield name, size and time of a file, or of all files below a folder."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    for file in files:
        try:
            told = file.stat()
        except OSError:
            continue  # what is not there is told by who reads it
        yield str(file), told.st_size, told.st_mtime_ns


def _here(config: Config, weights: str | None) -> Config:
    """Return the config as it can be built on any machine, with other weights."""
    model = config.model.model_copy(update={"weights": weights})
    if weights is None:
        model = model.model_copy(update={"ignore_missing": [], "adapt_stem": False})
    data = config.data.model_copy(update={"cache": "none", "num_workers": 0})
    engine = config.engine.model_copy(update={"device": "cpu", "precision": "fp32"})
    return config.model_copy(update={"model": model, "data": data, "engine": engine})


@contextmanager
def _named(weights: str | None, name: str | None) -> Iterator[None]:
    """Let errors name the run whose backbone stood in."""
    try:
        yield
    except (ValueError, OSError) as error:
        if weights is None or weights == name or weights not in str(error):
            raise
        raise ValueError(str(error).replace(weights, str(name))) from error


def _read(file: Path | None) -> dict[str, Fingerprints]:
    """Return what was kept; nothing where it cannot be read."""
    try:
        kept: dict[str, Fingerprints] = json.loads(file.read_text()) if file else {}
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}
