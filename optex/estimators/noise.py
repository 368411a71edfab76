"""Noise of the gradients in the units that estimators think in: those of the prior's variance."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from optex.estimators.history import GradientHistory

__all__ = ["relative_noise"]

LARGEST: Final = 1e3  # noise variance over the prior's; beyond it a prediction is a mean of all there is


def relative_noise(
    history: GradientHistory,
    slots: list[int],
    correlations: Tensor,  # [n, n]
    assumed: Tensor,  # []
) -> Tensor:  # [n] float64
    """Noise variance of the merged gradients in these slots, over the prior variance of a component.

    Where it is not told, and as a floor where it is (it also stands for what the model does not see), it is
    ``assumed / count``. A variance v_i that is told has to be put in units of the prior's variance s², which
    the
    spread of the gradients gives: with correlations c_ij of the kernel,

        E ‖g_i - g_j‖² / d = 2 s² (1 - c_ij) + v_i + v_j,

    summed over all pairs i < j and solved for s².
    """
    floor = assumed / history.counts[slots]
    if not history.tells_noise:
        return floor
    told = history.noise_variance[slots].nan_to_num(nan=0.0)
    weights = history.averaging[slots]
    gram = weights @ history.gradient_gram @ weights.mT
    squares = gram.diagonal()
    gaps = (squares[:, None] + squares - 2 * gram) / history.dimension
    excess = (gaps - told[:, None] - told).triu(1).sum()
    variance = excess / (2 * (1 - correlations)).triu(1).sum()
    least = told.max() / LARGEST  # and where the spread is all noise, or there is but one pair
    variance = torch.where(variance > least, variance, least)
    return torch.maximum(floor, told / variance)
