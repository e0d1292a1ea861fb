"""Check the data of a config: open every image, read every annotation, list all that is broken.

python tools/check_data.py --config-file configs/detection/r18_fpn_voc07.yaml
python tools/check_data.py --config-file X.yaml data.train.path=./my_images --json report.json

Ends with status 0 where all is well, 1 where something is broken, 2 where command line, config or
--json have to be changed first.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tract_transfer.cli.main import reports_errors

if TYPE_CHECKING:
    from tract_transfer.run.check_data import DataReport

MAX_SHOWN = 50


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="YAML, see configs/")
    parser.add_argument("--json", metavar="FILE", help="write the whole report there as well")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="or key value: over the file's keys"
    )
    return parser.parse_intermixed_args(words)


@reports_errors
def main() -> int:
    """Check the data and print what was found; return the exit code."""
    arguments = parse()

    from tract_transfer.config.schema import load_config

    config = load_config(arguments.config_file, arguments.overrides)
    if arguments.json and not Path(arguments.json).absolute().parent.is_dir():
        raise FileNotFoundError(f"--json {arguments.json}: there is no such folder. Make it first.")
    from tract_transfer.run.check_data import check_data

    report = check_data(config, show_progress)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(report.as_dict(), indent=1) + "\n")
    print("\n".join(lines_of(report)))
    return 0 if report.is_clean else 1


def show_progress(indices: Iterable[int], name: str) -> Iterable[int]:
    """Draw a bar on stderr, where someone looks at it."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    disable = not console.is_terminal
    return track(indices, description=name, console=console, disable=disable, transient=True)


def lines_of(report: "DataReport") -> list[str]:
    """Return the report as lines of text."""
    lines = []
    for name, split in report.splits.items():
        lines.append(f"{name}  ({split.name})")
        found = dict(split.statistics or {})
        classes = found.pop("classes", {})
        lines += [f"  {what:>22}  {in_words(value)}" for what, value in found.items()]
        if classes:
            lines.append(f"  {'classes':>22}  {len(classes)}")
            lines += [f"  {label:>22}  {in_words(counts)}" for label, counts in classes.items()]
        lines += shown(f"broken in {name}", split.problems)
    lines += shown("broken between the splits", report.problems)
    lines += shown("worth a look", report.warnings)
    count = sum(len(split.problems) for split in report.splits.values()) + len(report.problems)
    return [*lines, f"{count} problems, {len(report.warnings)} warnings"]


def in_words(value: Any) -> str:
    """Write counts and spreads on one line."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {number:g}" for name, number in value.items())
    return "none" if value is None else str(value)


def shown(title: str, lines: Sequence[str]) -> list[str]:
    """List lines under a title, the first MAX_SHOWN of them."""
    if not lines:
        return []
    more = len(lines) - MAX_SHOWN
    rest = [f"  ... and {more} more: --json FILE has them all"] if more > 0 else []
    return [f"{title}: {len(lines)}", *(f"  {line}" for line in lines[:MAX_SHOWN]), *rest]


if __name__ == "__main__":
    sys.exit(main())
