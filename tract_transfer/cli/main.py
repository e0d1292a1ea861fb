"""What all commands share: a dispatcher, exit codes and the arguments of a command line.

Exit codes: 0 success; 1 failure, or problems found; 2 refused, as command line, config, data or
folder must be changed first; 128 + n ended by signal n.
"""

import argparse
import math
import os
import sys
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import Any

INTERRUPTED = 130
# Name -> module of this package and its function.
COMMANDS = {
    "train": ("train", "main"),
    "suite": ("suite", "main"),
    "report": ("report", "main"),
    "predict": ("predict", "main"),
    "analyze": ("analyze", "main"),
    "check-data": ("data", "check"),
    "visualize-data": ("data", "visualize"),
    "export": ("export", "main"),
    "convert": ("export", "convert"),
}
# Errors that repeat until the user changes something, and others that are not mistakes in the code.
_REFUSALS = (
    ValueError, ImportError, FileNotFoundError, FileExistsError, NotADirectoryError,
    IsADirectoryError, PermissionError,
)  # fmt: skip
_FAILURES = (RuntimeError, OSError, FloatingPointError)  # OSError: a full disk, a lost connection


def main() -> int:
    """Run the command that the first argument names: `python -m tract_transfer.cli.main train`."""
    parser = argparse.ArgumentParser(prog="tract_transfer", add_help=False)
    parser.add_argument("command", choices=COMMANDS)
    name = parser.parse_args(sys.argv[1:2]).command
    module, function = COMMANDS[name]
    sys.argv = [f"tract_transfer {name}", *sys.argv[2:]]
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
    from tract_transfer.files import FAILED, REFUSED  # imports yaml

    if isinstance(error, _REFUSALS):
        print(f"error: {error}", file=sys.stderr)
        return REFUSED
    print(f"failed: {type(error).__name__}: {error}", file=sys.stderr)
    return FAILED


def make_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser that prints its description as it is written."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add a config file and its overrides, for `parse_intermixed_args`."""
    parser.add_argument("--config-file", required=True, metavar="FILE", help="YAML, see configs/")
    add_overrides(parser)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add overrides of a config's keys."""
    override = "or key value: overrides the file's key"
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=override)


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
