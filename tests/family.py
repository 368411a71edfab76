"""The family, declared once: tests/test_family_*.py run their suites over these tables.

A row is a paper's method with one setting. A paper's own file of tests has what only that paper promises.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from scipy.optimize import OptimizeResult
from torch import nn
from torch.optim import Optimizer

from optex import (
    ConsensusSource,
    GradientSource,
    InexactBilevelSource,
    PenaltyHypergradient,
    SmoothBilevel,
    SPSASource,
)
from optex.optimizers import MFAC, MKOR, NAG, SCALE, AdaGradNorm, AdaHessian, HeavyBall, TripleMomentum
from optex.solvers import newton_schulz_inverse
from tests.references import consensus, spsa
from tests.references.maid import dense_quadratic
from tests.references.penalty_bilevel import QuadraticBilevel

__all__ = ["FAMILY", "SOLVERS", "SOURCES", "Member", "SolverRow", "SourceRow"]


@dataclass(frozen=True)
class Member:
    """An optimizer as the suite drives it.

    Attributes:
        make: of a network (``tests.models.network``: linear, tanh, linear; float64), with any further groups'
            worth of settings left at their defaults.
        needs_graph: gradients have to come by ``backward(create_graph=True)``.
        groups: takes parameter groups handed to it, as torch's optimizers do: ``make_groups`` of such a list.
        under_optex: may be the base of ``OptEx``.
        compiles: ``torch.compile`` of a step leaves no graph break.
    """

    make: Callable[[nn.Module], Optimizer]
    make_groups: Callable[[list[dict]], Optimizer] | None = None
    needs_graph: bool = False
    under_optex: bool = True
    compiles: bool = True


FAMILY: dict[str, Member] = {
    "scale": Member(
        make=lambda model: SCALE.of(model, lr=0.02),
        make_groups=lambda groups: SCALE(groups, lr=0.02, role="last"),
    ),
    "adagrad-norm": Member(lambda model: AdaGradNorm(model.parameters(), lr=0.5), AdaGradNorm),
    "nag": Member(
        lambda model: NAG(model.parameters(), L=10.0, mu=0.1),
        lambda groups: NAG(groups, L=10.0, mu=0.1),
    ),
    "nag-convex": Member(
        lambda model: NAG(model.parameters(), lr=0.05, rule="convex"),
        lambda groups: NAG(groups, lr=0.05, rule="convex"),
    ),
    "nag-estimated": Member(
        lambda model: NAG(model.parameters()),
        NAG,
    ),
    "triple-momentum": Member(
        lambda model: TripleMomentum(model.parameters(), lr=0.1),
        lambda groups: TripleMomentum(groups, lr=0.1),
    ),
    "heavy-ball": Member(
        lambda model: HeavyBall(model.parameters(), L=10.0, mu=0.1),
        lambda groups: HeavyBall(groups, L=10.0, mu=0.1),
    ),
    # Its m × m system is solved by LAPACK, outside of what torch compiles.
    "m-fac": Member(
        make=lambda model: MFAC(model.parameters(), lr=0.05, window_size=8, damping=1e-2),
        make_groups=lambda groups: MFAC(groups, window_size=4),
        compiles=False,
    ),
    "m-fac-momentum": Member(
        make=lambda model: MFAC(
            model.parameters(), lr=0.02, window_size=4, damping=0.1, momentum=0.9, weight_decay=1e-3
        ),
        make_groups=lambda groups: MFAC(groups, window_size=4, momentum=0.5),
        compiles=False,
    ),
    # A step differentiates the gradient again, which torch.compile does not trace.
    "adahessian": Member(
        lambda model: AdaHessian(model.parameters(), lr=0.05), AdaHessian, needs_graph=True, compiles=False
    ),
    "adahessian-signed": Member(
        lambda model: AdaHessian(model.parameters(), lr=0.05, average="signed", block="rows"),
        lambda groups: AdaHessian(groups, lr=0.05, average="signed", block="rows"),
        needs_graph=True,
        compiles=False,
    ),
    # Steps alternate between those that update factors and those that do not; a graph holds for one of them.
    "mkor": Member(lambda model: MKOR.with_sgd(model, 0.05, interval=3), compiles=False),
    "mkor-exact": Member(lambda model: MKOR.with_sgd(model, 0.05, variant="exact", interval=2), compiles=False),
    "mkor-h": Member(lambda model: MKOR.with_sgd(model, 0.05, hybrid=True, interval=3), compiles=False),
}


@dataclass(frozen=True)
class SourceRow:
    """A source as the suite drives it.

    Attributes:
        make: builds everything anew, from the same seeds: the source, the parameters that are optimised, and
            ``count -> batches`` (None for each where it needs none).
        lr: of SGD, at which the objective falls.
        exact: the gradient that the source estimates, one tensor a parameter, given what ``make`` made; None
            where there is no closed form.
        tolerance: relative error of the mean of so many ``answers`` against it.
        pickles: can be sent to worker processes.
    """

    make: Callable[[], tuple[GradientSource, list[torch.Tensor], Callable[[int], list]]]
    lr: float = 0.05
    exact: Callable[[GradientSource, list[torch.Tensor]], list[torch.Tensor]] | None = None
    tolerance: float = 1e-6
    answers: int = 1
    pickles: bool = True


def _consensus(*, vectorized):
    hessian = torch.tensor([[1.0, 0.3, 0.0], [0.3, 0.8, 0.2], [0.0, 0.2, 1.2]], dtype=torch.float64)

    def make():
        start = torch.tensor([2.0, -1.0, 1.0], dtype=torch.float64)
        parameters = [nn.Parameter(start[:2].clone()), nn.Parameter(start[2:].clone())]
        objective = consensus.Bowl(hessian, None if vectorized else parameters)
        samples = 300 if vectorized else 30
        source = ConsensusSource(
            objective, parameters, samples=samples, alpha=2.0, sigma=0.4, vectorized=vectorized
        )
        return source, parameters, lambda count: [None] * count

    return make


def _exact_consensus(source, parameters):
    x = torch.cat([p.detach() for p in parameters])
    return list(consensus.proximal_gradient(source.objective.hessian, x, source.hopping_rate).split([2, 1]))


def _spsa():
    hessian = torch.tensor([[1.0, 0.3, 0.0], [0.3, 0.8, 0.2], [0.0, 0.2, 1.2]], dtype=torch.float64)
    start = torch.tensor([2.0, -1.0, 1.0], dtype=torch.float64)
    parameters = [nn.Parameter(start[:2].clone()), nn.Parameter(start[2:].clone())]
    source = SPSASource(spsa.Bowl(hessian, parameters), parameters, queries=16)
    generator = torch.Generator().manual_seed(0)
    return source, parameters, lambda count: list(0.1 * torch.randn(count, generator=generator).double())


def _exact_spsa(source, parameters):
    x = torch.cat([p.detach() for p in parameters])
    return list((source.objective.hessian @ x).split([2, 1]))


def _penalty(*, rate=None, sigma=0.01, sampled=False):
    def make():
        problem = QuadraticBilevel()
        parameters = [nn.Parameter(torch.linspace(-1.0, 2.0, problem.outer, dtype=torch.float64))]
        source = PenaltyHypergradient(
            problem.upper,
            problem.lower,
            parameters[0],
            torch.zeros(problem.inner, dtype=torch.float64),
            sigma=sigma,
            rate=rate,
            tolerance=1e-8,
            deterministic=not sampled,
        )
        return source, parameters, problem.batches if sampled else lambda count: [None] * count

    return make


def _exact_penalty(source, parameters):
    x = parameters[0].detach().numpy()
    return [torch.from_numpy(QuadraticBilevel().penalty_gradient(x, source.sigma))]


_QUADRATIC = dense_quadratic(6, 3)


def _inexact_bilevel() -> tuple[GradientSource, list[torch.Tensor], Callable[[int], list]]:
    theta = nn.Parameter(torch.ones(3, dtype=torch.float64))
    start = torch.zeros(6, dtype=torch.float64)
    levels = SmoothBilevel(_QUADRATIC.lower, _QUADRATIC.upper, start, **_QUADRATIC.constants())
    source = InexactBilevelSource(levels, [theta], epsilon=1e-8, delta=1e-8)
    return source, [theta], lambda count: [None] * count


SOURCES: dict[str, SourceRow] = {
    "consensus": SourceRow(_consensus(vectorized=False), lr=0.1),
    "consensus-vectorized": SourceRow(
        _consensus(vectorized=True), lr=0.1, exact=_exact_consensus, tolerance=0.03, answers=200
    ),
    "spsa": SourceRow(_spsa, exact=_exact_spsa, tolerance=0.05, answers=400),
    "penalty-bilevel": SourceRow(_penalty(), lr=0.3, exact=_exact_penalty),
    "penalty-bilevel-gradient-steps": SourceRow(_penalty(rate=0.3), lr=0.3, exact=_exact_penalty),
    "penalty-bilevel-sampled": SourceRow(
        _penalty(sampled=True), lr=0.1, exact=_exact_penalty, tolerance=0.02, answers=100
    ),
    "inexact-bilevel": SourceRow(
        _inexact_bilevel,
        lr=0.005,
        exact=lambda source, parameters: [_QUADRATIC.gradient(parameters[0].detach())],
    ),
}


@dataclass(frozen=True)
class SolverRow:
    """A solver as the suite drives it.

    Attributes:
        make: the problem, built anew from the same seeds: what the solver is called with, by name. Functions of
            the user's stand in it as ``function``.
        solve: called with these, and with ``tol=`` and ``maxiter=`` where a test chooses them.
        error: how far a result is from the truth.
        tolerance: of that error.
        function: the name of the user's function among the arguments, None where there is none: the suite lets
            it return NaN.
        iterates: takes ``maxiter``, and needs more than one.
    """

    make: Callable[[], dict[str, Any]]
    solve: Callable[..., OptimizeResult]
    error: Callable[[OptimizeResult], float]
    tolerance: float = 1e-6
    function: str | None = None
    iterates: bool = True


def _newton_schulz(*, init: str, batch: tuple[int, ...] = ()) -> SolverRow:
    def make():
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(*batch, 12, 5, generator=generator, dtype=torch.float64)
        return {"S": inputs.mT @ inputs}

    def error(result):
        return float((result.x - torch.linalg.inv(make()["S"])).abs().max())

    return SolverRow(make, partial(newton_schulz_inverse, init=init), error)


SOLVERS: dict[str, SolverRow] = {
    "newton-schulz": _newton_schulz(init="trace"),
    "newton-schulz-norm": _newton_schulz(init="norm", batch=(2, 3)),
}
