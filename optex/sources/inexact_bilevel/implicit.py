"""The hypergradient by the implicit function theorem, from inexact solves, and the bound of its error."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optex.errors import NonFiniteError
from optex.sources.inexact_bilevel.levels import LowerLevelError, SmoothBilevel, norm_of, upper_gradient
from optex.sources.inexact_bilevel.linearised import Linearised
from optex.sources.inexact_bilevel.lower import LowerSolution

__all__ = ["Hypergradient", "hypergradient"]


@dataclass(frozen=True)
class Hypergradient:
    """z ≈ ∇f(θ), and how far off it can be.

    Attributes:
        gradient: z, a tensor a parameter.
        loss: g(x), [].
        upper_gradient_norm: ‖∇g(x)‖.
        error_bound: ω ≥ ‖z - ∇f(θ)‖.
        products: Hessian-vector products of the linear solve.
    """

    gradient: list[Tensor]
    loss: Tensor
    upper_gradient_norm: float
    error_bound: float
    products: int

    @property
    def norm(self) -> float:
        """‖z‖."""
        return norm_of(self.gradient)


def hypergradient(
    problem: SmoothBilevel,
    theta: Sequence[Tensor],
    solution: LowerSolution,
    epsilon: float,
    delta: float,
    max_iterations: int = 2000,
) -> Hypergradient:
    """z = -(∇ₓθh)ᵀ q with ‖∇ₓₓh q - ∇g‖ ≤ δ at a lower solution within ε, and the bound of its error.

    With A = ∇ₓₓh, B = ∇ₓθh, b = ‖∇g‖, all at x, and L_{A⁻¹} = L_A / μ²:

        ω = c ε + ‖B‖ δ / μ + L_B L_g ε² / μ,    c = L_g ‖B‖ / μ + L_{A⁻¹} b ‖B‖ + L_B b / μ

    ‖B‖ is exact for up to 30 parameters, and beyond that of a Krylov space of 30 dimensions.

    Args:
        problem: the two levels.
        theta: θ, tensors as ``problem.lower`` gets them.
        solution: of the lower level, within ``epsilon``.
        epsilon, delta: the accuracies ε and δ, positive.
        max_iterations: most products with ∇ₓₓh in the linear solve.

    Raises:
        LowerLevelError, NonFiniteError: as ``InexactBilevelSource``.
    """
    mu = problem.constant("strong_convexity", theta)
    loss, slope = upper_gradient(problem, solution.x)
    at = Linearised(problem, theta, solution.x)
    q, products = _conjugate_gradients(at.hessian, slope, delta, mu, max_iterations)
    z = [-part for part in at.cross_transposed(q)]
    cross, steep = at.cross_norm(), float(slope.norm())
    bent, sheared = problem.hessian_lipschitz, problem.cross_lipschitz
    curvature_change, cross_change = (
        at.changes(q, epsilon) if bent is None or sheared is None else (math.nan, math.nan)
    )
    first = problem.upper_lipschitz * cross / mu
    first += cross * (curvature_change / mu if bent is None else bent * steep / mu**2)
    first += cross_change if sheared is None else sheared * steep / mu
    # A measured L_B is relative to q: B'[v]ᵀq.
    relative = cross_change / max(float(q.norm()), 1e-300) if sheared is None else sheared
    omega = first * epsilon + cross * delta / mu + relative * problem.upper_lipschitz * epsilon**2 / mu
    if not math.isfinite(norm_of(z)):
        raise NonFiniteError("hypergradient: it is not finite; look at lower's mixed derivatives")
    return Hypergradient(z, loss, steep, omega, products)


def _conjugate_gradients(
    product: Callable[[Tensor], Tensor], right: Tensor, delta: float, mu: float, max_iterations: int
) -> tuple[Tensor, int]:
    """q with ‖A q - right‖ ≤ δ, and how many products with A that took.

    Raises:
        LowerLevelError: a curvature beneath μ along a direction, or no convergence.
    """
    q, residual = torch.zeros_like(right), right
    direction, square = right, float(right.square().sum())
    for count in range(max_iterations):
        if math.sqrt(square) <= delta:
            return q, count
        image = product(direction)
        curvature = float((direction * image).sum() / direction.square().sum())
        if not math.isfinite(curvature):
            raise NonFiniteError("hypergradient: a product with the lower level's Hessian is not finite")
        if curvature < 0.999 * mu:
            kind = "indefinite" if curvature < 0 else "singular" if curvature < 1e-9 * mu else "flatter than μ"
            raise LowerLevelError(
                f"hypergradient: the lower level's Hessian is {kind}: curvature {curvature:.3g} along a "
                f"direction, strong_convexity is {mu:.3g}; add a ridge to lower, or give a smaller "
                "strong_convexity"
            )
        step = square / (curvature * float(direction.square().sum()))
        q, residual = q + step * direction, residual - step * image
        before, square = square, float(residual.square().sum())
        direction = residual + square / before * direction
    raise LowerLevelError(
        f"hypergradient: after {max_iterations} products the linear solve's residual is "
        f"{math.sqrt(square):.3g}, "
        f"asked for {delta:.3g}; allow more max_iterations or a larger delta"
    )
