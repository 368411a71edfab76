"""The family, declared once: tests/test_family_*.py run their suites over these tables.

A row is a paper's method with one setting. A paper's own file of tests has what only that paper promises.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal

import numpy as np
import scipy.sparse
import torch
from scipy.optimize import OptimizeResult
from torch import nn
from torch.optim import Optimizer

from optex import (
    ConsensusSource,
    CoordinateSource,
    DynamicMask,
    GaussianPolicy,
    GradientSource,
    GymnasiumEnvironment,
    InexactBilevelSource,
    LayerSampler,
    LinearQuadratic,
    MinimaxPenaltySource,
    ObjectiveSource,
    PenaltyHypergradient,
    SemiDualSource,
    Sketch,
    SketchedSource,
    SmoothBilevel,
    SoftmaxPolicy,
    SourceWeights,
    SPSASource,
    TrajectorySource,
    minimize_equality,
    sparse_ot,
)
from optex.optimizers import MFAC, MKOR, NAG, NIGT, SCALE, AdaGradNorm, AdaHessian, HeavyBall, TripleMomentum
from optex.solvers import dcdm, newton_schulz_inverse, sor, ssor_pcg
from optex.studies.poisson import Poisson, obstacles
from optex.studies.problems.hock_schittkowski import PROBLEMS
from tests.models import regression_batches
from tests.references import consensus, deepzero, scalebio, spsa, transport
from tests.references.maid import dense_quadratic
from tests.references.penalty_bilevel import QuadraticBilevel
from tests.references.relaxation import laplacian, relaxed

__all__ = ["FAMILY", "SOLVERS", "SOURCES", "Member", "SolverRow", "SourceRow"]


@dataclass(frozen=True)
class Member:
    """An optimizer as the suite drives it.

    Attributes:
        make: of a network (``tests.models.network``: linear, tanh, linear; float64), with any further groups'
            worth of settings left at their defaults.
        needs_graph: gradients have to come by ``backward(create_graph=True)``.
        groups: takes parameter groups handed to it, as torch's optimizers do: ``make_groups`` of such a list.
        compiles: ``torch.compile`` of a step leaves no graph break.
    """

    make: Callable[[nn.Module], Optimizer]
    make_groups: Callable[[list[dict]], Optimizer] | None = None
    needs_graph: bool = False
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
    "n-igt": Member(
        lambda model: NIGT(model.parameters(), lr=0.5, rest="extrapolated"),
        lambda groups: NIGT(groups, lr=0.5, rest="extrapolated"),
    ),
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

    make: Callable[[], tuple[GradientSource, Sequence[torch.Tensor], Callable[[int], list]]]
    lr: float = 0.05
    exact: Callable[[Any, Any], list[torch.Tensor]] | None = None
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


def _coordinates(*, vectorized=False):
    def make():
        model = deepzero.block_loss(0.0 if vectorized else 0.3)
        parameters = list(model.parameters())
        mask = DynamicMask(parameters, 0.5)
        source = CoordinateSource(model, parameters, mask=mask, vectorized=vectorized, central=vectorized)
        return source, parameters, regression_batches

    return make


def _coordinates_of_a_bowl():
    hessian = torch.tensor([[1.0, 0.3, 0.0], [0.3, 0.8, 0.2], [0.0, 0.2, 1.2]], dtype=torch.float64)
    start = torch.tensor([2.0, -1.0, 1.0], dtype=torch.float64)
    parameters = [nn.Parameter(start[:2].clone()), nn.Parameter(start[2:].clone())]
    source = CoordinateSource(spsa.Bowl(hessian, parameters), parameters, deterministic=True)
    return source, parameters, lambda count: [None] * count


def _exact_coordinates(source, parameters):
    x, hessian = torch.cat([p.detach() for p in parameters]), source.passes.objective.hessian
    return list((hessian @ x + 0.5 * source.mu * hessian.diagonal()).split([2, 1]))


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


def _inexact_bilevel():
    theta = nn.Parameter(torch.ones(3, dtype=torch.float64))
    start = torch.zeros(6, dtype=torch.float64)
    levels = SmoothBilevel(_QUADRATIC.lower, _QUADRATIC.upper, start, **_QUADRATIC.constants())
    source = InexactBilevelSource(levels, [theta], epsilon=1e-8, delta=1e-8)
    return source, [theta], lambda count: [None] * count


def _exact_scalebio(source, parameters):
    losses = scalebio.Regression().losses()
    _, along = scalebio.field(losses, parameters[0], source.model, source.rival, source.alpha)
    return along


def _scalebio(*, sampled=False, layers=None):
    def make():
        problem = scalebio.Regression()
        network, rival = scalebio.line(seed=1), scalebio.line(seed=2)
        if layers is not None:
            network, rival = scalebio.Tower(seed=1), scalebio.Tower(seed=2)
        weights = SourceWeights(3, dtype=torch.float64)
        with torch.no_grad():
            weights.logits.copy_(torch.tensor([0.5, 0.0, -0.5]))
        source = MinimaxPenaltySource(
            problem.upper,
            problem.samples if sampled else problem.lower,
            weights,
            network,
            rival,
            layers=layers,
            deterministic=not sampled and layers is None,
        )

        def batches(count):
            found = problem.batches(count) if sampled else [None] * count
            return found if layers is None else list(layers.numbered(found))

        return source, source.parameters, batches

    return make


def _cart_pole():
    torch.manual_seed(0)
    source = TrajectorySource(SoftmaxPolicy(4, 2, (4,)), GymnasiumEnvironment("CartPole-v1", horizon=15), 4)
    return source, source.parameters, lambda count: [None] * count


def _exact_policy(source, parameters):
    points = [p.detach().clone().requires_grad_() for p in parameters]
    exact = source.environment.expected_return(*points, deviation=0.5, discount=source.discount)
    return list(torch.autograd.grad(-exact, points))


def _policy(*, baseline=False):
    def make():
        policy = GaussianPolicy(1, 1, hidden=(), deviation=0.5, dtype=torch.float64)
        with torch.no_grad():
            policy.mean.get_parameter("0.weight").fill_(-0.2)
            policy.mean.get_parameter("0.bias").fill_(0.3)
        source = TrajectorySource(policy, LinearQuadratic(), 40, baseline=baseline)
        return source, source.parameters, lambda count: [None] * count

    return make


def _exact_sketched(source, parameters):
    x = torch.cat([p.detach() for p in parameters])
    return list((source.source.objective.hessian @ x).split([2, 1]))


def _sketched(kind, *, fixed=False):
    hessian = torch.tensor([[1.0, 0.3, 0.0], [0.3, 0.8, 0.2], [0.0, 0.2, 1.2]], dtype=torch.float64)

    def make():
        start = torch.tensor([2.0, -1.0, 1.0], dtype=torch.float64)
        parameters = [nn.Parameter(start[:2].clone()), nn.Parameter(start[2:].clone())]
        exact = ObjectiveSource(spsa.Bowl(hessian, parameters), deterministic=fixed)
        source = SketchedSource(exact, Sketch(kind, 2, seed=1), parameters, fixed=fixed)
        return source, parameters, lambda count: [torch.zeros((), dtype=torch.float64)] * count

    return make


_HS40 = (2 ** (-1 / 3), 2**-0.5, 2 ** (-11 / 12), 2**-0.25)


def _exact_semi_dual(source, parameters):
    alpha = parameters[0].detach().numpy()
    return [-torch.from_numpy(transport.semi_dual(alpha, *transport.problem(12, 6), 1.0, 4)[1])]


def _semi_dual(*, sampled):
    def make():
        alpha = nn.Parameter(torch.linspace(-0.2, 0.2, 12, dtype=torch.float64))
        source = SemiDualSource(alpha, *transport.problem(12, 6), gamma=1.0, k=4, sampled=sampled)
        batches = source.batches(2, seed=5) if sampled else itertools.repeat(None)
        return source, [alpha], lambda count: list(itertools.islice(batches, count))

    return make


SOURCES: dict[str, SourceRow] = {
    "consensus": SourceRow(_consensus(vectorized=False), lr=0.1),
    "consensus-vectorized": SourceRow(
        _consensus(vectorized=True), lr=0.1, exact=_exact_consensus, tolerance=0.03, answers=200
    ),
    "spsa": SourceRow(_spsa, exact=_exact_spsa, tolerance=0.05, answers=400),
    "coordinates": SourceRow(_coordinates_of_a_bowl, lr=0.1, exact=_exact_coordinates, tolerance=1e-9),
    "coordinates-masked": SourceRow(_coordinates()),
    "coordinates-vectorized": SourceRow(_coordinates(vectorized=True)),
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
    "scalebio": SourceRow(_scalebio(), exact=_exact_scalebio),
    "scalebio-sampled": SourceRow(_scalebio(sampled=True), exact=_exact_scalebio, tolerance=0.03, answers=200),
    "scalebio-layers": SourceRow(_scalebio(layers=LayerSampler("blocks", interval=2)), lr=0.01),
    "policy": SourceRow(_policy(), lr=0.01, exact=_exact_policy, tolerance=0.1, answers=200),
    "policy-baseline": SourceRow(
        _policy(baseline=True), lr=0.01, exact=_exact_policy, tolerance=0.05, answers=200
    ),
    "policy-cart-pole": SourceRow(_cart_pole),
    **{
        f"sketched-{kind}": SourceRow(_sketched(kind), exact=_exact_sketched, tolerance=0.1, answers=1000)
        for kind in ("gaussian", "srht", "count", "ams")
    },
    "sketched-fixed": SourceRow(_sketched("gaussian", fixed=True)),
    "semi-dual": SourceRow(_semi_dual(sampled=False), exact=_exact_semi_dual),
    # Every three batches of two columns are an epoch.
    "semi-dual-columns": SourceRow(_semi_dual(sampled=True), exact=_exact_semi_dual, answers=30),
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
    """

    make: Callable[[], dict[str, Any]]
    solve: Callable[..., OptimizeResult]
    error: Callable[[OptimizeResult], float]
    tolerance: float = 1e-6
    function: str | None = None


