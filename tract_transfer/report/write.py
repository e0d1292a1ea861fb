"""Writes a report as an HTML page, Markdown, LaTeX tables or JSON, by the file's suffix."""

import html
import json
import math
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jinja2

from tract_transfer import __version__
from tract_transfer.files import atomic_path
from tract_transfer.report import pictures, statistics
from tract_transfer.report.content import Report, Row
from tract_transfer.report.curves import SpeedUp
from tract_transfer.report.runs import Run
from tract_transfer.report.tables import Table, results_table, tables_of

SCHEMA, SCHEMA_VERSION = "tract_transfer.report", 1
_JSON_RUN_FIELDS = ("folder", "task", "method", "seed", "state", "failure", "metrics")
_LIMITS = {
    "filters": pictures.MAX_FILTERS, "score": pictures.MIN_SCORE, "best": pictures.BEST_DRAWN,
    "classes": 150,  # of a task, largest change first; the JSON has all
    "printed": 40,  # of them on paper
    "named": 20,  # beside their bars
}  # fmt: skip
_MAX_CLASSES_MARKDOWN = 40
_HTML_FILTERS = (
    "score", "gap", "spread", "interval", "metric_name", "is_loss", "p_value", "count_of",
    "count_missing",
)  # fmt: skip
_LATEX_TABLES = ("results", "statistics", "speed-ups", "cost", "paper", "unfinished")
_LONG = 60  # characters of a cell that LaTeX breaks into lines
_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\textquotedbl{}",
    "±": r"$\pm$", "−": "$-$", "×": r"$\times$", "–": r"\textendash{}", "λ": r"$\lambda$",
    "`": r"\textasciigrave{}", "'": r"\textquotesingle{}",
}  # fmt: skip


def save_report(report: Report, path: Path) -> None:
    """Write a report atomically, in the format of the file's suffix, and create its folder.

    Raises:
        ValueError: the suffix is not .html, .md, .tex or .json.
        DiskFullError: there is no space; an existing file is unchanged.
    """
    if path.suffix not in FORMATS:
        raise ValueError(f"{path}: the suffix of a report must be one of {', '.join(FORMATS)}.")
    text = FORMATS[path.suffix](report)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="replace")  # of a folder's name


def to_html(report: Report) -> str:
    """Return one HTML page that fetches nothing and runs no script."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {name: getattr(statistics, name) for name in _HTML_FILTERS}
    environment.filters["no_break"] = lambda text: text.replace(" %", "\u00a0%")
    problems = list(report.problems)
    tables = tables_of(report)
    return environment.get_template("report.html.jinja").render(
        report=report,
        version=__version__,
        methods=report.methods,
        treated=report.treated,
        baseline=report.baseline,
        curves={
            curves.task: pictures.draw_curves(report.tasks[curves.task], curves, report.methods)
            for curves in report.curves
        },
        detections=pictures.draw_detections(report.tasks, problems),
        filters=pictures.draw_filters(report.runs, problems),
        tables={table.name: table for table in tables if not table.task},
        task_tables=[table for table in tables if table.task],
        problems=problems,
        limits=_LIMITS,
    )


def to_json(report: Report) -> str:
    """Return a report as JSON; numbers are unrounded, fractions in [0, 1]."""
    head = {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, "tract_transfer": __version__}
    content = {**head, **vars(report)}
    del content["tasks"]
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False, default=_plain)
    return f"{text}\n"


def _plain(value: Any) -> Any:
    """Return a path, a run or another dataclass as JSON has it."""
    if isinstance(value, Path):
        return value.as_posix()
    if isinstance(value, Run):
        return {name: getattr(value, name) for name in _JSON_RUN_FIELDS}
    content = dict(vars(value))
    if isinstance(value, Row):
        content["missing"] = {m: [run.folder for run in runs] for m, runs in value.missing.items()}
    if isinstance(value, SpeedUp):
        for key, epochs in (("baseline", value.baseline), ("treated", value.treated)):
            content[key] = {
                s: "never" if epoch == math.inf else epoch for s, epoch in epochs.items()
            }
    return content


def to_markdown(report: Report) -> str:
    """Return a report as GitHub's Markdown, without pictures; names are never markup."""
    lines = [f"# {escape_markdown(report.title)}"]
    for sentence in report.answer or ["Nothing is compared: there is no other method."]:
        lines += ["", escape_markdown(sentence)]
    for table in tables_of(report):
        rows, notes = table.rows, table.notes
        if table.name == "classes" and len(rows) > _MAX_CLASSES_MARKDOWN:
            omitted = len(rows) - _MAX_CLASSES_MARKDOWN
            rows = rows[:_MAX_CLASSES_MARKDOWN]
            notes = [*notes, f"{omitted} classes with smaller changes are omitted."]
        rules = ["---" if i < table.words else "---:" for i in range(len(table.head))]
        lines += ["", f"## {escape_markdown(table.heading)}"] if table.heading else []
        lines += ["", escape_markdown(table.caption), ""]
        lines += [_pipes(map(escape_markdown, table.head)), _pipes(rules)]
        lines += [_pipes(map(escape_markdown, row)) for row in rows]
        lines += [""] * bool(notes) + [f"- {escape_markdown(note)}" for note in notes]
    if report.problems:
        lines += ["", "## Unreadable or excluded", ""]
        lines += [f"- {escape_markdown(problem)}" for problem in report.problems]
    lines += ["", f"Computed from the run folders by tract_transfer {__version__}."]
    return "\n".join(lines) + "\n"


