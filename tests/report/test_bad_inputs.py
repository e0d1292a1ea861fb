"""Bad inputs of reports: name -> what to do in an empty folder, and the message."""

import pytest
from report_runs import write_pair, write_report

from tract_transfer.report.content import read_report


def with_suite(text):
    def read(folder):
        (folder / "suite.json").write_text(text)
        read_report([folder])

    return read


SUITES = {
    "{oops": "cannot be read",
    '{"format": 2, "runs": []}': "must have format 1, got 2",
    "[]": "must have format 1, got None",
    '{"format": 1, "runs": [{"method": "a"}]}':
        r"runs\[0\] lacks a usable task, seed, folder, state",
    '{"format": 1}': r"runs\[0\] lacks",
}  # fmt: skip
BAD_INPUTS = {
    "a report of no folder": (lambda _: read_report([]), "at least one folder"),
    "a report of a folder without runs": (
        lambda folder: read_report([folder]), r"No run in .* or below"),
    "a report of two runs of one seed": (
        lambda folder: read_report([*write_pair(folder), *write_pair(folder / "again")]),
        r"seed 0\. Exclude one of them"),
    "a baseline that no run has": (
        lambda folder: read_report(write_pair(folder), "plain"),
        r"methods are tract, vanilla, and none is the baseline plain\."),
    "several methods and no baseline": (
        lambda folder: read_report(
            write_pair(folder)[3:] + write_pair(folder / "more", treated="other")[3:]
        ),
        r"none is the baseline vanilla\. .* --baseline other"),
    "another suffix of a report": (
        lambda folder: write_report(write_pair(folder), folder / "report.docx"),
        r"must be one of \.html, \.md, \.tex, \.json"),
    **{f"a suite.json of {text}": (with_suite(text), match) for text, match in SUITES.items()},
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_is_refused(tmp_path, name, refused):
    attempt, match = BAD_INPUTS[name]
    with refused(name, ValueError, match=match):
        attempt(tmp_path)
