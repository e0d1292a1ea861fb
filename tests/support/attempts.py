"""Attempts for tests of the launchers: what they run, and waiting for it."""

import time

from tract_transfer.suite.plan import PlannedRun, Resources

ENDS = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
print("ready", flush=True)
time.sleep(60)
"""
# Ends half a second after the first signal, with 20 more than it was sent.
COUNTS = """
import signal, sys, time
signals = []
signal.signal(signal.SIGTERM, lambda *_: signals.append(1))
print("ready", flush=True)
while not signals:
    time.sleep(0.01)
print("ending", flush=True)
time.sleep(0.5)
sys.exit(20 + len(signals))
"""


def run_of(task="voc", **resources):
    return PlannedRun("a", "vanilla", task, 0, {}, task, resources=Resources(**resources))


def wait(launcher, seconds=120):
    """Return what has ended, as soon as something has."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if done := launcher.ended():
            return done
        time.sleep(0.02)
    raise AssertionError("nothing ended")


def wait_for(text, file, seconds=120):
    """Wait until a log holds a text."""
    end = time.monotonic() + seconds
    while not file.exists() or text not in file.read_text():
        assert time.monotonic() < end
        time.sleep(0.02)
