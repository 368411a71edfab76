"""AdaSketch-Newton: problems of Hock and Schittkowski and logistic regression, beside SciPy's methods."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.optimize import NonlinearConstraint, approx_fprime, minimize
from torch import Tensor

import optex
from optex.solvers.equality import newton
from optex.solvers.equality.derivatives import read_form, smooth
from optex.studies.problems.hock_schittkowski import PROBLEMS, EqualityProblem
from papers import Check

ROOM = "solvers"

_COLOURS: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000")  # Okabe and Ito
_SKETCHED: Final = ("HS6", "HS7", "HS8", "HS28", "HS40", "HS42", "HS48")
_SEEDS: Final = range(5)

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Ended:
    """How a run ended: whether x solves the problem, iterations, calls of f, seconds."""

    solved: bool
    iterations: int
    calls: int
    seconds: float
    result: Any = None


class Arrays:
    """Torch functions as SciPy's methods get them: NumPy, with derivatives by autograd."""

    def __init__(self, problem: EqualityProblem) -> None:
        form, self.start = read_form(problem.start)
        self._f = smooth("f", problem.objective, form, None, None, ("", ""))
        self._c = smooth("c", problem.constraints, form, None, None, ("", ""))
        self._at: dict[str, tuple[bytes, Any]] = {}

    def _expanded(self, name: str, x: Vector) -> Any:
        """Value and derivatives, once a point."""
        if self._at.get(name, (b"", None))[0] != x.tobytes():
            self._at[name] = (x.tobytes(), (self._f if name == "f" else self._c).at(x))
        return self._at[name][1]

    def f(self, x: Vector) -> float:
        return float(self._expanded("f", x).value[0])

    def g(self, x: Vector) -> Vector:
        return self._expanded("f", x).jacobian[0].copy()

    def hess(self, x: Vector) -> Vector:
        return self._expanded("f", x).curvature(np.ones(1))

    def c(self, x: Vector) -> Vector:
        return self._expanded("c", x).value.copy()

    def jac(self, x: Vector) -> Vector:
        return self._expanded("c", x).jacobian.copy()

    def chess(self, x: Vector, v: Vector) -> Vector:
        return self._expanded("c", x).curvature(np.asarray(v, dtype=np.float64))

    @property
    def calls(self) -> int:
        return self._f.calls


def solves(problem: EqualityProblem, x: Vector) -> bool:
    """Feasible and as low as published, to 1e-4."""
    arrays = Arrays(problem)
    gap = (arrays.f(x) - problem.least) / (1 + abs(problem.least))
    return bool(np.abs(arrays.c(x)).max() <= 1e-4 and gap <= 1e-4)


def ours(problem: EqualityProblem, **options: Any) -> Ended:
    """``minimize_equality`` with its defaults."""
    started = time.perf_counter()
    try:
        result = optex.minimize_equality(
            problem.objective, problem.constraints, problem.start, maxiter=1000, seed=0, **options
        )
    except optex.RankDeficientError:
        return Ended(False, 0, 0, time.perf_counter() - started)
    seconds = time.perf_counter() - started
    return Ended(result.success and solves(problem, result.x), result.nit, result.nfev, seconds, result)


def slsqp(problem: EqualityProblem) -> Ended:
    """SciPy's SLSQP with exact gradients."""
    arrays = Arrays(problem)
    constraint = {"type": "eq", "fun": arrays.c, "jac": arrays.jac}
    options = {"ftol": 1e-8, "maxiter": 1000}
    return _scipy(problem, arrays, method="SLSQP", jac=arrays.g, constraints=constraint, options=options)


def trust(problem: EqualityProblem) -> Ended:
    """SciPy's trust-constr with exact Hessians, to the same KKT residual."""
    arrays = Arrays(problem)
    exact: dict[str, Any] = {"jac": arrays.jac, "hess": arrays.chess}
    constraint = NonlinearConstraint(arrays.c, 0.0, 0.0, **exact)
    options = {"gtol": 1e-4, "xtol": 1e-8, "maxiter": 1000}
    return _scipy(
        problem,
        arrays,
        method="trust-constr",
        jac=arrays.g,
        hess=arrays.hess,
        constraints=constraint,
        options=options,
    )


