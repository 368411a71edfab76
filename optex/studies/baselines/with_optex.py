"""Methods that are configurations of OptEx: its defaults, the paper's, two without a model of the gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from optex.estimators import HoldLast
from optex.optimizer import OptEx
from optex.round import Last, WithinTolerance
from optex.studies.baselines.interface import Recorder, Setting, Trace
from optex.studies.problems import Problem

__all__ = ["history_choice", "hold_last", "optex", "optex_alone", "optex_paper", "picard", "run_rounds"]


def optex(problem: Problem, setting: Setting) -> Trace:
    """``OptEx`` with its defaults, the setting's stride, and the setting's T0 where there is one."""
    base = setting.base_optimizer(problem)
    return run_rounds(
        problem,
        setting,
        OptEx(
            base,
            parallelism=setting.parallelism,
            stride=setting.stride,
            history_size=setting.history_size,
        ),
    )


def optex_alone(problem: Problem, setting: Setting) -> Trace:
    """``optex`` with one gradient a round, whatever the setting's N is; a default T0 is that for N = 1."""
    return optex(problem, replace(setting, parallelism=1))


def optex_paper(problem: Problem, setting: Setting) -> Trace:
    """Algorithm 1 of the paper."""
    base = setting.base_optimizer(problem)
    return run_rounds(problem, setting, OptEx.from_paper(base, setting.parallelism, **history_choice(setting)))


def hold_last(problem: Problem, setting: Setting) -> Trace:
    """N - 1 steps with the last gradient measured, then a true one."""
    base = setting.base_optimizer(problem)
    return run_rounds(
        problem,
        setting,
        OptEx(base, parallelism=setting.parallelism, history_size=1, estimator=HoldLast(), acceptance=Last()),
    )


def picard(problem: Problem, setting: Setting) -> Trace:
    """Steps with held gradients, kept as far as those were measured within one step of where they are used."""
    base = setting.base_optimizer(problem)
    return run_rounds(
        problem,
        setting,
        OptEx(
            base,
            parallelism=setting.parallelism,
            stride=1,
            history_size=1,
            estimator=HoldLast(),
            acceptance=WithinTolerance(1.0, adaptive=False),
        ),
    )


def history_choice(setting: Setting) -> dict[str, Any]:
    """The setting's T0 as a keyword argument; none where each method is to take its own default."""
    return {} if setting.history_size is None else {"history_size": setting.history_size}


def run_rounds(problem: Problem, setting: Setting, optimizer: OptEx) -> Trace:
    """Run any ``OptEx`` of the problem's parameters for the setting's rounds."""
    lr = optimizer.param_groups[0]["lr"]
    with Recorder(problem, setting.rounds) as recorder:
        for report in optimizer.rounds(problem.batches(), problem.source()):
            recorder.round(
                gradients=report.evaluated,
                accepted=report.accepted,
                overhead_seconds=report.overhead_seconds,
            )
            if recorder.done:
                break
    return recorder.trace(lr)
