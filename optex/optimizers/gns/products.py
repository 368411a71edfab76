"""A Hessian known by its products with vectors: conjugate gradients, one set of products for all shifts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import get_lapack_funcs
from torch import Tensor

from optex.checks import check_callable, check_integer, check_number
from optex.optimizers.gns.curvature import EUCLIDEAN, Curvature
from optex.optimizers.gns.metric import Metric

__all__ = ["ProductCurvature"]

(_ptsv,) = get_lapack_funcs(("ptsv",), dtype=np.float64)
_EXHAUSTED: Final = 1e-14  # relative to the largest entry of T: a smaller β is rounding


class ProductCurvature(Curvature):
    """H by its products with vectors: conjugate gradients in Lanczos form.

    H + λ B has the same Krylov space for every λ. With W its basis, Wᵀ B W = I, and T = Wᵀ H W tridiagonal,

        (H + λ B)⁻¹ r ≈ W y,    (T + λ I) y = ‖r‖* e_1,    ‖r - (H + λ B) W y‖* = β_k |y_k|

    is the k-th iterate of conjugate gradients preconditioned by B. The basis is kept while r stays the same:
    another λ costs products only where it needs a larger basis, and a larger λ needs a smaller one. Every new
    vector is made orthogonal to all before it.

    Args:
        product: v [d] to H v [d].
        tolerance: of the residual, relative to r, in the dual norm; in [0, 1). With the default, GNS takes
            about as many steps as with exact solves, with half the products or fewer.
        iterations: most products for one r, at least 1. The iterate after these is the answer; it is still a
            descent direction. Memory is as many vectors, twice that with a metric.

    Attributes:
        products: computed so far.

    Raises:
        ValueError: a setting is out of range.

    Source: Golub and Van Loan, *Matrix Computations*, 4th edition, section 11.3; with a metric as in Gould,
    Lucidi, Roma, Toint, SIAM Journal on Optimization 9 (1999) 504-525, section 5.

    >>> matrix = torch.diag(torch.tensor([1.0, 3.0]))
    >>> curvature = ProductCurvature(lambda v: matrix @ v, tolerance=1e-6)
    >>> curvature.solve(1.0, torch.tensor([2.0, 4.0])).round(decimals=4), curvature.products
    (tensor([1., 1.]), 2)
    """

    def __init__(
        self, product: Callable[[Tensor], Tensor], *, tolerance: float = 0.1, iterations: int = 200
    ) -> None:
        check_callable("ProductCurvature", "product", product)
        self._product = product
        self._tolerance = check_number("ProductCurvature", "tolerance", tolerance, most=1.0, open_above=True)
        self._iterations = check_integer("ProductCurvature", "iterations", iterations)
        self.products: int = 0
        self._basis: _Basis | None = None

    def solve(self, shift: float, right: Tensor, metric: Metric = EUCLIDEAN) -> Tensor | None:
        basis = self._basis
        if basis is None or basis.metric is not metric or not torch.equal(basis.start, right):
            basis = self._basis = _Basis(right, metric)
        if basis.norm == 0:
            return torch.zeros_like(right)
        size, most = 0, min(self._iterations, len(right))
        while True:
            size += 1
            if size > len(basis.diagonal):
                self.products += 1
                basis.extend(self._product)
            solution = basis.coefficients(shift, size)
            if solution is None:
                return None
            residual = basis.beyond[size - 1] * abs(solution[-1])
            if residual <= self._tolerance * basis.norm or size == most or basis.exhausted(size):
                return basis.combine(solution)


class _Basis:
    """Lanczos basis from one right side: dual vectors v = B w, T's diagonal α and off-diagonal β."""

    def __init__(
        self,
        right: Tensor,  # [d]
        metric: Metric,
    ) -> None:
        self.start, self.metric = right.clone(), metric
        self.norm = metric.dual_norm(right)
        self.duals: list[Tensor] = []
        self.primals: list[Tensor] = []
        self.diagonal: list[float] = []
        self.beyond: list[float] = []
        self._next = right / self.norm if self.norm else right

    def extend(self, product: Callable[[Tensor], Tensor]) -> None:
        """Add a vector, and with it a row of T."""
        dual = self._next
        primal = self.metric.inverse(dual)
        self.duals.append(dual)
        self.primals.append(primal)
        image = product(primal)
        self.diagonal.append(float(primal @ image))
        duals, primals = torch.stack(self.duals), torch.stack(self.primals)
        for _ in range(2):  # where most of it cancels, orthogonalising once is not enough
            image = image - duals.mT @ (primals @ image)
        length = self.metric.dual_norm(image)
        self.beyond.append(length)
        self._next = image / length if length else image

    def exhausted(self, size: int) -> bool:
        """Whether the Krylov space is complete: further products add nothing to it."""
        largest = max(*map(abs, self.diagonal[:size]), *self.beyond[:size])
        return self.beyond[size - 1] <= _EXHAUSTED * largest

    def coefficients(self, shift: float, size: int) -> NDArray[np.float64] | None:  # [size]
        """y; None where T + λ I is not positive definite."""
        diagonal = np.array(self.diagonal[:size]) + shift
        beside = np.array(self.beyond[: size - 1])
        if not (np.isfinite(diagonal).all() and np.isfinite(beside).all() and diagonal[0] > 0):
            return None
        if size == 1:  # LAPACK's routine has no empty array
            return self.norm / diagonal
        right = np.zeros(size)
        right[0] = self.norm
        *_, solution, failed = _ptsv(diagonal, beside, right)
        return None if failed else solution

    def combine(
        self,
        coefficients: NDArray[np.float64],  # [size]
    ) -> Tensor:  # [d]
        """W y."""
        weights = torch.from_numpy(coefficients).to(self.start.device, self.start.dtype)
        return weights @ torch.stack(self.primals[: len(coefficients)])
