"""How a tool ends that cannot do what it was asked: one line on stderr, and an exit code.

0 all was done; 1 it failed, or something was found wrong; 2 it was refused: command, config, data
or folder have to be changed first; 128 + n it was ended by signal n.
"""

import os
import sys
from collections.abc import Callable
from functools import wraps

FAILED, REFUSED = 1, 2
INTERRUPTED = 130
# What another try would meet again, until somebody changes something.
_REFUSALS = (
    ValueError, ImportError, FileNotFoundError, FileExistsError, NotADirectoryError,
    IsADirectoryError, PermissionError,
)  # fmt: skip
_FAILURES = (RuntimeError, OSError, FloatingPointError)  # OSError: a full disk, a lost connection


def ends_in_words(main: Callable[[], int]) -> Callable[[], int]:
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
