"""Information gain: how much the gradients at a run's points can tell under a kernel."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from optex import small
from optex.checks import check_number
from optex.estimators.kernels import Kernel, Matern52, kernel_named
from optex.linalg import inner_products, squared_norms

__all__ = ["InformationGain", "information_gain"]


@dataclass(frozen=True)
class InformationGain:
    """What n points, in their order, tell of one component of the gradient.

    Attributes:
        total: [n] float64, γ_j = ½ log det(I + σ⁻² K_j) of the first j points, in nats.
        variances: [n] float64, posterior variance of point j given those before it, in units of the prior's.
        noise_variance: σ², in those units.
    """

    total: Tensor
    variances: Tensor
    noise_variance: float

    @property
    def variance_bound(self) -> Tensor:  # [n] float64
        """Upper bound on the mean of the first j variances: 2 γ_j / (j ln(1 + σ⁻²))."""
        counts = torch.arange(1, len(self.total) + 1, dtype=torch.float64)
        return 2 * self.total / (counts * math.log1p(1 / self.noise_variance))


def information_gain(
    points: Tensor,  # [n, d]
    *,
    kernel: Kernel | str | None = None,
    lengthscale: float | None = None,
    noise_variance: float = 1e-6,
) -> InformationGain:
    """The realised information gain of a run's points under a separable kernel.

        γ_n = ½ log det(I + σ⁻² K) = ½ Σ_j ln(1 + v_j / σ²),

    with v_j the posterior variance at point j given those before it. As v ≤ 1 and v / ln(1 + v/σ²) grows with
    v, Σ_j v_j ≤ 2 γ_n / ln(1 + σ⁻²). The maximal gain of n points, over all sets of them, is at least this one.

    Args:
        points: in the order that they were evaluated in, at least one.
        kernel: a :class:`~optex.estimators.kernels.Kernel` or the name of one; Matérn-5/2 by default.
        lengthscale: in units of the points, positive; the median of their distances by default.
        noise_variance: σ², in units of the kernel's variance, positive.

    Raises:
        TypeError: ``points`` is no tensor.
        ValueError: an argument is out of range; the message names it.

    Source: Srinivas, Krause, Kakade, Seeger, *Gaussian process optimization in the bandit setting*, ICML 2010,
    lemmas 5.3 and 5.4.

    >>> import torch
    >>> gain = information_gain(torch.tensor([[0.0], [0.0], [9.0]]), lengthscale=1.0, noise_variance=1.0)
    >>> gain.variances.round(decimals=2)        # new, seen once with noise, far from both
    tensor([1.0000, 0.5000, 1.0000], dtype=torch.float64)
    """
    if not isinstance(points, Tensor):
        raise TypeError(f"information_gain: points must be a tensor [n, d], got {type(points).__name__}")
    if points.ndim != 2 or not len(points):
        raise ValueError(
            f"information_gain: points must be [n, d] with n at least 1, got {tuple(points.shape)}"
        )
    noise = check_number("information_gain", "noise_variance", noise_variance, least=0, open_below=True)
    squared = _squared_distances(points.detach())
    if lengthscale is None:
        positive = squared[squared > small.TINY]
        scale = positive.median().sqrt() if len(positive) else torch.ones((), dtype=torch.float64)
    else:
        given = check_number("information_gain", "lengthscale", lengthscale, least=0, open_below=True)
        scale = torch.tensor(given, dtype=torch.float64)
    values = kernel_named(Matern52() if kernel is None else kernel).value(squared, scale)
    # All eigenvalues are at least 1, and the leading blocks of the factor are those of the first points.
    factor = torch.linalg.cholesky(
        torch.eye(len(points), dtype=torch.float64) + torch.as_tensor(values) / noise
    )
    pivots = factor.diagonal()  # pivot² = 1 + v / σ²
    return InformationGain(pivots.log().cumsum(0), noise * (pivots.square() - 1), noise)


def _squared_distances(
    points: Tensor,  # [n, d]
) -> Tensor:  # [n, n] float64
    rows = (points - points[-1]).cpu()  # differences of neighbours keep digits that their norms lose
    norms = squared_norms(rows)
    squared = torch.as_tensor(small.squared_distances(norms, norms, inner_products(rows, rows)))
    squared.fill_diagonal_(0)
    return squared
