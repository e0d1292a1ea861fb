"""Write the report of any run folders.

python tools/report.py output/quickstart/*/*/* --output output/report.html
"""

import argparse
import sys
from pathlib import Path


def main() -> int:
    """Write the report the command line asks for; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, help="run folders")
    parser.add_argument("--output", type=Path, default=Path("report.html"), metavar="FILE")
    parser.add_argument("--baseline", default="vanilla", help="the method others are compared with")
    parser.add_argument("--title", default="Does the backbone transfer?")
    arguments = parser.parse_args()

    from tract_transfer.suite.report import text_table, write_report
    from tract_transfer.suite.runs import load_runs

    try:
        runs = load_runs(arguments.folders)
        methods = sorted({run.method for run in runs if run.method})
        if methods and arguments.baseline not in methods:
            raise ValueError(f"--baseline {arguments.baseline} is none of the methods {methods}.")
        if all(run.failure for run in runs):
            reasons = "; ".join(f"{run.folder}: {run.failure}" for run in runs)
            raise ValueError(f"No finished run to report. {reasons}.")
        options = {"baseline": arguments.baseline, "title": arguments.title}
        path = write_report(arguments.folders, arguments.output, **options)
    except (ValueError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(text_table(runs, arguments.baseline))
    print(path.resolve())
    return 0


if __name__ == "__main__":
    sys.exit(main())
