"""Gradient-normalized smoothness: recorded iteration counts, SciPy's methods beside it, trials at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Final

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.optimize import minimize, rosen, rosen_der, rosen_hess
from scipy.special import logsumexp, softmax

import optex
from optex.optimizers import GNS, DenseCurvature, WindowCurvature, power_fisher, power_gauss_newton
from optex.studies.problems import LogisticBreastCancer
from optex.studies.tables import markdown_table
from papers import Check

ROOM = "optimizers"

_SEED: Final = 3124
_GOAL: Final = 1e-8  # of f - f*
_MOST: Final = 3000  # iterations of anything
_COLOURS: Final = ("#0072b2", "#d55e00", "#009e73", "#000000", "#cc79a7")  # Okabe and Ito
_STYLES: Final = ("-", "--", "-.", ":", (0, (5, 1, 1, 1)))

Vector = NDArray[np.float64]


class _ReachedError(Exception):
    """The goal is reached; nothing more is to be counted."""


@dataclass(frozen=True)
class Posed:
    """A function with derivatives [d], [d, d], its least value, and what GNS may know of it beside.

    Attributes:
        curvatures: stand-ins for the Hessian, by name.
        metric: B [d, d]; the others get it as a change of variables.
    """

    fun: Callable[[Vector], float]
    jac: Callable[[Vector], Vector]
    hess: Callable[[Vector], Vector]
    start: Vector
    least: float
    curvatures: dict[str, Callable[[Vector], Any]]
    metric: Vector | None = None


def _log_sum(exponents: Vector) -> float:
    return float(np.asarray(logsumexp(exponents)))  # SciPy's annotation has a pair too, that of signed sums


@lru_cache
def log_sum_exp() -> Posed:
    """log Σ exp(A x - b) of 100 rows, shifted so that its minimum is at 0."""
    np.random.seed(_SEED)  # noqa: NPY002 (the numbers on record are this generator's)
    inputs = np.random.rand(100, 100) * 2 - 1  # noqa: NPY002
    b = np.random.rand(100) * 2 - 1  # noqa: NPY002
    rows = inputs.T - inputs @ softmax(-b)

    def hess(x: Vector) -> Vector:
        weights = softmax(rows @ x - b)
        gradient = rows.T @ weights
        return rows.T @ (weights[:, None] * rows) - np.outer(gradient, gradient)

    return Posed(
        lambda x: _log_sum(rows @ x - b),
        lambda x: rows.T @ softmax(rows @ x - b),
        hess,
        np.ones(100),
        _log_sum(-b),
        {"weighted Gauss-Newton": lambda x: WindowCurvature(rows, softmax(rows @ x - b))},
        inputs @ inputs.T,
    )


def _powers(
    residuals: Callable[[Vector], Vector],  # [d] to [m]
    jacobian: Callable[[Vector], Vector],  # [d] to [m, d]
    bend: Callable[[Vector], Vector],  # [d] to [d, d]: Σ u_i ∇²u_i
    start: Vector,
    metric: Vector | None = None,
) -> Posed:
    """‖u‖⁴ / 4."""

    def fun(x: Vector) -> float:
        return float(np.sum(residuals(x) ** 2) ** 2 / 4)

    def jac(x: Vector) -> Vector:
        u = residuals(x)
        return (u @ u) * (jacobian(x).T @ u)

    def hess(x: Vector) -> Vector:
        u, slope = residuals(x), jacobian(x)
        across = slope.T @ u
        return (u @ u) * (slope.T @ slope + bend(x)) + 2 * np.outer(across, across)

    stand_ins = {
        "Gauss-Newton": lambda x: power_gauss_newton(residuals(x), jacobian(x), 4),
        "Fisher, rank one": lambda x: power_fisher(residuals(x), jacobian(x), 4),
    }
    return Posed(fun, jac, hess, start, 0.0, stand_ins, metric)


@lru_cache
def equations() -> Posed:
    """‖A x - b‖⁴ / 4 with A 100 × 200, in the metric AᵀA, made definite."""
    np.random.seed(_SEED)  # noqa: NPY002
    inputs = np.random.rand(100, 200) * 2 - 1  # noqa: NPY002
    b = np.random.rand(100) * 2 - 1  # noqa: NPY002
    flat = np.zeros((200, 200))
    metric = inputs.T @ inputs + 1e-8 * np.eye(200)
    return _powers(lambda x: inputs @ x - b, lambda _: inputs, lambda _: flat, np.ones(200), metric)


@lru_cache
def chebyshev() -> Posed:
    """‖u‖⁴ / 4 with u_1 = (1 - x_1) / 2 and u_i = x_i - (2 x_{i-1}² - 1), n = 50; minimum at ones."""
    count = 50
    before = np.arange(count - 1)

    def residuals(x: Vector) -> Vector:
        return np.concatenate([[(1 - x[0]) / 2], x[1:] - (2 * x[:-1] ** 2 - 1)])

    def jacobian(x: Vector) -> Vector:
        slope = np.eye(count)
        slope[0, 0] = -0.5
        slope[before + 1, before] = -4 * x[:-1]
        return slope

    def bend(x: Vector) -> Vector:
        return np.diag(np.concatenate([-4 * residuals(x)[1:], [0.0]]))

    np.random.seed(_SEED)  # noqa: NPY002
    return _powers(residuals, jacobian, bend, np.random.rand(count))  # noqa: NPY002


@lru_cache
def rosenbrock() -> Posed:
    """Of two variables, from (-2, 2)."""
    return Posed(rosen, rosen_der, lambda x: np.asarray(rosen_hess(x)), np.array([-2.0, 2.0]), 0.0, {})


@lru_cache
def logistic() -> tuple[Posed, Callable[[torch.Tensor], torch.Tensor]]:
    """logistic-breast-cancer of the study: NumPy's functions by autograd, and the torch function itself."""
    problem = LogisticBreastCancer()

    def fun(x: torch.Tensor) -> torch.Tensor:
        logits = problem.inputs @ x[:-1] + x[-1]
        data = torch.nn.functional.binary_cross_entropy_with_logits(logits, problem.labels)
        return data + 0.5 * problem.l2 * (x[:-1] ** 2).sum()

    def gradient(x: Vector) -> Vector:
        leaf = torch.tensor(x, requires_grad=True)
        return torch.autograd.grad(fun(leaf), leaf)[0].numpy()

    def hess(x: Vector) -> Vector:
        return torch.func.hessian(fun)(torch.tensor(x)).numpy()

    start = torch.cat([problem.weight.detach(), problem.bias.detach()[None]]).numpy()
    best = minimize(
        lambda x: float(fun(torch.tensor(x))),
        start,
        jac=gradient,
        hess=hess,
        method="trust-exact",
        options={"gtol": 1e-12},
    )
    return Posed(lambda x: float(fun(torch.tensor(x))), gradient, hess, start, float(best.fun), {}), fun


