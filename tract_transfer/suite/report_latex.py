"""A report's tables as LaTeX, to be put into a paper by \\input; they need booktabs and UTF-8."""

import unicodedata
from dataclasses import replace

from tract_transfer import __version__
from tract_transfer.suite.content import Report
from tract_transfer.suite.tables import (
    Table,
    cost_table,
    paper_table,
    remarks,
    results_table,
    speed_up_table,
    statistics_table,
    unfinished_table,
)

_LONG = 60  # characters of a cell
_SPECIAL = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\textquotedbl{}",
    "±": r"$\pm$", "−": "$-$", "×": r"$\times$", "–": r"\textendash{}", "λ": r"$\lambda$",
    "`": r"\textasciigrave{}", "'": r"\textquotesingle{}",
}  # fmt: skip


def latex(report: Report) -> str:
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


def escape(text: str) -> str:
    """Return text that LaTeX prints as it is; control characters are left out."""
    kept = (c for c in " ".join(text.split()) if not unicodedata.category(c).startswith("C"))
    escaped = "".join(_SPECIAL.get(character, character) for character in kept)
    # `--` would become a dash, and a `[` after the end of a row an argument of it.
    return ("{}" if escaped.startswith("[") else "") + escaped.replace("--", "-{}-")


def _table(table: Table) -> list[str]:
    columns = "".join(_column(table, i) for i in range(len(table.head)))
    rows = [" & ".join(map(escape, row)) + r" \\" for row in table.rows]
    return [
        r"\begin{table}",
        r"  \centering\footnotesize",
        f"  \\caption{{{escape(table.caption)}}}",
        f"  \\label{{tab:{table.name}}}",
        f"  \\begin{{tabular}}{{@{{}}{columns}@{{}}}}",
        r"    \toprule",
        f"    {' & '.join(map(escape, table.head))} \\\\",
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
