"""The stride: how many steps a round drafts for every gradient that it evaluates."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Final

from optex.checks import as_float, saved_integer, saved_number, shown
from optex.round.surprise import Surprises

__all__ = ["LARGEST", "Stride", "read_stride"]

LARGEST: Final = 16.0  # for "auto"
# Factors of the stride: where predictions hold, and where they do not.
GROWTH: Final = 3.0
SAMPLED_GROWTH: Final = 1.25
SHRINKING: Final = 1.5
WHOLE: Final = 0.9  # of the drafted steps kept: as good as all
# Relative errors of predictions of deterministic gradients:
WRONG: Final = 0.5  # from here on the stride does not grow
WORTHLESS: Final = 1.0  # from here on it is 1
# Squared relative errors of a prediction used for many steps, where gradients are sampled:
HARMLESS: Final = 0.25
LARGEST_ERROR: Final = 0.65
SLACK: Final = 1.3  # between growing and shrinking
# A round of one gradient and one step is the base optimizer's; where rounds gain no more, predicting rests:
WATCH: Final = 32  # rounds without a gain before the first rest
WATCH_AGAIN: Final = 16  # before the others
SHORTEST_REST: Final = 16  # rounds; each rest is LENGTHENING times as long as the one before
LENGTHENING: Final = 4
LONGEST_REST: Final = 512


def read_stride(stride: Any) -> float:
    """The largest stride of the argument ``stride``.

    Raises:
        TypeError: it is neither ``"auto"`` nor a number.
        ValueError: it is less than 1, or not finite.
    """
    if stride == "auto":
        return LARGEST
    if isinstance(stride, bool) or not isinstance(stride, Real):
        raise TypeError(
            "stride must be 'auto', or how many steps a round drafts at most for each gradient that it "
            f"evaluates (1: none on predictions alone), got {shown(stride)}"
        )
    largest = as_float(stride)
    if not 1 <= largest < math.inf:
        raise ValueError(f"stride must be 'auto' or a finite number of at least 1, got {shown(stride)}")
    return largest


@dataclass(frozen=True)
class Stride:
    """Drafted steps per gradient evaluated; a round replaces it as a whole.

    It grows while rounds are kept whole and predictions hold, and shrinks to what was kept. With deterministic
    gradients the acceptance measures what can be kept; the stride does not grow where the relative error of
    predictions was ``WRONG`` or more, and is 1 where it was ``WORTHLESS`` or more.

    With sampled gradients nothing is measured at steps that are not evaluated, and the noise in a prediction is
    the same in all the K steps that use it, where that of K gradients would average out. With
    e² = ‖μ - ∇F‖² / ‖∇F‖² and s² = E‖g - ∇F‖² / ‖∇F‖² (:class:`Surprises`) the squared error of the sum of K
    steps is K² e² with predictions and K s² with gradients. The stride grows where

        e² ≤ min(HARMLESS + s² / K, LARGEST_ERROR)

    and shrinks where e² is ``SLACK`` times that.

    Where rounds of one gradient have gained no step for long, predicting rests for a while, as it costs time
    and memory traffic: the rounds of a rest are the base optimizer's steps.

    Attributes:
        most: the largest stride.
        value: the stride of the next round, 1 to ``most``.
        rest: rounds left to rest.
        pause: how long the next rest will be.
        watched: rounds without a gain since the last rest.
    """

    most: float = LARGEST
    value: float = 1.0
    rest: int = 0
    pause: int = SHORTEST_REST
    watched: int = 0

    def steps(self, count: int) -> int:
        """How many steps a round drafts that evaluates ``count`` of them.

        >>> Stride(value=2.5).steps(3)
        7
        """
        return max(count, int(count * self.value))

    def positions(self, count: int) -> list[int]:
        """Which of its steps a round evaluates: the first, and others spread evenly up to the last.

        >>> Stride(value=3.0).positions(4), Stride(value=3.0).positions(1)
        ([0, 4, 7, 11], [0])
        """
        last = self.steps(count) - 1
        return [round(i * last / (count - 1)) for i in range(count)] if count > 1 else [0]

    def after(self, count: int, kept: int, surprises: Surprises, *, deterministic: bool) -> Stride:
        """The stride after a round that evaluated ``count`` of its steps and kept ``kept``."""
        value = self.value
        whole = kept >= WHOLE * self.steps(count)
        if deterministic:
            value = GROWTH * value if whole else min(value, kept / count)
            if surprises.relative_error >= WRONG:
                value = min(value, self.value if surprises.relative_error < WORTHLESS else 1.0)
        else:
            error = surprises.relative_error**2
            bearable = min(HARMLESS + surprises.relative_noise / value, LARGEST_ERROR)
            if error > SLACK * bearable:
                value /= SHRINKING
            elif error <= bearable:
                value *= SAMPLED_GROWTH
            if not whole:
                value = min(value, kept / count)
        return replace(self, value=min(max(value, 1.0), self.most))._watching(
            count, kept, sampled=not deterministic
        )

    def _watching(self, count: int, kept: int, *, sampled: bool) -> Stride:
        """The stride with the gain of a round noted; it rests if there was none for long."""
        if count > 1:
            return self
        if self.value > 1 if sampled else kept > 1:
            return replace(self, watched=0, pause=SHORTEST_REST)
        if self.watched + 1 < (WATCH if self.pause == SHORTEST_REST else WATCH_AGAIN):
            return replace(self, watched=self.watched + 1)
        return replace(self, rest=self.pause, pause=min(LENGTHENING * self.pause, LONGEST_REST), watched=0)

    def rested(self) -> Stride:
        """One round of the rest later."""
        return replace(self, rest=self.rest - 1)

    def state_dict(self) -> dict[str, Any]:
        """All attributes but ``most``."""
        return {name: getattr(self, name) for name in ("value", "rest", "pause", "watched")}

    def loaded(self, state: dict[str, Any]) -> Stride:
        """This stride with saved attributes; the value at most this one's ``most``.

        Raises:
            ValueError: it is not what ``state_dict`` saves.
        """
        value = min(saved_number("Stride.loaded", state, "value", least=1), self.most)
        rest, pause, watched = (
            saved_integer("Stride.loaded", state, name) for name in ("rest", "pause", "watched")
        )
        return replace(self, value=value, rest=rest, pause=pause, watched=watched)
