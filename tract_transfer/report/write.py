"""The report of runs: one HTML page, Markdown, LaTeX tables or JSON, by the file's suffix."""

import html
import json
import math
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jinja2

from tract_transfer import __version__
from tract_transfer.files import temporary_path
from tract_transfer.report import statistics as wording
from tract_transfer.report import tables
from tract_transfer.report.compare import Row, compare, methods_of
from tract_transfer.report.content import BASELINE, Card, Report
from tract_transfer.report.pictures import (
    BEST_DRAWN,
    MAX_FILTERS,
    MIN_SCORE,
    draw_curves,
    draw_detections,
    picture_filters,
)
from tract_transfer.report.runs import Run
from tract_transfer.report.tables import (
    Table,
    class_sentences,
    class_table,
    cost_table,
    paper_table,
    remarks,
    results_table,
    speed_up_table,
    statistics_table,
    unfinished_table,
)

# --- A report as one HTML page that fetches nothing and runs no script.

MAX_CLASSES_HTML = 150  # of a task, those that changed most; the JSON has all
PRINTED_CLASSES = 40  # on paper
NAMED_CLASSES = 20  # of a task, beside its bars


def to_html(report: Report) -> str:
    """Return the page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    names = "score gap spread interval metric_name count_pairs count_seeds is_loss"
    for name in names.split():
        environment.filters[name] = getattr(wording, name)
    environment.filters["unbroken"] = _unbroken
    problems = list(report.problems)
    curves = {
        own.task: draw_curves(report.tasks[own.task], own, report.methods)
        for own in report.evaluations
    }
    return environment.get_template("report.html.jinja").render(
        report=report,
        version=__version__,
        methods=report.methods,
        treated=report.treated,
        baseline=report.baseline,
        curves=curves,
        detections=draw_detections(report.tasks, problems),
        filters=picture_filters(report.runs, problems),
        tables=tables,
        problems=problems,
        limits={
            "score": MIN_SCORE, "best": BEST_DRAWN, "filters": MAX_FILTERS,
            "classes": MAX_CLASSES_HTML,
            "printed": PRINTED_CLASSES, "named": NAMED_CLASSES,
        },
    )  # fmt: skip


def _unbroken(text: str) -> str:
    """Return text whose percent signs stay on the line of their number."""
    return text.replace(" %", "\u00a0%")


# --- A report as JSON, for programs; docs/report.md tells the fields.

SCHEMA, SCHEMA_VERSION = "tract_transfer.report", 1


def to_json(report: Report) -> str:
    """Return the content of a report as JSON; numbers are as measured, fractions in [0, 1]."""
    content = {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "tract_transfer": __version__,
        "title": report.title,
        "baseline": report.baseline,
        "methods": report.methods,
        "answer": report.answer,
        "results": [_row(row) for row in report.rows],
        "all_metrics": [_row(row) for row in report.every_row],
        "curves": [asdict(own) for own in report.evaluations],
        "speed_ups": [asdict(row) for row in report.speed_ups],
        "classes": {task: [asdict(row) for row in own] for task, own in report.classes.items()},
        "costs": [asdict(row) for row in report.costs],
        "paper": [asdict(row) for row in report.paper],
        "protocol": {task: [asdict(card) for card in own] for task, own in report.cards.items()},
        "runs": [
            {
                "folder": run.folder.as_posix(),
                "task": run.task,
                "method": run.method,
                "seed": run.seed,
                "state": run.state,
                "failure": run.failure,
                "metrics": run.metrics,
            }
            for run in report.runs
        ],
        "problems": report.problems,
    }
    return json.dumps(_finite(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _row(row: Row) -> dict[str, Any]:
    own = {key: value for key, value in vars(row).items() if key not in ("missing", "differences")}
    own["summaries"] = {method: asdict(summary) for method, summary in row.summaries.items()}
    own["differences"] = {method: asdict(found) for method, found in row.differences.items()}
    own["missing"] = {
        method: [run.folder.as_posix() for run in runs] for method, runs in row.missing.items()
    }
    return own


def _finite(value: Any) -> Any:
    """Return nested values with "never" for an infinity: epochs until what is never reached."""
    if isinstance(value, dict):
        return {key: _finite(own) for key, own in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(own) for own in value]
    return "never" if isinstance(value, float) and math.isinf(value) else value


# --- A report's tables as LaTeX, to be put into a paper by \input; they need booktabs and UTF-8

_LONG = 60  # characters of a cell
_SPECIAL = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\textquotedbl{}",
    "±": r"$\pm$", "−": "$-$", "×": r"$\times$", "–": r"\textendash{}", "λ": r"$\lambda$",
    "`": r"\textasciigrave{}", "'": r"\textquotesingle{}",
}  # fmt: skip


def to_latex(report: Report) -> str:
    """Return every table but those of classes and protocols, each a floating `table`."""
    results = results_table(report.rows, report.methods, report.baseline)
    tables = [results, statistics_table(report), speed_up_table(report), cost_table(report)]
    tables += [paper_table(report), _without_folders(unfinished_table(report))]
    notes = [*report.answer, *remarks(report)]
    notes += [
        f"{row.task}, {row.metric}: the setup differs in {text}"
        for row in report.paper
        for text in row.differing
    ]
    lines = [
        f"% {_comment(report.title)}: tables by tract_transfer {__version__}.",
        r"% Needs \usepackage{booktabs}, \usepackage{textcomp} and \usepackage[T1]{fontenc}.",
        *(f"% {_comment(note)}" for note in notes),
    ]
    for table in tables:
        if table.rows:
            lines += ["", *_table(table)]
    return "\n".join(lines) + "\n"


def escape_latex(text: str) -> str:
    """Return text that LaTeX prints as it is; control characters are left out."""
    kept = (c for c in " ".join(text.split()) if not unicodedata.category(c).startswith("C"))
    escaped = "".join(_SPECIAL.get(character, character) for character in kept)
    # `--` would become a dash, and a `[` after the end of a row an argument of it.
    return ("{}" if escaped.startswith("[") else "") + escaped.replace("--", "-{}-")


def _table(table: Table) -> list[str]:
    columns = "".join(_column(table, i) for i in range(len(table.head)))
    rows = [" & ".join(map(escape_latex, row)) + r" \\" for row in table.rows]
    return [
        r"\begin{table}",
        r"  \centering\footnotesize",
        f"  \\caption{{{escape_latex(table.caption)}}}",
        f"  \\label{{tab:{table.name}}}",
        f"  \\begin{{tabular}}{{@{{}}{columns}@{{}}}}",
        r"    \toprule",
        f"    {' & '.join(map(escape_latex, table.head))} \\\\",
        r"    \midrule",
        *(f"    {row}" for row in rows),
        r"    \bottomrule",
        r"  \end{tabular}",
        r"\end{table}",
    ]


def _column(table: Table, number: int) -> str:
    """Return how a column is set: numbers to the right, and what is long in lines."""
    if number >= table.words:
        return "r"
    longest = max(len(row[number]) for row in table.rows)
    return "l" if longest <= _LONG else r"p{0.5\linewidth}"


def _without_folders(table: Table) -> Table:
    """Return the table of runs without their paths, which no page is wide enough for."""
    words = [[*row[:-1]] for row in table.rows]
    return replace(table, head=table.head[:-1], rows=words, words=table.words - 1)


def _comment(text: str) -> str:
    return " ".join(text.split())


# --- A report as Markdown: every table and sentence of the page, without its pictures.

MAX_CLASSES_MARKDOWN = 40  # of a task, those that changed most; the JSON has all


def to_markdown(report: Report) -> str:
    """Return a report as GitHub's Markdown; names are shown and never markup."""
    return "\n".join(_lines(report)) + "\n"


