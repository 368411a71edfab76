"""The learning rate that ``minimize`` chooses where none is given."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Final

import torch
from torch import Tensor

from optex.errors import NotPositiveDefiniteError
from optex.estimators import Posterior
from optex.evaluators import Evaluation, EvaluationRequest, RandomDraws
from optex.minimizers.tracker import Tracker
from optex.optimizer import OptEx
from optex.sources import GradientSource
from optex.stepping import Snapshot

__all__ = ["AutomaticRate"]

_APART: Final = 4.0  # ratio of two neighbouring rates of the line search; less where N is above _SPREAD
_SPREAD: Final = 8
_TRIALS: Final = 24  # no further batch of rates is tried after as many
_SHARE: Final = 0.25  # of the rate whose single step was best: a run takes several
_GROWTH: Final = 1.1  # after a round that found a lower loss
_PATIENCE: Final = 3  # rounds in a row that found none
_CUTS: Final = (0.5, 0.25, 0.1, 0.04, 0.01)  # the rate is then multiplied by one of these
_AHEAD: Final = 4  # steps walked on predictions to choose among them
_ROUNDING: Final = 32  # units in the last place that two losses may differ by and count as equal


class AutomaticRate:
    """Finds a first learning rate by line search and lets the losses measured drive it from there.

    **Search.** The losses one step of the base optimizer away from x0 are measured at N rates at once, on a
    geometric grid around the rate that the base has; the grid is extended while its end is best. The run begins
    with a quarter of the best rate: the best single step is too long to be repeated.

    **Drive.** A round that measures a lower loss than any before raises the rate by a tenth. After three
    rounds in a row that do not, the run goes back to the best point, with the base optimizer's state as at the
    start, and the rate is cut, to the one of a few whose next steps come out lowest on predicted gradients.
    That costs no gradient. Losses that are equal but for rounding are ranked by the gradients' largest
    components.

    Args:
        optimizer: the one whose base gets the rates.
        source: of the gradients.
        tracker: the optimizer's evaluator.

    Attributes:
        chosen: the first rate, once the search is over.
        rate: the present one.

    Source: the "bold driver", which grows the rate while the error falls and cuts it, from the point before
    and without momentum, where it does not: Vogl, Mangis, Rigler, Zink, Alkon, Biological Cybernetics 59
    (1988) 257-263; Battiti, Complex Systems 3 (1989) 331-342. Search and predicted cuts are ours.
    """

    def __init__(self, optimizer: OptEx, source: GradientSource, tracker: Tracker) -> None:
        self._optimizer = optimizer
        self._source = source
        self._tracker = tracker
        self._start = Snapshot(optimizer.base, None)
        self._best_loss = self._best_norm = math.inf
        self._best: tuple[Tensor, Evaluation] | None = None
        self._stalled = 0
        self.chosen: float = self.rate

    @property
    def rate(self) -> float:
        """The base optimizer's learning rate."""
        return float(self._optimizer.base.param_groups[0]["lr"])

    @rate.setter
    def rate(self, rate: float) -> None:
        for group in self._optimizer.base.param_groups:
            group["lr"] = rate

    # ------------------------------------------------------------------ search

    def search(self) -> Iterator[None]:
        """Choose the first rate; yields after every batch of gradients that were computed at once."""
        tracker, count = self._tracker, self._optimizer.parallelism
        tracker.evaluate(self._request(self._optimizer.stepper.point[None]))
        self._note()
        yield
        assert self._best is not None
        tracker.known, start = self._best, self._best[1]  # the first round begins there
        apart = _APART ** min(1.0, _SPREAD / count)
        losses: dict[float, float] = {}
        rates = [self.rate * apart ** (i - count // 2) for i in range(count)]
        while rates and not tracker.stationary:
            with torch.no_grad():
                points = self._first_steps(rates, start)
            found = tracker.attempt(self._request(points)).losses.tolist()
            losses |= {r: f if math.isfinite(f) else math.inf for r, f in zip(rates, found, strict=True)}
            self._note()
            yield
            rates = self._beyond(losses, apart) if len(losses) < _TRIALS else []
        if losses:
            self.rate = _SHARE * min(losses, key=lambda rate: losses[rate])
        self.chosen = self.rate

    def _request(
        self,
        points: Tensor,  # [n, d]
    ) -> EvaluationRequest:
        draws = [RandomDraws() for _ in points]
        stepper = self._optimizer.stepper
        return EvaluationRequest(
            self._source, stepper.vector, points, [None] * len(points), draws, observe=stepper.observe
        )

    def _first_steps(
        self,
        rates: list[float],
        start: Evaluation,  # of one point
    ) -> Tensor:  # [rates, d]
        """Where one step from x0 leads at each rate."""
        stepper = self._optimizer.stepper
        points = []
        stepper.mark()
        for rate in rates:
            self.rate = rate
            stepper.recall(start.observations, 0)
            stepper.step(start.gradients[0])
            points.append(stepper.point)
            stepper.rewind()
        return torch.stack(points)

    def _beyond(self, losses: dict[float, float], apart: float) -> list[float]:
        """The next N rates to try; none where the best rate has a worse one on either side."""
        count = self._optimizer.parallelism
        best, lowest, highest = min(losses, key=lambda rate: losses[rate]), min(losses), max(losses)
        if losses[best] < self._tracker.start_loss and best == highest:
            return [highest * apart**i for i in range(1, count + 1)]
        if not losses[best] < self._tracker.start_loss or best == lowest:
            return [lowest / apart**i for i in range(count, 0, -1)]
        return []

    # ------------------------------------------------------------------ drive

    def follow(self) -> None:
        """Set the rate from what the last round measured."""
        if self._note():
            self._stalled = 0
            self.rate *= _GROWTH
            return
        self._stalled += 1
        if self._stalled >= _PATIENCE:
            self.back()

    def back(self) -> None:
        """Return to the best point, and lower the rate."""
        assert self._best is not None
        rate, (point, evaluation) = self.rate, self._best
        self._stalled = 0
        self._tracker.known = self._best
        self._start.restore()
        self._optimizer.stepper.move_to(point)
        self.rate = self._cut(rate, evaluation)

    @torch.no_grad()
    def _cut(
        self,
        rate: float,
        here: Evaluation,  # of one point
    ) -> float:
        """The lower rate whose next steps come out lowest on predicted gradients."""
        optimizer = self._optimizer
        rates = [cut * rate for cut in _CUTS]
        if not len(optimizer.history):
            return rates[-1]
        try:
            posterior = optimizer.estimator.fit(optimizer.history)
        except NotPositiveDefiniteError:
            return rates[-1]
        optimizer.stepper.mark()
        changes = {r: self._predicted_change(r, here, posterior) for r in rates}
        best = min(rates, key=lambda r: changes[r])
        return best if changes[best] < 0 else rates[-1]

    def _predicted_change(
        self,
        rate: float,
        start: Evaluation,  # of one point
        posterior: Posterior,
    ) -> float:
        """The loss's predicted change over the next steps: Σ_i ½ (ĝ_i + ĝ_{i+1}) · (y_{i+1} - y_i)."""
        stepper = self._optimizer.stepper
        self.rate = rate
        gradient = start.gradients[0]
        here, total = stepper.point, gradient.new_zeros(())
        stepper.recall(start.observations, 0)
        for i in range(_AHEAD):
            with stepper.drafting() if i else nullcontext():
                stepper.step(gradient)
            before, here = here, stepper.point
            predicted = posterior.means(posterior.locate(here[None]))[0]
            total += (gradient + predicted) @ (here - before) / 2
            gradient = predicted
        stepper.rewind()
        return float(total.nan_to_num(nan=math.inf))

    def _note(self) -> bool:
        """Whether the last request found a better point than any before; if so, keep it."""
        tracker = self._tracker
        losses, norms = tracker.evaluation.losses, tracker.norms.tolist()
        rounding = _ROUNDING * torch.finfo(losses.dtype).eps
        found = False
        for i, (loss, norm) in enumerate(zip(losses.tolist(), norms, strict=True)):
            slack = rounding * abs(self._best_loss) if math.isfinite(self._best_loss) else 0.0
            lower = loss < self._best_loss - slack or (
                loss <= self._best_loss + slack and norm < self._best_norm
            )
            if lower and math.isfinite(norm):
                self._best_loss, self._best_norm, found = loss, norm, True
                self._best = tracker.points[i].clone(), tracker.row(i)
        return found
