"""The rounds of one call of ``minimize``, and its result at any time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, Final

from scipy.optimize import OptimizeResult

from optex.callback import Callback
from optex.errors import NonFiniteError, NotPositiveDefiniteError, WorkerLostError
from optex.minimizers.rate import AutomaticRate
from optex.minimizers.tracker import Tracker
from optex.optimizer import OptEx
from optex.sources import GradientSource
from optex.sources.functions import PointForm

__all__ = ["Run", "report"]

_WITHIN_GTOL: Final = "Optimization terminated successfully: the gradient is within gtol."
_WITHIN_FTOL: Final = "Optimization terminated successfully: fun changed by no more than ftol in a round."
_OUT_OF_ROUNDS: Final = "Maximum number of iterations has been exceeded."
_PRECISION_LOSS: Final = "Desired error not necessarily achieved due to precision loss."
_AT_REST: Final = f"{_PRECISION_LOSS} The learning rate came down until steps left x as it is."
_IDLE: Final = 2  # rounds in a row that evaluate the known point alone: steps no longer change it


class Run:
    """The rounds of one call of ``minimize``, and its result at any time.

    Args:
        optimizer: takes the rounds.
        source: of the gradients.
        tracker: the optimizer's evaluator.
        form: the one in which the caller sees points.
        callback: the caller's.
        automatic: whether the learning rate is chosen and adapted by the run.
    """

    def __init__(
        self,
        optimizer: OptEx,
        source: GradientSource,
        tracker: Tracker,
        form: PointForm,
        callback: Callable[..., Any] | None,
        *,
        automatic: bool,
    ) -> None:
        self._optimizer = optimizer
        self._source = source
        self._tracker = tracker
        self._form = form
        self._callback = Callback(callback)
        self._first_rate = self._present_rate()
        self._rate = AutomaticRate(optimizer, source, tracker) if automatic else None
        self._taken = 0
        self._accepted = 0

    def until(self, maxiter: int, ftol: float | None) -> OptimizeResult:
        """Rounds until a tolerance is met, the callback stops them or ``maxiter`` is reached."""
        tracker, rate = self._tracker, self._rate
        before, idle, work = math.nan, 0, self._work()
        while self._taken < maxiter:
            count = tracker.count
            try:
                kept = next(work)
            except (NonFiniteError, NotPositiveDefiniteError) as error:
                if tracker.stationary:  # a step failed that is no longer needed
                    return self._result(0, _WITHIN_GTOL)
                if rate is None:
                    return self._result(2, f"{_PRECISION_LOSS} {error}")
                self._taken += 1
                work = self._rounds()
                rate.back()
                continue
            except WorkerLostError as error:
                if not tracker.count:
                    raise
                return self._result(3, str(error))
            self._accepted += kept
            idle = idle + 1 if tracker.count == count else 0
            if idle == _IDLE:
                return self._result(2, _AT_REST)
            if idle:
                continue
            self._taken += 1
            stopped = self._callback.stops(lambda: self._result(1, "The run has not ended."))
            if stopped:
                return self._result(99, stopped)
            if tracker.stationary:
                return self._result(0, _WITHIN_GTOL)
            if kept:
                here = tracker.start_loss
                if ftol is not None and abs(here - before) <= ftol * max(abs(here), abs(before), 1.0):
                    return self._result(0, _WITHIN_FTOL)
                before = here
                if rate is not None:
                    rate.follow()
        return self._result(1, _OUT_OF_ROUNDS)

    def _work(self) -> Iterator[int]:
        """Steps kept after each batch of gradients: 0 while a rate is searched."""
        if self._rate is not None:
            for _ in self._rate.search():
                yield 0
            self._first_rate = self._rate.chosen
        yield from self._rounds()

    def _rounds(self) -> Iterator[int]:
        for report in self._optimizer.rounds(itertools.repeat(None), self._source):
            yield report.accepted

    def _present_rate(self) -> float | None:
        rate = self._optimizer.base.param_groups[0].get("lr")
        return None if rate is None else float(rate)

    def _result(self, status: int, message: str) -> OptimizeResult:
        tracker = self._tracker
        return OptimizeResult(
            x=self._form.present(tracker.point),
            fun=tracker.loss,
            jac=self._form.present(tracker.gradient),
            nit=self._taken,
            njev=tracker.count,
            nfev=tracker.count,
            nstep=self._accepted,
            lr=self._first_rate,
            lr_final=self._present_rate(),
            success=status == 0,
            status=status,
            message=message,
        )


def report(result: OptimizeResult) -> str:
    """What ``disp=True`` prints, in SciPy's form."""
    rates = "none" if result.lr is None else f"{result.lr:.6g} at first, {result.lr_final:.6g} at last"
    entries = [
        ("Current function value", f"{result.fun:.6g}"),
        ("Iterations", f"{result.nit} (rounds of gradients computed at once)"),
        ("Steps of the optimizer", f"{result.nstep}"),
        ("Function evaluations", f"{result.nfev}"),
        ("Gradient evaluations", f"{result.njev}"),
        ("Learning rate", rates),
    ]
    return "\n".join([result.message, *(f"         {name}: {value}" for name, value in entries)])
