"""What a run's folder holds of a planned run: nothing, a part, all, or another run."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from tract_transfer.suite.runs import RESULTS_FORMAT

_SHOWN_KEYS = 5


@dataclass(frozen=True)
class Found:
    """What is there.

    Attributes:
        state: `new`, `begun` (a checkpoint to go on from), `finished`, or `other`: of another
            config, other data, other weights or another version.
        why: of `other`, what differs; of `begun`, what is broken, if anything is.
        config_sha256: of config.yaml, where it was compared.
    """

    state: Literal["new", "begun", "finished", "other"]
    why: str = ""
    config_sha256: str = ""
    results: Mapping[str, Any] | None = None


def look(
    folder: Path,
    config: Mapping[str, Any],
    fingerprints: Mapping[str, str] | None,
    weights_sha256: str | None = None,
    *,
    weights_are_known: bool = True,
    changed: Callable[[Mapping[str, Any], Mapping[str, Any]], list[str]],
    known_sha256: str = "",
) -> Found:
    """Return what `folder` holds of the run that `config` describes.

    Args:
        fingerprints: of the data, split -> fingerprint; None where that is not known.
        weights_sha256: the hash in the card of the backbone it takes; None without a card. Off
            with `weights_are_known`, while that backbone is still to be trained.
        changed: (config then, config now) -> the keys that differ and may not, in words.
        known_sha256: of a config.yaml that was found to be this config before.
    """
    results, broken = _read_results(folder / "results.json")
    if results is not None and (form := results.get("format", RESULTS_FORMAT)) != RESULTS_FORMAT:
        return Found(
            "other", f"results.json has format {form!r}, and this version reads {RESULTS_FORMAT}"
        )
    if results is None and not broken and not any(folder.glob("checkpoints/iter_*")):
        return Found("new")
    try:
        text = (folder / "config.yaml").read_bytes()
    except OSError as error:
        return Found("other", f"config.yaml cannot be read ({error.strerror})")
    sha256 = hashlib.sha256(text).hexdigest()
    # Weights that a hash tells may lie anywhere: a suite can be moved.
    is_told = results is not None and (weights_sha256 is not None or not weights_are_known)
    anywhere = "model.weights: " if is_told else None
    if sha256 != known_sha256 and (why := _other_config(text, config, changed, anywhere)):
        return Found("other", why)
    if why := _other_data(folder, fingerprints):
        return Found("other", why)
    if results is None:
        return Found("begun", broken, sha256)
    if weights_are_known and results.get("weights_sha256") != weights_sha256:
        return Found("other", "its backbone has been trained anew since")
    return Found("finished", "", sha256, results)


def goes_on(folder: Path, found: Found) -> str:
    """Say where a run that was begun goes on from, and what is broken, if anything is."""
    newest = max((path.name for path in folder.glob("checkpoints/iter_*")), default="the beginning")
    return f"goes on from {newest}{f': {found.why}' if found.why else ''}"


def read_weights_sha256(folder: Path) -> str | None:
    """Return the hash that the card of a run's backbone tells; None without a whole card."""
    try:
        card = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return str(card.get("sha256")) if isinstance(card, dict) else None


def _read_results(path: Path) -> tuple[dict[str, Any] | None, str]:
    """Return results that are whole, or of another format; or why they are neither, "" of none."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None, ""
    except (OSError, ValueError) as error:
        return None, f"results.json cannot be read ({error})"
    if isinstance(results, dict) and results.get("format", RESULTS_FORMAT) != RESULTS_FORMAT:
        return results, ""
    if not isinstance(results, dict) or not isinstance(results.get("metrics"), dict):
        return None, "results.json has no metrics"
    if results.get("primary_metric") not in results["metrics"]:
        return None, "results.json lacks its primary metric"
    return results, ""


def _other_config(
    text: bytes,
    config: Mapping[str, Any],
    changed: Callable[[Mapping[str, Any], Mapping[str, Any]], list[str]],
    but_for: str | None,
) -> str:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        then = yaml.load(text, loader)
    except (yaml.YAMLError, ValueError) as error:
        return f"config.yaml is not YAML ({error})"
    if not isinstance(then, dict):
        return "config.yaml is no mapping"
    keys = [key for key in changed(then, config) if not (but_for and key.startswith(but_for))]
    more = f" and {len(keys) - _SHOWN_KEYS} more" if len(keys) > _SHOWN_KEYS else ""
    return "; ".join(keys[:_SHOWN_KEYS]) + more


def _other_data(folder: Path, fingerprints: Mapping[str, str] | None) -> str:
    if fingerprints is None:
        return ""
    then = read_fingerprints(folder)
    if then is None:
        return "environment.json does not tell its data"
    differ = sorted(
        k for k in then.keys() | fingerprints.keys() if then.get(k) != fingerprints.get(k)
    )
    return f"other images or labels in data.{' and data.'.join(differ)}" if differ else ""


def read_fingerprints(folder: Path) -> dict[str, str] | None:
    """Return split -> fingerprint of the data that a run has read; None where it does not tell."""
    try:
        data = json.loads((folder / "environment.json").read_text(encoding="utf-8"))["data"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return data if isinstance(data, dict) else None
