"""SIGTERM, SIGINT and SIGUSR1 end a run where it can go on from.

While it trains, after the step it is in; in an evaluation, after its batch, for the checkpoint
before it is written and the evaluation will be made again; while files are read, at once.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import TypeVar

import torch
from accelerate import Accelerator

# Slurm's warning before a time limit is often SIGUSR1 (sbatch --signal=USR1@120).
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# A scheduler signals every process of a job, and the launcher among them signals its own again.
SAME_REQUEST_SECONDS = 1.0
Item = TypeVar("Item")


class Stopped(BaseException):
    """A signal ended the run; `exit_code` is the shell's for it."""

    def __init__(self, number: int, advice: str = "the run was stopped.") -> None:
        super().__init__(f"{signal.Signals(number).name}: {advice}")
        self.number = number
        self.exit_code = 128 + number


@dataclass
class StopRequest:
    """The signal that has asked a run to end, if one has.

    Attributes:
        number: set by the signal's handler, at any moment.
        can_wait: whether the run looks at `number` itself; else the handler raises Stopped.
    """

    number: int | None = None
    can_wait: bool = False

    def shared(self, accelerator: Accelerator) -> int | None:
        """Return the signal that any process of the group got; all of them must call it."""
        number = self.number or 0
        if accelerator.num_processes > 1:
            largest = torch.tensor(number, device=accelerator.device)
            torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
            number = int(largest)
        return number or None

    def watched(self, batches: Iterable[Item]) -> Iterator[Item]:
        """Yield the batches, but none after a signal; `check` then tells all processes of it."""
        for batch in batches:
            if self.number is not None:
                return
            yield batch

    def check(self, accelerator: Accelerator) -> None:
        """Raise Stopped where a signal came to any process; all of them must call it."""
        if number := self.shared(accelerator):
            raise Stopped(number)

    @contextlib.contextmanager
    def waits(self) -> Iterator[None]:
        """Let signals wait: what is done inside looks at `number` often enough."""
        self.can_wait = True
        try:
            yield
        finally:
            self.can_wait = False


@contextlib.contextmanager
def stop_on_signals(advice: Callable[[], str]) -> Iterator[StopRequest]:
    """Turn the first signal into a request; another, a second later or more, ends the process.

    Args:
        advice: says how to go on with what was stopped.

    Raises:
        Stopped: a signal came; the message says how to go on.
    """
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # Python delivers signals to the main thread alone
        return
    before = {int(number): signal.getsignal(number) for number in SIGNALS}
    owner, asked_at = os.getpid(), 0.0

    def ask(number: int, _frame: FrameType | None) -> None:
        nonlocal asked_at
        if os.getpid() != owner:
            return  # a data worker just forked: its parent decides
        if stop.number is not None:
            if time.monotonic() - asked_at >= SAME_REQUEST_SECONDS:
                _end_as_before(number, before[number])
            return
        stop.number, asked_at = number, time.monotonic()
        if not stop.can_wait:
            raise Stopped(number)

    for number in SIGNALS:
        signal.signal(number, ask)
    try:
        yield stop
        if stop.number is not None:  # it came after the last look at it
            raise Stopped(stop.number)
    except Stopped as stopped:
        raise Stopped(stopped.number, advice()) from None
    finally:
        for number in SIGNALS:
            signal.signal(number, before[number])


def _end_as_before(number: int, handler: object) -> None:
    """Do with a signal what would have been done without us; Ctrl-C ends without a traceback."""
    ends = handler is signal.default_int_handler or not callable(handler)
    signal.signal(number, signal.SIG_DFL if ends else handler)  # type: ignore[arg-type]
    signal.raise_signal(number)
