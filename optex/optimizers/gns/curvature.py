"""What is known of a Hessian at one point, and the one solve that a regularised step needs of it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, Final

import torch
from torch import Tensor

from optex.checks import check_number
from optex.optimizers.gns.metric import Metric, real_tensor

__all__ = [
    "EUCLIDEAN",
    "Curvature",
    "DenseCurvature",
    "NoCurvature",
    "RankOneCurvature",
    "WindowCurvature",
    "power_fisher",
    "power_gauss_newton",
]

EUCLIDEAN: Final = Metric()


class Curvature(ABC):
    """H at one point: the Hessian or a symmetric approximation of it."""

    @abstractmethod
    def solve(
        self,
        shift: float,
        right: Tensor,  # [d]
        metric: Metric = EUCLIDEAN,
    ) -> Tensor | None:  # [d]
        """(H + λ B)⁻¹ r.

        Args:
            shift: λ, positive.
            right: r.
            metric: B.

        Returns:
            The solution [d], or None where H + λ B is not positive definite: a larger λ is needed.

        Raises:
            ValueError: H is of another dimension than r.
        """


def _check_dimension(owner: str, dimension: int, right: Tensor) -> None:
    if dimension != len(right):
        raise ValueError(f"{owner}: is of dimension {dimension}, and the gradient has {len(right)} components")


def _finite(solution: Tensor) -> Tensor | None:
    return solution if bool(solution.isfinite().all()) else None


class NoCurvature(Curvature):
    """H = 0: the normalized gradient method, whose step is B⁻¹ r / λ."""

    def solve(self, shift: float, right: Tensor, metric: Metric = EUCLIDEAN) -> Tensor | None:
        return _finite(metric.inverse(right) / shift)


class DenseCurvature(Curvature):
    """H as a matrix; a Cholesky factorisation for every λ.

    Args:
        matrix: [d, d], symmetric (the lower triangle is read). Tensor or array.

    Raises:
        TypeError, ValueError: it is no real square matrix.

    >>> DenseCurvature([[1.0, 0.0], [0.0, 3.0]]).solve(1.0, torch.tensor([2.0, 4.0]))
    tensor([1., 1.])
    """

    def __init__(self, matrix: Any) -> None:
        self.matrix: Tensor = real_tensor("DenseCurvature", "matrix", matrix)
        if self.matrix.ndim != 2 or self.matrix.shape[0] != self.matrix.shape[1]:
            raise ValueError(f"DenseCurvature: matrix must be [d, d], got shape {tuple(self.matrix.shape)}")

    def solve(self, shift: float, right: Tensor, metric: Metric = EUCLIDEAN) -> Tensor | None:
        _check_dimension("DenseCurvature", len(self.matrix), right)
        shifted = metric.added(self.matrix.to(right.device, right.dtype), shift)
        factor, failed = torch.linalg.cholesky_ex(shifted)
        return None if failed else _finite(torch.cholesky_solve(right[:, None], factor)[:, 0])


class RankOneCurvature(Curvature):
    """H = α u uᵀ, by Sherman and Morrison's formula.

        (λ B + α u uᵀ)⁻¹ r = (B⁻¹ r - α (uᵀ B⁻¹ r) / (λ + α uᵀ B⁻¹ u) B⁻¹ u) / λ

    Args:
        vector: u [d]. Tensor or array.
        weight: α, of either sign.

    Raises:
        TypeError, ValueError: u is no vector, or α no finite number.

    >>> RankOneCurvature([1.0, 0.0], 3.0).solve(1.0, torch.tensor([4.0, 4.0]))
    tensor([1., 4.])
    """

    def __init__(self, vector: Any, weight: float = 1.0) -> None:
        self.vector: Tensor = real_tensor("RankOneCurvature", "vector", vector)
        if self.vector.ndim != 1:
            raise ValueError(f"RankOneCurvature: vector must be [d], got shape {tuple(self.vector.shape)}")
        self.weight: float = check_number("RankOneCurvature", "weight", weight, least=-math.inf)

    def solve(self, shift: float, right: Tensor, metric: Metric = EUCLIDEAN) -> Tensor | None:
        _check_dimension("RankOneCurvature", len(self.vector), right)
        u = self.vector.to(right.device, right.dtype)
        across = metric.inverse(u)
        pivot = shift + self.weight * float(u @ across)
        if not pivot > 0:
            return None
        return _finite((metric.inverse(right) - (self.weight / pivot) * (across @ right) * across) / shift)


class WindowCurvature(Curvature):
    """H = Rᵀ diag(w) R of m rows: Gauss-Newton matrix of a Jacobian, Fisher matrix of per-sample gradients.

    With S = diag(w)^½ R and fewer rows than columns, by Woodbury's formula and one m × m factorisation,

        (λ B + Sᵀ S)⁻¹ r = (B⁻¹ r - B⁻¹ Sᵀ (λ I + S B⁻¹ Sᵀ)⁻¹ S B⁻¹ r) / λ

    Args:
        rows: R [m, d]. Tensor or array.
        weights: w, not negative: a number or [m].

    Raises:
        TypeError, ValueError: rows or weights have another form, or a weight is negative.

    >>> WindowCurvature([[1.0, 0.0]], 3.0).solve(1.0, torch.tensor([4.0, 4.0]))
    tensor([1., 4.])
    """

    def __init__(self, rows: Any, weights: Any = 1.0) -> None:
        self.rows: Tensor = real_tensor("WindowCurvature", "rows", rows)
        if self.rows.ndim != 2:
            raise ValueError(f"WindowCurvature: rows must be [m, d], got shape {tuple(self.rows.shape)}")
        weights = real_tensor("WindowCurvature", "weights", weights).to(self.rows.device)
        if weights.shape not in ((), self.rows.shape[:1]):
            raise ValueError(
                f"WindowCurvature: weights must be a number or [{len(self.rows)}], one a row, got shape "
                f"{tuple(weights.shape)}"
            )
        if not bool((weights >= 0).all()):
            raise ValueError(
                "WindowCurvature: weights must not be negative; a matrix with negative eigenvalues is a "
                "DenseCurvature"
            )
        self.weights: Tensor = weights.expand(len(self.rows))
        self._dense: DenseCurvature | None = None

    def solve(self, shift: float, right: Tensor, metric: Metric = EUCLIDEAN) -> Tensor | None:
        _check_dimension("WindowCurvature", self.rows.shape[1], right)
        scaled = (self.weights.sqrt().to(self.rows.dtype)[:, None] * self.rows).to(right.device, right.dtype)
        if len(scaled) >= len(right):
            self._dense = self._dense or DenseCurvature(scaled.mT @ scaled)
            return self._dense.solve(shift, right, metric)
        across = metric.inverse(scaled)  # [m, d]
        small = scaled @ across.mT
        small.diagonal().add_(shift)
        factor, failed = torch.linalg.cholesky_ex(small)
        if failed:
            return None
        inner = torch.cholesky_solve((across @ right)[:, None], factor)[:, 0]
        return _finite((metric.inverse(right) - across.mT @ inner) / shift)


def power_fisher(residuals: Any, jacobian: Any, power: float) -> RankOneCurvature:
    """The rank-one term of the Hessian of f = ‖u‖ᵖ / p: (p - 2) ‖u‖ᵖ⁻⁴ (Jᵀu)(Jᵀu)ᵀ.

    Args:
        residuals: u [m].
        jacobian: J [m, d].
        power: p, at least 2.

    Raises:
        TypeError, ValueError: the shapes do not fit, or p is out of range.

    >>> power_fisher([1.0, 1.0], [[1.0, 0.0], [0.0, 2.0]], 4).vector
    tensor([1., 2.], dtype=torch.float64)
    """
    u, jacobian, norm = _residuals("power_fisher", residuals, jacobian, power)
    weight = (power - 2) * norm ** (power - 4) if norm > 0 else 0.0
    return RankOneCurvature(jacobian.mT @ u, weight)


def power_gauss_newton(residuals: Any, jacobian: Any, power: float) -> WindowCurvature:
    """The Hessian of f = ‖u‖ᵖ / p without second derivatives of u: ‖u‖ᵖ⁻² JᵀJ and the term of ``power_fisher``.

    Args:
        residuals: u [m].
        jacobian: J [m, d].
        power: p, at least 2; p = 2 is the Gauss-Newton matrix.

    Raises:
        TypeError, ValueError: the shapes do not fit, or p is out of range.

    >>> power_gauss_newton([3.0, 4.0], [[1.0], [0.0]], 2).weights
    tensor([1., 1., 0.], dtype=torch.float64)
    """
    u, jacobian, norm = _residuals("power_gauss_newton", residuals, jacobian, power)
    rows = torch.cat([jacobian, (jacobian.mT @ u)[None]])
    weights = rows.new_zeros(len(rows))
    if norm > 0:
        weights[-1] = (power - 2) * norm ** (power - 4)
    weights[:-1] = norm ** (power - 2)
    return WindowCurvature(rows, weights)


def _residuals(owner: str, residuals: Any, jacobian: Any, power: float) -> tuple[Tensor, Tensor, float]:
    u, jacobian = real_tensor(owner, "residuals", residuals), real_tensor(owner, "jacobian", jacobian)
    dtype = torch.promote_types(u.dtype, jacobian.dtype)
    u, jacobian = u.to(dtype), jacobian.to(dtype)
    check_number(owner, "power", power, least=2.0)
    if u.ndim != 1 or jacobian.ndim != 2 or len(u) != len(jacobian):
        raise ValueError(
            f"{owner}: residuals must be [m] and jacobian [m, d], got shapes {tuple(u.shape)} and "
            f"{tuple(jacobian.shape)}"
        )
    return u, jacobian, float(torch.linalg.vector_norm(u))
