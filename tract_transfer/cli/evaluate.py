"""Measure the reported checkpoint of a run again, on its own data or on others.

tract-transfer eval --run output/quickstart/detect
tract-transfer eval --run output/quickstart/detect evaluation.protocol=area
tract-transfer eval --config-file transfer/cifar10_finetune
torchrun --nproc-per-node 4 -m tract_transfer eval --config-file output/run/config.yaml

Prints the metrics, that of `evaluation.metric` first, and writes evaluation.json into the run
folder. The model and its transforms are those of the run; `data.test` and `evaluation` may differ.
"""

import json
import sys
from pathlib import Path

from tract_transfer.cli.main import (
    CONFIG_HELP,
    add_overrides,
    add_plugins,
    is_main_process,
    make_parser,
    reports_errors,
)


@reports_errors
def main() -> int:
    """Evaluate the run that the command line names; return the exit code."""
    parser = make_parser(__doc__)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--run", type=Path, metavar="FOLDER", help="a run folder")
    which.add_argument("--config-file", metavar="FILE", help=f"{CONFIG_HELP}, of a run")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_plugins(parser)
    add_overrides(parser)
    arguments = parser.parse_intermixed_args()
    from tract_transfer.engine.screen import ProgressLine, show_log

    is_main = is_main_process()
    show_log(is_main=is_main)
    with ProgressLine("Loading PyTorch"):
        from tract_transfer.config.schema import load_config
        from tract_transfer.engine.hooks import format_metric
        from tract_transfer.run.evaluate import evaluate_run
        from tract_transfer.run.trained import run_config

    if arguments.run is not None:
        config = run_config(arguments.run, arguments.overrides, arguments.plugins)
    else:
        config = load_config(arguments.config_file, arguments.overrides, arguments.plugins)
    metrics = evaluate_run(config)
    lines = [f"{name:>22}  {format_metric(name, value)}" for name, value in metrics.items()]
    if is_main:
        print(json.dumps(metrics) if arguments.json else "\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