_RELAXED: Final = np.random.default_rng(0).normal(size=36)


def _laplacian(form: Callable[[np.ndarray], Any], right: Callable[[np.ndarray], Any] = np.array):
    A = laplacian(6) + 0.1 * np.eye(36)
    return lambda: {"A": form(A), "b": right(A @ _RELAXED), "omega": 1.5}


def _dcdm(*, operator: bool = False) -> Callable[[], dict[str, Any]]:
    def make() -> dict[str, Any]:
        A, b = _poisson_system()
        if operator:
            return {
                "A": lambda v: torch.from_numpy(A @ v.numpy().ravel()).view(8, 8),
                "b": torch.from_numpy(b),
                "direction": lambda r: r + 0.2 * r.abs(),
            }
        return {"A": A, "b": b, "direction": lambda r: r.copy()}

    return make


def _left_over(result: OptimizeResult) -> float:
    A, b = _poisson_system()
    return float(np.linalg.norm(A @ np.asarray(result.x).ravel() - b.ravel()) / np.linalg.norm(b))


def _poisson_system() -> tuple[Any, Any]:
    problem = Poisson(obstacles((8, 8), 1, 0))
    return problem.matrix, problem.random_right_hand_side(0)


def _equality(linear_solver, name="HS7", solution=(0.0, 3**0.5), tolerance=1e-6):
    problem = PROBLEMS[name]

    def make():
        return {
            "f": problem.objective,
            "c": problem.constraints,
            "x0": torch.tensor(problem.start, dtype=torch.float64),
            "linear_solver": linear_solver,
            "seed": 0,
        }

    return SolverRow(
        make,
        minimize_equality,
        error=lambda result: max(abs(a - b) for a, b in zip(result.x.tolist(), solution, strict=True)),
        tolerance=tolerance,
        function="f",
    )


