"""Run methods x tasks x seeds and write one report; what is finished is skipped, so run it again.

python tools/run_suite.py --config-file configs/suites/quickstart.yaml
"""

import argparse
import gc
import json
import logging
import sys
from pathlib import Path

SUITE = "tract_transfer.suite"


def main() -> int:
    """Run the suite the command line names; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="see configs/suites/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="over the suite's keys")
    arguments = parser.parse_intermixed_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # The screen tells the suite's progress and what is wrong; each run's own log.txt tells all.
    logging.getLogger().handlers[0].addFilter(
        lambda record: record.levelno > logging.INFO or record.name.startswith(SUITE)
    )

    from tract_transfer.config import Config, ConfigError, load_config, load_suite
    from tract_transfer.suite.plan import PlannedRun, expand

    def config_of(planned: PlannedRun) -> Config:
        words = [f"{key}={json.dumps(value)}" for key, value in planned.overrides.items()]
        return load_config(planned.config_file, words)

    try:
        suite = load_suite(arguments.config_file, arguments.overrides)
        plan = expand(
            Path(suite.output_dir),
            {name: method.model_dump() for name, method in suite.methods.items()},
            suite.seeds,
            Path(suite.pretrain),
            {name: Path(path) for name, path in suite.tasks.items()},
        )
        for planned in plan:
            config_of(planned)  # a wrong config ends the suite now, not in an hour
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2

    from tract_transfer.engine.hooks import format_metrics
    from tract_transfer.engine.signals import Stopped
    from tract_transfer.run import is_done, run
    from tract_transfer.suite.execute import execute
    from tract_transfer.suite.report import text_table, write_report
    from tract_transfer.suite.runs import load_runs

    def carry_out(planned: PlannedRun) -> str:
        results = run(config_of(planned), resume=True)
        gc.collect()  # a trainer and its hooks know each other: free its data before the next run
        metric = results["primary_metric"]
        return format_metrics({metric: results["metrics"][metric]})

    try:
        failures = execute(plan, lambda planned: is_done(config_of(planned)), carry_out)
    except Stopped as stopped:
        print(f"{stopped} The same command goes on with the suite.", file=sys.stderr)
        return stopped.exit_code
    folders = [planned.folder for planned in plan]
    path = Path(suite.output_dir) / "report.html"
    write_report(folders, path, baseline=suite.baseline, title=suite.title)
    print(text_table(load_runs(folders), suite.baseline))
    print(path.resolve())
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
