"""The report of runs: one HTML page, Markdown, LaTeX tables or JSON, by the file's suffix."""

from collections.abc import Sequence
from pathlib import Path

from tract_transfer.files import aside_of
from tract_transfer.suite.compare import compare, methods_of
from tract_transfer.suite.content import BASELINE, Report
from tract_transfer.suite.report_html import html
from tract_transfer.suite.report_json import to_json
from tract_transfer.suite.report_latex import latex
from tract_transfer.suite.report_markdown import markdown, text_lines
from tract_transfer.suite.runs import Run
from tract_transfer.suite.tables import results_table

FORMATS = {".html": html, ".md": markdown, ".tex": latex, ".json": to_json}


def save_report(report: Report, path: Path) -> None:
    """Write a report in the format of the file's suffix, whole or not at all.

    Args:
        path: a file of the suffix .html, .md, .tex or .json; its folder is made.

    Raises:
        ValueError: another suffix.
        OSError: the file cannot be written; an earlier one is left as it was.
    """
    if path.suffix not in FORMATS:
        raise ValueError(f"{path}: a report's suffix must be one of {', '.join(FORMATS)}.")
    text = FORMATS[path.suffix](report)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = aside_of(path)
    try:
        aside.write_text(text, encoding="utf-8", errors="replace")  # a folder's name
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise OSError(
            error.errno, f"The report cannot be written ({error.strerror}). Make room or choose "
            "another place", str(path),
        ) from error  # fmt: skip


def text_table(runs: Sequence[Run], baseline: str = BASELINE) -> str:
    """Return the primary metrics as an aligned table that is also Markdown, for a terminal.

    Fractions are in percent, differences in percentage points with their 95 % interval and the
    number of pairs; lines below the table tell what is missing.
    """
    rows = compare(runs, baseline)
    table = results_table(rows, methods_of(runs, baseline), baseline)
    notes = [f"{row.task}: {note}" for row in rows for note in row.notes]
    notes += [f"Not finished: {r.folder.as_posix()}: {r.failure}." for r in runs if r.failure]
    return "\n".join([*text_lines(table), *[""] * bool(notes), *notes])