def differences(problem: EqualityProblem) -> Ended:
    """``equality_method`` with nothing but values."""
    arrays = Arrays(problem)
    constraint = {"type": "eq", "fun": arrays.c}
    return _scipy(
        problem, arrays, method=optex.equality_method, constraints=constraint, options={"maxiter": 1000}
    )


def _scipy(problem: EqualityProblem, arrays: Arrays, **given: Any) -> Ended:
    started = time.perf_counter()
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            result = minimize(arrays.f, arrays.start, **given)
    except optex.RankDeficientError:
        return Ended(False, 0, arrays.calls, time.perf_counter() - started)
    seconds = time.perf_counter() - started
    return Ended(solves(problem, result.x), int(result.nit), arrays.calls, seconds, result)


METHODS: Final[dict[str, Callable[[EqualityProblem], Ended]]] = {
    "MINRES": ours,
    "direct": lambda problem: ours(problem, linear_solver="direct"),
    "SLSQP": slsqp,
    "trust-constr": trust,
}


@lru_cache
def race() -> dict[str, dict[str, Ended]]:
    """All methods on all problems."""
    found: dict[str, dict[str, Ended]] = {method: {} for method in METHODS}
    for run in METHODS.values():
        run(PROBLEMS["HS28"])  # what a first call costs is not a method's
    for name, problem in PROBLEMS.items():
        for method, run in METHODS.items():
            found[method][name] = run(problem)
    return found


def _together(method: str) -> list[str]:
    return [
        name for name in PROBLEMS if all(found[name].solved for found in (race()[method], race()["MINRES"]))
    ]


def check_one_step() -> tuple[str, bool]:
    """The quadratics with linear constraints."""
    counts = {name: race()["MINRES"][name].iterations for name in ("HS28", "HS48", "HS51")}
    return ", ".join(f"{name} {count}" for name, count in counts.items()), set(counts.values()) == {1}


def check_two() -> tuple[str, bool]:
    """HS6 and HS7."""
    texts, holds = [], True
    for name in ("HS6", "HS7"):
        run = race()["MINRES"][name]
        gap = abs(run.result.fun - PROBLEMS[name].least)
        texts.append(f"{name}: {run.iterations} iterations, f - f* {gap:.1e}")
        holds &= run.iterations <= 20 and gap <= 1e-5
    return "; ".join(texts), holds


def _point(problem: EqualityProblem, x: Vector, lam: Vector) -> newton.Point:
    form, x = read_form(x)
    f, c = (
        smooth("f", function, form, None, None, ("", "")).at(x)
        for function in (problem.objective, problem.constraints)
    )
    return newton.Point(x, lam, f, c)


_RIGHT: Final = newton.Merit.gradient


def _published(self: newton.Merit, point: newton.Point, hessian: Vector) -> Vector:  # noqa: ARG001
    """The merit's gradient with ∇²f where ∇²_xx L belongs, as in the released code."""
    return _RIGHT(self, point, point.f.curvature(np.ones(1)))


def check_gradient() -> tuple[str, bool]:
    """∂/∂x_1 at HS6's start with λ = 0.3."""
    problem, merit = PROBLEMS["HS6"], newton.Merit(1.0, 0.1)
    z = np.array([*problem.start, 0.3])
    point = _point(problem, z[:2], z[2:])
    slope = np.asarray(approx_fprime(z, lambda z: merit.value(_point(problem, z[:2], z[2:])), 1e-7))[0]
    right = merit.gradient(point, point.hessian())[0]
    wrong = _published(merit, point, point.hessian())[0]
    return f"{right:.2f}; differences {slope:.2f}; with ∇²f {wrong:.2f}", bool(abs(right + 103.92) < 1e-9)


@lru_cache
def with_gradient(kind: str, spread: float) -> dict[str, Ended]:
    """The set with either merit gradient, λ drawn from N(0, spread²)."""
    original, random = newton.Merit.gradient, np.random.default_rng(0)
    if kind == "published":
        newton.Merit.gradient = _published
    try:
        found = {}
        for name, problem in PROBLEMS.items():
            count = Arrays(problem).c(np.array(problem.start)).size
            found[name] = ours(problem, lam0=spread * random.standard_normal(count))
        return found
    finally:
        newton.Merit.gradient = original