# ------------------------------------------------------------------ runs


@dataclass
class Counted:
    """A run until f - f* is below the goal: iterations, calls, and f - f* at every iteration."""

    iterations: int
    values: int
    gradients: int
    seconds: int  # Hessians, or products with them
    rounds: int
    gaps: list[float]

    @property
    def reached(self) -> bool:
        """Whether it got there."""
        return self.gaps[-1] < _GOAL


def _curvature(posed: Posed, named: Any) -> Any:
    """What ``minimize_gns`` takes for this name; what is no name of ours is its own."""
    if named == "hessian":
        return lambda x: DenseCurvature(posed.hess(x))
    return posed.curvatures.get(named, named) if isinstance(named, str) else named


def gns(
    posed: Posed,
    curvature: Any = "hessian",
    *,
    metric: bool = True,
    parallelism: int = 1,
    goal: float = _GOAL,
    most: int = _MOST,
) -> Counted:
    """``minimize_gns`` until f - f* is below the goal."""
    gaps = [posed.fun(posed.start) - posed.least]

    def told(intermediate_result: Any) -> bool:
        gaps.append(intermediate_result.fun - posed.least)
        return gaps[-1] < goal

    result = optex.minimize_gns(
        posed.fun,
        posed.start,
        jac=posed.jac,
        curvature=_curvature(posed, curvature),
        metric=posed.metric if metric else None,
        parallelism=parallelism,
        gtol=0.0,
        maxiter=most,
        callback=told,
    )
    return Counted(result.nit, result.nfev, result.njev, result.nhev, result.rounds, gaps)


