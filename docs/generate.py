"""Write the generated pages of docs/reference: recipes.md and errors.md.

python docs/generate.py                  # both; the second runs every test of a bad input
python docs/generate.py recipes
"""

import argparse
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests/support"))  # errors_page

# recipes.md

RECIPES = ROOT / "docs/reference/recipes.md"
FOLDERS = ("pretrain", "transfer", "detection", "paper")
BEGIN = "<!-- The tables are written by docs/generate.py. -->"
END = "<!-- End of the tables. -->"
COLUMNS = ("config", "data", "model", "images", "optimization or probe", "source")
# Keys that decide no number, or are elsewhere in the row.
_OMITTED = {
    "model": {"weights"},
    "data": {"train", "val", "test", "num_workers", "cache", "feature_cache"},
    "solver": set(),
    "evaluation": {"every_epochs", "every_iters"},
    "engine": {"checkpoint", "log", "channels_last"},
}
_WITHOUT_KEY = ("name", "optimizer", "schedule", "augment", "loss")
_WITHOUT_PREFIX = ("backbone", "head", "detector", "args")


class Recipe(NamedTuple):
    """The row of a config; configs that differ in config and data alone share a row."""

    section: str
    config: str
    data: str
    model: str
    images: str
    optimization: str
    source: str


def recipe_files() -> list[Path]:
    """Return the configs that have a row."""
    return [file for name in FOLDERS for file in sorted((ROOT / "configs" / name).glob("*.yaml"))]


def sources(file: Path) -> list[str]:
    """Return the `# Source:` comments of a config and its bases, its own first."""
    comment = re.match(r"(#.*\n)+", file.read_text(encoding="utf-8"))
    texts: list[str] = []
    for line in (comment.group() if comment else "").splitlines():
        if line.startswith("# Source: "):
            texts.append(line.removeprefix("# Source: "))
        elif line.startswith("#   ") and texts:
            texts[-1] += f" {line[1:].strip()}"
    bases = yaml.safe_load(file.read_text(encoding="utf-8")).get("_BASE_", [])
    for base in [bases] if isinstance(bases, str) else bases:
        texts += sources((file.parent / base).resolve())
    return [text.rstrip(".") for text in dict.fromkeys(texts)]


def recipe(file: Path) -> Recipe:
    """Return a config's row."""
    from tract_transfer.config.schema import ProbeConfig, load_config

    config = load_config(file)
    changed = config.model_dump(exclude_defaults=True)
    part = {
        key: {k: v for k, v in changed.get(key, {}).items() if k not in omitted}
        for key, omitted in _OMITTED.items()
    }
    if isinstance(config, ProbeConfig):
        optimization = _text(config.evaluation.model_dump(exclude_none=True))
    else:
        part["solver"]["schedule"] = config.solver.schedule
        tract = {"tract": {"lam": config.tract.lam}} if config.tract.enabled else {}
        optimization = _text(part["solver"], part["engine"], tract, part["evaluation"])
    return Recipe(
        _section(file, config),
        f"[{file.stem}](../../{file.relative_to(ROOT).as_posix()})",
        _data(changed["data"]),
        _text(part["model"], {"weights": config.model.weights or "none"}),
        _text(part["data"].pop("transforms"), part["data"]),
        optimization,
        "; ".join(sources(file)),
    )


def _section(file: Path, config: Any) -> str:
    if file.parent.name == "paper":
        return "The paper's experiments"
    if config.task == "classification":
        return "Fine-tuning" if config.model.weights else "Pre-training"
    return {"probe": "Probes", "detection": "Detection"}[config.task]


def _data(section: Mapping[str, Any]) -> str:
    """Return path and splits, such as `uoft-cs/cifar10: train, test`."""
    splits = [section[name] for name in ("train", "val", "test") if section.get(name)]
    names = [str(split.get("split") or " + ".join(split.get("sets", []))) for split in splits]
    return f"{splits[0].get('path', splits[0]['source'])}: {', '.join(names)}"


def _text(*trees: Mapping[str, Any]) -> str:
    return ", ".join(text for tree in trees for text in _leaves(tree))


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield `key value` for each leaf, or the value alone if it explains itself."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, "" if key in _WITHOUT_PREFIX else f"{key}.")
        elif value is True:
            yield f"{prefix}{key}"
        elif key in _WITHOUT_KEY and not prefix:
            yield _value(value)
        else:
            yield f"{prefix}{key} {_value(value)}"


