"""The trials of one iteration; who evaluates them, and how many at once, is the caller's choice."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from optex.checks import check_integer, check_number
from optex.optimizers.gns.curvature import Curvature
from optex.optimizers.gns.metric import Metric

__all__ = ["SearchSettings", "StepSearch", "Trial"]


@dataclass(frozen=True)
class SearchSettings:
    """Settings of the search for γ; the defaults are the published constants.

    Attributes:
        least_smoothness: γ is at least this after an accepted step.
        eps: added to γ where the gradient's norm is divided by it.
        trials: most trials in an iteration, at least 1.
    """

    least_smoothness: float = 1e-9
    eps: float = 1e-8
    trials: int = 41

    def check(self, owner: str) -> None:
        """Refuse a setting that is out of range; the message names the argument.

        Raises:
            ValueError: a setting is out of range.
        """
        check_number(owner, "least_smoothness", self.least_smoothness, open_below=True)
        check_number(owner, "eps", self.eps)
        check_integer(owner, "trials", self.trials)


@dataclass(frozen=True)
class Trial:
    """One γ of an iteration's search, and where it leads.

    Attributes:
        smoothness: γ.
        shift: λ = ‖g‖* / (γ + eps).
        step: h [d].
    """

    smoothness: float
    shift: float
    step: Tensor


class StepSearch:
    """The trials of one iteration: γ, γ/2, γ/4, ..., and which of them is taken.

        h = -(H + λ B)⁻¹ g,   taken where   f(x) - f(x + h) ≥ ‖∇f(x + h)‖*² / (8 λ)

    A γ at which H + λ B is not positive definite, or h not finite, is passed over and costs no evaluation; it
    counts as a trial.

    Args:
        curvature: H.
        metric: B.
        loss: f(x).
        gradient: g [d], not zero.
        smoothness: the first γ.
        settings: of the search.

    Attributes:
        tried: trials handed out or passed over.
    """

    def __init__(
        self,
        curvature: Curvature,
        metric: Metric,
        loss: float,
        gradient: Tensor,  # [d]
        smoothness: float,
        settings: SearchSettings,
    ) -> None:
        self._curvature, self._metric, self._settings = curvature, metric, settings
        self._loss, self._gradient = loss, gradient
        self._norm = metric.dual_norm(gradient)
        self._first = smoothness
        self.tried: int = 0

    def next(self, count: int) -> list[Trial]:
        """The next trials, in the order to judge them: ``count``, or as many as are left."""
        found: list[Trial] = []
        while len(found) < count and self.tried < self._settings.trials:
            smoothness = self._first * 0.5**self.tried
            shift = self._norm / (smoothness + self._settings.eps)
            self.tried += 1
            step = self._curvature.solve(shift, self._gradient, self._metric) if shift > 0 else None
            if step is not None and bool(step.isfinite().all()):
                found.append(Trial(smoothness, shift, -step))
        return found

    def accepts(
        self,
        trial: Trial,
        loss: float,
        gradient: Tensor,  # [d]
    ) -> bool:
        """Whether the step passes, by loss and gradient at its end; one that is not finite never does."""
        norm = self._metric.dual_norm(gradient)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return False
        return self._loss - loss >= norm * norm / (8 * trial.shift)

    def following(self, trial: Trial) -> float:
        """γ of the next iteration, after this one's trial was taken."""
        return max(2 * trial.smoothness, self._settings.least_smoothness)
