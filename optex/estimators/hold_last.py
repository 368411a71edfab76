"""The simplest prediction: the last gradient measured, everywhere."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from optex.estimators.interface import Estimator, Posterior
from optex.history import GradientHistory

__all__ = ["HoldLast"]


class _HeldGradient(Posterior):
    def __init__(
        self,
        gradient: Tensor,  # [d]
    ) -> None:
        self._gradient = gradient

    def mean(self, point: Tensor) -> Tensor:
        return self._gradient.to(point.device, point.dtype)

    def variance(self, point: Tensor) -> Tensor:
        return torch.ones((), dtype=torch.float64, device=point.device)

    def mean_difference(self, point: Tensor, origin: Tensor) -> Tensor:
        return torch.zeros_like(point)


@dataclass(frozen=True)
class HoldLast(Estimator):
    """Predict the newest measured gradient at every point: no model, no cost.

    The baseline every model has to beat; strong where the gradient changes little in N steps.
    """

    def fit(self, history: GradientHistory) -> Posterior:
        return _HeldGradient(history.gradients[history.newest])
