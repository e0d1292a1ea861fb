"""docs/errors.md lists the bad inputs that the tests give, no more and no fewer."""

import re

import errors_page
from errors_page import Row


def test_every_row_is_a_case_and_every_case_a_row():
    rows, patterns = set(errors_page.read_page()), {case.pattern for case in errors_page.cases()}
    without_case = {row for row in rows if not any(re.fullmatch(p, row) for p in patterns)}
    without_row = {p for p in patterns if not any(re.fullmatch(p, row) for row in rows)}
    assert (without_case, without_row) == (set(), set()), "make errors writes the page anew"


def test_there_are_many_and_none_is_silent():
    rows = errors_page.read_page().values()
    assert len(rows) >= 60
    assert all(len(row.message) > 20 and row.where.endswith(".py") for row in rows)


def test_the_page_is_as_it_was_written():
    assert errors_page.PAGE.read_text(encoding="utf-8") == errors_page.page_of(
        errors_page.read_page()
    )


def test_a_row_is_read_as_it_was_written(tmp_path, monkeypatch):
    row = Row("a | b", "data/voc.py", "give `x | y` or <class>")
    monkeypatch.setattr(errors_page, "PAGE", tmp_path / "errors.md")
    row = row._replace(what="a or b")
    errors_page.PAGE.write_text(errors_page.page_of({row.what: row}))
    assert errors_page.read_page() == {row.what: row}


def test_folders_and_foreign_words_are_not_shown(tmp_path):
    base, said = (
        tmp_path.parent,
        f"No file at {tmp_path}/a/b.xml, in {tmp_path}. Known: ['alexnet', 1]",
    )
    assert errors_page.shown(said, base) == "No file at …/a/b.xml, in …. Known: …"
    assert len(errors_page.shown("word " * 200, base)) <= errors_page.LONGEST + 2
