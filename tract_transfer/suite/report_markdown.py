"""A report as Markdown: every table and sentence of the page, without its pictures."""

import html
import re
from collections.abc import Iterator, Sequence

from tract_transfer import __version__
from tract_transfer.suite.content import Card, Report
from tract_transfer.suite.tables import (
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

MAX_CLASSES = 40  # of a task, those that changed most; the JSON has all


def markdown(report: Report) -> str:
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


def escape(text: str) -> str:
    """Return text that Markdown shows as it is: no tag, no emphasis, no link, no end of a cell."""
    text = html.escape(_one_line(text), quote=False)
    text = re.sub(r"([\\`*|\[\]~])", r"\\\1", text)
    return re.sub(r"(?<![0-9A-Za-z])_|_(?![0-9A-Za-z])", r"\\_", text)


def _lines(report: Report) -> Iterator[str]:
    yield f"# {escape(report.title)}"
    for sentence in report.answer or ["Nothing is compared: there is no other method."]:
        yield from ("", escape(sentence))
    if report.rows:
        results = results_table(report.rows, report.methods, report.baseline)
        yield from _section("Results", results)
        yield from _section("", statistics_table(report))
        yield from ["", *(f"- {escape(remark)}" for remark in remarks(report))]
    if len(report.every_row) > len(report.rows):
        every = results_table(report.every_row, report.methods, report.baseline)
        yield from _section("All metrics", every)
    yield from _section("Speed-ups", speed_up_table(report))
    for task, classes in report.classes.items():
        if classes:
            yield from _section(f"Classes of {task}", class_table(report, task, MAX_CLASSES))
            left_out = len(classes) - MAX_CLASSES
            text = [f"{left_out} classes that changed less are left out."] if left_out > 0 else []
            yield from ["", *(escape(line) for line in [*class_sentences(report, task), *text])]
    yield from _section("Cost", cost_table(report))
    yield from _section("Beside the paper", paper_table(report))
    for row in report.paper:
        differing = "; ".join(row.differing) or "nothing that its config and the paper tell"
        yield from ("", f"{escape(f'{row.task}, {row.metric}')}: differs in {escape(differing)}.")
    for task, cards in report.cards.items():
        yield from ("", f"## Protocol of {escape(task)}")
        for card in cards:
            yield from _card(card, report.methods)
    yield from _section("Not finished", unfinished_table(report))
    if report.problems:
        yield from ("", "## Not readable, or left out", "")
        yield from (f"- {escape(problem)}" for problem in report.problems)
    yield from ("", f"Computed from the run folders by tract_transfer {__version__}.")


def _section(heading: str, table: Table) -> Iterator[str]:
    if not table.rows:
        return
    if heading:
        yield from ("", f"## {escape(heading)}")
    yield from ("", escape(table.caption), "")
    yield from _pipes(table.head, table.rows, table.words)


def _pipes(head: Sequence[str], rows: Sequence[Sequence[str]], words: int) -> Iterator[str]:
    rules = ["---" if i < words else "---:" for i in range(len(head))]
    yield f"| {' | '.join(map(escape, head))} |"
    yield f"| {' | '.join(rules)} |"
    for row in rows:
        yield f"| {' | '.join(map(escape, row))} |"


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
