"""Stationary kernels as functions of the squared distance, with two derivatives.

A kernel here is ``k(r²)`` with ``k(0) = 1``. Its derivatives with respect to ``r²`` need no square roots of
coordinates, and the covariance of gradients is made of them: for a Gaussian process on the objective with
covariance ``φ(r²)``, the gradients have covariance ``-2 φ'(r²) I - 4 φ''(r²) δ δᵀ``.

Formulas: Rasmussen and Williams, *Gaussian Processes for Machine Learning*, 2006, section 4.2.1.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Final

from optex.checks import check_positive, shown
from optex.small import Array, exp, sqrt

__all__ = ["KERNELS", "RBF", "Kernel", "Matern12", "Matern32", "Matern52", "RationalQuadratic", "kernel_named"]


class Kernel(ABC):
    """A stationary kernel ``k(r²)``, normalised to ``k(0) = 1``.

    Every method takes squared distances of any shape (squared units of the iterates, not negative) and a
    length scale (units of the iterates, positive; a number or an array that broadcasts against them), both
    NumPy's or both torch's, and returns such an array of the broadcast shape. Where a derivative has no finite
    limit at ``r = 0`` the result there is infinite.
    """

    @abstractmethod
    def value(self, squared_distance: Array, lengthscale: float | Array) -> Array:
        """k(r²)."""

    @abstractmethod
    def derivative(self, squared_distance: Array, lengthscale: float | Array) -> Array:
        """dk / d(r²)."""

    @abstractmethod
    def second_derivative(self, squared_distance: Array, lengthscale: float | Array) -> Array:
        """d²k / d(r²)²."""

    def profiles(self, squared_distance: Array, lengthscale: Array) -> tuple[Array, Array]:
        """k'(r²) / k'(0) and 2 k''(r²) / k'(0): the factors of the covariance of gradients, p₁ I + p₂ δ δᵀ."""
        at_zero = self.derivative(0 * lengthscale, lengthscale)
        first = self.derivative(squared_distance, lengthscale) / at_zero
        return first, 2 * self.second_derivative(squared_distance, lengthscale) / at_zero


@dataclass(frozen=True)
class RBF(Kernel):
    """Squared exponential: ``exp(-r² / 2ℓ²)``."""

    def value(self, squared_distance: Array, lengthscale: float | Array) -> Array:
        return exp(-squared_distance / (2 * lengthscale**2))

    def derivative(self, squared_distance: Array, lengthscale: float | Array) -> Array:
        return -self.value(squared_distance, lengthscale) / (2 * lengthscale**2)

    def second_derivative(self, squared_distance: Array, lengthscale: float | Array) -> Array:
        return self.value(squared_distance, lengthscale) / (4 * lengthscale**4)

    def profiles(self, squared_distance: Array, lengthscale: Array) -> tuple[Array, Array]:
        value = self.value(squared_distance, lengthscale)
        return value, value / -(lengthscale**2)


def _scaled_distance(squared_distance: Array, lengthscale: float | Array, degrees: int) -> Array:
    """a = √degrees · r / ℓ, the argument of the Matérn family; da/d(r²) = degrees / (2 ℓ² a)."""
    return math.sqrt(degrees) * sqrt(squared_distance) / lengthscale


@dataclass(frozen=True)
class Matern12(Kernel):
    """Matérn, ν = 1/2: ``exp(-a)``, ``a = r / ℓ``. Both derivatives are infinite at r = 0."""

    def value(self, squared_distance: Array, lengthscale: float | Array) -> Array:
        return exp(-_scaled_distance(squared_distance, lengthscale, 1))

    def derivative(self, squared_distance: Array, lengthscale: float | Array) -> Array:
        a = _scaled_distance(squared_distance, lengthscale, 1)
        return -exp(-a) / (2 * lengthscale**2 * a)

    def second_derivative(self, squared_distance: Array, lengthscale: float | Array) -> Array:
        # d/da [-e⁻ᵃ / (2ℓ²a)] = e⁻ᵃ (1 + a) / (2ℓ²a²), times da/d(r²) = 1 / (2ℓ²a)
        a = _scaled_distance(squared_distance, lengthscale, 1)
        return exp(-a) * (1 + a) / (4 * lengthscale**4 * a**3)


