"""Train, probe or evaluate one config: pre-training, fine-tuning, a probe or a detector.

python tools/train_net.py --config-file configs/quickstart/pretrain.yaml
python tools/train_net.py --config-file X.yaml solver.lr=0.05 tract.enabled=true
torchrun --nproc-per-node 4 tools/train_net.py --config-file X.yaml
"""

import argparse
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="YAML, see configs/")
    parser.add_argument("--resume", action="store_true", help="go on with the run in output_dir")
    parser.add_argument(
        "--eval-only", action="store_true", help="measure the checkpoint in output_dir, no training"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="build all, run two steps, print what it would cost"
    )
    parser.add_argument(
        "--num-gpus", type=int, metavar="N", help="start N processes on this machine's GPUs"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="or key value: over the file's keys"
    )
    return parser.parse_args(words)


def main() -> int:
    """Run what the command line asks for; return the exit code."""
    arguments = parse()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("tract_transfer").setLevel(logging.INFO)

    from tract_transfer.config import ConfigError, load_config

    try:
        config = load_config(arguments.config_file, arguments.overrides)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    if arguments.num_gpus is not None and "RANK" not in os.environ:
        return launch(arguments.num_gpus)

    from tract_transfer.engine.signals import Stopped
    from tract_transfer.run import evaluate_run, preview, run

    if int(os.environ.get("RANK", "0")) > 0:
        logging.getLogger("tract_transfer").setLevel(logging.ERROR)
    try:
        if arguments.dry_run:
            for what, value in preview(config).items():
                print(f"{what:>22}  {value}")
        elif arguments.eval_only:
            for metric, value in evaluate_run(config).items():
                print(f"{metric:>22}  {value:.4f}")
        else:
            run(config, resume=arguments.resume)
            print(Path(config.output_dir) / "results.json")
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return stopped.exit_code
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("TRACT_TRANSFER_TRACEBACK"):
            raise
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def launch(num_gpus: int) -> int:
    """Start this command again as `num_gpus` processes of one group."""
    import torch

    if not 1 <= num_gpus <= torch.cuda.device_count():
        print(
            f"--num-gpus {num_gpus}: torch sees {torch.cuda.device_count()} GPUs. "
            "For processes on a CPU: torchrun --nproc-per-node N tools/train_net.py ...",
            file=sys.stderr,
        )
        return 2
    group = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_gpus}"]
    return subprocess.run([sys.executable, *group, *sys.argv], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
