"""Functions in closed form, of any dimension, with optional Gaussian noise in the gradient."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from itertools import repeat
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from optex.checks import check_integer
from optex.studies.problems.interface import Problem, seeded_generator

__all__ = ["Ackley", "Function", "Quadratic", "Rosenbrock", "Sphere"]


class Function(Problem):
    """A function F(θ) of a vector θ in R^d, with minimum 0, started uniformly in (-radius, radius)^d.

    With ``noise`` > 0 a batch is a vector ε ~ N(0, noise² I) and its loss F(θ) + ⟨ε, θ⟩, whose gradient is
    ∇F(θ) + ε: Gaussian noise of that standard deviation on every component, the same for every method.
    Without noise every batch is None.

    Args:
        dim: d, an integer of at least ``least_dimension``.
        seed: of the start and the noise.
        noise: standard deviation of one component of the gradient's noise, not negative.
        dtype: of the parameters.

    Raises:
        ValueError: an argument is out of range.

    >>> import torch
    >>> problem = Sphere(dim=4, seed=0)
    >>> with torch.no_grad():
    ...     problem.theta.fill_(3.0)
    Parameter containing:
    tensor([3., 3., 3., 3.], dtype=torch.float64, requires_grad=True)
    >>> problem.evaluate()
    3.0
    """

    radius: ClassVar[float] = 2.0
    least_dimension: ClassVar[int] = 1

    def __init__(
        self,
        dim: int = 10_000,
        seed: int = 0,
        noise: float = 0.0,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__(seed)
        check_integer(type(self).__name__, "dim", dim, least=self.least_dimension)
        if not 0 <= noise < math.inf:
            raise ValueError(
                f"{type(self).__name__}: noise must be finite and not negative, got {noise}; "
                "it is the standard deviation of one component"
            )
        self.noise: float = noise
        self.theta: nn.Parameter = nn.Parameter(torch.empty(dim, dtype=dtype))
        self.reset()

    @abstractmethod
    def value(
        self,
        theta: Tensor,  # [d]
    ) -> Tensor:  # []
        """F(θ)."""

    def minimizer(self) -> Tensor:  # [d]
        """The θ at which F is lowest."""
        return torch.zeros_like(self.theta.detach())

    @property
    def deterministic(self) -> bool:
        return self.noise == 0

    @property
    def minimum(self) -> float:
        return 0.0

    def forward(
        self,
        batch: Tensor | None,  # [d]
    ) -> Tensor:
        value = self.value(self.theta)
        return value if batch is None else value + batch @ self.theta

    def batches(self) -> Iterator[Tensor | None]:
        return self._noise_vectors() if self.noise else repeat(None)

    def _noise_vectors(self) -> Iterator[Tensor]:
        generator = seeded_generator(self.seed, "batches")
        while True:
            yield self.noise * torch.randn(len(self.theta), generator=generator, dtype=self.theta.dtype)

    @torch.no_grad()
    def evaluate(self) -> float:
        return float(self.value(self.theta))

    @torch.no_grad()
    def reset(self) -> None:
        self.theta.uniform_(-self.radius, self.radius, generator=seeded_generator(self.seed, "start"))


def root_mean_square(
    theta: Tensor,  # [d]
) -> Tensor:  # []
    """``sqrt(mean(θ²))``; at θ = 0, where the square root's derivative is infinite, the subgradient is 0."""
    return torch.linalg.vector_norm(theta) / math.sqrt(len(theta))


@final
class Sphere(Function):
    """F(θ) = sqrt(mean(θ²)): a cone, with a kink at its minimum."""

    name = "sphere"

    def value(self, theta: Tensor) -> Tensor:
        return root_mean_square(theta)


@final
class Ackley(Function):
    """F(θ) = -20 exp(-0.2 sqrt(mean(θ²))) - exp(mean(cos 2πθ)) + 20 + e: many local minima in a funnel."""

    name = "ackley"
    radius: ClassVar[float] = 1.5

    def value(self, theta: Tensor) -> Tensor:
        funnel = -20 * torch.exp(-0.2 * root_mean_square(theta))
        ripples = -torch.exp(torch.cos(2 * math.pi * theta).mean())
        return funnel + ripples + 20 + math.e


@final
class Rosenbrock(Function):
    """F(θ) = mean over i of 100 (θ_{i+1} - θ_i²)² + (1 - θ_i)²: a curved valley with its minimum at θ = 1."""

    name = "rosenbrock"
    least_dimension: ClassVar[int] = 2

    def value(self, theta: Tensor) -> Tensor:
        here, following = theta[:-1], theta[1:]
        return (100 * (following - here**2) ** 2 + (1 - here) ** 2).mean()

    def minimizer(self) -> Tensor:
        return torch.ones_like(self.theta.detach())


@final
class Quadratic(Function):
    """F(θ) = ½ Σ λ_i θ_i², eigenvalues λ log-spaced from 1/condition to 1.

    Args:
        dim, seed, noise, dtype: as in :class:`Function`.
        condition: largest over smallest eigenvalue, at least 1.

    Raises:
        ValueError: an argument is out of range.
    """

    name = "quadratic"

    def __init__(
        self,
        dim: int = 10_000,
        seed: int = 0,
        noise: float = 0.0,
        dtype: torch.dtype = torch.float64,
        condition: float = 1e3,
    ) -> None:
        super().__init__(dim, seed, noise, dtype)
        if not 1 <= condition < math.inf:
            raise ValueError(f"Quadratic: condition must be finite and at least 1, got {condition}")
        self.eigenvalues: Tensor
        spectrum = torch.logspace(-math.log10(condition), 0, dim, dtype=dtype)
        self.register_buffer("eigenvalues", spectrum, persistent=False)

    def value(self, theta: Tensor) -> Tensor:
        return 0.5 * (self.eigenvalues * theta**2).sum()
