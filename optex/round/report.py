"""The record a round leaves."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

__all__ = ["RoundReport"]


@dataclass(frozen=True)
class RoundReport:
    """What one round did and what it cost.

    Attributes:
        number: rounds before this one.
        losses: [n], the losses measured at the proxies; NaN where none was.
        drafted: K, steps of the base optimizer that the round drafted.
        accepted: those of them that it kept, 1..K; 0 where the round's first step was skipped because it was
            not finite.
        evaluated: true gradients computed, 1..N; one more where the first point was evaluated twice, to see
            whether a source that was declared deterministic is.
        stride: K over the steps that were to be evaluated.
        dropped: indices of proxies whose loss or gradient was not finite or not plausible.
        retried: indices of proxies whose evaluation was lost at first (a worker that died, hung or failed).
        lost: those lost at the second try, too.
        relative_errors: ``‖predicted - measured‖ / ‖measured‖`` at every proxy at which a gradient was
            predicted and measured, of sampled gradients with their noise: about 1 where that is large.
        prediction_error: how wrong predictions are, ``‖μ - ∇F‖ / ‖∇F‖``, free of the noise of sampled gradients
            (averaged over recent rounds) and noise-free anyway for deterministic ones; NaN where nothing is
            known yet, infinite where successive gradients have nothing in common.
        noise_variance: of one component of a gradient, as the source told it, mean over the usable gradients;
            0 for a deterministic source, NaN where none was told.
        gradient_norm: length of the gradient at the round's start (at the first point evaluated, where that one
            was not); NaN where ``noise_variance`` is 0 or NaN, as nothing needs it then.
        dimension: d, how many components a gradient has.
        batch_numbers: of the batches evaluated, counted from 0 in the order that they were drawn; empty where
            there are none, as for closures.
        seconds: wall time of the round.
        gradient_seconds: the part of it spent evaluating gradients.
    """

    number: int
    losses: Tensor
    drafted: int
    accepted: int
    evaluated: int
    stride: float
    dropped: tuple[int, ...]
    retried: tuple[int, ...]
    lost: tuple[int, ...]
    relative_errors: Tensor
    prediction_error: float
    noise_variance: float
    gradient_norm: float
    dimension: int
    batch_numbers: tuple[int, ...]
    seconds: float
    gradient_seconds: float

    @property
    def loss(self) -> float:
        """The loss at the round's start (at the first point evaluated, where that one was not)."""
        measured = self.losses[~self.losses.isnan()]
        return float(measured[0]) if len(measured) else math.nan

    @property
    def overhead_seconds(self) -> float:
        """Wall time beyond the gradients: predicting, stepping, remembering."""
        return self.seconds - self.gradient_seconds

    @property
    def break_even_seconds(self) -> float:
        """How slow one gradient must be for the round to pay, if its gradients take the time of one.

        A round of k steps then takes the overhead and one gradient, vanilla k gradients: it pays where a
        gradient takes more than overhead / (k - 1). Infinite at k = 1.
        """
        return self.overhead_seconds / (self.accepted - 1) if self.accepted > 1 else math.inf

    def as_dict(self) -> dict[str, float]:
        """The report in plain numbers, for a logger or a row of a table.

        What is a tuple of indices is counted, and ``relative_error`` is the mean of ``relative_errors``, NaN
        where no gradient was predicted and measured. ``losses`` and ``batch_numbers`` are left out: of the
        losses, ``loss`` is the one that can be compared with those of other rounds.
        """
        errors = self.relative_errors[~self.relative_errors.isnan()]
        return {
            "number": self.number,
            "loss": self.loss,
            **{name: getattr(self, name) for name in ("drafted", "accepted", "evaluated", "stride")},
            **{name: len(getattr(self, name)) for name in ("dropped", "retried", "lost")},
            "relative_error": float(errors.mean()) if len(errors) else math.nan,
            **{name: getattr(self, name) for name in ("prediction_error", "noise_variance", "gradient_norm")},
            "dimension": self.dimension,
            **{name: getattr(self, name) for name in ("seconds", "gradient_seconds", "overhead_seconds")},
            "break_even_seconds": self.break_even_seconds,
        }