def check_published_gradient(spread: float) -> tuple[str, bool]:
    """What the difference does to runs."""
    right, wrong = (with_gradient(kind, spread) for kind in ("right", "published"))
    both = [name for name in PROBLEMS if right[name].solved and wrong[name].solved]
    lost = [name for name in PROBLEMS if right[name].solved and not wrong[name].solved]
    found = [
        (sum(runs[name].iterations for name in both), sum(runs[name].calls for name in both))
        for runs in (right, wrong)
    ]
    figure = (
        f"{found[0][0]} iterations and {found[0][1]} calls of f here, {found[1][0]} and {found[1][1]} with "
        f"∇²f, {len(both)} problems both solve; lost with ∇²f: {', '.join(lost) or 'none'}"
    )
    return figure, found[0] <= found[1]


def check_solved() -> tuple[str, bool]:
    """Of all problems."""
    texts = []
    for method, found in race().items():
        missed = [name for name, run in found.items() if not run.solved]
        texts.append(f"{method} {len(found) - len(missed)}" + (f" (not {', '.join(missed)})" if missed else ""))
    counts = {method: sum(run.solved for run in found.values()) for method, found in race().items()}
    return f"of {len(PROBLEMS)}: " + "; ".join(texts), counts["MINRES"] >= max(
        counts["SLSQP"], counts["trust-constr"]
    )


def check_cost(rival: str, measure: str) -> tuple[str, bool]:
    """Sums over the problems that both solve."""
    names = _together(rival)
    mine, theirs = (sum(getattr(race()[m][name], measure) for name in names) for m in ("MINRES", rival))
    unit = " s" if measure == "seconds" else ""
    return f"{mine:.3g}{unit} against {theirs:.3g}{unit}, {len(names)} problems both solve", mine <= theirs


@lru_cache
def sketched() -> dict[str, dict[str, Ended]]:
    """The inner solvers on problems where sketching ends."""
    return {
        solver: {name: ours(PROBLEMS[name], linear_solver=solver) for name in _SKETCHED}
        for solver in ("direct", "minres", "gv", "rk")
    }


def check_sketches() -> tuple[str, bool]:
    """Solved by all, and what that takes."""
    texts = []
    for solver in ("minres", "gv", "rk"):
        runs = sketched()[solver].values()
        inner, outer = (sum(getattr(run.result, of) for run in runs) for of in ("inner_nit", "nit"))
        texts.append(f"{solver} {inner / outer:.0f} ({sum(run.seconds for run in runs):.2g} s)")
    same = all(
        abs(run.iterations - sketched()["direct"][name].iterations) <= 1 and run.solved
        for found in sketched().values()
        for name, run in found.items()
    )
    return "inner iterations an outer one: " + ", ".join(texts), same


def check_differences() -> tuple[str, bool]:
    """SciPy's front door with values alone."""
    found = {name: differences(problem) for name, problem in PROBLEMS.items()}
    missed = [name for name, run in found.items() if not run.solved]
    return f"{len(found) - len(missed)} of {len(found)} (not {', '.join(missed) or 'any'})", len(missed) <= sum(
        not run.solved for run in race()["MINRES"].values()
    )


# ------------------------------------------------------------------ constrained logistic regression


def logistic(seed: int, samples: int, d: int, *, sphere: bool) -> EqualityProblem:
    """Mean logistic loss with ten random linear equations and, as in the paper, on the unit sphere."""
    random = np.random.default_rng(seed)
    rows = random.standard_normal((samples, d))
    labels = np.sign(rows @ random.standard_normal(d) + 0.5 * random.standard_normal(samples))
    equations = random.standard_normal((10, d))
    inside = random.standard_normal(d)
    inside /= np.linalg.norm(inside)
    X, y, A = (torch.from_numpy(array) for array in (rows, labels, equations))
    b = A @ torch.from_numpy(inside)  # a random b often has no solution on the sphere

    def f(x: Tensor) -> Tensor:
        return torch.nn.functional.softplus(-y * (X @ x)).mean()

    def c(x: Tensor) -> Tensor:
        linear = A @ x - b
        return torch.cat([linear, (x @ x - 1)[None]]) if sphere else linear

    return EqualityProblem("logistic", f, c, (1.0,) * d, np.inf)


