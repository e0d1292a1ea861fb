"""What a command shows of its log, on a terminal and elsewhere."""

import io
import logging
import sys

import pytest
from rich.console import Console

from tract_transfer.engine.hooks import LogProgress, MetricsFile
from tract_transfer.engine.screen import (
    IN_PLACE,
    ProgressLine,
    TerminalHandler,
    log_handler,
    log_rows,
)

logger = logging.getLogger("tract_transfer.test_screen")


class Terminal(io.StringIO):
    """A stream that is a terminal."""

    def isatty(self):
        return True


@pytest.fixture
def terminal():
    """A terminal of 100 columns that shows the package's log."""
    stream, package = Terminal(), logging.getLogger("tract_transfer")
    handler = TerminalHandler(Console(file=stream, width=100, force_terminal=True))
    level = package.level
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    yield stream
    package.removeHandler(handler)
    package.setLevel(level)


@pytest.mark.parametrize(
    ("stream", "environment", "is_terminal"),
    [
        (Terminal, {}, True),
        (Terminal, {"NO_COLOR": "1"}, True),
        (Terminal, {"TERM": "dumb"}, False),
        (io.StringIO, {}, False),
        (io.StringIO, {"FORCE_COLOR": "1"}, False),
    ],
)
def test_only_a_terminal_is_drawn_on(stream, environment, is_terminal, monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stderr", stream())
    assert isinstance(log_handler(), TerminalHandler) == is_terminal


def test_a_line_shows_the_first_parts_that_fit():
    line = ProgressLine("iter", 40)
    with line:
        line.update(10, ["loss 0.25", "epoch 0.77", "lr 0.1"])
        whole = line.text(1000)
        assert whole.startswith("iter 10/40  eta 0:00:0")
        assert whole.endswith("  loss 0.25  epoch 0.77  lr 0.1")
        for columns in range(len("iter 10/40"), len(whole) + 1):
            text = line.text(columns)
            assert len(text) <= columns
            assert whole.startswith(text)


def test_no_row_of_a_terminal_is_wider_than_it(terminal):
    line = ProgressLine("iter", 40)
    with line:
        line.update(10, ["loss 0.25", "epoch 0.77"])
        for columns in (5, 20, 60, 200):
            console = Console(file=io.StringIO(), width=columns, force_terminal=True, no_color=True)
            assert len(console.render_lines(line, pad=False)) == 1
            with console.capture() as shown:
                console.print(line)
            assert len(shown.get().rstrip("\n")) <= columns


def test_the_log_is_printed_above_the_line(terminal):
    before = sys.stderr
    with ProgressLine("iter", 40) as line:
        logger.warning("a [red]warning[/red]")
        logger.info("iter 5/40", extra=IN_PLACE)
        print("a library's own print", file=sys.stderr)
        line.update(5)
    lines = terminal.getvalue()
    assert "a [red]warning[/red]" in lines
    assert "a library's own print\n" in lines
    assert "iter 5/40\n" not in lines
    assert lines.endswith("\x1b[1A\x1b[2K")  # the line is erased
    assert sys.stderr is before


def test_a_line_covers_the_one_it_is_inside(terminal):
    with ProgressLine("iter", 40):
        with ProgressLine("evaluating, batch", 3) as inner:
            assert list(inner.track("abc")) == list("abc")
        covered = terminal.getvalue().rindex("evaluating")
        assert terminal.getvalue().rindex("iter 0/40") > covered


def test_an_error_removes_the_line(terminal):
    with pytest.raises(ValueError, match="why"), ProgressLine("iter", 40):
        raise ValueError("why")
    shown = terminal.getvalue()
    logger.error("failed")
    assert terminal.getvalue().removeprefix(shown).endswith("failed\x1b[0m\n")


def test_a_run_survives_its_terminal(terminal, monkeypatch):
    def gone(*_):
        raise OSError(5, "Input/output error")

    before = sys.stderr
    monkeypatch.setattr("tract_transfer.engine.screen.REFRESH_SECONDS", 0.0)
    with ProgressLine("iter", 40) as line:
        monkeypatch.setattr(terminal, "write", gone)
        line.update(1)
        line.update(2)
    assert sys.stderr is before


def test_rows_are_aligned(caplog):
    with caplog.at_level(logging.INFO, "tract_transfer"):
        log_rows(logger, [("a", "1"), ("long", "2"), ("", "3")])
    assert caplog.messages == ["   a  1", "long  2", "      3"]


def test_a_training_logs_a_line_each_interval_and_updates_it_in_place(
    tmp_path, train_tiny, terminal, caplog
):
    with caplog.at_level(logging.INFO, "tract_transfer"):
        train_tiny(LogProgress(MetricsFile(tmp_path, tensorboard=False), 2, iters_per_epoch=4))
    lines = [line for line in caplog.messages if line.startswith("iter ")]
    assert [line.split()[1] for line in lines] == ["2/6", "4/6", "6/6"]
    assert all("eta 0:00:0" in line for line in lines)
    shown = terminal.getvalue()
    assert "iter 0/6" in shown
    assert [line in shown for line in lines] == [False, False, True]  # the last one stays


@pytest.fixture
def train_tiny(tmp_path, load_tiny):
    """Train a tiny classifier for 6 iterations with a hook."""
    from accelerate import Accelerator

    from tract_transfer.build.data import build_data
    from tract_transfer.build.trainer import build_trainer

    def train(hook):
        config = load_tiny(tmp_path)
        trainer = build_trainer(config, build_data(config), Accelerator(cpu=True))
        trainer.hooks = [hook]
        trainer.train()

    return train
