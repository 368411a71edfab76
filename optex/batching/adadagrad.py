"""AdAdaGrad: batches that grow as far as the noise of their gradients asks for.

Lau, Liu, Kolar: *AdAdaGrad: Adaptive Batch Size Schemes for Adaptive Gradient Methods*, arXiv 2402.11215. The
tests are older: the norm test is by Byrd, Chin, Nocedal, Wu (Mathematical Programming 134, 2012), the
inner-product test and its augmented form by Bollapragada, Byrd, Nocedal (SIAM J. Optim. 28, 2018,
arXiv 1710.11258).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from optex.batching.statistics import GradientStatistics
from optex.checks import check_integer, check_number, saved_integer, shown

__all__ = [
    "AugmentedInnerProductTest",
    "BatchSizeController",
    "BatchSizeTest",
    "CoordinateTest",
    "InnerProductTest",
    "NormTest",
]


class BatchSizeTest(ABC):
    """How many samples a gradient should have had, from the statistics of the one that was measured."""

    @abstractmethod
    def proposal(self, statistics: GradientStatistics) -> float:
        """The smallest batch that would pass; infinite where the mean gradient is 0 and its samples are not.

        Raises:
            ValueError: the statistics lack a number that the test needs.
        """


@dataclass(frozen=True)
class NormTest(BatchSizeTest):
    """The gradient's noise is at most the fraction η of its length: ``b ≥ V / (η² ‖ḡ‖²)``.

    Args:
        eta: η, above 0; 0.1 as published. Smaller is stricter.

    Raises:
        ValueError: η is out of range.

    >>> NormTest(eta=0.5).proposal(GradientStatistics(8, squared_norm=2.0, variance=10.0))
    20.0
    """

    eta: float = 0.1

    def __post_init__(self) -> None:
        check_number("NormTest", "eta", self.eta, open_below=True)

    def proposal(self, statistics: GradientStatistics) -> float:
        variance = _known("NormTest", "variance", statistics.variance)
        return _over(variance, self.eta**2 * statistics.squared_norm)


@dataclass(frozen=True)
class InnerProductTest(BatchSizeTest):
    """The step is most often a descent direction: ``b ≥ Var_i ⟨g_i, ḡ⟩ / (θ² ‖ḡ‖⁴)``.

    Noise orthogonal to the gradient does not count, so that batches are smaller than the norm test's.

    Args:
        theta: θ, above 0; 0.1 as published.

    Raises:
        ValueError: θ is out of range.
    """

    theta: float = 0.1

    def __post_init__(self) -> None:
        check_number("InnerProductTest", "theta", self.theta, open_below=True)

    def proposal(self, statistics: GradientStatistics) -> float:
        variance = _known("InnerProductTest", "inner_product_variance", statistics.inner_product_variance)
        return _over(variance, self.theta**2 * statistics.squared_norm**2)


@dataclass(frozen=True)
class AugmentedInnerProductTest(BatchSizeTest):
    """The inner-product test, and a bound on the noise orthogonal to the gradient, ``b ≥ V_⊥ / (ν² ‖ḡ‖²)``.

    ``V_⊥`` is the variance of ``g_i - ⟨g_i, ḡ⟩ / ‖ḡ‖² ḡ``, summed over the coordinates.

    Args:
        theta, nu: θ and ν, above 0; 0.1 as published.

    Raises:
        ValueError: θ or ν is out of range.
    """

    theta: float = 0.1
    nu: float = 0.1

    def __post_init__(self) -> None:
        check_number("AugmentedInnerProductTest", "theta", self.theta, open_below=True)
        check_number("AugmentedInnerProductTest", "nu", self.nu, open_below=True)

    def proposal(self, statistics: GradientStatistics) -> float:
        along = InnerProductTest(self.theta).proposal(statistics)
        return max(along, _over(statistics.orthogonal_variance, self.nu**2 * statistics.squared_norm))


@dataclass(frozen=True)
class CoordinateTest(BatchSizeTest):
    """The norm test in every coordinate: ``b ≥ max_j Var_i(g_ij) / (η² ḡ_j²)``, for coordinate-wise AdaGrad.

    One coordinate whose mean is near 0 decides, and a network has many: expect the largest batch at once.

    Args:
        eta: η, above 0; 0.1 as published.

    Raises:
        ValueError: η is out of range.
    """

    eta: float = 0.1

    def __post_init__(self) -> None:
        check_number("CoordinateTest", "eta", self.eta, open_below=True)

    def proposal(self, statistics: GradientStatistics) -> float:
        return _known("CoordinateTest", "coordinate_ratio", statistics.coordinate_ratio) / self.eta**2


def _known(owner: str, name: str, value: float) -> float:
    if math.isnan(value):
        remedy = {
            "variance": "one sample has none; draw batches of 2 and more, and tell the noise: "
            "optex.PerSampleSource, or AccumulatingSource with its parameters",
        }.get(name, "a round's report tells the noise's size alone; use PerSampleSource.measure, or NormTest")
        raise ValueError(f"{owner}: the statistics have no {name} (NaN); {remedy}")
    return value


def _over(noise: float, signal: float) -> float:
    if not noise:
        return 0.0
    return noise / signal if signal else math.inf


class BatchSizeController:
    """The size of the next batch: ``b ← min(maximum, max(b, ⌈proposal⌉))``, at most ``growth`` times b.

    Where a gradient is nothing but noise, ``‖ḡ‖² ≈ V / b`` and the norm test asks for ``b / η²``: with η = 0.1
    one unlucky gradient multiplies the batch by a hundred, and it never shrinks. ``growth`` bounds that.

    Args:
        batch_size: b at the start, at least 2: one sample has no variance.
        maximum: largest size, at least ``batch_size``.
        test: proposes sizes; None is ``NormTest()``.
        growth: largest factor a step, above 1; infinite as published.

    Attributes:
        batch_size: b; may be set.

    Raises:
        ValueError: an argument is out of range.
        TypeError: ``test`` is no ``BatchSizeTest``.

    >>> controller = BatchSizeController(8, maximum=1000, test=NormTest(eta=0.5))
    >>> controller.update(GradientStatistics(8, squared_norm=2.0, variance=6.0)) # asks for 12
    12
    >>> controller.update(GradientStatistics(12, squared_norm=2.0, variance=1.0)) # asks for 2: never down
    12
    >>> controller.update(GradientStatistics(12, squared_norm=0.0, variance=1.0)) # asks for all there are
    24
    """

    def __init__(
        self, batch_size: int, maximum: int, *, test: BatchSizeTest | None = None, growth: float = 2.0
    ) -> None:
        owner = type(self).__name__
        self.maximum: int = check_integer(owner, "maximum", maximum, least=2)
        if test is not None and not isinstance(test, BatchSizeTest):
            raise TypeError(f"{owner}: test must be a BatchSizeTest such as NormTest(), got {shown(test)}")
        self.test: BatchSizeTest = NormTest() if test is None else test
        self.growth: float = growth
        if not (isinstance(growth, float) and growth == math.inf):
            check_number(owner, "growth", growth, least=1.0, open_below=True)
        self.batch_size = batch_size

    @property
    def batch_size(self) -> int:
        """Samples in the next batch."""
        return self._batch_size

    @batch_size.setter
    def batch_size(self, size: int) -> None:
        self._batch_size = check_integer(type(self).__name__, "batch_size", size, least=2, most=self.maximum)

    def update(self, statistics: GradientStatistics) -> int:
        """The size for the next batch, after these statistics of a gradient.

        Raises:
            ValueError: they lack a number that the test needs; the size is as before.
        """
        size = self.batch_size
        wanted = min(self.test.proposal(statistics), self.growth * size, float(self.maximum))
        self._batch_size = min(self.maximum, max(size, math.ceil(wanted)))
        return self._batch_size

    def state_dict(self) -> dict[str, Any]:
        """The size alone; settings stay those of the object that it is loaded into."""
        return {"batch_size": self.batch_size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a saved size.

        Raises:
            ValueError: the state is cut short, or its size above ``maximum``.
        """
        self.batch_size = saved_integer(type(self).__name__, state, "batch_size", least=2)
