"""ChebCB: a bandit with a context, that fits a Chebyshev polynomial in it to the cost of each action."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import lsq_linear

from optex.checks import saved_integer, saved_number, saved_tensor
from optex.solvers.relaxation.learner import Learner

__all__ = ["ChebCB"]


class ChebCB(Learner):
    """Least squares on Chebyshev polynomials, and inverse gap weighting.

    The cost of action i at context c, z = c mapped to [-1, 1], is f_i(c) = Σ_{j<m} θ_ij T_j(z), fitted to what
    i has cost, with |θ_i0| ≤ K and |θ_ij| ≤ 2 R / j: K is the largest cost so far and R its distance to the
    least, and these bound the coefficients of a function whose slope is at most R over the interval's length.
    With i* the least of f_i(c) at this context

        p_i = 1 / (d + η (f_i(c) - f_i*(c)))  for i ≠ i*,       p_i* = 1 - Σ p_i
        η = 2 t √(d t / (E + 2 α² t)),          α = (π + 2/π log(2 m + 1)) R / (2 (m + 1))

    for d actions at time t; E is the squared error of the predictions made before each cost was known, less
    that of the present fits. Fits are in the unit of the costs and η in its inverse: choices do not depend on
    it.

    Source: Khodak et al., with the constants of their code; inverse gap weighting: Foster and Rakhlin, *Beyond
    UCB*, ICML 2020.
    """

    def __init__(self, actions: int, contexts: tuple[float, float], features: int) -> None:
        self._contexts, self._features = contexts, features
        self._theta = np.zeros((actions, features))
        # Of each action, the triangular factor of rows (T_j(z), cost, failed): all that least squares need of
        # them, in memory that does not grow; a failure's cost may still be raised.
        self._factors = np.zeros((actions, features + 2, features + 2))
        self._spread = np.zeros(actions)  # Σ (cost - f)² of each fit
        self._played = np.zeros(actions)
        self._online = 0.0  # Σ (cost - predicted)²
        self._least, self._worst = math.inf, 0.0
        self._time = 1

    def probabilities(self, context: float | None) -> NDArray[np.float64]:
        predicted = self._theta @ self._polynomials(context)
        best, actions = int(predicted.argmin()), len(predicted)
        chances = 1 / (actions + self._rate() * (predicted - predicted[best]))
        chances[best] = 0.0
        chances[best] = 1 - chances.sum()
        return chances

    def learn(self, context: float | None, action: int, chance: float, cost: float | None) -> None:
        row = self._polynomials(context)
        failed = cost is None
        seen = (self._least, self._worst)
        if cost is not None:
            self._least, self._worst = min(self._least, cost), max(self._worst, cost)
        paid = self._failure() if cost is None else cost
        self._online += (float(self._theta[action] @ row) - paid) ** 2
        stacked = np.vstack([self._factors[action], [*row, 0.0 if failed else paid, float(failed)]])
        self._factors[action] = np.linalg.qr(stacked, mode="r")
        self._played[action] += 1
        moved = seen != (self._least, self._worst)
        for index in np.flatnonzero(self._played) if moved else (action,):
            self._fit(int(index))
        self._time += 1

    def best(self, context: float | None) -> int:
        predicted = self._theta @ self._polynomials(context)
        return int(np.where(self._played > 0, predicted, math.inf).argmin())

    def _polynomials(self, context: float | None) -> NDArray[np.float64]:  # [features]
        assert context is not None
        low, high = self._contexts
        z = min(1.0, max(-1.0, 2 * (context - low) / (high - low) - 1))
        return np.cos(np.arange(self._features) * math.acos(z))

    def _failure(self) -> float:
        """The cost that a failed run counts: that of the worst run that did not fail."""
        return self._worst if self._worst > 0 else 1.0

    @property
    def _range(self) -> float:
        return self._worst - self._least if self._least < math.inf else 0.0

    def _fit(self, action: int) -> None:
        features = self._features
        factor = self._factors[action]
        rows, costs = factor[:, :features], factor[:, features] + self._failure() * factor[:, features + 1]
        theta = np.linalg.lstsq(rows, costs, rcond=None)[0]
        bound = np.concatenate([[self._failure()], 2 * self._range / np.arange(1, features)])
        if (abs(theta) > bound).any():
            # Where the bound is 0, and so the coefficient, SciPy asks for a little room.
            room = np.maximum(bound, 1e-12 * self._failure())
            theta = lsq_linear(rows, costs, (-room, room), method="bvls").x
        self._theta[action] = theta
        self._spread[action] = ((rows @ theta - costs) ** 2).sum()

    def _rate(self) -> float:
        """η."""
        features, actions, time = self._features, len(self._theta), self._time - 1
        approximation = (math.pi + 2 / math.pi * math.log(2 * features + 1)) * self._range / (2 * features + 2)
        regret = max(0.0, self._online - float(self._spread.sum()))
        denominator = regret + 2 * approximation**2 * time
        return 2 * time * math.sqrt(actions * time / denominator) if denominator > 0 else 0.0

    def state(self) -> dict[str, Any]:
        return {
            "theta": torch.tensor(self._theta),
            "factors": torch.tensor(self._factors),
            "spread": torch.tensor(self._spread),
            "played": torch.tensor(self._played),
            "online": self._online,
            "least": self._least,
            "worst": self._worst,
            "time": self._time,
        }

    def restored(self, owner: str, state: Any) -> ChebCB:
        found = ChebCB(len(self._theta), self._contexts, self._features)
        for name in ("theta", "factors", "spread", "played"):
            saved = saved_tensor(owner, state, name, getattr(self, f"_{name}").shape)
            setattr(found, f"_{name}", saved.numpy().copy())
        for name in ("online", "least", "worst"):
            setattr(found, f"_{name}", saved_number(owner, state, name, least=0.0))
        found._time = saved_integer(owner, state, "time", least=1)
        return found
