"""The simplest prediction: the last gradient measured, everywhere."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from optex import small
from optex.estimators.history import GradientHistory, Locations
from optex.estimators.interface import Coefficients, Estimator, Posterior

__all__ = ["HoldLast"]


class _HeldGradient(Posterior):
    def coefficients(self, locations: Locations) -> Coefficients:
        history = self.history
        weights = small.full((len(locations), history.size), 0.0, small.array(history.iterate_gram))
        weights[:, history.newest] = 1.0
        return Coefficients(weights)

    def means(self, locations: Locations) -> Tensor:
        gradient = self.history.gradients[self.history.newest]
        return gradient.to(locations.points.device, locations.points.dtype).expand_as(locations.points)

    def differences(self, locations: Locations, origins: Locations) -> Tensor:
        return torch.zeros_like(locations.points)

    def variance(self, point: Tensor) -> Tensor:
        return torch.ones((), dtype=torch.float64, device=point.device)


@dataclass(frozen=True)
class HoldLast(Estimator):
    """Predict the newest measured gradient at every point: no model, no cost.

    The baseline every model has to beat; strong where the gradient changes little in N steps.
    """

    def fit(self, history: GradientHistory) -> Posterior:
        return _HeldGradient(history)
