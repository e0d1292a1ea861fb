"""Deterministic algorithms, and the seeds of an iteration."""

import contextlib
import os
import random
from collections.abc import Iterator

import numpy as np
import torch


@contextlib.contextmanager
def deterministic(enabled: bool) -> Iterator[None]:
    """Let torch use algorithms alone that give the same bits again; as it was, where not enabled.

    An operation that has none on the device raises RuntimeError, which names it. cuBLAS takes its
    setting from the environment, at its first use in a process.
    """
    if not enabled:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    was = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was, warn_only=warned)
        torch.backends.cudnn.benchmark = benchmark


def seed_all(seed: int, iteration: int, process: int) -> None:
    """Seed python, numpy and torch for one iteration of one process."""
    words = np.random.SeedSequence((seed, iteration, process)).generate_state(2)
    value = int(words[0]) << 32 | int(words[1])
    random.seed(value)
    np.random.seed(int(words[0]))
    torch.manual_seed(value)
