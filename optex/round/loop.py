"""Rounds over batches, as an iterator with a length."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Iterator, Sized
from typing import Any

from optex.round.report import RoundReport
from optex.round.round import Rounds

__all__ = ["RoundLoop"]


class RoundLoop(Iterator[RoundReport]):
    """What ``OptEx.rounds`` answers: one report a round, until the batches are used up.

    ``len`` is there where the batches have one, for progress bars: rounds made so far and the fewest that the
    batches left can be enough for, N of them a round. It grows where a round uses fewer, and ends exact.

    Args:
        reports: runs a round for each report.
        batches: that the rounds use.
        rounds: runs them, and knows how many batches are drawn and not used yet.
    """

    def __init__(
        self, reports: Generator[RoundReport, None, None], batches: Iterable[Any], rounds: Rounds
    ) -> None:
        self._reports, self._batches, self._rounds = reports, batches, rounds
        self._before = self._drawn()
        self._made = 0
        self._ended = False

    def _drawn(self) -> int:
        return self._rounds.queue.next_number(self._rounds.progress)

    def __iter__(self) -> RoundLoop:
        return self

    def __next__(self) -> RoundReport:
        try:
            report = next(self._reports)
        except BaseException:  # the end, or an error, after which nothing more comes either
            self._ended = True
            raise
        self._made += 1
        return report

    def __len__(self) -> int:
        if self._ended:
            return self._made
        if not isinstance(self._batches, Sized):
            raise TypeError(
                f"rounds: batches are a {type(self._batches).__name__}, which has no length; hand over a list "
                "or a DataLoader where one is needed"
            )
        to_come = max(len(self._batches) - (self._drawn() - self._before), 0)
        left = to_come + self._rounds.queue.at_hand(self._rounds.progress)
        return self._made + math.ceil(left / self._rounds.parallelism)

    def close(self) -> None:
        """Make no more rounds; batches at hand are kept for the next loop."""
        self._reports.close()
        self._ended = True
