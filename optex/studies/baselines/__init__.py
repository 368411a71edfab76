"""Baselines: the methods that OptEx is compared with, and OptEx itself, by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from optex.studies.baselines.data_parallel import tuned_data_parallel
from optex.studies.baselines.in_turn import target, vanilla
from optex.studies.baselines.interface import BaseFactory, Method, Recorder, Setting, Trace
from optex.studies.baselines.lbfgs import lbfgs
from optex.studies.baselines.line_search import line_search
from optex.studies.baselines.nowcast import nowcast, nowcast_dmd
from optex.studies.baselines.scipy_methods import lbfgs_scipy, nonlinear_cg
from optex.studies.baselines.with_optex import hold_last, optex, optex_alone, optex_paper, picard

__all__ = ["METHODS", "BaseFactory", "Method", "MethodEntry", "Recorder", "Setting", "Trace", "make_method"]


@dataclass(frozen=True)
class MethodEntry:
    """A method as the registry knows it.

    Attributes:
        run: runs a problem from its start for a setting's rounds.
        description: one line.
        own_optimizer: the optimizer that it uses instead of the base optimizer; None where it uses that.
        tunes_rate: whether it runs with several learning rates and keeps the best run.
        deterministic_only: whether it refuses problems with sampled gradients.
        strides: whether it takes steps at which no gradient is evaluated, where the setting's stride allows.
        gradients_alone: whether it gives the base optimizer nothing but gradients; base optimizers that are
            ``ObservesEvaluations`` need more of an evaluation.
    """

    run: Method
    description: str
    own_optimizer: str | None = None
    tunes_rate: bool = False
    deterministic_only: bool = False
    strides: bool = False
    gradients_alone: bool = False


METHODS: Final[dict[str, MethodEntry]] = {
    "vanilla": MethodEntry(vanilla, "the base optimizer, one step a round"),
    "target": MethodEntry(target, "the base optimizer, N steps a round in turn: the ideal"),
    "data-parallel": MethodEntry(
        tuned_data_parallel,
        "one step with N gradients' mean; best lr of × 1, √N, N",
        tunes_rate=True,
        gradients_alone=True,
    ),
    "hold-last": MethodEntry(hold_last, "N - 1 steps with the last gradient, then a true one"),
    "line-search": MethodEntry(
        line_search, "N lengths of the base optimizer's step, the best kept", gradients_alone=True
    ),
    "picard": MethodEntry(picard, "replay of held gradients within tolerance 1, no estimator"),
    "lbfgs": MethodEntry(lbfgs, "L-BFGS, strong-Wolfe search; an evaluation is a round", own_optimizer="lbfgs"),
    "lbfgs-scipy": MethodEntry(
        lbfgs_scipy(10),
        "SciPy's L-BFGS-B, history 10; an evaluation is a round",
        "l-bfgs-b",
        deterministic_only=True,
    ),
    "lbfgs-scipy-50": MethodEntry(
        lbfgs_scipy(50),
        "SciPy's L-BFGS-B, history 50; an evaluation is a round",
        "l-bfgs-b",
        deterministic_only=True,
    ),
    "nonlinear-cg": MethodEntry(
        nonlinear_cg, "SciPy's conjugate gradients; an evaluation is a round", "cg", deterministic_only=True
    ),
    "nowcast": MethodEntry(
        nowcast, "jumps along the line through the last iterates, by the loss", gradients_alone=True
    ),
    "nowcast-dmd": MethodEntry(
        nowcast_dmd, "jumps by the iterates' linear dynamics, by the loss", gradients_alone=True
    ),
    "optex-paper": MethodEntry(optex_paper, "Algorithm 1 of the paper"),
    "optex-alone": MethodEntry(optex_alone, "OptEx with one gradient a round, whatever N is", strides=True),
    "optex": MethodEntry(optex, "OptEx with its defaults", strides=True),
}


def make_method(name: str) -> MethodEntry:
    """The method of that name.

    Raises:
        ValueError: the name is unknown.
    """
    if name not in METHODS:
        raise ValueError(f"method: {name!r} is not one of {', '.join(METHODS)}")
    return METHODS[name]
