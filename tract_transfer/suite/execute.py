"""Run a plan: skip what is finished, resume what was cut off, let a failure stop only itself."""

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tract_transfer.suite.plan import PlannedRun

logger = logging.getLogger(__name__)


def execute(
    runs: Sequence[PlannedRun],
    is_finished: Callable[[PlannedRun], bool],
    carry_out: Callable[[PlannedRun], str],
) -> dict[Path, str]:
    """Carry out the runs in their order.

    Args:
        is_finished: whether a run's results are there already.
        carry_out: runs one, or goes on with it, and returns its result in words. Its ValueError,
            OSError, RuntimeError and FloatingPointError count as the failure of that run.

    Returns:
        The folders of the runs that failed or could not start, and why.
    """
    failures: dict[Path, str] = {}
    for number, run in enumerate(runs, 1):
        title = f"[{number}/{len(runs)}] seed {run.seed}  {run.task:<10} {run.method:<10}"
        if run.needs in failures:
            failures[run.folder] = f"its backbone {run.needs} failed"
            logger.error("%s not started: %s", title, failures[run.folder])
            continue
        started = time.perf_counter()
        try:
            if is_finished(run):
                logger.info("%s finished before", title)
                continue
            outcome = carry_out(run)
        except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
            failures[run.folder] = f"{type(error).__name__}: {error}"
            logger.error("%s failed: %s", title, failures[run.folder])
            continue
        logger.info("%s %s  (%.0f s)", title, outcome, time.perf_counter() - started)
    return failures
