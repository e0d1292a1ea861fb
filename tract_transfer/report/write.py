"""Writes a report as an HTML page, Markdown, LaTeX tables or JSON, by the file's suffix."""

import html
import json
import math
import re
import unicodedata
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from tract_transfer import __version__
from tract_transfer.files import atomic_path
from tract_transfer.report import pictures, statistics
from tract_transfer.report.content import Report, Row
from tract_transfer.report.curves import SpeedUp
from tract_transfer.report.runs import Run
from tract_transfer.report.tables import results_table, tables_of

SCHEMA, SCHEMA_VERSION = "tract_transfer.report", 1
_JSON_RUN_FIELDS = ("folder", "task", "method", "seed", "state", "failure", "metrics")
_LIMITS = {
    "filters": pictures.MAX_FILTERS, "score": pictures.MIN_SCORE, "best": pictures.BEST_DRAWN,
    "classes": 150,  # of a task, largest change first; the JSON has all
    "printed": 40,  # of them on paper
    "named": 20,  # beside their bars
}  # fmt: skip
_HTML_FILTERS = (
    "score", "gap", "spread", "interval", "metric_name", "is_loss", "p_value", "count_of",
    "count_missing",
)  # fmt: skip
_LATEX_TABLES = ("results", "statistics", "speed-ups", "cost", "paper", "unfinished")
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
    environment = _environment(autoescape=True)
    environment.filters |= {name: getattr(statistics, name) for name in _HTML_FILTERS}
    environment.filters["no_break"] = lambda text: text.replace(" %", "\u00a0%")
    problems = list(report.problems)
    tables = tables_of(report)
    return environment.get_template("report.html.jinja").render(
        report=report,
        version=__version__,
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


def _environment(**options: Any) -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, **options,
    )  # fmt: skip


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
        for key in ("baseline", "treated"):
            epochs = content[key].items()
            content[key] = {seed: "never" if epoch == math.inf else epoch for seed, epoch in epochs}
    return content


def to_markdown(report: Report) -> str:
    """Return a report as GitHub's Markdown, without pictures; names are never markup."""
    template = _environment(finalize=escape_markdown).get_template("report.md.jinja")
    return template.render(report=report, version=__version__, tables=tables_of(report))


def escape_markdown(text: str) -> str:
    """Return text that Markdown shows literally: no tag, emphasis, link or end of a cell."""
    text = html.escape(_one_line(text), quote=False)
    text = re.sub(r"([\\`*|\[\]~])", r"\\\1", text)
    return re.sub(r"(?<![0-9A-Za-z])_|_(?![0-9A-Za-z])", r"\\_", text)


def _one_line(text: str) -> str:
    return " ".join(text.split()) if re.search(r"[\n\r\t\v\f\x85\u2028\u2029]", text) else text


def text_table(report: Report) -> str:
    """Return the primary metrics as aligned Markdown for a terminal.

    Lines below the table report what is missing.
    """
    table = results_table(report, report.results)
    rows = (table.head, *table.rows)
    lines = [[_one_line(cell).replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    text = [f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines]
    notes = list(table.notes)
    notes += [f"Unfinished: {run.folder.as_posix()}: {run.failure}." for run in report.unfinished]
    return "\n".join([*text, *[""] * bool(notes), *notes])


def to_latex(report: Report) -> str:
    r"""Return the tables, except those of classes and protocols, for \input into a paper."""
    environment = _environment(
        finalize=lambda value: value if isinstance(value, Markup) else escape_latex(value),
        block_start_string="<%", block_end_string="%>",
        variable_start_string="<<", variable_end_string=">>",
        comment_start_string="<#", comment_end_string="#>",
    )  # fmt: skip
    environment.filters["comment"] = lambda text: Markup(" ".join(text.split()))
    tables = [table for table in tables_of(report) if table.name in _LATEX_TABLES]
    template = environment.get_template("report.tex.jinja")
    return template.render(report=report, version=__version__, tables=tables)


def escape_latex(text: str) -> str:
    """Return text that LaTeX prints literally; control characters are removed."""
    printable = (c for c in " ".join(text.split()) if not unicodedata.category(c).startswith("C"))
    escaped = "".join(_LATEX.get(character, character) for character in printable)
    # LaTeX turns `--` into a dash, and reads a `[` at the start of a row as an argument.
    return ("{}" if escaped.startswith("[") else "") + escaped.replace("--", "-{}-")


FORMATS = {".html": to_html, ".md": to_markdown, ".tex": to_latex, ".json": to_json}
