"""A linear classifier on frozen features by SGD: a whole grid of settings in one pass."""

# G settings (points of the grid), N images, B batch, D features, K classes

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from tract_transfer.evaluation.probes import Features, Fit, Rows, Selection, check_probe

Point = tuple[float, float]  # learning rate, weight decay
Train = Callable[[Tensor, Tensor, Sequence[Point]], tuple[Tensor, Tensor]]

_SCORED_AT_ONCE = 4096  # rows


def linear_probe(
    train: Rows,
    test_x: Features,
    *,
    selection: Selection,
    lrs: Sequence[float],
    weight_decays: Sequence[float],
    max_epochs: int,
    batch_size: int,
    momentum: float,
    seed: int,
    num_classes: int,
    device: torch.device | str = "cpu",
) -> Fit:
    """Train a linear classifier for every learning rate and weight decay, and report the best.

    All settings see the same batches at once, as in DINOv2. The best by top-1 on `selection` (of
    equals the smallest learning rate, then the smallest decay) is trained again on all of train.
    Features are standardised by the rows that are fitted.

    Raises:
        ValueError: fewer than two classes, an empty grid, every setting diverged, shapes or labels
            that do not fit, or features that are not finite.
    """
    check_probe(train, test_x, num_classes)
    points = list(itertools.product(sorted(set(lrs)), sorted(set(weight_decays))))
    if not points:
        raise ValueError("A linear probe needs a learning rate and a weight decay at least.")

    train_points = partial(
        train_linear,
        max_epochs=max_epochs,
        batch_size=batch_size,
        momentum=momentum,
        seed=seed,
        num_classes=num_classes,
    )
    top1 = _val_top1(selection, points, train_points, device)
    if max(top1) < 0:
        raise ValueError(
            f"Every setting of the linear probe diverged. Lower evaluation.linear.lrs {list(lrs)}."
        )
    lr, weight_decay = points[top1.index(max(top1))]
    scores = _final_scores(train, test_x, (lr, weight_decay), train_points, device)
    val_top1 = {
        f"lr {rate:g}, weight decay {decay:g}": None if value < 0 else value
        for (rate, decay), value in zip(points, top1, strict=True)
    }
    return Fit(scores.numpy(), {"lr": lr, "weight_decay": weight_decay}, {"val_top1": val_top1})


def _val_top1(
    selection: Selection, points: Sequence[Point], train_points: Train, device: torch.device | str
) -> list[float]:
    """Return the top-1 of each point on the selection, -1 where it diverged."""
    hits, diverged = torch.zeros(len(points)), torch.zeros(len(points), dtype=torch.bool)
    truth = torch.from_numpy(selection.val.y)
    blocks = _scores(selection.fit, selection.val.x, points, train_points, device)
    for block, labels in zip(blocks, truth.split(_SCORED_AT_ONCE), strict=True):
        hits += (block.argmax(dim=2) == labels).sum(dim=1)
        diverged |= ~block.isfinite().all(dim=2).all(dim=1)
    top1: list[float] = torch.where(diverged, -1.0, hits.double() / len(truth)).tolist()
    return top1


def _final_scores(
    train: Rows, test_x: Features, point: Point, train_points: Train, device: torch.device | str
) -> Tensor:
    """Return the logits (N, K) of the test images by the chosen point, trained on all of train."""
    blocks = _scores(train, test_x, [point], train_points, device)
    scores = torch.cat([block[0] for block in blocks])
    if not scores.isfinite().all():
        raise ValueError(
            f"The linear probe diverged on all of train at lr {point[0]:g}, which did not on a "
            "part of it. Leave it out of evaluation.linear.lrs."
        )
    return scores


def _scores(
    fitted: Rows,
    of: Features,
    points: Sequence[Point],
    train_points: Train,
    device: torch.device | str,
) -> Iterator[Tensor]:
    """Train the points on standardised rows; yield (G, n, K) logits, a block of `of` at a time."""
    scaler = StandardScaler().fit(fitted.x.astype(np.float64))
    x, rows = (
        torch.from_numpy(scaler.transform(part.astype(np.float64)).astype(np.float32))
        for part in (fitted.x, of)
    )
    weight, bias = train_points(x.to(device), torch.from_numpy(fitted.y).to(device), points)
    for part in rows.split(_SCORED_AT_ONCE):
        yield torch.matmul(part.to(device), weight).add_(bias[:, None]).cpu()


@torch.no_grad()
def train_linear(
    x: Tensor,
    y: Tensor,
    points: Sequence[Point],
    *,
    max_epochs: int,
    batch_size: int,
    momentum: float,
    seed: int,
    num_classes: int,
) -> tuple[Tensor, Tensor]:
    """Return weights (G, D, K) and biases (G, K) of each (learning rate, weight decay).

    SGD with momentum on the cross-entropy from zero weights; the learning rate falls to zero by a
    cosine over all iterations, weight decay leaves the biases out. The order of the rows depends
    on (seed, epoch) alone, and what a point learns on none of the others.

    Args:
        x: (N, D) float32.
        y: (N,) labels.
    """
    rates, decays = torch.tensor(points, dtype=x.dtype, device=x.device).T[:, :, None, None]
    weight = x.new_zeros(len(points), x.shape[1], num_classes)
    bias = x.new_zeros(len(points), 1, num_classes)
    velocities = torch.zeros_like(weight), torch.zeros_like(bias)
    total, step = max_epochs * math.ceil(len(x) / batch_size), 0
    for epoch in range(max_epochs):
        order = torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(len(x)))
        for rows in order.to(x.device).split(batch_size):
            batch = x[rows]
            slope = (torch.matmul(batch, weight) + bias).softmax(dim=2)
            slope[:, torch.arange(len(rows), device=x.device), y[rows]] -= 1
            slope /= len(rows)
            gradients = (
                torch.matmul(batch.T, slope).addcmul_(decays, weight),
                slope.sum(dim=1, keepdim=True),
            )
            factor = 0.5 * (1 + math.cos(math.pi * step / total))
            for value, velocity, gradient in zip(
                (weight, bias), velocities, gradients, strict=True
            ):
                value -= velocity.mul_(momentum).add_(gradient) * (rates * factor)
            step += 1
    return weight, bias[:, 0]
