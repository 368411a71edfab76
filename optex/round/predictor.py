"""The predictor: it owns history, estimator and fitted posterior."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from optex.checks import check_integer, saved_entry
from optex.errors import JitterWarning, NotPositiveDefiniteError, warn
from optex.estimators import Estimator, GradientHistory, HoldLast, Posterior
from optex.estimators.arrivals import Arrivals
from optex.estimators.history import Locations, Overwritten

__all__ = ["Predictor", "default_history_size"]


def default_history_size(parallelism: int) -> int:
    """T0 where none is named.

    Raises:
        ValueError: ``parallelism`` is no integer of at least 1.

    >>> default_history_size(4), default_history_size(16)
    (16, 32)
    """
    check_integer("default_history_size", "parallelism", parallelism)
    return 16 if parallelism <= 8 else 32


@dataclass(frozen=True)
class _Before:
    """What remembering some pairs is about to change."""

    history: Overwritten
    estimator: dict[str, Any]
    posterior: Posterior | None


class Predictor:
    """Predicts gradients from those remembered; a round asks for its posterior and hands it what was measured.

    Attributes:
        estimator: makes posteriors of the history, and learns from how they did.
        history: the pairs to predict from.
    """

    def __init__(self, estimator: Estimator, history: GradientHistory) -> None:
        self.estimator = estimator
        self.history = history
        self._posterior: Posterior | None = None

    def posterior(self) -> Posterior | None:
        """The estimator fitted to the history, anew only when that has changed; None while it is empty."""
        if self._posterior is None and len(self.history):
            try:
                self._posterior = self.estimator.fit(self.history)
            except NotPositiveDefiniteError as error:
                warn(f"OptEx: {error}. The last gradient is held for this round.", JitterWarning)
                self._posterior = HoldLast().fit(self.history)
        return self._posterior

    def remember(
        self,
        points: Tensor,  # [n, d]
        gradients: Tensor,  # [n, d]
        noise_variance: Sequence[float],  # n
        measured: Sequence[tuple[Tensor, Tensor] | None],  # n
        located: Locations | None = None,
    ) -> list[int]:
        """Put the pairs into the history, after the estimator has learned how well it had predicted them.

        Args:
            points, gradients, noise_variance: the pairs, as in ``GradientHistory.append``.
            measured: where their steps had been measured before, as in ``Estimator.judge``.
            located: the points as the draft located them; None where it did not.

        Returns:
            Their slots in the history, in their order; of more pairs than it holds, those of the last ones.
        """
        posterior, arrivals = self.posterior(), None
        if posterior is not None:
            arrivals = Arrivals(self.history, points, gradients, located)
            self.estimator.judge(posterior, arrivals, measured)
        self._posterior = None
        self.history.append(points, gradients, noise_variance, arrivals)
        held = min(len(points), self.history.size)
        return [(self.history.newest - age) % self.history.size for age in reversed(range(held))]

    def before_remembering(self, count: int) -> _Before:
        """What remembering ``count`` pairs would change, for ``take_back``."""
        return _Before(self.history.before_append(count), self.estimator.state_dict(), self._posterior)

    def take_back(self, before: _Before) -> None:
        """Undo what happened since ``before_remembering``; may be called again."""
        self._posterior = None
        self.history.take_back(before.history)
        self.estimator.load_state_dict(before.estimator)
        self._posterior = before.posterior

    def state_dict(self) -> dict[str, Any]:
        """The history, and what the estimator has learned."""
        return {"history": self.history.state_dict(), "estimator": self.estimator.state_dict()}

    def loaded(self, state: dict[str, Any]) -> Predictor:
        """A new predictor with these settings and a saved history; this one stays as it is.

        Raises:
            ValueError: the history is of another size or dimension, or the state is not what is saved here.
        """
        history, estimator = self.history.like(), copy.deepcopy(self.estimator)
        history.load_state_dict(saved_entry("OptEx.load_state_dict", state, "history"))
        estimator.load_state_dict(saved_entry("OptEx.load_state_dict", state, "estimator"))
        return Predictor(estimator, history)
