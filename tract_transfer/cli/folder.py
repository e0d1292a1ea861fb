"""A folder of images in place of a config file: `train ./my_images`."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tract_transfer.cli.main import number

if TYPE_CHECKING:
    from tract_transfer.config.schema import Config
    from tract_transfer.run.recipe import Recipe

RECIPE_VARIABLE = "TRACT_TRANSFER_RECIPE"
_MAX_VARIABLE = 100_000  # characters; Linux takes 128 KiB
FOLDER = "without --config-file, the first word is the folder of the images"
# Options of a folder: name in the command line -> arguments of add_argument.
_OPTIONS: dict[str, dict[str, Any]] = {
    "--task": {"choices": ["classify", "detect", "probe"], "help": "default: by what it holds"},
    "--backbone": {"metavar": "NAME", "help": "default timm/resnet18"},
    "--weights": {"metavar": "WEIGHTS", "help": "pretrained (default), none, a file or a run"},
    "--tract": {"action": "store_true", "help": "train the first layer with TrAct"},
    "--epochs": {"type": number(int, 1), "metavar": "N", "help": "default: by the images"},
    "--size": {"type": number(int, 8), "metavar": "PX", "help": "default: by the images"},
    "--batch-size": {"type": number(int, 1), "metavar": "N", "help": "default: by the images"},
    "--output": {"metavar": "DIR", "help": "default: output/<folder>-<task>"},
    "--name": {"metavar": "NAME", "help": "the run's label in reports"},
}


def add_folder_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose a config for a folder."""
    group = parser.add_argument_group(
        "for a folder of images", f"{FOLDER}; key=value overrides what is chosen"
    )
    for name, arguments in _OPTIONS.items():
        group.add_argument(name, **arguments)


def take_folder(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> str | None:
    """Return the folder that a command line gives in place of a config file, and remove it.

    A command line with both or neither ends with argparse's error.
    """
    words = arguments.overrides
    first = words[0] if words else ""
    is_folder = bool(first) and "=" not in first and Path(first).is_dir()
    if arguments.config_file is None:
        if not first or ("=" in first and not Path(first).exists()):
            parser.error("give the folder of the images, or --config-file FILE.")
        arguments.overrides = words[1:]
        return str(first)
    if is_folder or first.startswith((".", "/", "~")):
        parser.error(
            f"give a folder or --config-file: {first} and {arguments.config_file} are both."
        )
    given = [name for name in _OPTIONS if getattr(arguments, _destination(name), None)]
    if given:
        parser.error(f"{given[0]} goes with a folder. With --config-file, override its keys.")
    return None


def folder_config(folder: str, arguments: argparse.Namespace) -> tuple["Config", "Recipe | None"]:
    """Return the config for a folder, and the recipe that chose it.

    If the command continues or measures a run, the config is that of the run, and no recipe.
    Processes that --num-gpus started take the recipe of the process that started them.
    """
    from tract_transfer.registry import load_plugins
    from tract_transfer.run import recipe as recipes

    load_plugins(arguments.plugins)
    if text := os.environ.pop(RECIPE_VARIABLE, None):
        recipe = recipes.Recipe.from_json(text)
        return recipe.config(arguments.overrides, arguments.plugins), recipe
    given = {name: getattr(arguments, _destination(name)) for name in _OPTIONS}
    options = recipes.Options(
        task=given["--task"],
        backbone=given["--backbone"],
        weights=given["--weights"],
        tract=given["--tract"],
        epochs=given["--epochs"],
        size_px=given["--size"],
        batch_size=given["--batch-size"],
        output_dir=given["--output"],
        name=given["--name"],
    )
    continues = bool(arguments.resume or arguments.eval_only or arguments.debug_batch)
    machine = recipes.Machine.this()
    if arguments.num_gpus is not None and "RANK" not in os.environ:
        machine = machine._replace(processes=arguments.num_gpus)
    words, plugins = arguments.overrides, arguments.plugins
    return recipes.config_for(folder, options, words, plugins, continues=continues, machine=machine)


def pass_on(recipe: "Recipe") -> None:
    """Let the processes that this one starts take its recipe.

    A recipe that is too long for a variable is not passed: they choose again, and a run compares
    their configs.
    """
    if len(text := recipe.to_json()) < _MAX_VARIABLE:
        os.environ[RECIPE_VARIABLE] = text


def checked_config(
    folder: str, overrides: list[str], plugins: list[str]
) -> tuple["Config", "Recipe"]:
    """Return a config with the data of a folder, to check them."""
    from tract_transfer.data.folder import describe_folder
    from tract_transfer.run.recipe import Machine, Options, make_recipe

    options = Options(weights="none")  # no model is built
    recipe = make_recipe(folder, describe_folder(folder), options, Machine.this(), overrides)
    return recipe.config(overrides, plugins), recipe


def _destination(option: str) -> str:
    return option.removeprefix("--").replace("-", "_")
