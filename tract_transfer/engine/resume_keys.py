"""Which keys of a config decide a run's numbers, and which may differ when it is resumed."""

from collections.abc import Mapping
from typing import Any

# Keys that may differ on resume: they decide where and how fast, not what.
SAFE_ON_RESUME = (
    "output_dir", "engine.log", "engine.checkpoint", "data.num_workers", "data.cache",
    "data.undecodable", "data.feature_cache", "data.max_pixels", "paper",
)  # fmt: skip
LABELS = ("name", "method")


def changed_keys(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return `key: old then, new now` for each key that may not differ on resume, and does."""
    old, new = flatten(then), flatten(now)
    return [
        f"{key}: {old.get(key)!r} then, {new.get(key)!r} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not _may_differ(key, old.get(key), new.get(key))
    ]


def deciding_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return dotted keys and values of a config without its labels and what may differ."""
    return {
        key: value
        for key, value in flatten(config).items()
        if key not in LABELS and not _may_differ(key, value, value)
    }


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return dotted keys and their values."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _may_differ(key: str, old: Any, new: Any) -> bool:
    if key == "data.cache" and "device" in (old, new):
        return False  # it augments by other random numbers
    return key.startswith(SAFE_ON_RESUME)
