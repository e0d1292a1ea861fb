"""Write the tables of docs/recipes.md: what every recipe in configs/ sets, and its source.

python tools/recipes.py           # writes docs/recipes.md
python tools/recipes.py --check   # exit status 1 where the page is not what the configs say
"""

import argparse
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tract_transfer.cli.main import reports_errors

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/recipes.md"
FOLDERS = ("pretrain", "transfer", "detection", "paper")
BEGIN = "<!-- The tables are written by tools/recipes.py. -->"
END = "<!-- End of the tables. -->"
COLUMNS = ("config", "data", "model", "images", "optimization or probe", "source")
# Keys that decide no number, or are told elsewhere in the row.
_OTHER = {
    "model": {"weights"},
    "data": {"train", "val", "test", "num_workers", "cache", "feature_cache"},
    "solver": set(),
    "evaluation": {"every_epochs", "every_iters"},
    "engine": {"checkpoint", "log", "channels_last"},
}
_BARE = ("name", "optimizer", "schedule", "augment", "loss")


class Row(NamedTuple):
    """A line of a table; `config` and `data` are lists where several configs share the rest."""

    section: str
    config: str
    data: str
    model: str
    images: str
    how: str
    source: str


def files() -> list[Path]:
    """Return the configs that have a row."""
    return [file for name in FOLDERS for file in sorted((ROOT / "configs" / name).glob("*.yaml"))]


def sources(file: Path) -> list[str]:
    """Return what a config and its bases call their sources, its own first."""
    comment = re.match(r"(#.*\n)+", file.read_text(encoding="utf-8"))
    found: list[str] = []
    for line in (comment.group() if comment else "").splitlines():
        if line.startswith("# Source: "):
            found.append(line.removeprefix("# Source: "))
        elif line.startswith("#   ") and found:
            found[-1] += f" {line[1:].strip()}"
    bases = yaml.safe_load(file.read_text(encoding="utf-8")).get("_BASE_", [])
    for base in [bases] if isinstance(bases, str) else bases:
        found += sources((file.parent / base).resolve())
    return [text.rstrip(".") for text in dict.fromkeys(found)]


def row(file: Path) -> Row:
    """Return a config's line."""
    from tract_transfer.config.schema import ProbeConfig, load_config

    config = load_config(file)
    told = config.model_dump(exclude_defaults=True)
    part = {key: _without(told.get(key, {}), left_out) for key, left_out in _OTHER.items()}
    if isinstance(config, ProbeConfig):
        how = _texts(config.evaluation.model_dump(exclude_none=True))
    else:
        part["solver"]["schedule"] = config.solver.schedule
        tract = {"tract": {"lam": config.tract.lam}} if config.tract.enabled else {}
        how = _texts(part["solver"], part["engine"], tract, part["evaluation"])
    return Row(
        _section(file, config),
        f"[{file.stem}](../{file.relative_to(ROOT).as_posix()})",
        _data(told["data"]),
        _texts(part["model"], {"weights": config.model.weights or "none"}),
        _texts(part["data"].pop("transforms"), part["data"]),
        how,
        "; ".join(sources(file)),
    )


def tables() -> str:
    """Return the tables: configs that differ in their data alone share a line."""
    rows = [row(file) for file in files()]
    lines = []
    for section in dict.fromkeys(each.section for each in rows):
        shared: dict[tuple[str, ...], list[Row]] = {}
        for each in rows:
            if each.section == section:
                shared.setdefault(each[3:], []).append(each)
        lines += [f"### {section}", "", _line(COLUMNS), _line(["---"] * len(COLUMNS))]
        for rest, own in shared.items():
            configs, data = (
                dict.fromkeys(getattr(each, name) for each in own) for name in ("config", "data")
            )
            lines.append(_line([", ".join(configs), "; ".join(data), *rest]))
        lines.append("")
    return "\n".join(lines)


def page() -> str:
    """Return docs/recipes.md with the tables as they should be."""
    before, begin, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{PAGE} must have the lines {BEGIN} and {END}. Put them back.")
    return f"{before}{BEGIN}\n\n{tables()}\n{END}{after}"


def _section(file: Path, config: Any) -> str:
    if file.parent.name == "paper":
        return "The paper's experiments"
    if config.task == "classification":
        return "Fine-tuning" if config.model.weights else "Pre-training"
    return {"probe": "Probes", "detection": "Detection"}[config.task]


def _without(tree: Mapping[str, Any], keys: set[str]) -> dict[str, Any]:
    return {key: value for key, value in tree.items() if key not in keys}


def _data(section: Mapping[str, Any]) -> str:
    """Name the data by path and splits, as `uoft-cs/cifar10: train, test`."""
    splits = [section[name] for name in ("train", "val", "test") if section.get(name)]
    named = [str(each.get("split") or " + ".join(each.get("sets", []))) for each in splits]
    return f"{splits[0].get('path', splits[0]['source'])}: {', '.join(named)}"


def _texts(*trees: Mapping[str, Any]) -> str:
    return ", ".join(text for tree in trees for text in _leaves(tree))


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield `key value` for each leaf; of what says itself what it is, the value alone."""
    for key, value in tree.items():
        if value == {}:
            continue
        if isinstance(value, dict):
            yield from _leaves(
                value, "" if key in ("backbone", "head", "detector", "args") else f"{key}."
            )
        elif value is True:
            yield f"{prefix}{key}"
        else:
            text = _value(value)
            yield text if key in _BARE and not prefix else f"{prefix}{key} {text}"


def _value(value: Any) -> str:
    if isinstance(value, list):
        if len(value) > 12:
            return f"{len(value)} values from {_value(value[0])} to {_value(value[-1])}"
        return f"[{', '.join(map(_value, value))}]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


@reports_errors
def main() -> int:
    """Write the page, or compare it; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    arguments = parser.parse_args()
    wanted = page()
    if not arguments.check:
        PAGE.write_text(wanted, encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != wanted:
        print(f"{PAGE} is not what the configs say. Run python tools/recipes.py.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
