"""What a command shows of its log: on a terminal, one line of progress below the lines of the log.

A command calls `show_log` once. Code that logs marks records by `extra`:

    IN_PLACE: the line repeats what a `ProgressLine` shows; a terminal does not print it.
    BEST: a terminal shows the line in green.
"""

import contextlib
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tract_transfer.files import redact

IN_PLACE, BEST = {"in_place": True}, {"style": "green"}
REFRESH_SECONDS = 0.5
_BAR_COLUMNS = (8, 24)  # least and most
_STYLES = {logging.WARNING: "yellow", logging.ERROR: "red", logging.CRITICAL: "red"}
Item = TypeVar("Item")


def log_handler(*, is_main: bool = True) -> logging.Handler:
    """Return the handler for a command's log on standard error.

    Only the main process draws a line of progress.

    Pipes and files get plain lines, and so do terminals without control characters (TERM=dumb),
    whatever FORCE_COLOR says. NO_COLOR keeps the line of progress and omits its colors.
    """
    console = Console(stderr=True, highlight=False)
    is_shown_in_place = is_main and sys.stderr.isatty() and console.is_interactive
    handler = TerminalHandler(console) if is_shown_in_place else logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    return handler


def show_log(*, is_main: bool = True) -> None:
    """Show this package's log on standard error; of processes that are not the main one, errors.

    Does nothing about handlers if the program has installed its own.
    """
    logging.basicConfig(level=logging.WARNING, handlers=[log_handler(is_main=is_main)])
    logging.getLogger("tract_transfer").setLevel(logging.INFO if is_main else logging.ERROR)


class ProgressLine:
    """A line of progress, on the terminal that shows the log; a context manager.

    Without such a terminal it shows nothing. Inside another one it covers that one. It is drawn by
    `update` at most every REFRESH_SECONDS, and by no thread: data workers are forked meanwhile.

    Args:
        what: is counted, such as `iter`, or done at once.
        total: the number of steps; None counts none.
        done: steps before this line.
    """

    def __init__(self, what: str, total: int | None = None, done: int = 0) -> None:
        self.what, self.total, self.done = what, total, done
        self.parts: Sequence[str] = ()
        self._marks: list[tuple[float, int]] = []  # (time, done): the start, and the first parts
        self._terminal: TerminalHandler | None = None

    def __enter__(self) -> "ProgressLine":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Show the line."""
        self._marks = [(time.perf_counter(), self.done)]
        self._terminal = _terminal()
        if self._terminal is not None:
            self._terminal.open(self)

    def stop(self) -> None:
        """Remove the line, if it is shown."""
        if self._terminal is not None:
            self._terminal.close_line(self)
            self._terminal = None

    def update(self, done: int, parts: Sequence[str] | None = None) -> None:
        """Set the steps that are done, and what is shown beside them, the most important first."""
        self.done = done
        if parts is not None:
            self.parts = parts
            if len(self._marks) == 1:
                self._marks.append((time.perf_counter(), done))
        if self._terminal is not None:
            self._terminal.draw_if_due()

    def eta(self) -> timedelta | None:
        """Return the remaining time at the mean speed since the start; None before a step.

        From the second call of `update` with parts on, the steps before the first do not count:
        they include warming up.
        """
        marks = [mark for mark in self._marks if mark[1] < self.done]
        if not marks or self.total is None:
            return None
        started, first = marks[-1]
        rate = (time.perf_counter() - started) / (self.done - first)
        return timedelta(seconds=round(rate * (self.total - self.done)))

    def track(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield items and count them."""
        for item in items:
            yield item
            self.update(self.done + 1)

    def text(self, columns: int) -> str:
        """Return the line in at most this many columns, with as many of the parts as fit."""
        if self.total is None:
            return self.what
        text, eta = f"{self.what} {self.done}/{self.total}", self.eta()
        for part in [*([] if eta is None else [f"eta {eta}"]), *self.parts]:
            if len(text) + len(part) + 2 > columns:
                break
            text += f"  {part}"
        return text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        text = self.text(options.max_width)
        least, most = _BAR_COLUMNS
        columns = min(most, options.max_width - len(text) - 2)
        line = Table.grid(padding=(0, 2))
        if columns >= least and self.total is not None:
            line.add_row(_bar(self.total, self.done, columns), Text(text, no_wrap=True))
        else:
            line.add_row(Text(text, no_wrap=True, overflow="ellipsis"))
        yield line


def _bar(total: int, done: int, columns: int) -> ProgressBar:
    return ProgressBar(total, done, columns, complete_style="cyan", finished_style="cyan")


class TerminalHandler(logging.Handler):
    """Prints the log on a terminal, above the progress line that is open."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console
        self._lines: list[ProgressLine] = []  # the last one is shown
        self._live: Live | None = None
        self._drawn_at = 0.0

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record, unless the progress line shows it."""
        if getattr(record, "in_place", False):
            return
        try:
            style = getattr(record, "style", _STYLES.get(record.levelno, ""))
            text = Text(self.format(record), style)
            text.stylize("dim", 0, getattr(record, "label_width", 0))
            self.console.print(text, soft_wrap=True)  # paths and commands can be copied
        except Exception:  # as all handlers of logging
            self.handleError(record)

    def open(self, line: ProgressLine) -> None:
        """Show a line, over those that are open."""
        self._lines.append(line)
        with self._survives():
            if self._live is None:
                self._live = Live(
                    get_renderable=lambda: self._lines[-1] if self._lines else "",
                    console=self.console,
                    auto_refresh=False,
                    transient=True,
                    redirect_stdout=sys.stdout.isatty(),  # a pipe gets what is printed
                )
                self._live.start()
                self.console.show_cursor(True)  # a kill would leave it hidden
            self.draw()

    def close_line(self, line: ProgressLine) -> None:
        """Remove a line."""
        self._lines.remove(line)
        with self._survives():
            if self._lines:
                self.draw()
            elif self._live is not None:
                live, self._live = self._live, None
                live.stop()

    def draw_if_due(self) -> None:
        """Draw the line if it was not drawn lately."""
        if time.perf_counter() - self._drawn_at >= REFRESH_SECONDS:
            with self._survives():
                self.draw()

    def draw(self) -> None:
        """Draw the line."""
        self._drawn_at = time.perf_counter()
        if self._live is not None:
            self._live.refresh()

    @contextlib.contextmanager
    def _survives(self) -> Iterator[None]:
        """Let the run continue if the terminal is gone."""
        try:
            yield
        except (OSError, ValueError):  # ValueError: a closed file
            live, self._live = self._live, None
            if live is not None:
                with contextlib.suppress(OSError, ValueError):
                    live.stop()  # restores sys.stderr, whatever it raises


def _terminal() -> TerminalHandler | None:
    """Return the terminal that shows this package's log."""
    handlers = [*logging.getLogger("tract_transfer").handlers, *logging.getLogger().handlers]
    return next((one for one in handlers if isinstance(one, TerminalHandler)), None)


def log_rows(
    logger: logging.Logger, rows: Sequence[tuple[str, str]], *, highlight: str | None = None
) -> None:
    """Log a line for each label and text, with aligned texts; a terminal highlights a label's."""
    width = max(len(label) for label, _ in rows)
    for label, text in rows:
        extra: dict[str, Any] = {"label_width": width, **(BEST if label == highlight else {})}
        logger.info("%s  %s", label.rjust(width), redact(text), extra=extra)
