"""What every estimator of the next gradients answers."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from optex.history import GradientHistory

__all__ = ["Estimator", "Posterior"]


class Posterior(ABC):
    """An estimator fitted to a history: predicts the gradient at points not yet evaluated.

    A posterior is read before the history it was fitted to changes; it holds no copy of the rows.
    """

    @abstractmethod
    def mean(
        self,
        point: Tensor,  # [d]
    ) -> Tensor:  # [d], in the point's dtype
        """Predicted gradient μ(θ)."""

    @abstractmethod
    def variance(
        self,
        point: Tensor,  # [d]
    ) -> Tensor:  # [] float64
        """Posterior variance of one component of the gradient, in units of the prior's."""

    def mean_difference(
        self,
        point: Tensor,  # [d]
        origin: Tensor,  # [d]
    ) -> Tensor:  # [d]
        """μ(point) - μ(origin): how the gradient changes from where it was measured to where it is needed.

        Exactly zero where the two points are the same.
        """
        return self.mean(point) - self.mean(origin)


class Estimator(ABC):
    """Settings of a predictor; ``fit`` makes a posterior and leaves the estimator as it was."""

    @abstractmethod
    def fit(self, history: GradientHistory) -> Posterior:
        """Condition on the history, which holds at least one pair."""
