"""What every estimator of the next gradients answers."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from optex import small
from optex.estimators.arrivals import Arrivals
from optex.estimators.history import GradientHistory, Locations
from optex.linalg import accumulate_rows, combine_rows
from optex.small import Array, array, tensor

__all__ = ["Coefficients", "Estimator", "Posterior"]


@dataclass(frozen=True)
class Coefficients:
    """Predictions as combinations of stored rows and of the points' own offsets from the anchor.

    Attributes:
        on_gradients: [n, T0].
        on_displacements: [n, T0]; None for none.
        on_offsets: [n]; None with ``on_displacements``.
    """

    on_gradients: Array
    on_displacements: Array | None = None
    on_offsets: Array | None = None


class Posterior(ABC):
    """An estimator fitted to a history: predicts the gradient at points not yet evaluated.

    Every prediction is a combination of the stored rows and of the point's offset from the history's anchor,
    μ(θ) = a(θ)ᵀ G + b(θ)ᵀ D + c(θ) ξ; a posterior answers the ``coefficients``. It holds no copy of the rows,
    so it is valid until the history changes. A point is located once, by ``locate``, for all predictions at it.
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
    def coefficients(self, locations: Locations) -> Coefficients:
        """Coefficients of the predictions at n points."""

    @abstractmethod
    def variance(
        self,
        point: Tensor,  # [d]
    ) -> Tensor:  # [] float64
        """Posterior variance of one component of the gradient, in units of the prior's."""

    def prior_variance(self) -> Tensor:  # [] float64
        """Prior variance s² of a component, in squared units of the gradient; NaN for a short history.

        By default the sample variance of a component over the history. A model with a covariance takes the
        maximum-likelihood estimate s² = Σ_c y_cᵀ A⁻¹ y_c / (n d), with y_c the residuals of component c from
        the prior mean and A the covariance of the n pairs in units of s²; n - 1 stands in place of n where the
        prior mean is estimated from the pairs.
        """
        slots, history = self.history.representatives, self.history
        weights = array(history.averaging)[slots]
        gram = weights @ array(history.gradient_gram) @ weights.T
        count = len(slots)
        return self._per_component(gram.diagonal().sum() - gram.sum() / count, count - 1)

    def _per_component(self, total: Array, freedom: int) -> Tensor:  # [] float64
        known = freedom > 0
        return tensor(small.nonnegative(total)) / (freedom * self.history.dimension if known else math.nan)

    def means(self, locations: Locations) -> Tensor:  # [n, d], in the points' dtype
        """Predicted gradients at n points."""
        return self._combined(self.coefficients(locations), locations, None, None)

    def differences(self, locations: Locations, origins: Locations) -> Tensor:  # [n, d]
        """μ(point) - μ(origin), pair by pair; exactly zero where the two are the same object."""
        return self._combined(self.coefficients(locations), locations, self.coefficients(origins), origins)

    def _combined(
        self, here: Coefficients, locations: Locations, there: Coefficients | None, origins: Locations | None
    ) -> Tensor:  # [n, d]
        on_g, on_d = here.on_gradients, here.on_displacements
        if there is not None:
            on_g = on_g - there.on_gradients
            on_d = None if on_d is None else on_d - there.on_displacements
        result = combine_rows(tensor(on_g), self.history.gradients)
        if on_d is not None:
            accumulate_rows(result, tensor(on_d), self.history.displacements)
        if here.on_offsets is not None:
            slopes = here.on_offsets
            if there is not None and origins is not None:  # c ξ - c' ξ' = (c - c') ξ + c' (ξ - ξ')
                slopes = slopes - there.on_offsets
                _add_scaled(result, there.on_offsets, locations.offsets - origins.offsets)
            _add_scaled(result, slopes, locations.offsets)
        return result.to(locations.points.device, locations.points.dtype)

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


def _add_scaled(
    result: Tensor,  # [n, d], changed
    weights: Array,  # [n]
    rows: Tensor,  # [n, d]
) -> None:
    if len(result) == 1 and not isinstance(weights, Tensor):  # a plain number, not a tensor: no synchronisation
        result.add_(rows, alpha=float(weights[0]))
    else:
        factors = tensor(weights).to(result.device, result.dtype)[:, None]
        result.addcmul_(rows.to(result.dtype), factors)


class Estimator(ABC):
    """Settings of a predictor; ``fit`` makes a posterior and leaves the estimator as it was.

    Attributes:
        assumed_noise_variance: the noise variance assumed where the history does not know the gradients', in
            units of the prior's variance; 0 where there is no such setting.
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
        arrivals: Arrivals,
        held: Sequence[tuple[Tensor, Tensor] | None],  # n pairs ([d], [d])
    ) -> None:
        """Learn from true gradients that a posterior of this estimator has not seen; nothing by default.

        Args:
            posterior: fitted to the history without these pairs.
            arrivals: the pairs.
            held: for a pair whose step was measured elsewhere before, with the same minibatch, that point
                and that gradient: what is judged there is the predicted difference. None for other pairs.
        """

    def state_dict(self) -> dict[str, Any]:
        """What ``judge`` has learned."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what another estimator of these settings has learned; checked before anything changes.

        Raises:
            ValueError: it is not what such an estimator saves.
        """