def line_search_gradient(posed: Posed, most: int) -> int:
    """Iterations to the goal of x - g / L; L doubles until f falls as it should, and halves after."""
    x, level = posed.start.copy(), 1.0
    value, gradient = posed.fun(x), posed.jac(x)
    for count in range(most):
        if value - posed.least < _GOAL:
            return count
        there, reached = x, value
        for _ in range(30):
            there = x - gradient / level
            moved = there - x
            reached = posed.fun(there)
            if reached <= value + gradient @ moved + level / 2 * (moved @ moved):
                break
            level *= 2
        level = max(level / 2, 1e-5)
        x, value, gradient = there, reached, posed.jac(there)
    return most


def scipy_run(posed: Posed, method: str, *, changed: bool = False) -> Counted:
    """A method of SciPy until f - f* is below the goal, in variables in which the metric is the identity."""
    back = np.eye(len(posed.start))
    if changed:
        assert posed.metric is not None
        back = np.linalg.inv(np.linalg.cholesky(posed.metric).T)
    counted = Counted(0, 0, 0, 0, 0, [posed.fun(posed.start) - posed.least])

    def fun(z: Vector) -> float:
        counted.values += 1
        gap = posed.fun(back @ z) - posed.least
        counted.gaps.append(min(gap, counted.gaps[-1]))
        if gap < _GOAL:
            raise _ReachedError
        return gap

    def jac(z: Vector) -> Vector:
        counted.gradients += 1
        return back.T @ posed.jac(back @ z)

    def hess(z: Vector) -> Vector:
        counted.seconds += 1
        return back.T @ posed.hess(back @ z) @ back

    def hessp(z: Vector, v: Vector) -> Vector:
        counted.seconds += 1
        return back.T @ (posed.hess(back @ z) @ (back @ v))

    def told(_: Vector) -> None:
        counted.iterations += 1

    second = {"trust-exact": {"hess": hess}, "trust-ncg": {"hessp": hessp}, "Newton-CG": {"hessp": hessp}}
    options: dict[str, Any] = {"maxiter": _MOST}
    options |= {"L-BFGS-B": {"ftol": 0.0, "gtol": 0.0, "maxfun": 10**5}, "Newton-CG": {"xtol": 1e-300}}.get(
        method, {"gtol": 0.0}
    )
    start = np.linalg.solve(back, posed.start)
    try:
        minimize(fun, start, jac=jac, method=method, callback=told, options=options, **second.get(method, {}))
    except _ReachedError:
        counted.iterations += 1  # the one under way
    return counted


RIVALS: Final = ("trust-exact", "trust-ncg", "Newton-CG", "L-BFGS-B")


def rivals(posed: Posed) -> dict[str, Counted]:
    """SciPy's methods, each in the variables that suit it better where there is a metric."""
    found = {}
    for method in RIVALS:
        runs = [scipy_run(posed, method)]
        if posed.metric is not None:
            runs.append(scipy_run(posed, method, changed=True))
        found[method] = min(runs, key=lambda run: (not run.reached, run.values))
    return found


