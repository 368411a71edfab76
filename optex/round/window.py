"""The steps ahead, each with a minibatch and random numbers of its own, and the progress of the run."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from optex.evaluators import RandomDraws
from optex.round.stride import Stride
from optex.round.surprise import Surprises
from optex.sources import GradientSource

__all__ = ["BatchQueue", "PlannedStep", "Progress", "RoundRequest"]


@dataclass(frozen=True)
class PlannedStep:
    """A step not taken yet.

    Attributes:
        batch: its minibatch.
        number: of the batch, in the order they came; None for a closure's.
        measured: point [d] and gradient [d] of its evaluation in an earlier round; None without one.
        draws: the random numbers of its evaluations, the same each time.
    """

    batch: Any
    number: int | None = None
    measured: tuple[Tensor, Tensor] | None = None
    draws: RandomDraws = field(default_factory=RandomDraws)


@dataclass(frozen=True)
class RoundRequest:
    """What ``rounds`` hands to ``step`` in the closure's place, so that hooks and schedulers see a step."""

    source: GradientSource
    window: tuple[PlannedStep, ...]


@dataclass(frozen=True)
class Progress:
    """How far a run is; a round replaces it as a whole, by one assignment.

    Attributes:
        rounds: ended so far.
        steps_taken: steps of the base optimizer kept so far.
        planned: batches that became planned steps, those taken among them.
        window: the planned steps that are not taken yet.
        surprises: what measured gradients said of their predictions.
        stride: steps that the next round drafts for each gradient.
    """

    rounds: int = 0
    steps_taken: int = 0
    planned: int = 0
    window: tuple[PlannedStep, ...] = ()
    surprises: Surprises = field(default_factory=Surprises)
    stride: Stride = field(default_factory=Stride)


class BatchQueue:
    """Batches drawn and not planned yet, numbered; an interrupt at any line loses none of them."""

    def __init__(self) -> None:
        self._drawn: deque[tuple[int, Any]] = deque()

    def __copy__(self) -> BatchQueue:
        twin = BatchQueue()
        twin._drawn.extend(self._drawn)
        return twin

    def draw(self, batches: Iterator[Any], progress: Progress, count: int) -> None:
        """Take batches until ``count`` of them wait in the window and here, or there are no more."""
        missing = count - len(progress.window) - len(self.waiting(progress))
        if missing > 0:
            numbered = zip(
                itertools.count(self.next_number(progress)), itertools.islice(batches, missing), strict=False
            )
            self._drawn.extend(numbered)

    def waiting(self, progress: Progress) -> list[PlannedStep]:
        """The batches here as steps to plan."""
        while self._drawn and self._drawn[0][0] < progress.planned:
            self._drawn.popleft()
        return [PlannedStep(batch, number) for number, batch in self._drawn]

    def at_hand(self, progress: Progress) -> int:
        """How many drawn batches belong to steps not taken yet."""
        return len(progress.window) + len(self.waiting(progress))

    def next_number(self, progress: Progress) -> int:
        """The number of the next batch: how many were drawn in all."""
        return (
            self._drawn[-1][0] + 1
            if self._drawn and self._drawn[-1][0] >= progress.planned
            else progress.planned
        )

    def clear(self) -> None:
        """Drop all."""
        self._drawn.clear()
