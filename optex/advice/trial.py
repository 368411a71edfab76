"""Rounds of OptEx, run from the present parameters and taken back."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Final

from optex.advice.subject import Kept, Subject
from optex.advice.timing import Clock, PlainLoop
from optex.errors import NonFiniteError
from optex.evaluators import Evaluator
from optex.optimizer import OptEx
from optex.round import RoundReport, default_history_size
from optex.stepping import Buffers

__all__ = ["FEWEST", "PARALLELISM", "Trial", "run_trials"]

PARALLELISM: Final = (1, 4, 8)
_SHARES: Final = (0.4, 0.5, 1.0)  # of the time left, in this order
# N = 1 rests after 32 rounds without a gain, and rounds of a rest show nothing.
_MOST: Final = {1: 32, 4: 16, 8: 12}
FEWEST: Final = 8  # rounds to judge by: half of them count, and history and stride have to grow before


@dataclass(frozen=True)
class Trial:
    """What was measured over the second half of some rounds, when history and stride have grown.

    Attributes:
        parallelism: N.
        rounds: all that were run, the first half included.
        steps: kept a round, on average.
        overhead_seconds: time of a round beyond its gradients, on average.
        stride: the last round's.
        prediction_error: median of the rounds that knew one; NaN where none did.
        memory_bytes: beyond the base optimizer's, by the formula of ``OptEx``.
    """

    parallelism: int
    rounds: int
    steps: float
    overhead_seconds: float
    stride: float
    prediction_error: float
    memory_bytes: int


def run_trials(
    subject: Subject,
    kept: Kept,
    evaluators: Mapping[str, Evaluator],
    at_once: Mapping[str, Mapping[int, float]],
    loop: PlainLoop,
    clock: Clock,
) -> tuple[list[Trial], list[str]]:
    """A trial of every N with the evaluator that is fastest at it, and why trials are missing."""
    trials, missing = [], []
    for parallelism, share in zip(PARALLELISM, _SHARES, strict=True):
        name = min(at_once, key=lambda name: at_once[name].get(parallelism, math.inf))
        # Where the time ran out before N at once were measured, there is none left for rounds of them.
        gradients = at_once[name].get(parallelism, math.inf)
        least = FEWEST * gradients
        seconds = share * clock.left
        if least > seconds:
            seconds = clock.left if parallelism == 1 else seconds
        if least > seconds:
            missing.append(f"N = {parallelism} was not run: {FEWEST} rounds do not fit into these seconds")
            continue
        try:
            reports, spent = _run(subject, evaluators[name], parallelism, seconds)
        except NonFiniteError:
            missing.append(f"N = {parallelism} led to losses or parameters that are not finite")
            continue
        finally:
            kept.rewind()
        if len(reports) < FEWEST:
            missing.append(f"N = {parallelism}: only {len(reports)} rounds fit into these seconds")
            continue
        # On a device a round's own clocks stop before the work is done: gradients timed alone are exact.
        device = None if subject.vector.device.type == "cpu" else gradients
        trials.append(_trial(reports, spent, device, parallelism, _memory(subject, parallelism, loop)))
    return trials, missing


def _run(
    subject: Subject, evaluator: Evaluator, parallelism: int, seconds: float
) -> tuple[list[RoundReport], list[float]]:
    optimizer = OptEx(
        subject.base,
        parallelism=parallelism,
        evaluator=evaluator,
        scheduler=subject.scheduler,
        model=subject.model,
        gradient_hook=subject.gradient_hook,
    )
    reports, spent, clock = [], [], Clock(seconds)
    rounds = optimizer.rounds(itertools.cycle(subject.batches), subject.source)
    while len(reports) < _MOST[parallelism] and (clock.left or not reports):
        subject.wait()
        started = time.perf_counter()
        reports.append(next(rounds))
        subject.wait()
        spent.append(time.perf_counter() - started)
    return reports, spent


def _trial(
    reports: list[RoundReport],
    spent: list[float],
    gradient_seconds: float | None,
    parallelism: int,
    memory_bytes: int,
) -> Trial:
    half = len(reports) // 2
    late = reports[half:]
    if gradient_seconds is None:
        overhead = sum(report.overhead_seconds for report in late) / len(late)
    else:
        overhead = max(0.0, sum(spent[half:]) / len(late) - gradient_seconds)
    known = [report.prediction_error for report in late if not math.isnan(report.prediction_error)]
    return Trial(
        parallelism=parallelism,
        rounds=len(reports),
        steps=sum(report.accepted for report in late) / len(late),
        overhead_seconds=overhead,
        stride=late[-1].stride,
        prediction_error=median(known) if known else math.nan,
        memory_bytes=memory_bytes,
    )


def _memory(subject: Subject, parallelism: int, loop: PlainLoop) -> int:
    vector, n = subject.vector, parallelism
    d, t0 = vector.dimension, default_history_size(parallelism)
    numbers = (3 * t0 + 1) * d + 5 * n * d + 2 * n * d + 2 * (d + loop.state_numbers)
    buffers = [] if subject.module is None else Buffers.of(subject.module).tensors
    return numbers * vector.dtype.itemsize + (n + 1) * sum(b.numel() * b.itemsize for b in buffers)
