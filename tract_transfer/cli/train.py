"""Train, probe or evaluate one config, or a folder of images.

tract-transfer train ./my_images
tract-transfer train ./my_images --task probe --backbone timm/resnet50
tract-transfer train --config-file quickstart/pretrain
tract-transfer train --config-file X.yaml solver.lr=0.05 tract.enabled=true
torchrun --nproc-per-node 4 -m tract_transfer train --config-file X.yaml
"""

import argparse
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from tract_transfer.cli.folder import add_folder_options, folder_config, pass_on, take_folder
from tract_transfer.cli.main import (
    add_config,
    is_main_process,
    make_parser,
    number,
    read_config,
    reports_errors,
)

if TYPE_CHECKING:
    from tract_transfer.config.schema import Config
    from tract_transfer.run.recipe import Recipe


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser(__doc__)
    add_config(parser, is_required=False)
    add_folder_options(parser)
    parser.add_argument("--resume", action="store_true", help="resume the run in output_dir")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--eval-only", action="store_true", help="evaluate its checkpoint")
    instead.add_argument("--dry-run", action="store_true", help="print the cost after two steps")
    text = "repeat the step at which a training was not finite, and print where it starts"
    instead.add_argument("--debug-batch", type=Path, metavar="FILE", help=text)
    parser.add_argument("--num-gpus", type=number(int, 1), metavar="N", help="processes to start")
    arguments = parser.parse_intermixed_args()
    if arguments.resume and (arguments.eval_only or arguments.debug_batch):
        parser.error("--resume continues a training: leave out --eval-only or --debug-batch.")
    arguments.folder = take_folder(parser, arguments)
    return arguments


@reports_errors
def main() -> int:
    """Run what the command line asks for; return the exit code."""
    arguments = parse()
    from tract_transfer.engine.screen import ProgressLine, show_log

    is_main = is_main_process()
    show_log(is_main=is_main)
    recipe = None
    if arguments.folder is None:
        config = read_config(arguments)
    else:
        config, recipe = folder_config(arguments.folder, arguments)
    if arguments.num_gpus is not None and "RANK" not in os.environ:
        if recipe is not None:
            pass_on(recipe)
        return launch(arguments.num_gpus)

    with ProgressLine("Loading PyTorch"):
        from tract_transfer.engine.group import Stopped

        import_module("tract_transfer.run.run")  # and all that it imports
    try:
        lines = carry_out(arguments, config, recipe)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return stopped.exit_code
    if is_main and lines:
        print("\n".join(lines))
    return 0


def carry_out(
    arguments: argparse.Namespace, config: "Config", recipe: "Recipe | None"
) -> list[str]:
    """Do what the command line asks for; return the lines to print.

    Args:
        recipe: what chose the config, if it was chosen for a folder.
    """
    from tract_transfer.engine.hooks import format_metric
    from tract_transfer.run.evaluate import evaluate_run, preview, replay_debug_batch
    from tract_transfer.run.run import run

    if arguments.debug_batch is not None:
        return replay_debug_batch(config, arguments.debug_batch)
    if arguments.eval_only:
        metrics = evaluate_run(config)
        return [f"{name:>22}  {format_metric(name, value)}" for name, value in metrics.items()]
    chosen = None if recipe is None else recipe.chosen(arguments.overrides, arguments.plugins)
    if arguments.dry_run:
        costs = preview(config, resume=arguments.resume)
        lines = [f"{what:>22}  {value}" for what, value in costs.items()]
        return lines if chosen is None else [*lines, "", chosen.recipe_text]
    run(config, resume=arguments.resume, chosen=chosen)
    if sys.stdout.isatty() and sys.stderr.isatty():
        return []  # the log has shown it
    return [str(Path(config.output_dir) / "results.json")]


def launch(num_gpus: int) -> int:
    """Replace this process by a group of `num_gpus` processes."""
    import torch

    count = torch.cuda.device_count()
    if num_gpus > count:
        raise ValueError(
            f"--num-gpus {num_gpus}: torch sees {count} GPUs. "
            "For processes on a CPU: torchrun --nproc-per-node N -m tract_transfer train ..."
        )
    group = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_gpus}"]
    command = [sys.executable, *group, "-m", "tract_transfer.cli.train", *sys.argv[1:]]
    os.execv(sys.executable, command)  # not a child: a signal to this process must reach the group


if __name__ == "__main__":
    sys.exit(main())
