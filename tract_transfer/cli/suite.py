"""Run methods x tasks x seeds and report on them. Finished runs are skipped, so a suite that was
stopped is resumed by the same command.

tract-transfer suite --config-file suites/quickstart workers=2
tract-transfer suite --config-file suites/quickstart --dry-run
"""

import argparse
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tract_transfer.cli.main import add_config, make_parser, reports_errors

if TYPE_CHECKING:
    from tract_transfer.config.suite import SuiteConfig
    from tract_transfer.suite.launchers import Launcher
    from tract_transfer.suite.state import Suite

SHOWN = "tract_transfer.suite"


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser(__doc__)
    add_config(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would be done with every run, and stop"
    )
    parser.add_argument(
        "--set-aside", action="store_true", help="move folders of other runs to set_aside/"
    )
    parser.add_argument("--launcher", choices=("local", "ray", "slurm"), default="local")
    parser.add_argument("--address", help="of the Ray cluster; default: start one on this machine")
    arguments = parser.parse_intermixed_args()
    if arguments.address and arguments.launcher != "ray":
        parser.error("--address needs --launcher ray")
    return arguments


@reports_errors
def main() -> int:
    """Run the suite that the command line names; return the exit code."""
    arguments = parse()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger().handlers[0].addFilter(make_filter())

    from tract_transfer.config.suite import load_suite
    from tract_transfer.files import REFUSED
    from tract_transfer.run.suite import list_plan, open_suite
    from tract_transfer.suite.execute import execute
    from tract_transfer.suite.screen import Screen

    config = load_suite(arguments.config_file, arguments.overrides, arguments.plugins)
    suite = open_suite(config, refuse=not (arguments.dry_run or arguments.set_aside))
    if arguments.dry_run:
        print("\n".join(list_plan(suite)))
        if suite.take_stock():
            print("Other runs are in the way: --set-aside moves their folders.", file=sys.stderr)
            return REFUSED
        return 0
    launcher = make_launcher(arguments, config)
    try:
        launcher.check(suite.runs)
        screen = Screen(len(suite.runs))
        stop_signal = execute(suite, launcher, screen, set_aside=arguments.set_aside)
    finally:
        launcher.close()
    if stop_signal is not None:
        print("Stopped; the same command resumes from the checkpoints.", file=sys.stderr)
        return 128 + stop_signal
    write_reports(suite)
    return 0 if all(job.state == "finished" for job in suite.jobs) else 1


def make_filter() -> Callable[[logging.LogRecord], bool]:
    """Return a filter that passes the suite's own lines, and each warning once: runs share data."""
    seen: set[str] = set()

    def is_shown(record: logging.LogRecord) -> bool:
        is_new = record.getMessage() not in seen
        seen.add(record.getMessage())
        return (is_new and record.levelno > logging.INFO) or record.name.startswith(SHOWN)

    return is_shown


def make_launcher(arguments: argparse.Namespace, config: "SuiteConfig") -> "Launcher":
    """Return the launcher that the command line names."""
    from tract_transfer.suite.launchers import RayLauncher, SlurmLauncher, this_machine

    if arguments.launcher == "ray":
        return RayLauncher(arguments.address, config.workers)
    if arguments.launcher == "slurm":
        return SlurmLauncher(Path(config.output_dir) / "slurm", config.workers)
    return this_machine(config.workers or 1)


def write_reports(suite: "Suite") -> None:
    """Write the report in every format into the suite's folder; print its table and HTML path."""
    from tract_transfer.report.content import read_report
    from tract_transfer.report.write import FORMATS, save_report, text_table

    report = read_report([suite.folder], suite.config.baseline, suite.config.title)
    paths = {suffix: suite.folder / f"report{suffix}" for suffix in FORMATS}
    for path in paths.values():
        save_report(report, path)
    print(text_table(report))
    print(paths[".html"].resolve())


if __name__ == "__main__":
    sys.exit(main())