def _value(value: Any) -> str:
    if isinstance(value, list):
        if len(value) > 12:
            return f"{len(value)} values from {_value(value[0])} to {_value(value[-1])}"
        return f"[{', '.join(map(_value, value))}]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def recipe_tables() -> str:
    """Return a table for each section."""
    recipes = [recipe(file) for file in recipe_files()]
    lines = []
    for section in dict.fromkeys(one.section for one in recipes):
        shared: dict[tuple[str, ...], list[Recipe]] = {}
        for one in recipes:
            if one.section == section:
                shared.setdefault(one[3:], []).append(one)
        lines += [f"### {section}", "", _line(COLUMNS), _line(["---"] * len(COLUMNS))]
        for rest, rows in shared.items():
            configs = ", ".join(dict.fromkeys(row.config for row in rows))
            data = "; ".join(dict.fromkeys(row.data for row in rows))
            lines.append(_line([configs, data, *rest]))
        lines.append("")
    return "\n".join(lines)


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def recipes_page() -> str:
    """Return docs/reference/recipes.md with new tables."""
    before, begin, rest = RECIPES.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{RECIPES} must have the lines {BEGIN} and {END}. Put them back.")
    return f"{before}{BEGIN}\n\n{recipe_tables()}\n{END}{after}"


# errors.md

ERRORS_HEAD = """\
# Bad inputs and their messages

Each row is a bad input that a test gives, and the start of the error it causes. `…/` stands for a
folder, `…` for what other libraries or the machine decide. `make docs` writes this page.

Exit codes of every command:

- 0: success;
- 2, and `error: ...` on stderr: command line, config, data, weights or folder must change first;
- 1, and `failed: SomeError: ...`: a failure, such as a full disk, a lost connection or a loss that
  is not finite. Also problems found by `check_data.py` (data), `analyze_model.py` (weights),
  `predict.py` (one of its files) and `run_suite.py` (a run);
- 130, 138 or 143, and `SIGINT: ...`: ended by a signal.

`TRACT_TRANSFER_TRACEBACK=1` in the environment adds the traceback. Data that are skipped or clipped
and other warnings are in [reliability.md](reliability.md) and in `results.json`.
"""
# Package that raises the error -> section of the page.
SECTIONS = {
    "config": "Configs",
    "build": "Configs",
    "data": "Data",
    "models": "Models and weights",
    "detectron2": "Models and weights",
    "tract": "TrAct",
    "engine": "Training and run folders",
    "run": "Training and run folders",
    "evaluation": "Evaluation",
    "suite": "Suites and reports",
    "report": "Suites and reports",
}


def errors_page(rows: Mapping[str, tuple[str, str]]) -> str:
    """Return docs/reference/errors.md from bad input -> (package that raises, message)."""
    tables: dict[str, list[str]] = {title: [] for title in [*SECTIONS.values(), "Everything else"]}
    for bad_input, (package, message) in sorted(rows.items(), key=lambda row: row[0].lower()):
        code = f"`` {message} ``" if "`" in message else f"`{message}`"
        cells = [text.replace("|", "\\|") for text in (bad_input, code)]
        tables[SECTIONS.get(package, "Everything else")].append(_line(cells))
    text = ERRORS_HEAD
    for title, lines in tables.items():
        if lines:
            text += (
                f"\n## {title}\n\n| Input | Message |\n| --- | --- |\n" + "\n".join(lines) + "\n"
            )
    return text


def write_errors() -> int:
    """Run every test of a bad input, and write their messages; return pytest's exit code."""
    import pytest
    from errors_page import PAGE, Recorder

    recorder = Recorder()
    code = pytest.main([str(ROOT / "tests"), "-q", "-p", "no:cacheprovider"], plugins=[recorder])
    if code == 0:
        PAGE.write_text(errors_page(recorder.rows), encoding="utf-8")
        print(f"{len(recorder.rows)} rows in {PAGE}")
    return int(code)


def main() -> int:
    """Write the pages; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("page", nargs="?", choices=("recipes", "errors"))
    page = parser.parse_args().page
    if page != "errors":
        RECIPES.write_text(recipes_page(), encoding="utf-8")
    return write_errors() if page != "recipes" else 0


if __name__ == "__main__":
    sys.exit(main())