@lru_cache
def all_runs() -> dict[str, dict[str, Counted]]:
    """GNS with its curvatures, and SciPy's methods, on every function."""
    posed = {
        "log-sum-exp": log_sum_exp(),
        "‖Ax - b‖⁴/4": equations(),
        "Rosenbrock": rosenbrock(),
        "Chebyshev": chebyshev(),
    }
    found = {}
    for name, problem in posed.items():
        own = {"GNS, Hessian": gns(problem)}
        own |= {f"GNS, {kind}": gns(problem, kind) for kind in problem.curvatures}
        if problem.metric is not None:
            own["GNS, H = 0"] = gns(problem, "none")
        found[name] = own | rivals(problem)
    found["logistic-breast-cancer"] = {"GNS, CG": cg_run(), **rivals(logistic()[0])}
    return found


def cg_run(tolerance: float = 0.1) -> Counted:
    """The study's problem through autograd and conjugate gradients."""
    posed, fun = logistic()
    gaps = [posed.fun(posed.start) - posed.least]

    def told(intermediate_result: Any) -> bool:
        gaps.append(intermediate_result.fun - posed.least)
        return gaps[-1] < _GOAL

    result = optex.minimize_gns(
        fun, torch.from_numpy(posed.start), gtol=0.0, callback=told, cg_tolerance=tolerance
    )
    return Counted(result.nit, result.nfev, result.njev, result.nhev, result.rounds, gaps)


# ------------------------------------------------------------------ checks


def _at_most(make: Callable[[], Counted], most: int) -> tuple[str, bool]:
    run = make()
    return f"{run.iterations} iterations, {run.values} evaluations", run.reached and run.iterations <= most


def _plain_gradients() -> tuple[str, bool]:
    posed = log_sum_exp()
    plain, own = line_search_gradient(posed, _MOST), gns(posed, "none", metric=False)
    figure = (
        f"line search: {plain} iterations, GNS with H = 0: f - f* = {own.gaps[-1]:.1e} after {own.iterations}"
    )
    return figure, plain == _MOST and not own.reached


def _fisher() -> tuple[str, bool]:
    fisher, exact = (gns(equations(), kind) for kind in ("Fisher, rank one", "hessian"))
    figure = f"Fisher {fisher.iterations} iterations, Hessian {exact.iterations}"
    return figure, fisher.reached and fisher.iterations <= 22 and fisher.iterations < exact.iterations


def _fisher_against_none() -> tuple[str, bool]:
    fisher, none = (gns(equations(), kind) for kind in ("Fisher, rank one", "none"))
    return (
        f"Fisher {fisher.iterations} iterations, H = 0 in the same metric {none.iterations}",
        fisher.iterations < none.iterations,
    )


def _rosenbrock_gradient() -> tuple[str, bool]:
    count = line_search_gradient(rosenbrock(), 20_000)
    return f"{count} iterations", count > 5000


def _chebyshev() -> tuple[str, bool]:
    runs = {kind: gns(chebyshev(), kind, goal=0.0, most=30) for kind in ("hessian", "Gauss-Newton")}
    figure = ", ".join(f"{kind} {run.gaps[-1]:.1e}" for kind, run in runs.items())
    return figure, all(run.gaps[-1] < 1e-12 for run in runs.values())


def _chebyshev_from_zero() -> tuple[str, bool]:
    posed = chebyshev()
    run = gns(Posed(posed.fun, posed.jac, posed.hess, np.zeros(50), 0.0, {}), goal=1e-12, most=200)
    return f"f = {run.gaps[-1]:.1e} after {run.iterations} iterations", run.gaps[-1] < 1e-12


def _rounds() -> tuple[str, bool]:
    figures, holds = [], True
    for name, posed in (("LSE", log_sum_exp()), ("Rosenbrock", rosenbrock()), ("Chebyshev", chebyshev())):
        runs = [gns(posed, parallelism=count) for count in (1, 2, 4)]
        same = all(run.gaps == runs[0].gaps for run in runs)
        counts = [run.rounds for run in runs]
        holds = holds and same and counts == sorted(counts, reverse=True) and counts[1] < counts[0]
        figures.append(f"{name} {', '.join(map(str, counts))}")
    return "; ".join(figures), holds


