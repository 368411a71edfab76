"""What a bandit's learner is asked and told."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Learner"]


class Learner(ABC):
    """Knows what actions have cost. Costs are not negative, and runs that failed have none."""

    @abstractmethod
    def probabilities(self, context: float | None) -> NDArray[np.float64]:  # [actions]
        """The probability of each action; their sum is 1."""

    @abstractmethod
    def learn(self, context: float | None, action: int, chance: float, cost: float | None) -> None:
        """Learn the cost of an action that was chosen with probability ``chance``; None where it failed."""

    @abstractmethod
    def best(self, context: float | None) -> int:
        """The action that seems to cost least."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Everything that ``restored`` needs: numbers and tensors of its own."""

    @abstractmethod
    def restored(self, owner: str, state: Any) -> Learner:
        """Another one of this kind, with that state.

        Raises:
            ValueError: it is no such state.
        """
