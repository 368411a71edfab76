"""Data parallelism: the gradients of N batches at one point, one step with their mean."""

from __future__ import annotations

import math

from optex.evaluators import RandomDraws
from optex.stepping import ParameterVector, Stepper
from optex.studies.baselines.interface import Recorder, Setting, Trace
from optex.studies.baselines.points import Points
from optex.studies.problems import Problem

__all__ = ["data_parallel", "tuned_data_parallel"]


def tuned_data_parallel(problem: Problem, setting: Setting) -> Trace:
    """``data_parallel`` with that of lr, √N · lr and N · lr whose last noise-free loss is lowest.

    The trace is the best run's, with its learning rate; it does not count what the other two runs cost.
    """
    factors = sorted({1.0, math.sqrt(setting.parallelism), float(setting.parallelism)})
    traces = [data_parallel(problem, setting, factor) for factor in factors]
    return min(traces, key=lambda trace: math.inf if math.isnan(trace.loss[-1]) else trace.loss[-1])


def data_parallel(problem: Problem, setting: Setting, factor: float) -> Trace:
    """One step a round with the mean of N gradients and ``factor`` times the learning rate."""
    base = setting.base_optimizer(problem)
    for group in base.param_groups:
        group["lr"] = factor * group["lr"]
    lr = base.param_groups[0]["lr"]
    vector = ParameterVector(problem.parameters())
    evaluator = Points(problem, vector)
    with Recorder(problem, setting.rounds) as recorder:
        stepper, batches = Stepper(base, vector), problem.batches()
        while not recorder.done:
            points = stepper.point.expand(setting.parallelism, -1)
            own_batches, draws = [next(batches) for _ in points], [RandomDraws() for _ in points]
            stepper.step(evaluator.evaluate(points, own_batches, draws).gradients.mean(0))
            evaluator.keep(-1)
            recorder.round(gradients=len(points), accepted=1)
    return recorder.trace(lr)