def _against(name: str) -> tuple[str, bool]:
    """Who needs the fewest evaluations of f and of its gradient; whether it is a GNS."""
    runs = {key: run for key, run in all_runs()[name].items() if run.reached}
    calls = {key: run.values + run.gradients for key, run in runs.items()}
    ours = min((key for key in calls if key.startswith("GNS")), key=lambda key: calls[key])
    theirs = min(
        (key for key in calls if key not in ours and not key.startswith("GNS")), key=lambda key: calls[key]
    )
    figure = (
        f"{ours}: {runs[ours].iterations} iterations, {calls[ours]} calls; {theirs}: {runs[theirs].iterations} "
        f"iterations, {calls[theirs]} calls"
    )
    return figure, calls[ours] <= calls[theirs]


def _tolerances() -> tuple[str, bool]:
    runs = {tolerance: cg_run(tolerance) for tolerance in (1e-1, 1e-3, 1e-6)}
    figure = "; ".join(f"{t:g}: {run.iterations} iterations, {run.seconds} products" for t, run in runs.items())
    return figure, all(run.reached for run in runs.values())


def _closures() -> tuple[str, bool]:
    """Closure calls to the goal: GNS with the Hessian's products, and torch's L-BFGS."""
    posed, fun = logistic()
    counts = {}
    for name in ("GNS", "L-BFGS"):
        x = torch.nn.Parameter(torch.tensor(posed.start))
        limits = {"max_iter": _MOST, "max_eval": 10 * _MOST, "tolerance_grad": 0.0, "tolerance_change": 0.0}
        lbfgs = torch.optim.LBFGS([x], line_search_fn="strong_wolfe", **limits)
        optimizer = GNS([x]) if name == "GNS" else lbfgs
        calls = 0

        def closure(x: torch.nn.Parameter = x, own: torch.optim.Optimizer = optimizer) -> torch.Tensor:
            nonlocal calls
            calls += 1
            loss = fun(x)
            if float(loss.detach()) - posed.least < _GOAL:
                raise _ReachedError
            if isinstance(own, torch.optim.LBFGS):
                own.zero_grad()
                loss.backward()
            return loss

        try:
            for _ in range(_MOST):
                optimizer.step(closure)
        except _ReachedError:
            counts[name] = calls
    figure = ", ".join(f"{name} {calls} calls" for name, calls in counts.items())
    return figure, len(counts) == 2 and counts["GNS"] <= counts["L-BFGS"]


CHECKS = [
    Check(
        "log-sum-exp (n = m = 100), exact Hessian, to f - f* < 1e-8",
        "at most 20 iterations (recorded: 14)",
        partial(_at_most, lambda: gns(log_sum_exp()), 20),
    ),
    Check(
        "the same, weighted Gauss-Newton",
        "at most 30 iterations (recorded: 21)",
        partial(_at_most, lambda: gns(log_sum_exp(), "weighted Gauss-Newton"), 30),
    ),
    Check(
        "the same, gradient methods without the metric", "not there after 3,000 (recorded)", _plain_gradients
    ),
    Check(
        "‖Ax - b‖⁴/4, A 100 × 200, metric AᵀA + 1e-8 I: Fisher's rank one, to 1e-8",
        "at most 22 iterations, and ahead of the exact Hessian (recorded)",
        _fisher,
    ),
    Check("the same: what the rank-one term adds", "fewer iterations than H = 0", _fisher_against_none),
    Check(
        "Rosenbrock from (-2, 2), exact Hessian, to 1e-8",
        "at most 60 iterations (recorded: 51)",
        partial(_at_most, lambda: gns(rosenbrock()), 60),
    ),
    Check("the same, gradient method with line search", "thousands (recorded: 7,153)", _rosenbrock_gradient),
    Check(
        "Chebyshev's equations, n = 50, p = 4, start uniform in [0, 1]: f after 30 iterations",
        "below 1e-12 (recorded)",
        _chebyshev,
    ),
    Check("the same from 0", "the minimum, f below 1e-12", _chebyshev_from_zero),
    Check(
        "trials at once: rounds with N = 1, 2, 4, the same iterates to the bit",
        "fewer with N = 2 than in turn",
        _rounds,
    ),
    Check("logistic-breast-cancer: tolerance of the conjugate gradients", "all reach 1e-8", _tolerances),
    Check(
        "logistic-breast-cancer: calls of the closure to 1e-8, against torch's L-BFGS with its line search",
        "no more than L-BFGS's (products with the Hessian come on top)",
        _closures,
    ),
    *[
        Check(
            f"{name}: calls of f and ∇f to 1e-8 against the best of SciPy",
            "no more than SciPy's",
            partial(_against, name),
        )
        for name in ("log-sum-exp", "‖Ax - b‖⁴/4", "Rosenbrock", "Chebyshev", "logistic-breast-cancer")
    ],
]


