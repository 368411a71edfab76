"""What every estimator of the next gradients answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from optex.estimators.history import GradientHistory, Locations

__all__ = ["Estimator", "Posterior"]


class Posterior(ABC):
    """An estimator fitted to a history: predicts the gradient at points not yet evaluated.

    It holds no copy of the rows: it is good until the history changes. A point is located once, by
    ``locate``, for all that is then asked about it.
    """

    def __init__(self, history: GradientHistory) -> None:
        self.history = history

    def locate(
        self,
        points: Tensor,  # [n, d]
    ) -> Locations:
        """Inner products of points with the history, shared by all its posteriors."""
        return self.history.locate(points)

    @abstractmethod
    def means(self, locations: Locations) -> Tensor:  # [n, d], in the points' dtype
        """Predicted gradients at n points."""

    @abstractmethod
    def differences(self, locations: Locations, origins: Locations) -> Tensor:  # [n, d]
        """μ(point) - μ(origin), pair by pair; exactly zero where the two are the same object."""

    @abstractmethod
    def variance(
        self,
        point: Tensor,  # [d]
    ) -> Tensor:  # [] float64
        """Posterior variance of one component of the gradient, in units of the prior's."""

    def mean(
        self,
        point: Tensor,  # [d]
    ) -> Tensor:  # [d], in the point's dtype
        """Predicted gradient μ(θ)."""
        return self.means(self.locate(point[None]))[0]

    def mean_difference(
        self,
        point: Tensor,  # [d]
        origin: Tensor,  # [d]
    ) -> Tensor:  # [d]
        """μ(point) - μ(origin): how the gradient changes from where it was measured to where it is needed."""
        return self.differences(self.locate(point[None]), self.locate(origin[None]))[0]


class Estimator(ABC):
    """Settings of a predictor; ``fit`` makes a posterior and leaves the estimator as it was.

    Attributes:
        assumed_noise_variance: the noise that it reckons with where the history does not tell, in units of the
            prior's variance; 0 where it has no such setting.
    """

    @property
    def assumed_noise_variance(self) -> float:
        return 0.0

    @abstractmethod
    def fit(self, history: GradientHistory) -> Posterior:
        """Condition on the history, which holds at least one pair."""

    def judge(
        self,
        posterior: Posterior,
        points: Tensor,  # [n, d]
        gradients: Tensor,  # [n, d]
        held: Sequence[tuple[Tensor, Tensor] | None],  # n pairs ([d], [d])
    ) -> None:
        """Learn from true gradients that a posterior of this estimator has not seen; nothing by default.

        Args:
            posterior: fitted to the history without these pairs.
            points, gradients: the pairs.
            held: where a point's step had been measured elsewhere before, with the same minibatch, that
                point and that gradient: what is asked there is the difference. None elsewhere.
        """

    def state_dict(self) -> dict[str, Any]:
        """What ``judge`` has learned."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what another estimator of these settings has learned; checked before anything changes.

        Raises:
            ValueError: it is not what such an estimator saves.
        """
