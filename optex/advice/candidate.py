"""One way to run OptEx, and what was measured of it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

__all__ = ["Candidate"]


@dataclass(frozen=True)
class Candidate:
    """One way to run OptEx, measured over some rounds from the present parameters.

    Attributes:
        parallelism: N, gradients evaluated at once.
        stride: as ``OptEx`` takes it.
        evaluator: what computes them: ``"sequential"`` (in turn), ``"vectorized"``, ``"workers"``, or the name
            of another evaluator's class.
        rounds: those run; all that follows is measured over their second half.
        steps: kept in a round, on average.
        stride_reached: steps drafted for each gradient, in the last round.
        prediction_error: how wrong predictions were, ``‖μ - ∇F‖ / ‖∇F‖`` as in ``RoundReport``, median; NaN
            where nothing was predicted, infinite where gradients had nothing in common.
        gradient_seconds: time of a round's N gradients.
        overhead_seconds: time of a round beyond them: predicting, stepping, remembering.
        plain_gradient_seconds, plain_step_seconds: of the base optimizer alone, to compare with.
        memory_bytes: upper bound beyond the base optimizer's own; the evaluator's needs come on top.
    """

    parallelism: int
    stride: float | Literal["auto"]
    evaluator: str
    rounds: int
    steps: float
    stride_reached: float
    prediction_error: float
    gradient_seconds: float
    overhead_seconds: float
    plain_gradient_seconds: float
    plain_step_seconds: float
    memory_bytes: int

    @property
    def seconds_per_step(self) -> float:
        """Seconds of a round over the steps that it keeps."""
        return (self.gradient_seconds + self.overhead_seconds) / self.steps

    @property
    def relative_time(self) -> float:
        """``seconds_per_step`` over the base optimizer's own; below 1 OptEx is faster."""
        return self.seconds_per_step / (self.plain_gradient_seconds + self.plain_step_seconds)

    @property
    def gradient_ratio(self) -> float:
        """Time of a round's gradients over that of one: 1 where N at once take no longer, N in turn."""
        return self.gradient_seconds / self.plain_gradient_seconds

    @property
    def break_even_seconds(self) -> float:
        """Seconds that a gradient must take for this to pay, all else equal; 0 if always, infinite if never."""
        gain = self.steps - self.gradient_ratio
        cost = self.overhead_seconds - self.steps * self.plain_step_seconds
        if gain <= 0:
            return 0.0 if cost < 0 else math.inf
        return max(0.0, cost / gain)

    def as_dict(self) -> dict[str, Any]:
        """The attributes, and the properties that follow from them."""
        derived = ("seconds_per_step", "relative_time", "gradient_ratio", "break_even_seconds")
        return {**asdict(self), **{name: getattr(self, name) for name in derived}}
