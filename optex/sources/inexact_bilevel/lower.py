"""The lower level, solved within a given distance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optex.errors import NonFiniteError
from optex.sources.inexact_bilevel.levels import LowerLevelError, SmoothBilevel, lower_gradient
from optex.sources.inexact_bilevel.linearised import Linearised

__all__ = ["LowerSolution", "solve_lower"]


@dataclass(frozen=True)
class LowerSolution:
    """A point x with ‖x - x̂(θ)‖ ≤ ‖∇ₓh(x, θ)‖ / μ ≤ ε.

    Attributes:
        x: of the start's shape.
        error_bound: ‖∇ₓh‖ / μ.
        iterations: gradients of h that it took.
    """

    x: Tensor
    error_bound: float
    iterations: int


def solve_lower(
    problem: SmoothBilevel,
    theta: Sequence[Tensor],
    start: Tensor,  # of x's shape
    epsilon: float,
    max_iterations: int = 2000,
) -> LowerSolution:
    """Nesterov's accelerated gradient until ‖∇ₓh‖ / μ ≤ ε, from the start.

    Raises:
        LowerLevelError: not within ``max_iterations``.
        NonFiniteError: h or its gradient is not finite.
    """
    theta = [t.detach() for t in theta]
    mu = problem.constant("strong_convexity", theta)
    given = problem.lower_lipschitz is not None
    lipschitz = problem.constant("lower_lipschitz", theta) if given else 0.0
    x = previous = start.detach()
    error = math.inf
    for iteration in range(1, max_iterations + 1):
        root = math.sqrt(max(mu / lipschitz, 0.0)) if lipschitz else 1.0
        z = x + max(0.0, (1 - root) / (1 + root)) * (x - previous)
        value, gradient = lower_gradient(problem, theta, z)
        error = float(gradient.norm()) / mu
        if not math.isfinite(error):
            raise NonFiniteError("solve_lower: the lower level's gradient is not finite; look at lower and θ")
        if error <= epsilon:
            return LowerSolution(z, error, iteration)
        if not given:
            lipschitz = lipschitz or max(mu, 1.2 * _largest_curvature(problem, theta, z))
            lipschitz = _enough(problem, theta, z, value, gradient, lipschitz)
        previous, x = x, z - gradient / lipschitz
    raise LowerLevelError(
        f"solve_lower: after {max_iterations} iterations ‖∇h‖/μ is {error:.3g}, asked for {epsilon:.3g}; allow "
        f"more max_iterations, a larger epsilon, or check that lower is strongly convex with μ = {mu:.3g}"
    )


def _largest_curvature(problem: SmoothBilevel, theta: Sequence[Tensor], x: Tensor) -> float:
    at, generator = Linearised(problem, theta, x), torch.Generator().manual_seed(0)
    v, found = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x), 0.0
    for _ in range(20):
        v = at.hessian(v / v.norm())
        found = float(v.norm())
        if not found or not math.isfinite(found):
            break
    return found


def _enough(
    problem: SmoothBilevel,
    theta: Sequence[Tensor],
    z: Tensor,
    value: Tensor,  # []
    gradient: Tensor,
    lipschitz: float,
) -> float:
    """L, doubled until a step of 1/L descends by ‖∇h‖² / (2 L)."""
    square = float(gradient.square().sum())
    slack = 100 * torch.finfo(value.dtype).eps * abs(float(value))
    for _ in range(60):
        with torch.no_grad():
            after = float(problem.lower(z - gradient / lipschitz, *theta))
        if after <= float(value) - square / (2 * lipschitz) + slack:
            break
        lipschitz *= 2
    return lipschitz
