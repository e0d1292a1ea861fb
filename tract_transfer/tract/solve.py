"""The damped inverse of a Gram matrix, and its product with a gradient. Nothing waits for a GPU."""

# N inputs a row, O outputs

from typing import NamedTuple

import torch
from torch import Tensor

from tract_transfer.tract.precision import float32_factors

EXACT_SIZE = 256  # up to which N the factor is of float64, at no cost that counts


class DampedFactor(NamedTuple):
    """The Cholesky `factor` (N, N) of x x^T / b + lam I.

    `health` is (finite, positive definite, lam is as asked for). Without the first two the factor
    is of no use, and the update is zero.
    """

    factor: Tensor
    health: Tensor

    def times(self, gradient: Tensor) -> Tensor:
        """Return gradient (O, ...) (x x^T / b + lam I)^-1, in the shape of `gradient`."""
        columns = gradient.reshape(len(gradient), -1).T.to(self.factor.dtype)
        with float32_factors(gradient.device.type):
            solved = torch.cholesky_solve(columns, self.factor).T.reshape(gradient.shape)
        return torch.where(self.health[:2].all(), solved, 0)


def damped_factor(gram: Tensor, lam: float, *, relative: bool) -> DampedFactor:
    """Factorise gram + lam I.

    `relative` takes lam times the mean of the diagonal. Neither is taken below what rounding can
    take from an eigenvalue, 4 eps of the trace, which keeps a matrix without full rank positive.
    For inputs of standard deviation 1 that is less than a hundredth of any lam in use.

    Args:
        gram: (N, N), the mean of x x^T; float32 or float64.
    """
    rounding = 4 * torch.finfo(gram.dtype).eps
    exact = len(gram) <= EXACT_SIZE and gram.device.type in ("cpu", "cuda")
    matrix = gram.to(torch.float64 if exact else gram.dtype, copy=True)
    finite = matrix.sum().isfinite()
    diagonal = matrix.diagonal()
    trace = diagonal.sum()
    wanted = lam * trace / len(gram) if relative else torch.full_like(trace, lam)
    damping = torch.maximum(wanted, rounding * trace)
    # A blank batch under a relative lam: any positive matrix will do, for its gradient is 0 too.
    diagonal += torch.where(damping > 0, damping, 1)
    with float32_factors(gram.device.type):
        factor, failed = torch.linalg.cholesky_ex(matrix)
    return DampedFactor(factor, torch.stack([finite, failed == 0, damping <= wanted]))
