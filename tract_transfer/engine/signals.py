"""SIGTERM and SIGINT end a training after the step it is in."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from tract_transfer.engine.trainer import Trainer


class Stopped(Exception):  # noqa: N818 - not an error: the run can go on from its checkpoint
    """A signal ended the training; its checkpoint is written."""

    def __init__(self, number: int, output_dir: str) -> None:
        name = signal.Signals(number).name
        super().__init__(
            f"{name}: checkpoint written. Go on with --resume (output_dir {output_dir})."
        )
        self.exit_code = 128 + number


@contextlib.contextmanager
def stop_on_signals(trainer: Trainer) -> Iterator[None]:
    """Let the first SIGTERM or SIGINT ask `trainer` to stop; a second one ends at once."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python delivers signals to the main thread alone
        return
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}

    def ask(number: int, _frame: FrameType | None) -> None:
        trainer.stop_requested = number
        for each in numbers:
            signal.signal(each, before[each])

    for number in numbers:
        signal.signal(number, ask)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, before[number])
