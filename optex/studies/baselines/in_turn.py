"""The base optimizer run in turn: vanilla, which all methods are measured against, and target, the ideal."""

from __future__ import annotations

from itertools import islice

from optex.round.arguments import source_of
from optex.studies.baselines.interface import Recorder, Setting, Trace
from optex.studies.problems import Problem

__all__ = ["target", "vanilla"]


def vanilla(problem: Problem, setting: Setting) -> Trace:
    """One step a round."""
    return _in_turn(problem, setting, steps=1)


def target(problem: Problem, setting: Setting) -> Trace:
    """N steps a round, each with a gradient of its own: as far as N gradients at once could lead."""
    return _in_turn(problem, setting, steps=setting.parallelism)


def _in_turn(problem: Problem, setting: Setting, steps: int) -> Trace:
    base = setting.base_optimizer(problem)
    source = source_of(base, problem.source(), deterministic=problem.deterministic)
    lr = base.param_groups[0]["lr"]
    with Recorder(problem, setting.rounds) as recorder:
        batches = problem.batches()
        while not recorder.done:
            for batch in islice(batches, steps):
                base.zero_grad()
                source.gradient(batch)
                base.step()
            recorder.round(gradients=steps, accepted=steps)
    return recorder.trace(lr)