@dataclass(frozen=True)
class Matern32(Kernel):
    """Matérn, ν = 3/2: ``(1 + a) exp(-a)``, ``a = √3 r / ℓ``. The second derivative is infinite at r = 0."""

    def value(self, squared_distance: Array, lengthscale: float | Array) -> Array:
        a = _scaled_distance(squared_distance, lengthscale, 3)
        return (1 + a) * exp(-a)

    def derivative(self, squared_distance: Array, lengthscale: float | Array) -> Array:
        # dk/da = -a e⁻ᵃ, times da/d(r²) = 3 / (2ℓ²a)
        a = _scaled_distance(squared_distance, lengthscale, 3)
        return -3 * exp(-a) / (2 * lengthscale**2)

    def second_derivative(self, squared_distance: Array, lengthscale: float | Array) -> Array:
        a = _scaled_distance(squared_distance, lengthscale, 3)
        return 9 * exp(-a) / (4 * lengthscale**4 * a)


@dataclass(frozen=True)
class Matern52(Kernel):
    """Matérn, ν = 5/2: ``(1 + a + a²/3) exp(-a)``, ``a = √5 r / ℓ``."""

    def value(self, squared_distance: Array, lengthscale: float | Array) -> Array:
        a = _scaled_distance(squared_distance, lengthscale, 5)
        return (1 + a + a**2 / 3) * exp(-a)

    def derivative(self, squared_distance: Array, lengthscale: float | Array) -> Array:
        # dk/da = -a (1 + a) e⁻ᵃ / 3, times da/d(r²) = 5 / (2ℓ²a)
        a = _scaled_distance(squared_distance, lengthscale, 5)
        return -5 * (1 + a) * exp(-a) / (6 * lengthscale**2)

    def second_derivative(self, squared_distance: Array, lengthscale: float | Array) -> Array:
        # d/da [(1 + a) e⁻ᵃ] = -a e⁻ᵃ
        a = _scaled_distance(squared_distance, lengthscale, 5)
        return 25 * exp(-a) / (12 * lengthscale**4)

    def profiles(self, squared_distance: Array, lengthscale: Array) -> tuple[Array, Array]:
        a = _scaled_distance(squared_distance, lengthscale, 5)
        decay = exp(-a)
        return (1 + a) * decay, decay * (-5 / lengthscale**2)


@dataclass(frozen=True)
class RationalQuadratic(Kernel):
    """``(1 + r² / 2αℓ²)^(-α)``: a mixture of squared exponentials over length scales.

    Args:
        alpha: α, positive; the smaller, the wider the mixture.

    Raises:
        ValueError: ``alpha`` is not positive.
    """

    alpha: float = 1.0

    def __post_init__(self) -> None:
        check_positive("RationalQuadratic", "alpha", self.alpha, "large ones are near the RBF")

    def _base(self, squared_distance: Array, lengthscale: float | Array) -> Array:
        return 1 + squared_distance / (2 * self.alpha * lengthscale**2)

    def value(self, squared_distance: Array, lengthscale: float | Array) -> Array:
        return self._base(squared_distance, lengthscale) ** -self.alpha

    def derivative(self, squared_distance: Array, lengthscale: float | Array) -> Array:
        return -(self._base(squared_distance, lengthscale) ** (-self.alpha - 1)) / (2 * lengthscale**2)

    def second_derivative(self, squared_distance: Array, lengthscale: float | Array) -> Array:
        power = self._base(squared_distance, lengthscale) ** (-self.alpha - 2)
        return (self.alpha + 1) / (4 * self.alpha * lengthscale**4) * power


KERNELS: Final[dict[str, type[Kernel]]] = {
    "rbf": RBF,
    "matern-1/2": Matern12,
    "matern-3/2": Matern32,
    "matern-5/2": Matern52,
    "rational-quadratic": RationalQuadratic,
}


def kernel_named(kernel: str | Kernel) -> Kernel:
    """The kernel of that name (a key of ``KERNELS``); an instance passes through.

    Raises:
        ValueError: the name is unknown.

    >>> kernel_named("matern-5/2")
    Matern52()
    """
    if isinstance(kernel, Kernel):
        return kernel
    if not isinstance(kernel, str) or kernel not in KERNELS:
        raise ValueError(
            f"kernel: {shown(kernel)} is not one of {', '.join(KERNELS)}; or pass a Kernel instance"
        )
    return KERNELS[kernel]()
