"""How a tool ends that cannot do what it was asked: one line on stderr, and an exit code.

0 all was done; 1 it failed, or something was found wrong; 2 it was refused: command, config, data
or folder have to be changed first; 128 + n it was ended by signal n.
"""

import argparse
import os
import sys
from collections.abc import Callable
from functools import wraps

from tract_transfer.files import FAILED, REFUSED

INTERRUPTED = 130
# What another try would meet again, until somebody changes something.
_REFUSALS = (
    ValueError, ImportError, FileNotFoundError, FileExistsError, NotADirectoryError,
    IsADirectoryError, PermissionError,
)  # fmt: skip
_FAILURES = (RuntimeError, OSError, FloatingPointError)  # OSError: a full disk, a lost connection


def reports_errors(main: Callable[[], int]) -> Callable[[], int]:
    """Let a tool's `main` end as this module says, and not by a traceback.

    Errors of other kinds are mistakes in the code, and keep theirs; so do all where the environment
    has TRACT_TRANSFER_TRACEBACK.
    """

    @wraps(main)
    def run() -> int:
        try:
            return main()
        except KeyboardInterrupt:
            print("SIGINT: ended.", file=sys.stderr)
            return INTERRUPTED
        except (*_REFUSALS, *_FAILURES) as error:
            if os.environ.get("TRACT_TRANSFER_TRACEBACK"):
                raise
            return tell(error)

    return run


def tell(error: Exception) -> int:
    """Print an error as `error: why` or `failed: SomeError: why`; return the exit code."""
    if isinstance(error, _REFUSALS):
        print(f"error: {error}", file=sys.stderr)
        return REFUSED
    print(f"failed: {type(error).__name__}: {error}", file=sys.stderr)
    return FAILED


# --- Types of command-line arguments, for argparse: a value out of range is refused by its name


def at_least(least: int) -> Callable[[str], int]:
    """Return what reads a whole number from `least` on."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"a whole number, {least} at least; got {text}")
        return number

    return read


def fraction(text: str) -> float:
    """Read a number between 0 and 1."""
    try:
        number = float(text)
    except ValueError:
        number = -1
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"a number between 0 and 1; got {text}")
    return number