def _transport_error(result):
    a, b, C = transport.problem(9, 4)
    plans = [C, C[::-1]] if result.x.ndim == 3 else [C]
    exact = np.stack([transport.quadratic(a, b, costs, 0.5) for costs in plans])
    return float(np.abs(np.asarray(result.x).reshape(exact.shape) - exact).max())


def _transport(shape=(), *, kind=torch.from_numpy):
    def make():
        a, b, C = transport.problem(9, 4)
        costs = np.stack([C, C[::-1]]) if shape else C
        return {"a": kind(a), "b": kind(b), "C": kind(costs.copy()), "gamma": 0.5, "k": 6}

    return make


def _newton_schulz(*, init: Literal["trace", "norm"], batch: tuple[int, ...] = ()) -> SolverRow:
    def make():
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(*batch, 12, 5, generator=generator, dtype=torch.float64)
        return {"S": inputs.mT @ inputs}

    def error(result):
        return float((result.x - torch.linalg.inv(make()["S"])).abs().max())

    return SolverRow(make, partial(newton_schulz_inverse, init=init), error)


SOLVERS: dict[str, SolverRow] = {
    "sor": SolverRow(_laplacian(np.array), sor, lambda result: relaxed(result, _RELAXED)),
    "sor-sparse": SolverRow(_laplacian(scipy.sparse.csr_array), sor, lambda result: relaxed(result, _RELAXED)),
    "sor-torch-sparse": SolverRow(
        _laplacian(lambda A: torch.tensor(A).to_sparse(), torch.tensor),
        sor,
        lambda result: relaxed(result, _RELAXED),
    ),
    "ssor-pcg": SolverRow(
        _laplacian(scipy.sparse.csr_array), ssor_pcg, lambda result: relaxed(result, _RELAXED)
    ),
    "ssor-pcg-torch": SolverRow(
        _laplacian(torch.tensor, torch.tensor), ssor_pcg, lambda result: relaxed(result, _RELAXED)
    ),
    "dcdm": SolverRow(_dcdm(), dcdm, _left_over, tolerance=1e-4, function="direction"),
    "dcdm-operator": SolverRow(_dcdm(operator=True), dcdm, _left_over, tolerance=1e-4, function="A"),
    "equality-minres": _equality("minres"),
    "equality-direct": _equality("direct"),
    # Ends within the KKT residual of 1e-4, in few thousand sketches.
    "equality-vectors": _equality("gv", "HS40", _HS40, tolerance=1e-4),
    "equality-kaczmarz": _equality("rk", "HS40", _HS40, tolerance=1e-4),
    "sparse-transport": SolverRow(_transport(kind=np.asarray), sparse_ot, _transport_error),
    "sparse-transport-dual": SolverRow(_transport(), partial(sparse_ot, form="dual"), _transport_error),
    "sparse-transport-batch": SolverRow(_transport((2,)), sparse_ot, _transport_error),
    "newton-schulz": _newton_schulz(init="trace"),
    "newton-schulz-norm": _newton_schulz(init="norm", batch=(2, 3)),
}
