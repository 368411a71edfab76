"""The obvious twin of MAID: dense matrices for a quadratic bilevel problem, and lower solves by closed form."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor


class Constants(TypedDict):
    """What ``optex.SmoothBilevel`` has to be told of the two levels."""

    strong_convexity: float
    lower_lipschitz: float
    upper_lipschitz: float
    hessian_lipschitz: float
    cross_lipschitz: float


@dataclass(frozen=True)
class DenseQuadratic:
    """h = ½ xᵀHx + xᵀ(Cθ - c), g = ½ ‖Mx - b‖²: everything that MAID estimates, exactly.

    Also a pair of functions, ``lower`` and ``upper``, that can be sent to other processes.
    """

    hessian: Tensor  # H [n, n]
    cross: Tensor  # C [n, m]
    linear: Tensor  # c [n]
    measure: Tensor  # M [k, n]
    data: Tensor  # b [k]

    def lower(self, x: Tensor, theta: Tensor) -> Tensor:
        return x @ (self.hessian @ x) / 2 + x @ (self.cross @ theta - self.linear)

    def upper(self, x: Tensor) -> Tensor:
        return (self.measure @ x - self.data).square().sum() / 2

    def solution(self, theta: Tensor) -> Tensor:
        return torch.linalg.solve(self.hessian, self.linear - self.cross @ theta)

    def value(self, theta: Tensor) -> float:
        return float(self.upper(self.solution(theta)))

    def gradient(self, theta: Tensor) -> Tensor:
        slope = self.measure.mT @ (self.measure @ self.solution(theta) - self.data)
        return -self.cross.mT @ torch.linalg.solve(self.hessian, slope)

    def constants(self) -> Constants:
        eigenvalues = torch.linalg.eigvalsh(self.hessian)
        return {
            "strong_convexity": float(eigenvalues[0]),
            "lower_lipschitz": float(eigenvalues[-1]),
            "upper_lipschitz": float(torch.linalg.matrix_norm(self.measure, 2)) ** 2,
            "hessian_lipschitz": 0.0,
            "cross_lipschitz": 0.0,
        }


def dense_quadratic(n: int, m: int, seed: int = 0) -> DenseQuadratic:
    """A well-conditioned one."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    root = draw(n, n)
    return DenseQuadratic(
        root @ root.mT / n + torch.eye(n, dtype=torch.float64), draw(n, m), draw(n), draw(n, n), draw(n)
    )


def error_bound(problem: DenseQuadratic, epsilon: float, delta: float) -> float:
    """ω of a quadratic lower level: ‖B‖ (L_g ε + δ) / μ."""
    constants = problem.constants()
    cross = float(torch.linalg.matrix_norm(problem.cross, 2))
    return cross * (constants["upper_lipschitz"] * epsilon + delta) / constants["strong_convexity"]


def exact_descent(problem: DenseQuadratic, theta: Tensor, steps: int, beta: float = 0.1) -> list[Tensor]:
    """MAID where accuracies are far beneath everything: Armijo's rule with η², on the exact function."""
    found = [theta]
    for _ in range(steps):
        gradient, value = problem.gradient(theta), problem.value(theta)
        rate = beta
        while problem.value(theta - rate * gradient) - value > -(1e-4**2) * rate * float(
            gradient.square().sum()
        ):
            rate *= 0.9
        theta, beta = theta - rate * gradient, rate / 0.9
        found.append(theta)
    assert all(math.isfinite(float(t.sum())) for t in found)
    return found