def text_lines(table: Table) -> list[str]:
    """Return a table in aligned columns, Markdown that a terminal shows as well."""
    lines = [
        [_one_line(cell).replace("|", "\\|") for cell in row] for row in (table.head, *table.rows)
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    padded = [[c.ljust(w) for c, w in zip(line, widths, strict=True)] for line in lines]
    return [f"| {' | '.join(line)} |" for line in padded]


def escape_markdown(text: str) -> str:
    """Return text that Markdown shows as it is: no tag, no emphasis, no link, no end of a cell."""
    text = html.escape(_one_line(text), quote=False)
    text = re.sub(r"([\\`*|\[\]~])", r"\\\1", text)
    return re.sub(r"(?<![0-9A-Za-z])_|_(?![0-9A-Za-z])", r"\\_", text)


def _lines(report: Report) -> Iterator[str]:
    yield f"# {escape_markdown(report.title)}"
    for sentence in report.answer or ["Nothing is compared: there is no other method."]:
        yield from ("", escape_markdown(sentence))
    if report.rows:
        results = results_table(report.rows, report.methods, report.baseline)
        yield from _section("Results", results)
        yield from _section("", statistics_table(report))
        yield from ["", *(f"- {escape_markdown(remark)}" for remark in remarks(report))]
    if len(report.every_row) > len(report.rows):
        every = results_table(report.every_row, report.methods, report.baseline)
        yield from _section("All metrics", every)
    yield from _section("Speed-ups", speed_up_table(report))
    for task, classes in report.classes.items():
        if classes:
            yield from _section(
                f"Classes of {task}", class_table(report, task, MAX_CLASSES_MARKDOWN)
            )
            left_out = len(classes) - MAX_CLASSES_MARKDOWN
            text = [f"{left_out} classes that changed less are left out."] if left_out > 0 else []
            yield from [
                "",
                *(escape_markdown(line) for line in [*class_sentences(report, task), *text]),
            ]
    yield from _section("Cost", cost_table(report))
    yield from _section("Beside the paper", paper_table(report))
    for row in report.paper:
        differing = "; ".join(row.differing) or "nothing that its config and the paper tell"
        yield from (
            "",
            f"{escape_markdown(f'{row.task}, {row.metric}')}: differs in "
            f"{escape_markdown(differing)}.",
        )
    for task, cards in report.cards.items():
        yield from ("", f"## Protocol of {escape_markdown(task)}")
        for card in cards:
            yield from _card(card, report.methods)
    yield from _section("Not finished", unfinished_table(report))
    if report.problems:
        yield from ("", "## Not readable, or left out", "")
        yield from (f"- {escape_markdown(problem)}" for problem in report.problems)
    yield from ("", f"Computed from the run folders by tract_transfer {__version__}.")


def _section(heading: str, table: Table) -> Iterator[str]:
    if not table.rows:
        return
    if heading:
        yield from ("", f"## {escape_markdown(heading)}")
    yield from ("", escape_markdown(table.caption), "")
    yield from _pipes(table.head, table.rows, table.words)


def _pipes(head: Sequence[str], rows: Sequence[Sequence[str]], words: int) -> Iterator[str]:
    rules = ["---" if i < words else "---:" for i in range(len(head))]
    yield f"| {' | '.join(map(escape_markdown, head))} |"
    yield f"| {' | '.join(rules)} |"
    for row in rows:
        yield f"| {' | '.join(map(escape_markdown, row))} |"


def _card(card: Card, methods: Sequence[str]) -> Iterator[str]:
    if card.differing:
        rows = [
            [key, *("; ".join(by.get(method, ["–"])) for method in methods)]
            for key, by in card.differing.items()
        ]
        yield from ("", f"{card.heading}, where runs differ:", "")
        yield from _pipes(["key", *methods], rows, len(methods) + 1)
    if card.shared:
        yield from ("", f"{card.heading}, the same in every run:", "")
        yield from _pipes(["key", "value"], [list(item) for item in card.shared.items()], 2)


def _one_line(text: str) -> str:
    return " ".join(text.split()) if re.search(r"[\n\r\t\v\f\x85\u2028\u2029]", text) else text


FORMATS = {".html": to_html, ".md": to_markdown, ".tex": to_latex, ".json": to_json}


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
    aside = temporary_path(path)
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
