"""Tsallis-INF: a bandit without contexts, good against adversaries and against chance alike."""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from optex.checks import saved_integer, saved_number, saved_tensor
from optex.solvers.relaxation.learner import Learner

__all__ = ["TsallisINF"]

_NEWTON: Final = 20


class TsallisINF(Learner):
    """Follows the regularised leader, with Tsallis's entropy of power 1/2.

        p_i = 4 / (η (k_i / s - x))²,   Σ p_i = 1 by Newton's method on x,   η = 2 / √t

    k_i is the sum of cost / p_i over the times that i was chosen, an unbiased estimate of what i would have
    cost all along, and s the mean cost so far, so that costs may have any unit.

    Source: Zimmert and Seldin, *Tsallis-INF*, JMLR 2021; Khodak et al., arXiv 2310.02246.
    """

    def __init__(self, actions: int) -> None:
        self._ended = np.zeros(actions)  # Σ cost / p, over runs that ended
        self._failed = np.zeros(actions)  # Σ 1 / p, over those that did not
        self._total = 0.0
        self._worst = 0.0
        self._count = 0  # of costs
        self._time = 1

    def probabilities(self, context: float | None) -> NDArray[np.float64]:
        losses = self._losses()
        rate = 2 / math.sqrt(self._time)
        # At this x the best action's p is 1, so the sum is at least 1. It is convex and grows with x: Newton's
        # steps come down from this side and never pass a pole.
        x = losses.min() - 2 / rate
        for _ in range(_NEWTON):
            chances = 4 / (rate * (losses - x)) ** 2
            x = x - (chances.sum() - 1) / (rate * (chances**1.5).sum())
        chances = 4 / (rate * (losses - x)) ** 2
        return chances / chances.sum()

    def learn(self, context: float | None, action: int, chance: float, cost: float | None) -> None:
        if cost is None:
            self._failed[action] += 1 / chance
        else:
            self._ended[action] += cost / chance
            self._total += cost
            self._worst = max(self._worst, cost)
            self._count += 1
        self._time += 1

    def best(self, context: float | None) -> int:
        return int(self._losses().argmin())

    def _losses(self) -> NDArray[np.float64]:
        """k / s [actions]; a failure counts as the worst run that ended, and does not move the mean."""
        mean = self._total / self._count if self._total > 0 else 1.0
        worst = self._worst if self._worst > 0 else 1.0
        return (self._ended + worst * self._failed) / mean

    def state(self) -> dict[str, Any]:
        return {
            "ended": torch.tensor(self._ended),
            "failed": torch.tensor(self._failed),
            "total": self._total,
            "worst": self._worst,
            "count": self._count,
            "time": self._time,
        }

    def restored(self, owner: str, state: Any) -> TsallisINF:
        found = TsallisINF(len(self._ended))
        shape = self._ended.shape
        found._ended = saved_tensor(owner, state, "ended", shape).numpy().copy()
        found._failed = saved_tensor(owner, state, "failed", shape).numpy().copy()
        found._total = saved_number(owner, state, "total", least=0.0)
        found._worst = saved_number(owner, state, "worst", least=0.0)
        found._count = saved_integer(owner, state, "count")
        found._time = saved_integer(owner, state, "time", least=1)
        return found