# ------------------------------------------------------------------ page


def curves() -> dict[str, Any]:
    """f - f* at every iteration, and all counts against SciPy's."""
    runs = all_runs()
    lines = {
        "log-sum-exp": {k: v.gaps for k, v in runs["log-sum-exp"].items() if k.startswith("GNS")},
        "‖Ax - b‖⁴/4": {k: v.gaps for k, v in runs["‖Ax - b‖⁴/4"].items() if k.startswith("GNS")},
    }
    counts = {
        problem: {
            name: [run.iterations, run.values, run.gradients, run.seconds] if run.reached else None
            for name, run in found.items()
        }
        for problem, found in runs.items()
    }
    rounds = {
        name: [gns(posed, parallelism=count).rounds for count in (1, 2, 4, 8)]
        for name, posed in (
            ("log-sum-exp", log_sum_exp()),
            ("‖Ax - b‖⁴/4", equations()),
            ("Rosenbrock", rosenbrock()),
            ("Chebyshev", chebyshev()),
        )
    }
    return {"lines": lines, "counts": counts, "rounds": rounds}


def tables(record: dict[str, Any]) -> dict[str, str]:
    """The page's second table: who needs how much."""
    rows = []
    for problem, found in record["curves"]["counts"].items():
        for name, counts in found.items():
            rows.append((problem, name, *(map(str, counts) if counts else ["not reached"] * 4)))
    header = ("problem", "method", "iterations", "f", "∇f", "Hessians or products")
    return {"rivals": markdown_table(header, rows)}


def draw(found: dict[str, Any]) -> Figure:
    """Convergence on two functions, and rounds against trials at once."""
    figure = Figure(figsize=(12, 4.3), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3)
    for panel, (name, lines) in zip(axes, found["lines"].items(), strict=False):
        for (label, gaps), colour, style in zip(lines.items(), _COLOURS, _STYLES, strict=False):
            panel.semilogy(np.maximum(gaps, 1e-12), color=colour, linestyle=style, label=label)
        panel.axhline(_GOAL, color="#8a8a8a", linewidth=0.8, label="goal")
        panel.set(title=name, xlabel="iteration", ylabel="f - f*")
        panel.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
    for (name, rounds), colour, style in zip(found["rounds"].items(), _COLOURS, _STYLES, strict=False):
        axes[2].plot([1, 2, 4, 8], rounds, color=colour, linestyle=style, marker="o", label=name)
    axes[2].set(
        title="trials at once", xlabel="N", ylabel="rounds to f - f* < 1e-8", xscale="log", xticks=[1, 2, 4, 8]
    )
    axes[2].set_xticks([1, 2, 4, 8], ["1", "2", "4", "8"])
    axes[2].minorticks_off()
    axes[2].set_ylim(bottom=0)
    axes[2].legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
    return figure
