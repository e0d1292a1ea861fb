"""Write the report of any runs: run folders, suite folders, or folders that contain either.

tract-transfer report output/quickstart --output output/report.html
tract-transfer report output/quickstart --output output/report --format html md tex json
"""

import sys
from pathlib import Path

from tract_transfer.cli.main import make_parser, reports_errors

FORMATS = ("html", "md", "tex", "json")
MAX_REASONS = 5  # of runs that are not finished


@reports_errors
def main() -> int:
    """Write the report that the command line asks for; return the exit code."""
    parser = make_parser(__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="folders with runs")
    parser.add_argument("--output", type=Path, default=Path("report.html"), metavar="FILE")
    text = "default: by the suffix of FILE; each format is written to FILE with its own suffix"
    parser.add_argument("--format", nargs="+", choices=FORMATS, dest="formats", help=text)
    text = "the method to compare with; default: the suite's, or vanilla, or the only method"
    parser.add_argument("--baseline", help=text)
    parser.add_argument("--title", help="default: the suite's")
    arguments = parser.parse_args()

    from tract_transfer.report.content import read_report
    from tract_transfer.report.write import save_report, text_table

    suffix = arguments.output.suffix.removeprefix(".")
    formats = arguments.formats or ([suffix] if suffix in FORMATS else [])
    if not formats:
        parser.error(f"--output {arguments.output} must end in one of {FORMATS}, or set --format.")
    stem = arguments.output.with_suffix("") if suffix in FORMATS else arguments.output
    report = read_report(arguments.folders, arguments.baseline, arguments.title)
    if not report.tasks:
        reasons = [f"{run.folder}: {run.failure}" for run in report.runs]
        more = f"; and {len(reasons) - MAX_REASONS} more" if len(reasons) > MAX_REASONS else ""
        raise ValueError(f"No finished run to report. {'; '.join(reasons[:MAX_REASONS])}{more}.")
    paths = [stem.with_name(f"{stem.name}.{name}") for name in formats]
    for path in paths:
        save_report(report, path)
    print(text_table(report))
    for path in paths:
        print(path.resolve())
    return 0


if __name__ == "__main__":
    sys.exit(main())
