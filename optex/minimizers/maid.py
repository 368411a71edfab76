"""The method of adaptive inexact descent, for bilevel problems.

Salehi, Mukherjee, Roberts, Ehrhardt: *An adaptively inexact first-order method for bilevel optimization with
application to hyperparameter learning*, arXiv 2308.10098.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import numpy as np
import torch
from scipy.optimize import OptimizeResult
from torch import Tensor

from optex.callback import stops_by_result
from optex.checks import check_callable, check_integer, check_number, shown
from optex.errors import NonFiniteError
from optex.sources.inexact_bilevel import (
    Hypergradient,
    LowerLevelError,
    LowerSolution,
    SmoothBilevel,
    hypergradient,
    solve_lower,
)

__all__ = ["maid"]

_FINEST: Final = 1e-14  # finer accuracies, relative to x, are lost in rounding
_WORDS: Final = {
    0: "the hypergradient is within gtol, its error included",
    1: "maxiter reached",
    2: "no accuracy above rounding makes the hypergradient a descent direction that is seen to descend",
    3: "max_evaluations reached",
    99: "stopped by callback",
}


@dataclass(frozen=True)
class _Settings:
    epsilon: float
    delta: float
    beta: float
    eta: float
    rho: float
    tau: float
    nu: float

    def __post_init__(self) -> None:
        ranges = {"epsilon": math.inf, "delta": math.inf, "beta": math.inf, "eta": 1.0, "rho": 1.0, "tau": 1.0}
        for name, top in ranges.items():
            check_number("maid", name, getattr(self, name), most=top, open_below=True, open_above=True)
        check_number("maid", "nu", self.nu, least=1.0)


@dataclass
class _State:
    theta: Tensor
    x: Tensor
    epsilon: float
    delta: float
    beta: float
    lower_iterations: int = 0
    products: int = 0
    nit: int = 0
    gradient: Hypergradient | None = None
    history: dict[str, list[float]] = field(
        default_factory=lambda: {
            name: []
            for name in (
                "loss",
                "epsilon",
                "delta",
                "step",
                "norm",
                "error_bound",
                "lower_iterations",
                "products",
            )
        }
    )

    def coarsen(self, factor: float) -> None:
        self.epsilon, self.delta = self.epsilon * factor, self.delta * factor


def maid(
    problem: SmoothBilevel,
    theta0: Any,
    *,
    epsilon: float = 0.1,
    delta: float = 0.1,
    beta: float = 0.1,
    eta: float = 1e-4,
    rho: float = 0.9,
    tau: float = 0.5,
    nu: float = 1.05,
    max_backtracks: int = 10,
    maxiter: int = 100,
    max_evaluations: int | None = None,
    max_iterations: int = 2000,
    gtol: float = 0.0,
    trials: int = 1,
    workers: Callable[..., Iterable[Any]] | None = None,
    callback: Callable[[OptimizeResult], Any] | None = None,
) -> OptimizeResult:
    """Minimise f(θ) = g(x̂(θ)) by gradient descent that chooses its step sizes and accuracies itself.

    x̂(θ) minimises the lower level h(x, θ). A step solves it within ε, and the linear system of the
    hypergradient z within δ. Both are multiplied by τ until the bound ω of z's error is at most (1 - η) ‖z‖, so
    that -z is a descent direction. The step size is the first α = β ρ^i, i < ``max_backtracks`` (one more after
    each failure), that satisfies, with x at θ and x' at θ - αz, both within ε,

        g(x') + ‖∇g(x')‖ ε + ½ L_g ε²  -  [g(x) - ‖∇g(x)‖ ε]  ≤  -η² α ‖z‖²

    so that f descends whatever the errors are. Where g is not convex the bracket loses ½ L_g ε² as well. After
    a success β = α / ρ, and ε and δ are multiplied by ν; after a failure by τ. β is then the largest step tried
    that may still be short enough, as far as accuracy ε can tell; without one, a step shorter than all tried.
    (The released code keeps β; where β is far too long, its search never ends.)

    Args:
        problem: the two levels and their constants; ``lower(x, theta)``.
        theta0: start, finite: a floating-point tensor of any shape, or anything that becomes a float64 array.
        epsilon, delta, beta: ε, δ and β at the start, above 0.
        eta, rho, tau: η, ρ and τ, in (0, 1).
        nu: ν, at least 1.
        max_backtracks: step sizes tried before the accuracies are refined, at least 1.
        maxiter: most steps, at least 1.
        max_evaluations: the run ends after as many gradients of h and products with its Hessian; None: no
            limit.
        max_iterations: most iterations of one solve, at least 1.
        gtol: stop where ‖z‖ + ω, a bound of ‖∇f‖, is at most this; not negative.
        trials: step sizes that are tried at once, at least 1; the one taken does not depend on it.
        workers: a function like ``map`` that evaluates them, as a thread pool's; None: one after the other.
        callback: ``callback(result)`` after every step, with the result so far. It stops the run by returning
            True or raising ``StopIteration``.

    Returns:
        ``OptimizeResult``: ``x`` (θ, in theta0's form), ``fun`` (g at the last solve), ``jac`` (z),
        ``error_bound`` (ω), ``lower_x``, ``nit``, ``nfev`` (gradients of h), ``nhev`` (products with its
        Hessian), ``epsilon``, ``delta``, ``beta``, ``history`` (lists, an entry a step and the start),
        ``success``, ``status``, ``message``.

    Raises:
        TypeError, ValueError: an argument cannot work.
        LowerLevelError, NonFiniteError: as ``InexactBilevelSource``, at a point that was reached; at a trial
            they fail the trial.

    Source: arXiv 2308.10098, the algorithm MAID; constants of the released code.

    >>> import torch, optex
    >>> target = torch.tensor([1.0, -2.0], dtype=torch.float64)
    >>> problem = optex.SmoothBilevel(
    ...     lower=lambda x, theta: (x - theta).square().sum(),
    ...     upper=lambda x: (x - target).square().sum() / 2,
    ...     start=torch.zeros(2, dtype=torch.float64), strong_convexity=2.0, upper_lipschitz=1.0)
    >>> result = optex.maid(problem, [0.0, 0.0], gtol=1e-3)
    >>> result.success, result.x.round(2)
    (True, array([ 1., -2.]))
    """
    settings = _Settings(epsilon, delta, beta, eta, rho, tau, nu)
    counts = {"max_backtracks": max_backtracks, "maxiter": maxiter, "trials": trials}
    counts |= {"max_iterations": max_iterations}
    counts |= {} if max_evaluations is None else {"max_evaluations": max_evaluations}
    for name, value in counts.items():
        check_integer("maid", name, value)
    check_number("maid", "gtol", gtol)
    check_callable("maid", "callback", callback, optional=True)
    if workers is not None:
        check_callable("maid", "workers", workers)
    if not isinstance(problem, SmoothBilevel):
        raise TypeError(f"maid: problem must be a SmoothBilevel, got {shown(problem)}")
    arrays, theta = _read_start(theta0)
    state = _State(theta, problem.start.detach().clone(), epsilon, delta, beta)
    descent = _Descent(problem, settings, state, max_iterations, max_backtracks, trials, workers or map)
    told = partial(_result, state, arrays)
    status = 2
    while descent.linearise():
        descent.record()
        if state.gradient is not None and state.gradient.norm + state.gradient.error_bound <= gtol:
            status = 0
        elif state.nit >= maxiter:
            status = 1
        elif max_evaluations is not None and state.lower_iterations + state.products >= max_evaluations:
            status = 3
        elif callback is not None and state.nit and stops_by_result(callback, told(1)):
            status = 99
        elif descent.search():
            continue
        return told(status)
    return told(2)


@dataclass
class _Descent:
    """One step of the method: a hypergradient good enough, and a step size that descends."""

    problem: SmoothBilevel
    settings: _Settings
    state: _State
    max_iterations: int
    max_backtracks: int
    trials: int
    map: Callable[..., Iterable[Any]]
    loss: float = math.nan
    step: float = math.nan

    def linearise(self) -> bool:
        """Multiply the accuracies by τ until -z is sure to descend; False where they reach rounding."""
        state, settings = self.state, self.settings
        while True:
            solution = self._solve()
            found = hypergradient(
                self.problem, [state.theta], solution, state.epsilon, state.delta, self.max_iterations
            )
            state.products += found.products
            state.x, state.gradient, self.loss = solution.x, found, float(found.loss)
            if found.error_bound <= (1 - settings.eta) * found.norm:
                return True
            state.coarsen(settings.tau)
            if not self._representable():
                return False

    def search(self) -> bool:
        """Take the first step size that is sure to descend, refining accuracies until there is one."""
        state, settings = self.state, self.settings
        for failures in range(10_000):
            count = self.max_backtracks + failures
            rates = [state.beta * settings.rho**i for i in range(count)]
            taken, plausible = self._first(rates)
            if taken is not None:
                rate, solution = taken
                assert state.gradient is not None
                state.theta = state.theta - rate * state.gradient.gradient[0]
                state.x, state.beta, self.step = solution.x, rate / settings.rho, rate
                state.coarsen(settings.nu)
                state.nit += 1
                return True
            state.coarsen(settings.tau)
            state.beta = plausible or rates[-1] * settings.rho
            if not self._representable() or not self.linearise():
                return False
        return False

    def record(self) -> None:
        """Add an entry to the history, of the point where the hypergradient is known."""
        state, found = self.state, self.state.gradient
        assert found is not None
        values = {
            "loss": self.loss,
            "epsilon": state.epsilon,
            "delta": state.delta,
            "step": self.step,
            "norm": found.norm,
            "error_bound": found.error_bound,
            "lower_iterations": state.lower_iterations,
            "products": state.products,
        }
        for name, value in values.items():
            state.history[name].append(value)

    def _first(self, rates: list[float]) -> tuple[tuple[float, _Trial] | None, float | None]:
        """The largest rate that passes, with its trial, and the largest that does not certainly fail.

        ``trials`` are evaluated at once.
        """
        state, found, plausible = self.state, self.state.gradient, None
        assert found is not None
        error = _below(self.problem, found.upper_gradient_norm, state.epsilon)
        attempt = partial(_attempt, self.problem, state.x, state.epsilon, self.max_iterations)
        for begin in range(0, len(rates), self.trials):
            some = rates[begin : begin + self.trials]
            answers = list(self.map(attempt, [state.theta - rate * found.gradient[0] for rate in some]))
            state.lower_iterations += sum(answer.iterations for answer in answers)
            for rate, answer in zip(some, answers, strict=True):
                allowed = self.loss - self.settings.eta**2 * rate * found.norm**2
                if answer.ceiling <= allowed - error:
                    return (rate, answer), plausible
                if plausible is None and answer.floor <= allowed + error:
                    plausible = rate
        return None, plausible

    def _solve(self) -> LowerSolution:
        state = self.state
        solution = solve_lower(self.problem, [state.theta], state.x, state.epsilon, self.max_iterations)
        state.lower_iterations += solution.iterations
        return solution

    def _representable(self) -> bool:
        scale = 1 + float(self.state.x.abs().max())
        return self.state.epsilon > _FINEST * scale and self.state.beta > 0


@dataclass(frozen=True)
class _Trial:
    """What a trial step found: the lower solution, and a lower and an upper bound of f."""

    x: Tensor
    floor: float
    ceiling: float
    iterations: int


def _attempt(
    problem: SmoothBilevel, start: Tensor, epsilon: float, max_iterations: int, theta: Tensor
) -> _Trial:
    """A lower solve at θ within ε; infinite losses where there is none."""
    try:
        solution = solve_lower(problem, [theta], start, epsilon, max_iterations)
    except LowerLevelError:
        return _Trial(start, math.inf, math.inf, max_iterations)
    except NonFiniteError:
        return _Trial(start, math.inf, math.inf, 1)
    x = solution.x.detach().requires_grad_()
    with torch.enable_grad():
        value = problem.upper(x)
        (slope,) = torch.autograd.grad(value, x)
    loss, steep = float(value.detach()), float(slope.norm())
    ceiling = loss + steep * epsilon + problem.upper_lipschitz * epsilon**2 / 2
    if not math.isfinite(ceiling):
        return _Trial(start, math.inf, math.inf, solution.iterations)
    return _Trial(solution.x, loss - _below(problem, steep, epsilon), ceiling, solution.iterations)


def _below(problem: SmoothBilevel, steep: float, epsilon: float) -> float:
    """How far f can lie below g(x) at x within ε of the lower solution, with ‖∇g(x)‖ = ``steep``."""
    return steep * epsilon + (0.0 if problem.convex_upper else problem.upper_lipschitz * epsilon**2 / 2)


def _read_start(theta0: Any) -> tuple[bool, Tensor]:
    """Whether the caller uses arrays, and the start as a tensor with memory of its own."""
    arrays = not isinstance(theta0, Tensor)
    try:
        theta = torch.tensor(np.asarray(theta0, dtype=np.float64)) if arrays else theta0.detach().clone()
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(f"maid: theta0 must be a tensor or an array of numbers, got {shown(theta0)}") from error
    if not theta.is_floating_point() or not theta.numel() or not bool(theta.isfinite().all()):
        came = f"one of {theta.dtype} and shape {tuple(theta.shape)}"
        raise ValueError(
            f"maid: theta0 must be real and finite, with one component at least, got {came}; start where "
            "both levels are defined"
        )
    return arrays, theta


def _result(state: _State, arrays: bool, status: int) -> OptimizeResult:
    found = state.gradient
    assert found is not None
    gradient = found.gradient[0]
    return OptimizeResult(
        x=state.theta.numpy().copy() if arrays else state.theta.clone(),
        fun=state.history["loss"][-1] if state.history["loss"] else float(found.loss),
        jac=gradient.numpy().copy() if arrays else gradient.clone(),
        error_bound=found.error_bound,
        lower_x=state.x.clone(),
        nit=state.nit,
        nfev=state.lower_iterations,
        nhev=state.products,
        epsilon=state.epsilon,
        delta=state.delta,
        beta=state.beta,
        history={name: list(values) for name, values in state.history.items()},
        success=status == 0,
        status=status,
        message=_WORDS[status],
    )
