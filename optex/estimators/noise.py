"""Noise of the gradients in the units that estimators use: those of the prior's variance."""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from torch import Tensor

from optex import small
from optex.estimators.history import GradientHistory
from optex.small import Array, array

__all__ = ["relative_noise"]

LARGEST: Final = 1e3  # noise variance over the prior's; beyond it a prediction is a mean of all gradients


def relative_noise(
    history: GradientHistory,
    slots: list[int],
    correlations: Array,  # [n, n]
    assumed: float,
) -> Array:  # [n]
    """Noise variance of the merged gradients in these slots, over the prior variance of a component.

    Where the history does not know the noise it is ``assumed / count``, and that is a floor where it does: it
    also stands for what the model cannot represent. A known variance v_i has to be divided by the prior's
    variance s², which follows from the spread of the gradients: with correlations c_ij of the kernel,

        E ‖g_i - g_j‖² / d = 2 s² (1 - c_ij) + v_i + v_j,

    summed over all pairs i < j and solved for s².

    Args:
        history: of the gradients.
        slots: n slots that stand for an iterate.
        correlations: of the kernel between their iterates.
        assumed: noise variance of a single gradient, in units of the prior's, where it is not known.
    """
    floor = assumed / array(history.counts)[slots]
    if not history.tells_noise:
        return floor
    variances = array(history.noise_variance)[slots]
    told = small.where(variances == variances, variances, 0 * floor)  # NaN is not equal to itself
    weights = array(history.averaging)[slots]
    gram = weights @ array(history.gradient_gram) @ weights.T
    squares = gram.diagonal()
    gaps = (squares[:, None] + squares - 2 * gram) / history.dimension
    excess = _pairs(gaps - told[:, None] - told)
    spread = _pairs(2 * (1 - correlations))
    variance = excess / small.where(spread > 0, spread, spread + math.inf)
    least = told.max() / LARGEST  # and where the spread is all noise, or there is but one pair
    return small.maximum(floor, told / small.where(variance > least, variance, least))


def _pairs(matrix: Array) -> Array:
    """The sum over pairs, each once."""
    return matrix.triu(1).sum() if isinstance(matrix, Tensor) else np.triu(matrix, 1).sum()
