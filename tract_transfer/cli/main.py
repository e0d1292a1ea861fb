"""What all commands share: a dispatcher, exit codes and the arguments of a command line.

Exit codes: 0 success; 1 failure, or problems found; 2 refused, as command line, config, data or
folder must be changed first; 128 + n ended by signal n.
"""

import argparse
import math
import os
import sys
from collections.abc import Callable
from difflib import get_close_matches
from functools import wraps
from importlib import import_module
from typing import TYPE_CHECKING, Any

import tract_transfer

if TYPE_CHECKING:
    from tract_transfer.config.schema import Config

PROGRAM = "tract-transfer"
INTERRUPTED = 130
# Name -> module of this package, its function, and what it does.
COMMANDS = {
    "train": ("train", "main", "pre-train, fine-tune, probe or train a detector"),
    "eval": ("evaluate", "main", "measure the reported checkpoint of a run again"),
    "predict": ("predict", "main", "apply a trained model to images and videos"),
    "suite": ("suite", "main", "run methods x tasks x seeds, and report on them"),
    "report": ("report", "main", "write the report of any runs"),
    "check-data": ("data", "check", "list everything that is broken in the data of a config"),
    "visualize": ("data", "visualize", "draw training images as a training gets them"),
    "analyze": ("analyze", "main", "print a model's parameters, FLOPs, strides and memory"),
    "export": ("export", "main", "write a run's model for timm, torchvision or ONNX"),
    "convert": ("export", "convert", "convert a ResNet's weights to detectron2's names, or back"),
    "configs": ("configs", "main", "list the packaged configs, or copy one to edit"),
    "doctor": ("doctor", "main", "check the installation, or TrAct on a model and its data"),
}
CONFIG_HELP = "a YAML file, or the name of a packaged config"
# Errors that repeat until the user changes something, and others that are not mistakes in the code.
_REFUSALS = (
    ValueError, ImportError, FileNotFoundError, FileExistsError, NotADirectoryError,
    IsADirectoryError, PermissionError,
)  # fmt: skip
_FAILURES = (RuntimeError, OSError, FloatingPointError)  # OSError: a full disk, a lost connection


def main() -> int:
    """Run the command that the first argument names: `tract-transfer train ...`."""
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:{width}}  {about}" for name, (*_, about) in COMMANDS.items())
    parser = make_parser(f"commands:\n{listed}\n\n`{PROGRAM} COMMAND --help` explains one.")
    parser.prog, parser.usage = PROGRAM, f"{PROGRAM} [--help | --version] COMMAND ..."
    version = f"{PROGRAM} {tract_transfer.__version__}"
    parser.add_argument("--version", action="version", version=version)
    parser.add_argument("command", metavar="COMMAND", help=argparse.SUPPRESS)
    name = parser.parse_args(sys.argv[1:2] or ["--help"]).command
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"the commands are: {', '.join(COMMANDS)}"
        parser.error(f"there is no command {name!r}; {hint}")
    module, function, _ = COMMANDS[name]
    sys.argv = [f"{PROGRAM} {name}", *sys.argv[2:]]
    code: int = getattr(import_module(f"tract_transfer.cli.{module}"), function)()
    return code


def reports_errors(command: Callable[[], int]) -> Callable[[], int]:
    """Make a command report errors in one line on stderr and by its exit code.

    Errors of other kinds are mistakes in the code and keep their traceback. So do all if the
    environment has TRACT_TRANSFER_TRACEBACK.
    """

    @wraps(command)
    def run() -> int:
        try:
            return command()
        except KeyboardInterrupt:
            print("SIGINT: ended.", file=sys.stderr)
            return INTERRUPTED
        except (*_REFUSALS, *_FAILURES) as error:
            if os.environ.get("TRACT_TRANSFER_TRACEBACK"):
                raise
            return print_error(error)

    return run


def print_error(error: Exception) -> int:
    """Print `error: why` or `failed: SomeError: why`; return the exit code."""
    from tract_transfer.files import FAILED, REFUSED

    if isinstance(error, _REFUSALS):
        hint = None
        if isinstance(error, ModuleNotFoundError):
            hint = tract_transfer.install_hint(error, sys.argv[0].rpartition(" ")[2])  # see main
        print(f"error: {hint or error}", file=sys.stderr)
        return REFUSED
    print(f"failed: {type(error).__name__}: {error}", file=sys.stderr)
    return FAILED


def is_main_process() -> bool:
    """Whether this is the process of a group that prints; known without torch."""
    return os.environ.get("RANK", "0") == "0"


def make_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser that prints its description as it is written."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_config(parser: argparse.ArgumentParser, *, is_required: bool = True) -> None:
    """Add a config file and its overrides, for `parse_intermixed_args`."""
    parser.add_argument("--config-file", required=is_required, metavar="FILE", help=CONFIG_HELP)
    add_plugins(parser)
    add_overrides(parser)


def add_plugins(parser: argparse.ArgumentParser) -> None:
    """Add --plugin, which may be given several times."""
    text = "a module or .py file that registers backbones, sources, ... (repeatable)"
    plugin: dict[str, Any] = {"action": "append", "default": [], "dest": "plugins"}
    parser.add_argument("--plugin", metavar="MODULE", help=text, **plugin)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add overrides of a config's keys."""
    override = "or key value: overrides the file's key"
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=override)


def read_config(arguments: argparse.Namespace, *more: str) -> "Config":
    """Return the config of --config-file with its overrides, and `more` of them."""
    from tract_transfer.config.schema import load_config

    return load_config(arguments.config_file, [*arguments.overrides, *more], arguments.plugins)


def number(kind: type, least: float, most: float = math.inf) -> Callable[[str], Any]:
    """Return the type of an argument that is an int or a float within limits."""

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            limits = f">= {least}" if most == math.inf else f"in [{least}, {most}]"
            raise argparse.ArgumentTypeError(f"must be {kind.__name__} {limits}, got {text}")
        return value

    return read


if __name__ == "__main__":
    sys.exit(main())
