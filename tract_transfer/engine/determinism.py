"""Deterministic algorithms, and the seeds of an iteration."""

import contextlib
import os
import random
from collections.abc import Iterator

import numpy as np
import torch


@contextlib.contextmanager
def deterministic(enabled: bool) -> Iterator[None]:
    """Use only algorithms of torch that repeat their bits, if enabled.

    An operation without one on the device raises RuntimeError. cuBLAS reads its setting from the
    environment when a process first uses it.
    """
    if not enabled:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        torch.backends.cudnn.benchmark = benchmark


def seed_all(seed: int, iteration: int, process: int) -> None:
    """Seed Python, NumPy and torch for one iteration of one process."""
    words = np.random.SeedSequence((seed, iteration, process)).generate_state(2)
    value = int(words[0]) << 32 | int(words[1])
    random.seed(value)
    np.random.seed(int(words[0]))
    torch.manual_seed(value)


@contextlib.contextmanager
def keeps_random_state() -> Iterator[None]:
    """Restore the random state of Python, NumPy and torch at the end."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
