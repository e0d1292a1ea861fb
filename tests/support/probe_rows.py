"""Overlapping clusters as rows of features, and images as batches."""

from types import SimpleNamespace

import numpy as np
import torch

from tract_transfer.evaluation.probes import Rows


def clusters(n, num_classes=4, dim=6, seed=0, spread=1.5):
    centres = np.random.default_rng(99).normal(size=(num_classes, dim)) * 2
    rng = np.random.default_rng(seed)
    y = np.arange(n) % num_classes
    x = centres[y] + rng.normal(size=(n, dim)) * spread
    return Rows(x.astype(np.float32), y)


def marks_of(n, num_classes=3, seed=0, ignored=0.1):
    """Rows with several labels (N, K), some of which do not count."""
    rng = np.random.default_rng(seed)
    shown = rng.random((n, num_classes)) < 0.4
    centres = np.random.default_rng(98).normal(size=(num_classes, 5)) * 2
    x = shown @ centres + rng.normal(size=(n, 5))
    marks = np.where(shown, 1, -1)
    marks[rng.random(marks.shape) < ignored] = 0
    return Rows(x.astype(np.float32), marks)


def batches(images, size):
    """Batches of images whose indices start at 100."""
    for start in range(0, len(images), size):
        part = images[start : start + size]
        yield SimpleNamespace(images=part, indices=torch.arange(start, start + len(part)) + 100)


TRAIN, TEST = clusters(200), clusters(80, seed=1)
