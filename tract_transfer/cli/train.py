"""Train, probe or evaluate one config: pre-training, fine-tuning, a probe or a detector.

python tools/train_net.py --config-file configs/quickstart/pretrain.yaml
python tools/train_net.py --config-file X.yaml solver.lr=0.05 tract.enabled=true
torchrun --nproc-per-node 4 tools/train_net.py --config-file X.yaml
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tract_transfer.cli.main import at_least, reports_errors

if TYPE_CHECKING:
    from tract_transfer.config.schema import Config


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="YAML, see configs/")
    parser.add_argument("--resume", action="store_true", help="go on with the run in output_dir")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--eval-only", action="store_true", help="measure the checkpoint in output_dir, no training"
    )
    instead.add_argument(
        "--dry-run", action="store_true", help="build all, run two steps, print what it would cost"
    )
    instead.add_argument(
        "--debug-batch",
        type=Path,
        metavar="FILE",
        help="run the step again at which a training was not finite, and tell where it begins",
    )
    parser.add_argument(
        "--num-gpus", type=at_least(1), metavar="N", help="start N processes on this machine's GPUs"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="or key value: over the file's keys"
    )
    arguments = parser.parse_intermixed_args(words)
    if arguments.resume and (arguments.eval_only or arguments.debug_batch):
        parser.error("--resume goes on with a training: leave --eval-only or --debug-batch out.")
    return arguments


@reports_errors
def main() -> int:
    """Run what the command line asks for; return the exit code."""
    arguments = parse()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("tract_transfer").setLevel(logging.INFO)

    from tract_transfer.config.schema import load_config

    config = load_config(arguments.config_file, arguments.overrides)
    if arguments.num_gpus is not None and "RANK" not in os.environ:
        return launch(arguments.num_gpus)

    from tract_transfer.engine.group import Stopped

    is_main = os.environ.get("RANK", "0") == "0"
    if not is_main:
        logging.getLogger("tract_transfer").setLevel(logging.ERROR)
    try:
        lines = carry_out(arguments, config)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return stopped.exit_code
    if is_main:
        print("\n".join(lines))
    return 0


def carry_out(arguments: argparse.Namespace, config: "Config") -> list[str]:
    """Do what the command line asks for; return what to say of it."""
    from tract_transfer.engine.hooks import format_metric
    from tract_transfer.run.evaluate import evaluate_run, preview, replay_debug_batch
    from tract_transfer.run.run import run

    if arguments.dry_run:
        return [
            f"{what:>22}  {value}"
            for what, value in preview(config, resume=arguments.resume).items()
        ]
    if arguments.debug_batch is not None:
        return replay_debug_batch(config, arguments.debug_batch)
    if arguments.eval_only:
        metrics = evaluate_run(config)
        return [f"{name:>22}  {format_metric(name, value)}" for name, value in metrics.items()]
    run(config, resume=arguments.resume)
    return [str(Path(config.output_dir) / "results.json")]


def launch(num_gpus: int) -> int:
    """Let `num_gpus` processes of one group take this one's place.

    Raises:
        ValueError: there are not so many.
    """
    import torch

    there = torch.cuda.device_count()
    if 1 <= num_gpus <= there:
        group = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_gpus}"]
        # Not as a child: a signal to this process must reach the group.
        os.execv(
            sys.executable,
            [sys.executable, *group, "-m", "tract_transfer.cli.train", *sys.argv[1:]],
        )
    raise ValueError(
        f"--num-gpus {num_gpus}: torch sees {there} GPUs. "
        "For processes on a CPU: torchrun --nproc-per-node N tools/train_net.py ..."
    )


if __name__ == "__main__":
    sys.exit(main())
