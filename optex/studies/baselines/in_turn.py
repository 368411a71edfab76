"""The base optimizer run in turn: vanilla, which all else is measured against, and target, the ideal."""

from __future__ import annotations

from itertools import islice

from optex.sources import backpropagate
from optex.stepping import ObservesEvaluations
from optex.studies.baselines.interface import Recorder, Setting, Trace
from optex.studies.problems import Problem

__all__ = ["target", "vanilla"]


def vanilla(problem: Problem, setting: Setting) -> Trace:
    """One step a round."""
    return _in_turn(problem, setting, steps=1)


def target(problem: Problem, setting: Setting) -> Trace:
    """N steps a round, one after the other: the most that N gradients at once can give the same optimizer."""
    return _in_turn(problem, setting, steps=setting.parallelism)


def _in_turn(problem: Problem, setting: Setting, steps: int) -> Trace:
    base = setting.base_optimizer(problem)
    create_graph = isinstance(base, ObservesEvaluations) and base.needs_graph
    lr = base.param_groups[0]["lr"]
    with Recorder(problem, setting.rounds) as recorder:
        batches = problem.batches()
        while not recorder.done:
            for batch in islice(batches, steps):
                base.zero_grad()
                backpropagate(problem(batch), create_graph=create_graph)
                base.step()
            recorder.round(gradients=steps, accepted=steps)
    return recorder.trace(lr)