def kept(steps: list[float], residuals: list[float]) -> Callable[..., None]:
    """A callback that writes down step lengths and KKT residuals."""

    def told(intermediate_result: Any) -> None:
        steps.append(intermediate_result.step)
        residuals.append(intermediate_result.kkt)

    return told


@lru_cache
def regressions(sphere: bool, start: float = 1.0) -> list[tuple[Any, list[float], list[float]]]:
    """Results, step lengths and KKT residuals; the released code starts from x = 1, λ = 1."""
    found = []
    for seed in _SEEDS:
        problem, steps, residuals = logistic(seed, 200, 20, sphere=sphere), [], []

        count = 11 if sphere else 10
        result = optex.minimize_equality(
            problem.objective,
            problem.constraints,
            np.full(20, start),
            np.full(count, start),
            callback=kept(steps, residuals),
        )
        found.append((result, steps, residuals))
    return found


def check_logistic(sphere: bool, start: float = 1.0) -> tuple[str, bool]:
    """Iterations and the share of unit steps."""
    runs = regressions(sphere, start)
    counts = [result.nit for result, _, _ in runs]
    units = [sum(step == 1.0 for step in steps) for _, steps, _ in runs]
    text = ", ".join(f"{count} ({unit})" for count, unit in zip(counts, units, strict=True))
    local = all(steps[-1] == 1.0 for _, steps, _ in runs)
    whole = all(unit == count for count, unit in zip(counts, units, strict=True))
    solved = all(result.success for result, _, _ in runs)
    return f"{text} iterations (unit steps), 5 seeds", solved and max(counts) <= 15 and (
        local if sphere else whole
    )


@lru_cache
def large() -> dict[str, Ended]:
    """2,000 samples, 200 variables, on the sphere."""
    problem = logistic(0, 2000, 200, sphere=True)
    return {method: run(problem) for method, run in METHODS.items()}


def check_large(rival: str) -> tuple[str, bool]:
    """Seconds, and where they end."""
    found = large()

    def words(name: str) -> str:
        run = found[name]
        return f"{name} {run.seconds:.2g} s ({run.iterations} iterations, f = {float(run.result.fun):.5f})"

    mine = min(("MINRES", "direct"), key=lambda name: found[name].seconds)
    return f"{words('MINRES')}, {words('direct')}; {words(rival)}", found[mine].seconds <= found[rival].seconds


def check_infeasible() -> tuple[str, bool]:
    """Contradictions, of which a run has to say that they are."""
    cases: dict[str, Callable[[Tensor], Tensor]] = {
        "x² = -1": lambda x: x[:1] ** 2 + 1,
        "‖x‖² = -1": lambda x: (x @ x + 1)[None],
        "‖x‖ = 1, x₁ = 3": lambda x: torch.stack([x @ x - 1, x[0] - 3]),
        "exp x₁ = 0": lambda x: x[:1].exp(),
    }
    said, texts = [], []
    for name, c in cases.items():
        result = optex.minimize_equality(lambda x: (x**2).sum(), c, [2.0, 1.0])
        said.append("infeasible" in result.message)
        texts.append(f"{name}: {'said' if said[-1] else 'not said'}, {result.nit} iterations")
    return "; ".join(texts), all(said)


