"""Run methods x tasks x seeds and report on them; what is finished is skipped, so run it again.

python tools/run_suite.py --config-file configs/suites/quickstart.yaml workers=2
python tools/run_suite.py --config-file configs/suites/quickstart.yaml --dry-run
"""

import argparse
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tract_transfer.cli.main import reports_errors

if TYPE_CHECKING:
    from tract_transfer.config.suite import SuiteConfig
    from tract_transfer.run.suite import Suite
    from tract_transfer.suite.launchers import Launcher

SHOWN = ("tract_transfer.suite", "tract_transfer.run.suite", "tract_transfer.run.suite_plan")


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="see configs/suites/")
    parser.add_argument(
        "--dry-run", action="store_true", help="say of every run what would be done, and do nothing"
    )
    parser.add_argument(
        "--set-aside", action="store_true", help="move folders that hold other runs out of the way"
    )
    parser.add_argument("--launcher", choices=("local", "ray", "slurm"), default="local")
    parser.add_argument("--address", help="of the Ray cluster; without it, one on this machine")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="over the suite's keys")
    arguments = parser.parse_intermixed_args()
    if arguments.address and arguments.launcher != "ray":
        parser.error("--address is of --launcher ray")
    return arguments


@reports_errors
def main() -> int:
    """Run the suite the command line names; return the exit code."""
    arguments = parse()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger().handlers[0].addFilter(make_filter())

    from tract_transfer.config.suite import load_suite
    from tract_transfer.run.suite import Suite, list_plan

    config = load_suite(arguments.config_file, arguments.overrides)
    refuse = not (arguments.dry_run or arguments.set_aside)
    suite = Suite(config, remember=not arguments.dry_run, refuse=refuse)
    if arguments.dry_run:
        print("\n".join(list_plan(suite, suite.take_stock())))
        return 0
    launcher = make_launcher(arguments, config)
    try:
        return carry_out(arguments, suite, launcher)
    finally:
        launcher.close()


def make_filter() -> Callable[[logging.LogRecord], bool]:
    """Return what lets through the suite's own lines and, once each, what is wrong.

    Runs share data, and so their warnings; each run's own log.txt tells all.
    """
    said: set[str] = set()

    def is_news(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        is_wrong = record.levelno > logging.INFO and text not in said
        said.add(text)
        return is_wrong or record.name.startswith(SHOWN)

    return is_news


def make_launcher(arguments: argparse.Namespace, config: "SuiteConfig") -> "Launcher":
    """Return what starts the runs."""
    from tract_transfer.suite.cluster import RayLauncher, SlurmLauncher
    from tract_transfer.suite.launchers import this_machine

    if arguments.launcher == "ray":
        return RayLauncher(arguments.address, config.workers)
    if arguments.launcher == "slurm":
        return SlurmLauncher(Path(config.output_dir) / "slurm", config.workers)
    return this_machine(config.workers or 1)


def carry_out(arguments: argparse.Namespace, suite: "Suite", launcher: "Launcher") -> int:
    """Run what is to be run, and write the reports; return the exit code."""
    from tract_transfer.run.suite import carry_out
    from tract_transfer.suite.screen import make_screen

    launcher.check(suite.runs)
    stopped = carry_out(
        suite,
        launcher,
        make_screen(len(suite.runs)),
        set_aside=arguments.set_aside,
    )
    if stopped is not None:
        print("Stopped; runs keep their checkpoints. The same command goes on.", file=sys.stderr)
        return 128 + stopped

    write_reports(suite)
    return 0 if all(job.state == "finished" for job in suite.jobs) else 1


def write_reports(suite: "Suite") -> None:
    """Write the report in every format into the suite's folder; print its table and the page."""
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
