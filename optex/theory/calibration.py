"""Calibration: the error that predictions expect of themselves, beside the error that they have."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor

from optex.errors import NotPositiveDefiniteError
from optex.estimators import GradientHistory, Posterior
from optex.optimizer import OptEx
from optex.round import RoundReport
from optex.small import jitter_unsaid
from optex.theory.bounds import error_bound

__all__ = ["Calibration", "CalibrationSummary", "Comparison"]


@dataclass(frozen=True)
class Comparison:
    """One predicted gradient beside the true one.

    Attributes:
        predicted: √(s² v), the standard deviation of one component of the error, as the model has it.
        actual: ‖μ - ∇F‖ / √d, the root mean square of the components of the error.
        gradient: ‖∇F‖ / √d.
        within_one, within_two: shares of the components whose error is at most one and two ``predicted``.
        dimension: d.
    """

    predicted: float
    actual: float
    gradient: float
    within_one: float
    within_two: float
    dimension: int


@dataclass(frozen=True)
class CalibrationSummary:
    """A summary of comparisons. Normal errors of the size predicted have coverages 0.683 and 0.954.

    Attributes:
        count: how many comparisons.
        skipped: points for which the model had no standard deviation, or one of 0.
        ratio: geometric mean of actual / predicted: above 1 the model is overconfident, below 1 underconfident.
        spread: geometric standard deviation of actual / predicted; 1 where it is the same everywhere.
        correlation: Spearman's, of predicted and actual; NaN for fewer than three, or where either is constant.
        coverage_one, coverage_two: shares of components within one and two standard deviations, mean.
        bounded: share of the errors below ``error_bound`` at 95 %.
        relative_error: median of ‖μ - ∇F‖ / ‖∇F‖.
    """

    count: int
    skipped: int
    ratio: float
    spread: float
    correlation: float
    coverage_one: float
    coverage_two: float
    bounded: float
    relative_error: float


class Calibration:
    """Collects predicted standard deviations and true errors of predicted gradients.

    The model says that, given the history, a component of ∇F(θ) - μ(θ) has variance s² v(θ) (paper, Proposition
    4.1): v is ``Posterior.variance`` and s² ``Posterior.prior_variance``. ``watch`` compares that with a run's
    own evaluations, each predicted from the history before its round; ``record`` with gradients from any
    other source.

    A run is the same with and without, bit for bit. While a round is under way a copy of
    the history is held, 2 · T0 · d numbers.

    Attributes:
        comparisons: in the order in which they were made.
        skipped: points without a comparison.

    >>> import itertools, torch, optex
    >>> theta = torch.nn.Parameter(torch.linspace(-2, 2, 50, dtype=torch.float64))
    >>> optimizer = optex.OptEx(torch.optim.Adam([theta], lr=0.05), parallelism=4, deterministic=True)
    >>> calibration = Calibration()
    >>> rounds = optimizer.rounds(itertools.repeat(None, 40), lambda _: (theta**4).sum())
    >>> for report in calibration.watch(optimizer, rounds):
    ...     pass
    >>> summary = calibration.summary()
    >>> summary.count > 20, summary.correlation > 0.5
    (True, True)
    """

    def __init__(self) -> None:
        self.comparisons: list[Comparison] = []
        self.skipped: int = 0

    def watch(
        self,
        optimizer: OptEx,
        rounds: Iterable[RoundReport],
        gradient: Callable[[Tensor], Tensor] | None = None,
    ) -> Iterator[RoundReport]:
        """Pass on the reports of a run, and compare what each round remembered with what had been predicted.

        Args:
            optimizer: whose rounds these are.
            rounds: ``optimizer.rounds(...)``.
            gradient: the true gradient [d] at a point [d]; None for the one that the round measured, which is
                right where gradients are deterministic. Sampled ones have noise that is no error of the
                prediction. It must leave the optimizer's parameters as they are.

        Raises:
            ValueError: the optimizer's vectors are split among ranks.
        """
        if optimizer.history.space.is_split:
            raise ValueError("Calibration.watch: vectors are split among ranks; use OptEx(shard=False)")
        reports = iter(rounds)
        while True:
            history, before = optimizer.history, optimizer.history.appended
            posterior = self._fitted(optimizer)
            try:
                report = next(reports)
            except StopIteration:
                return
            if optimizer.history is history:
                points, measured = _newest(history, history.appended - before)
                if posterior is not None and len(points):
                    truth = measured if gradient is None else torch.stack([gradient(point) for point in points])
                    self.record(posterior, points, truth)
                elif before:
                    self.skipped += len(points)
            yield report

    @staticmethod
    def _fitted(optimizer: OptEx) -> Posterior | None:
        """The optimizer's present posterior, over a copy of its history."""
        if not len(optimizer.history):
            return None
        history = optimizer.history.like()
        history.load_state_dict(optimizer.history.state_dict())
        try:
            return jitter_unsaid(lambda: optimizer.estimator.fit(history))
        except NotPositiveDefiniteError:
            return None

    @torch.no_grad()
    def record(
        self,
        posterior: Posterior,
        points: Tensor,  # [n, d]
        gradients: Tensor,  # [n, d]
    ) -> None:
        """Compare predictions with true gradients at points that the posterior's history does not hold.

        Raises:
            ValueError: shapes differ from [n, dimension].
        """
        dimension = posterior.history.dimension
        if points.ndim != 2 or points.shape != gradients.shape or points.shape[1] != dimension:
            raise ValueError(
                f"Calibration.record: points {tuple(points.shape)} and gradients {tuple(gradients.shape)} must "
                f"both be [n, {dimension}]"
            )
        unit = float(posterior.prior_variance())
        for point, truth in zip(points, gradients, strict=True):
            predicted = math.sqrt(unit * float(posterior.variance(point))) if unit >= 0 else math.nan
            error = (posterior.mean(point) - truth).to(torch.float64)
            actual = float(error.square().mean().sqrt())
            if not (0 < predicted < math.inf and math.isfinite(actual)):
                self.skipped += 1
                continue
            size = error.abs()
            self.comparisons.append(
                Comparison(
                    predicted=predicted,
                    actual=actual,
                    gradient=float(truth.to(torch.float64).square().mean().sqrt()),
                    within_one=float((size <= predicted).to(torch.float64).mean()),
                    within_two=float((size <= 2 * predicted).to(torch.float64).mean()),
                    dimension=dimension,
                )
            )

    @property
    def predicted(self) -> NDArray[np.float64]:  # [comparisons]
        """Standard deviations of a component, as predicted."""
        return np.array([c.predicted for c in self.comparisons])

    @property
    def actual(self) -> NDArray[np.float64]:  # [comparisons]
        """Root mean squares of the components of the true errors."""
        return np.array([c.actual for c in self.comparisons])

    def summary(self) -> CalibrationSummary:
        """A summary of all comparisons so far.

        Raises:
            ValueError: there is none.
        """
        found = self.comparisons
        if not found:
            raise ValueError(
                f"Calibration.summary: nothing was compared ({self.skipped} points skipped); watch more rounds"
            )
        predicted, actual = self.predicted, self.actual
        ratios = np.log(np.maximum(actual, np.finfo(float).tiny) / predicted)
        varied = len(found) > 2 and np.ptp(predicted) > 0 and np.ptp(actual) > 0
        bounds = [error_bound(c.predicted, c.dimension) / math.sqrt(c.dimension) for c in found]
        return CalibrationSummary(
            count=len(found),
            skipped=self.skipped,
            ratio=float(np.exp(ratios.mean())),
            spread=float(np.exp(ratios.std())),
            correlation=float(np.asarray(spearmanr(predicted, actual))[0]) if varied else math.nan,
            coverage_one=float(np.mean([c.within_one for c in found])),
            coverage_two=float(np.mean([c.within_two for c in found])),
            bounded=float(np.mean(actual <= np.array(bounds))),
            relative_error=float(np.median([c.actual / c.gradient if c.gradient else math.inf for c in found])),
        )


def _newest(history: GradientHistory, count: int) -> tuple[Tensor, Tensor]:  # [n, d], [n, d]
    """The last pairs appended that are still held, oldest first; copies."""
    slots = [(history.newest - age) % history.size for age in reversed(range(min(count, history.size)))]
    rows = history.displacements[slots]
    if not slots:
        return rows, history.gradients[slots]
    return rows + history.reference.to(rows.device, rows.dtype), history.gradients[slots].clone()