HS = "Hock and Schittkowski: "
CHECKS = [
    Check("HS28, HS48, HS51: iterations", "exactly 1 (prototype)", check_one_step),
    Check("HS6, HS7", "at most 20 iterations, f* = 0 and -√3 to 1e-5 (prototype)", check_two),
    Check("merit gradient at HS6's start, λ = 0.3, ∂/∂x₁", "-103.92, by differences", check_gradient),
    *(
        Check(
            f"the released code's merit gradient, λ from {words}",
            "no fewer iterations than the right one",
            lambda s=spread: check_published_gradient(s),
        )
        for words, spread in (("0", 0.0), ("N(0, 10²)", 10.0))
    ),
    Check(HS + "solved", "no fewer than SLSQP or trust-constr", check_solved),
    *(
        Check(f"{HS}{words}, MINRES against {rival}", "no more", lambda r=rival, m=measure: check_cost(r, m))
        for rival in ("SLSQP", "trust-constr")
        for measure, words in (("iterations", "iterations"), ("calls", "calls of f"), ("seconds", "seconds"))
    ),
    Check(
        f"inner solvers on {', '.join(_SKETCHED)}",
        "all solve all, outer iterations those of exact directions ± 1",
        check_sketches,
    ),
    Check(HS + "through SciPy, values alone", "solved as with autograd", check_differences),
    *(
        Check(
            f"logistic regression, N = 200, d = 20, 10 linear equations, from x = λ = {start:g}",
            "at most 15 iterations, unit steps (prototype)",
            lambda s=start: check_logistic(False, s),
        )
        for start in (0.0, 1.0)
    ),
    Check(
        "the same on the sphere, from x = λ = 1, as the released code",
        "at most 15 iterations, the last step 1 (paper: locally)",
        lambda: check_logistic(True),
    ),
    *(
        Check(
            f"logistic regression on the sphere, N = 2000, d = 200, against {rival}",
            "no slower",
            lambda r=rival: check_large(r),
        )
        for rival in ("SLSQP", "trust-constr")
    ),
    Check("constraints without a solution", "said to seem infeasible", check_infeasible),
]


def curves() -> dict[str, Any]:
    """KKT residuals along runs, calls of f by problem, inner iterations by solver."""
    residuals: dict[str, list[float]] = {}
    for name in ("HS7", "HS27", "HS77", "HS100LNP"):
        problem, found = PROBLEMS[name], []
        optex.minimize_equality(
            problem.objective,
            problem.constraints,
            problem.start,
            callback=kept([], found),
        )
        residuals[name] = found
    residuals["logistic, sphere"] = regressions(True)[0][2]
    return {
        "residuals": residuals,
        "calls": {
            method: {name: run.calls if run.solved else None for name, run in found.items()}
            for method, found in race().items()
            if method != "direct"
        },
        "inner": {
            solver: {name: run.result.inner_nit / run.iterations for name, run in found.items()}
            for solver, found in sketched().items()
            if solver != "direct"
        },
    }


def draw(found: dict[str, Any]) -> Figure:
    """Three panels."""
    figure = Figure(figsize=(13.5, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    way, calls, inner = figure.subplots(1, 3, width_ratios=(1, 1.5, 0.9))
    for colour, (name, values) in zip(_COLOURS, found["residuals"].items(), strict=True):
        way.semilogy(range(1, len(values) + 1), np.maximum(values, 1e-12), ".-", color=colour, label=name)
    way.axhline(1e-4, color="0.5", linewidth=0.8)
    way.set(title="Iterations", xlabel="iteration", ylabel="KKT residual", ylim=(1e-9, 1e6))
    for colour, marker, (name, counts) in zip(_COLOURS, "osx", found["calls"].items(), strict=False):
        label = "minimize_equality" if name == "MINRES" else name
        values = [np.nan if count is None else count for count in counts.values()]
        calls.semilogy(values, marker, color=colour, label=label, markersize=5)
    names = list(found["calls"]["MINRES"])
    calls.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
    calls.set(title="Calls of f where solved", ylabel="calls", ylim=(1, 3000))
    for colour, marker, (name, counts) in zip(_COLOURS, "osx", found["inner"].items(), strict=False):
        label = {"minres": "MINRES", "gv": "Gaussian vectors", "rk": "Kaczmarz"}[name]
        inner.semilogy(list(counts.values()), marker, color=colour, label=label, markersize=6)
    inner.set_xticks(range(len(_SKETCHED)), _SKETCHED, rotation=90, fontsize=8)
    inner.set(title="Inner iterations an outer one", ylabel="iterations", ylim=(1, 3e6))
    for axes in (way, calls, inner):
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8, loc="upper right", ncols=1 if axes is inner else 3 if axes is calls else 2)
    return figure
