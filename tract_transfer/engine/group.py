"""Agreement between the processes of a group, lost processes, and signals that stop a run."""

import contextlib
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

# How gloo, torch's store and NCCL report that the other end is gone.
_LOST = (
    "closed by peer", "reset by peer", "Broken pipe", "Connection refused", "recvValue failed",
    "ncclRemoteError",
)  # fmt: skip
# Slurm's warning before a time limit is often SIGUSR1 (sbatch --signal=USR1@120).
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# A scheduler signals every process of a job, and the launcher among them signals its own again.
SAME_REQUEST_SECONDS = 1.0
Item = TypeVar("Item")


def main_first(accelerator: Accelerator, work: Callable[[], object]) -> None:
    """Do `work` on the main process while the others wait; if it fails, all processes fail."""
    failure: Exception | None = None
    if accelerator.is_main_process:
        try:
            work()
        except Exception as error:  # raised below: the others wait for the broadcast
            failure = error
    (message,) = broadcast_object_list([failure and f"{type(failure).__name__}: {failure}"])
    if failure is not None:
        raise failure
    if message is not None:
        raise RuntimeError(f"The main process failed. {message}")


def check_same(value: int, what: str) -> None:
    """Raise ValueError if `value` is not the same on all processes."""
    values = gather_object([value])
    if len(set(values)) > 1:
        raise ValueError(
            f"The processes of the group see different {what}: {values}. All of them need the same "
            "output_dir, on a file system that they share."
        )


def check_same_config(config: Mapping[str, Any]) -> None:
    """Raise ValueError if the dotted keys of a config differ in value between processes."""
    configs = gather_object([config])
    for process, other in enumerate(configs):
        keys = sorted(k for k in config.keys() | other.keys() if config.get(k) != other.get(k))
        if keys:
            listed = ", ".join(keys[:5]) + (", ..." if len(keys) > 5 else "")
            raise ValueError(
                f"The processes of the group have different configs: process {process} has another "
                f"{listed}. Start all of them with the same words "
                "and versions. A config chosen for a folder also depends on the machine and on the "
                "network: write it once (train FOLDER --dry-run prints it), and give all of them "
                "that file by --config-file."
            )


@contextlib.contextmanager
def reports_lost_processes(accelerator: Accelerator) -> Iterator[None]:
    """Explain an error that another process of the group caused by ending."""
    try:
        yield
    except RuntimeError as error:
        if accelerator.num_processes == 1 or not any(text in str(error) for text in _LOST):
            raise
        raise RuntimeError(
            f"Process {accelerator.process_index} ends because another of the "
            f"{accelerator.num_processes} processes of the group has ended. See its own message or "
            f"the launcher's for the reason, then resume with --resume. "
            f"({str(error).splitlines()[0]})"
        ) from error


class Stopped(BaseException):
    """A signal stopped the run; `exit_code` is the shell's for it."""

    def __init__(self, number: int, advice: str = "the run was stopped.") -> None:
        super().__init__(f"{signal.Signals(number).name}: {advice}")
        self.number = number
        self.exit_code = 128 + number


@dataclass
class StopRequest:
    """A signal's request to stop the run."""

    number: int | None = None  # the signal, set by its handler at any moment
    can_wait: bool = False  # the run checks `number` itself; else the handler raises Stopped

    def shared(self, accelerator: Accelerator) -> int | None:
        """Return the signal that any process of the group has received; a collective."""
        if accelerator.num_processes == 1:
            return self.number
        largest = torch.tensor(self.number or 0, device=accelerator.device)
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
        return int(largest) or None

    def watched(self, batches: Iterable[Item]) -> Iterator[Item]:
        """Yield batches until a signal arrives; call `check` afterwards."""
        return itertools.takewhile(lambda _: self.number is None, batches)

    def check(self, accelerator: Accelerator) -> None:
        """Raise Stopped if any process has received a signal; a collective."""
        if number := self.shared(accelerator):
            raise Stopped(number)

    @contextlib.contextmanager
    def waits(self) -> Iterator[None]:
        """Let signals wait: the code inside checks `number` often enough."""
        self.can_wait = True
        try:
            yield
        finally:
            self.can_wait = False


@contextlib.contextmanager
def stop_on_signals(advice: Callable[[], str]) -> Iterator[StopRequest]:
    """Turn the first signal into a request; another one a second later ends the process.

    Args:
        advice: returns how to resume the stopped run, for the message.

    Raises:
        Stopped: a signal arrived.
    """
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # Python delivers signals to the main thread only
        return
    before = {int(number): signal.getsignal(number) for number in SIGNALS}
    owner, asked_at = os.getpid(), 0.0

    def ask(number: int, _frame: FrameType | None) -> None:
        nonlocal asked_at
        if os.getpid() != owner:
            return  # a data worker that was just forked: its parent decides
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
        if stop.number is not None:  # it arrived after the last check
            raise Stopped(stop.number)
    except Stopped as stopped:
        raise Stopped(stopped.number, advice()) from None
    finally:
        for number in SIGNALS:
            signal.signal(number, before[number])


def _end_as_before(number: int, handler: object) -> None:
    """Handle a signal as without us, except that Ctrl-C ends without a traceback."""
    ends = handler is signal.default_int_handler or not callable(handler)
    signal.signal(number, signal.SIG_DFL if ends else handler)  # type: ignore[arg-type]
    signal.raise_signal(number)
