"""What every pool of workers does: evaluate jobs at once, and survive the loss of some of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from optex.evaluators.workers.messages import Job, Outcome
from optex.evaluators.workers.objective import SharedObjective

__all__ = ["WorkerPool"]


class WorkerPool(ABC):
    """Evaluates jobs at once. One thread at a time may use it."""

    @abstractmethod
    def run(self, objective: SharedObjective, jobs: Sequence[Job], timeout: float | None) -> list[Outcome]:
        """One outcome for each job, in their order, within ``timeout`` seconds; None waits for ever."""

    def renew(self) -> None:
        """Repair what broke when jobs were lost in the last run."""

    def abandon(self) -> None:
        """Drop all evaluations under way; nobody waits for them any more."""

    def close(self) -> None:
        """Release everything that the pool has created; the next run creates it again."""
