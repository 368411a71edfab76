"""The one record of a round: it grows from part to part, from the draft to the report."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from optex.estimators import Posterior
from optex.estimators.history import Locations
from optex.linalg import rows_at
from optex.round.report import RoundReport
from optex.round.surprise import Surprises
from optex.round.window import PlannedStep, Progress
from optex.small import tensor
from optex.sources import GradientSource
from optex.stepping import Buffers, GradientMask, Stepper
from optex.vector_space import VectorSpace

__all__ = ["RoundRecord"]


@dataclass
class RoundRecord:
    """What a round knows. Each attribute is set by the part that it is listed under, and read by later parts.

    Attributes:
        number: rounds before this one.
        source: of the gradients.
        window: the n steps with a batch of their own, the first not taken yet.
        steps: K >= n, drafted.
        positions: n, which of the K those of the window are, the first 0.
        stepper: the base optimizer, marked at the round's start.
        space: of all vectors of the round; it has their lengths, and says which are finite.
        buffers: what an evaluation changes beside the gradients; None where that is not known.
        undo: calls that take the round back, the last first; each is added before the change it takes back.

        **Draft.** proxies: [n, d], the points drafted for the window's steps; row 0 is the round's start.
        drafted: [n, d], the gradients predicted there; zeros where none was.
        predicted: rows of ``drafted`` with a prediction.
        distances: n entries: the prediction distance [], how far from where its step was measured each
            drafted gradient was predicted; None for a step that had not been measured.
        draft_mask: parameters that were stepped.
        located: by row, the proxies as seen from the history that they were predicted from.

        **Evaluate.** evaluated: which proxies were evaluated.
        evaluations: gradients computed, those lost left out.
        losses: [n], NaN where not evaluated.
        gradients: [n, d], true gradients at the proxies.
        noise_variance: n, of one component of each gradient; NaN where the noise is of unknown size.
        usable: n flags: evaluated, loss and gradient finite, gradient plausible.
        mask: parameters that got a gradient at the first point evaluated.
        buffers_after: per point evaluated, the buffers behind it; None where there are none.
        observations: per row, what the base optimizer observed there; None where it asked for nothing.
        retried, lost: indices of proxies whose evaluation was lost at first, and for good.
        gradient_seconds: wall time of the evaluations.
        failed: index of the step whose loss or gradient ended the round; None where none did.

        **Remember.** surprises: what the gradients said of their predictions, with those of earlier rounds.
        slots: by row, where a proxy is in the history now.
        posterior: the estimator fitted to the history with this round's pairs; None where the acceptance
            does not use it.

        **Replay.** accepted: steps kept.

        **Keep.** after: the run's progress behind the round.
    """

    number: int
    source: GradientSource
    window: Sequence[PlannedStep]
    steps: int
    positions: Sequence[int]
    stepper: Stepper
    space: VectorSpace
    buffers: Buffers | None
    undo: list[Callable[[], object]] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)

    proxies: Tensor = field(init=False)
    drafted: Tensor = field(init=False)
    predicted: list[int] = field(default_factory=list)
    distances: list[Tensor | None] = field(init=False)
    draft_mask: GradientMask = field(init=False)
    located: dict[int, Locations] = field(default_factory=dict)

    evaluated: range = field(default_factory=lambda: range(0))
    evaluations: int = 0
    losses: Tensor = field(init=False)
    gradients: Tensor = field(init=False)
    noise_variance: list[float] = field(init=False)
    usable: list[bool] = field(default_factory=list)
    mask: GradientMask = field(init=False)
    buffers_after: tuple[list[Tensor], ...] | None = None
    observations: list[Any] | None = None
    retried: tuple[int, ...] = ()
    lost: tuple[int, ...] = ()
    gradient_seconds: float = 0.0
    failed: int | None = None

    surprises: Surprises = field(default_factory=Surprises)
    slots: dict[int, int] = field(default_factory=dict)
    posterior: Posterior | None = None
    accepted: int = 0
    after: Progress | None = None

    def take_back(self) -> None:
        """Undo all that the round did, the last change first."""
        while self.undo:
            self.undo[-1]()
            self.undo.pop()

    def report(self) -> RoundReport:
        """The report of the round, for the user."""
        noise = self._mean_noise()
        return RoundReport(
            number=self.number,
            losses=self.losses,
            drafted=self.steps,
            accepted=self.accepted,
            evaluated=self.evaluations,
            stride=self.steps / len(self.window),
            dropped=tuple(i for i in self.evaluated if not self.usable[i] and i not in self.lost),
            retried=self.retried,
            lost=self.lost,
            relative_errors=self._relative_errors(),
            prediction_error=self.surprises.relative_error,
            noise_variance=noise,
            gradient_norm=self._gradient_norm() if noise > 0 else math.nan,  # or nothing compares with it
            dimension=self.space.dimension,
            batch_numbers=tuple(n for i in self.evaluated if (n := self.window[i].number) is not None),
            seconds=time.perf_counter() - self.started,
            gradient_seconds=self.gradient_seconds,
        )

    def note_distance(self, row: int, here: Locations) -> None:
        """Note a row's distance to the nearest iterate in the history, where gradients are deterministic."""
        if self.source.deterministic:  # else a pair of another minibatch is no measurement of this step
            nearest = here.squared_distances[0, here.history.representatives].min()
            self.distances[row] = tensor(nearest).sqrt()

    @cached_property
    def comparison(self) -> tuple[list[int], Tensor, Tensor]:  # k rows, [k], [k]
        """Rows predicted and measured, how far each prediction was off, and the measured gradients' lengths."""
        rows = [i for i in self.predicted if i in self.evaluated and self.usable[i]]
        truth = rows_at(self.gradients, rows)
        if not rows:
            return rows, truth.new_empty(0), truth.new_empty(0)
        gaps, norms = self.space.norms([*(rows_at(self.drafted, rows) - truth), *truth]).view(2, -1)
        return rows, gaps, norms

    def _relative_errors(self) -> Tensor:  # [k]
        _, gaps, norms = self.comparison
        return gaps / norms.clamp_min(torch.finfo(norms.dtype).tiny)

    def _mean_noise(self) -> float:
        told = [self.noise_variance[i] for i in self.evaluated if self.usable[i]]
        told = [variance for variance in told if not math.isnan(variance)]
        return sum(told) / len(told) if told else math.nan

    def _gradient_norm(self) -> float:
        first = self.evaluated.start
        rows, _, norms = self.comparison
        if first in rows:
            return float(norms[rows.index(first)])
        return float(self.space.norms([self.gradients[first]])[0])
