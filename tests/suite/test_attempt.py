"""One attempt: its process, the file that can stop it, and why it ended."""

import signal
import sys
import threading

import pytest
from attempts import COUNTS, ENDS, wait_for

from tract_transfer.suite.launchers import Attempt, on_threads, why_it_ended


@pytest.fixture
def make(tmp_path):
    def build(script, **environment):
        command = [sys.executable, "-S", "-c", script]
        return Attempt(command, tmp_path / "run/console.txt", environment, tmp_path / "stop")

    return build


def test_an_attempt_returns_its_exit_code_and_appends_to_its_log(make):
    script = "import os, sys; print(os.environ['A']); print('why', file=sys.stderr); sys.exit(4)"
    assert [make(script, A="one")(), make(script, A="two")()] == [4, 4]
    lines = make(script).log.read_text().split()
    assert sorted(lines) == ["one", "two", "why", "why"]


def begin(attempt):
    """Let a thread run an attempt, which is ready now, and its exit code follow in the list."""
    codes = []
    thread = threading.Thread(target=lambda: codes.append(attempt()))
    thread.start()
    wait_for("ready", attempt.log)
    return thread, codes


def test_a_file_stops_an_attempt_wherever_it_runs(make):
    attempt = make(ENDS)
    thread, codes = begin(attempt)
    attempt.stop(signal.SIGTERM)
    thread.join(60)
    assert codes == [7]


def test_who_was_stopped_is_sent_no_second_signal_where_slurm_takes_the_machine_back(make):
    """Which would end it before its checkpoint is written."""
    pytest.importorskip("submitit")
    attempt = make(COUNTS)
    thread, codes = begin(attempt)
    attempt.stop(signal.SIGTERM)
    wait_for("ending", attempt.log)
    again = attempt.checkpoint().function
    thread.join(60)
    assert codes == [21]
    assert again() == 128 + signal.SIGTERM  # it was stopped, so it does not begin anew


def test_an_attempt_that_was_stopped_in_the_queue_does_not_begin(make):
    attempt = make("pass")
    attempt.stop(signal.SIGTERM)
    assert attempt() == 128 + signal.SIGTERM
    assert not attempt.log.exists()


@pytest.mark.parametrize(
    ("code", "said", "why"),
    [
        (-9, "iter 3\n", "ended by SIGKILL, as when memory runs out; see {log}"),
        (-11, "iter 3\n", "ended by SIGSEGV; see {log}"),
        (-200, "", "ended by signal 200; see {log}"),
        (1, "", "exit code 1 (see {log})"),
        (1, "a\nNoRoomError: /x\nMake room.\n", "NoRoomError: /x Make room. (see {log})"),
        (2, "first\nlast\n", "last (see {log})"),
        (2, "iter 3\nerror: No x.\nSet y.\n", "No x. Set y. (see {log})"),
        (1, "failed: NonFiniteError: x\n", "NonFiniteError: x (see {log})"),
    ],
)
def test_a_failure_says_why(tmp_path, code, said, why):
    log = tmp_path / "console.txt"
    log.write_text(said)
    assert why_it_ended(code, log) == why.format(log=log)


def test_a_failure_without_a_log_says_its_code(tmp_path):
    assert why_it_ended(1, tmp_path / "none") == f"exit code 1 (see {tmp_path / 'none'})"


def test_of_a_long_log_the_end_is_read(tmp_path):
    log = tmp_path / "console.txt"
    log.write_text("OldError: x\n" + "line\n" * 5000 + "ValueError: " + "long " * 500)
    why = why_it_ended(1, log)
    assert why.startswith("ValueError: long")
    assert len(why) < 1400


def test_threads_are_told_to_every_library():
    assert on_threads(None) == {}
    assert set(on_threads(3).values()) == {"3"}
    assert "OMP_NUM_THREADS" in on_threads(3)
