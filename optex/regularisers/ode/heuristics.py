"""What a step of Tsit5 tells of how hard the equation is: its embedded error, and its stiffness."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from optex.regularisers.ode.recording import Steps, require_torchode

__all__ = ["error_estimate", "stiffness_estimate"]

# Where Tsit5's region of stability ends on the negative real axis, as OrdinaryDiffEq has it.
_STABILITY: Final = 3.5068


def error_estimate(steps: Steps, rtol: float, atol: float) -> Tensor:  # [s, n]
    """E = RMS(e / (atol + rtol max(|u|, |u⁺|))), over a row's d components.

    A step is accepted where E is below 1. Its gradient is 0 where E is: no root of 0 is differentiated.

    Args:
        steps: s steps of n rows.
        rtol, atol: the tolerances that the error is measured by.
    """
    scale = atol + rtol * torch.maximum(steps.before.abs(), steps.after.abs())
    return _rms(steps.error / scale)


def stiffness_estimate(steps: Steps) -> Tensor:  # [s, n]
    """S = RMS(k_7 - k_6) / RMS(g_7 - g_6) / 3.5068, an estimate of the field's Lipschitz constant.

    g_6 and g_7 are the two states at the step's end at which k_6 and k_7 were taken. For u' = λ u it is
    |λ| / 3.5068; h S above 1 is a step beyond Tsit5's stability. 0 where the two states coincide.

    Args:
        steps: s steps of n rows.
    """
    tableau = require_torchode().Tsit5.TABLEAU
    # g_7 - g_6 from the stages: subtracting two large, nearby states would lose its digits.
    weights = (tableau.a[6] - tableau.a[5]).to(steps.stages)
    apart = steps.size[..., None] * torch.einsum("j,sjnd->snd", weights, steps.stages)
    slopes, states = _rms(steps.stages[:, 6] - steps.stages[:, 5]), _rms(apart)
    return torch.where(states > 0, slopes / torch.where(states > 0, states, 1.0), 0.0) / _STABILITY


def _rms(
    values: Tensor,  # [s, n, d]
) -> Tensor:  # [s, n]
    # √0 has an infinite slope, which the chain rule multiplies by 0.
    squares = values.square().mean(-1)
    return torch.where(squares > 0, torch.where(squares > 0, squares, 1.0).sqrt(), 0.0)