def escape_markdown(text: str) -> str:
    """Return text that Markdown shows literally: no tag, emphasis, link or end of a cell."""
    text = html.escape(_one_line(text), quote=False)
    text = re.sub(r"([\\`*|\[\]~])", r"\\\1", text)
    return re.sub(r"(?<![0-9A-Za-z])_|_(?![0-9A-Za-z])", r"\\_", text)


def _pipes(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _one_line(text: str) -> str:
    return " ".join(text.split()) if re.search(r"[\n\r\t\v\f\x85\u2028\u2029]", text) else text


def text_table(report: Report) -> str:
    """Return the primary metrics as aligned Markdown for a terminal.

    Fractions are in percent; differences are in percentage points with their 95 % interval and the
    number of pairs. Lines below the table report what is missing.
    """
    table = results_table(report, report.results)
    lines = [
        [_one_line(cell).replace("|", "\\|") for cell in row] for row in (table.head, *table.rows)
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    text = [_pipes(map(str.ljust, line, widths)) for line in lines]
    unfinished = [(run.folder.as_posix(), run.failure) for run in report.unfinished]
    notes = [*table.notes, *(f"Unfinished: {path}: {why}." for path, why in unfinished)]
    return "\n".join([*text, *[""] * bool(notes), *notes])


def to_latex(report: Report) -> str:
    r"""Return the tables, except those of classes and protocols, for \input into a paper."""
    tables = [table for table in tables_of(report) if table.name in _LATEX_TABLES]
    notes = [*report.answer, *(note for table in tables for note in table.notes)]
    lines = [
        f"{report.title}: tables by tract_transfer {__version__}.",
        r"Needs \usepackage{booktabs}, \usepackage{textcomp} and \usepackage[T1]{fontenc}.",
        *notes,
    ]
    lines = [f"% {' '.join(line.split())}" for line in lines]
    for table in tables:
        # No page is wide enough for paths.
        columns = range(len(table.head) - (table.name == "unfinished"))
        rows = [[escape_latex(row[i]) for i in columns] for row in (table.head, *table.rows)]
        head, *body = [f"    {' & '.join(row)} \\\\" for row in rows]
        lines += [
            "",
            r"\begin{table}",
            r"  \centering\footnotesize",
            f"  \\caption{{{escape_latex(table.caption)}}}",
            f"  \\label{{tab:{table.name}}}",
            f"  \\begin{{tabular}}{{@{{}}{''.join(_alignment(table, i) for i in columns)}@{{}}}}",
            r"    \toprule",
            head,
            r"    \midrule",
            *body,
            r"    \bottomrule",
            r"  \end{tabular}",
            r"\end{table}",
        ]
    return "\n".join(lines) + "\n"


def _alignment(table: Table, column: int) -> str:
    """Return a column's alignment: numbers to the right, long texts broken into lines."""
    if column >= table.words:
        return "r"
    longest = max(len(row[column]) for row in table.rows)
    return "l" if longest <= _LONG else r"p{0.5\linewidth}"


def escape_latex(text: str) -> str:
    """Return text that LaTeX prints literally; control characters are removed."""
    printable = (c for c in " ".join(text.split()) if not unicodedata.category(c).startswith("C"))
    escaped = "".join(_LATEX.get(character, character) for character in printable)
    # LaTeX turns `--` into a dash, and reads a `[` at the start of a row as an argument.
    return ("{}" if escaped.startswith("[") else "") + escaped.replace("--", "-{}-")


FORMATS = {".html": to_html, ".md": to_markdown, ".tex": to_latex, ".json": to_json}
