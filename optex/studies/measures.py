"""The measures of every study: acceleration against vanilla, rounds to a level, and spreads over seeds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "VANILLA",
    "Outcome",
    "Spread",
    "Summary",
    "acceleration",
    "best_so_far",
    "geometric_mean",
    "largest_acceleration",
    "rounds_behind",
    "rounds_to_level",
]

VANILLA: Final = "vanilla"  # the method that all others are measured against


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over those seeds that have a value.

    Attributes:
        mean: NaN where no seed has a value.
        deviation: NaN where fewer than two seeds have one.
        count: how many seeds have one.
    """

    mean: float
    deviation: float
    count: int

    @classmethod
    def over(cls, values: Iterable[float]) -> Spread:
        """The spread of those values that are not NaN."""
        known = [value for value in values if not math.isnan(value)]
        return cls(
            mean=float(np.mean(known)) if known else math.nan,
            deviation=float(np.std(known, ddof=1)) if len(known) > 1 else math.nan,
            count=len(known),
        )


@dataclass(frozen=True)
class Outcome:
    """What one run came to.

    Attributes:
        final_loss: after its last round; NaN where it stopped before.
        rounds_to_vanilla: the first round with a loss no higher than vanilla's after a number of rounds that
            the study names; NaN where the run did not get there.
        acceleration: as the function of that name has it; NaN where vanilla was not run far enough.
        accepted: mean steps kept a round.
        gradients: evaluated.
        seconds: it took.
        stopped: whether it ended early because something was not finite.
    """

    final_loss: float
    rounds_to_vanilla: float
    acceleration: float
    accepted: float
    gradients: int
    seconds: float
    stopped: bool


@dataclass(frozen=True)
class Summary:
    """A method's outcomes over the seeds.

    Attributes:
        seeds: runs made.
        final_loss: over the runs that were not stopped early.
        rounds_to_vanilla: over the runs that reached vanilla's loss.
        acceleration: over the runs that have one.
        accepted, gradients, seconds: means over all runs.
        stopped: how many runs ended early.
    """

    seeds: int
    final_loss: Spread
    rounds_to_vanilla: Spread
    acceleration: Spread
    accepted: float
    gradients: float
    seconds: float
    stopped: int

    @classmethod
    def over(cls, outcomes: Sequence[Outcome]) -> Summary:
        """The summary of one method's runs, of which there is at least one."""
        return cls(
            seeds=len(outcomes),
            final_loss=Spread.over(run.final_loss for run in outcomes),
            rounds_to_vanilla=Spread.over(run.rounds_to_vanilla for run in outcomes),
            acceleration=Spread.over(run.acceleration for run in outcomes),
            accepted=float(np.mean([run.accepted for run in outcomes])),
            gradients=float(np.mean([run.gradients for run in outcomes])),
            seconds=float(np.mean([run.seconds for run in outcomes])),
            stopped=sum(run.stopped for run in outcomes),
        )


def best_so_far(
    loss: ArrayLike,  # [rounds + 1]
) -> NDArray[np.float64]:  # [rounds + 1]
    """The lowest loss up to each round; rounds without a loss (NaN) leave it as it is.

    >>> best_so_far([3.0, 4.0, 1.0, math.nan]).tolist()
    [3.0, 3.0, 1.0, 1.0]
    """
    values = np.asarray(loss, dtype=float)
    return np.minimum.accumulate(np.where(np.isnan(values), np.inf, values))


def acceleration(
    loss: Sequence[float],  # [rounds + 1]
    vanilla: Sequence[float],  # [reach · rounds + 1, or more]
    reach: int,
) -> float:
    """How many rounds of vanilla one round of the method is worth.

    At round r: (first vanilla round whose best loss so far is at most the method's best by r) / r. The
    run's acceleration is the mean of that at a third, two thirds and all of the rounds.

    Only vanilla's first ``reach · rounds`` rounds count, so that a run has the same acceleration however far
    vanilla was run; with ``reach`` = N they are as many as the target's steps. A method that is better than
    vanilla is in all of them is taken to have reached the last of them. A method that diverges keeps its best
    loss, and falls behind by standing still.

    Raises:
        ValueError: vanilla was run for fewer rounds.

    >>> vanilla = [8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]
    >>> acceleration([8.0, 6.0, 4.0, 2.0], vanilla, reach=2)     # two of vanilla's steps a round
    2.0
    >>> acceleration([8.0, math.nan, math.nan, math.nan], vanilla, reach=2)
    0.0
    """
    length = reach * (len(loss) - 1) + 1
    if len(vanilla) < length:
        raise ValueError(
            f"acceleration: {len(loss) - 1} rounds are measured against {length - 1} of vanilla's, which was "
            f"run for {len(vanilla) - 1}; run it further, or lower reach, which is {reach}"
        )
    rounds = _judged(len(loss) - 1)
    best = best_so_far(loss)[rounds]
    reached = np.searchsorted(-best_so_far(vanilla[:length]), -best).clip(max=length - 1)
    return float(np.mean(reached / rounds))


def largest_acceleration(rounds: int, reach: int) -> float:
    """The largest acceleration that can be measured: of a method that is always better than vanilla's best.

    >>> largest_acceleration(rounds=3, reach=2)     # the mean of 6 / 1, 6 / 2 and 6 / 3
    3.6666666666666665
    """
    return float(np.mean(reach * rounds / np.array(_judged(rounds))))


def _judged(rounds: int) -> list[int]:
    """The rounds that a run is judged at: a third, two thirds and all of them."""
    return [max(1, rounds // 3), max(1, 2 * rounds // 3), rounds]


def rounds_to_level(
    loss: Sequence[float] | NDArray[np.floating],  # [n]
    level: float,
    rounds: Sequence[int] | None = None,  # [n]
) -> float:
    """The first round with a loss of at most ``level``; NaN where there is none.

    Args:
        loss: after each of the rounds; NaN after the run stopped.
        level: the loss to reach.
        rounds: after which the losses were measured; None is 0, 1, 2, ...

    >>> rounds_to_level([4.0, 3.0, 2.0], level=3.0)
    1.0
    >>> rounds_to_level([4.0, 3.0, 2.0], level=3.0, rounds=[0, 10, 20])
    10.0
    """
    places = range(len(loss)) if rounds is None else rounds
    return next((float(r) for r, value in zip(places, loss, strict=True) if value <= level), math.nan)


def rounds_behind(
    loss: Sequence[float],  # [rounds + 1]
    vanilla: Sequence[float],  # [rounds + 1, or more]
) -> int:
    """The number of rounds after which the best loss so far is above vanilla's, by more than rounding.

    >>> rounds_behind([5.0, 6.0, 3.0, 2.0], [5.0, 4.0, 3.0, 2.0])
    1
    """
    best, of_vanilla = best_so_far(loss), best_so_far(vanilla)[: len(loss)]
    return int((best > of_vanilla + 1e-9 * np.abs(of_vanilla)).sum())


def geometric_mean(values: ArrayLike, floor: float = 0.05) -> float:
    """The geometric mean of the values, each raised to ``floor``: one failed run must not make it zero.

    >>> round(geometric_mean([1.0, 4.0]), 6), round(geometric_mean([0.0, 0.05]), 6)
    (2.0, 0.05)
    """
    return float(np.exp(np.mean(np.log(np.maximum(values, floor)))))
