"""``solve_bilevel``: a bilevel problem by first derivatives alone.

Kwon, Kwon, Wright, Nowak: *On Penalty Methods for Nonconvex Bilevel Optimization and First-Order Stochastic
Approximation*, ICLR 2024, arXiv 2309.01753.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from typing import Any, Literal

import torch
from scipy.optimize import OptimizeResult
from torch import Tensor
from torch.optim import Optimizer

from optex.callback import Callback
from optex.checks import check_callable, check_integer, check_number, check_positive, shown
from optex.errors import NonFiniteError
from optex.evaluators import Evaluator, VectorizedEvaluator, WorkersEvaluator
from optex.minimizers.arguments import Settings, build_base, check_disp, read_evaluator
from optex.minimizers.run import Run
from optex.minimizers.single_loop import SingleLoop
from optex.minimizers.tracker import Tracker
from optex.optimizer import OptEx
from optex.sources import PenaltyHypergradient
from optex.sources.functions import Point, PointForm, read_start
from optex.sources.levels import Levels

__all__ = ["solve_bilevel"]

_OWNER = "solve_bilevel"
_STOPPED = "The callback asked to stop."


def solve_bilevel(
    upper: Callable[[Any, Any, Any], Tensor],
    lower: Callable[[Any, Any, Any], Tensor],
    x0: Any,
    y0: Any,
    *,
    sigma: float = 1e-2,
    method: Literal["double-loop", "single-loop"] = "double-loop",
    lr: float | None = None,
    rate: float | None = None,
    inner_steps: int = 500,
    tolerance: float | None = 1e-4,
    optimizer: str | Callable[..., Optimizer] = "adam",
    parallelism: int = 4,
    evaluator: Evaluator | None = None,
    workers: int | Executor | Callable[..., Iterable[Any]] | None = None,
    batches: Iterable[Any] | None = None,
    callback: Callable[..., Any] | None = None,
    maxiter: int = 200,
    gtol: float = 1e-5,
    disp: bool = False,
) -> OptimizeResult:
    """Minimise f(x, y*(x)) over x, where y*(x) minimises g(x, y) over y.

    The **double loop** takes steps of ``optimizer`` along ∇ψ_σ, the gradient of the penalty (see
    :class:`~optex.PenaltyHypergradient`), under :class:`~optex.OptEx` with ``parallelism`` hypergradients at
    once. Its lower-level solves start from the solutions at the last round's end. The **single loop** takes one
    step of y, z and x at a time, with momentum where batches are sampled; it is sequential, without OptEx.

    Args:
        upper, lower: f and g: ``f(x, y, batch)``, written in torch, returns a scalar tensor; x and y are
            tensors of the shapes of x0 and y0. ``batch`` is None unless the single loop has ``batches``.
        x0, y0: where to start: arrays of one dimension (the functions get float64 tensors), or tensors.
        sigma: σ of the penalty, positive. x is off by O(σ); rounding grows as 1/σ.
        method: as above.
        lr: the outer rate α, about ½ / L_ψ. None: the double loop chooses it as :func:`~optex.minimize` does;
            the single loop needs one.
        rate: γ of inner gradient steps, about 1 / (L_g + σ L_f). None: the double loop solves by L-BFGS; the
            single loop needs one.
        inner_steps, tolerance: of the double loop's solves, as in :class:`~optex.PenaltyHypergradient`.
        optimizer, parallelism, workers: of the double loop, as in :func:`~optex.minimize`.
        evaluator: of the double loop, an :class:`~optex.Evaluator`, but not a vectorized one; None evaluates
            in turn.
        batches: of the single loop, one a step, at least one: gradients are then samples, and have momentum.
            The run ends with the last batch. None: exact gradients.
        callback: after every round or step ``callback(intermediate_result)`` if that is its parameter's name,
            with x, y, z so far, else ``callback(x)``. It stops the run by raising ``StopIteration`` or by
            returning True.
        maxiter: most rounds, or steps of the single loop.
        gtol: largest component of ∇ψ_σ to stop at, not negative. The single loop, whose y and z lag, compares
            that of its direction instead, and only without ``batches``.
        disp: print at the end how it went.

    Returns:
        ``scipy.optimize.OptimizeResult``: ``x``; ``y`` and ``z``, minimisers of σ f + g and of g there;
        ``fun``, f(x, z); ``penalty``, ψ_σ(x); ``jac``, ∇ψ_σ(x); ``nit`` (rounds or steps), ``nstep`` (steps),
        ``nlower`` (gradients of the lower level, in this process), ``sigma``, ``success``, ``status`` and
        ``message``. Status 0: within gtol; 1: maxiter reached, or no batches left; 2: numbers that are not
        finite; 3: workers no longer answer; 99: stopped by ``callback``.

    Raises:
        TypeError, ValueError: an argument cannot work; the message names it and the remedy.

    Source: Kwon, Kwon, Wright, Nowak, ICLR 2024, arXiv 2309.01753.

    >>> import numpy as np, optex
    >>> result = optex.solve_bilevel(
    ...     lambda x, y, _: ((y - 1) ** 2).sum(),                     # f
    ...     lambda x, y, _: ((y - x**2) ** 2).sum(),                  # g: y = x²
    ...     np.array([2.0, 0.5]), np.zeros(2),
    ... )
    >>> result.success, result.x.round(3), result.y.round(3)
    (True, array([1., 1.]), array([1., 1.]))
    """
    form, start = read_start(x0)
    inner_form, inner = read_start(y0)
    if inner.dtype != start.dtype:
        raise TypeError(
            f"{_OWNER}: x0 and y0 must have one dtype, got {start.dtype} and {inner.dtype}; convert one"
        )
    check_disp(_OWNER, disp)
    check_callable(_OWNER, "callback", callback, optional=True)
    check_integer(_OWNER, "maxiter", maxiter)
    check_number(_OWNER, "gtol", gtol)
    point, forms = Point(start), (form, inner_form)
    options = (None, None, None, evaluator, workers, None, maxiter, gtol, None, disp, {})
    settings = Settings(optimizer, lr, parallelism, "auto", *options)
    _check_method(method, settings, batches)
    if method == "single-loop":
        levels = Levels(
            _OWNER, upper, lower, point.x, inner, check_positive(_OWNER, "sigma", sigma, "try 1e-2")
        )
        alpha, gamma = _rates(lr, rate)
        loop = SingleLoop(levels, alpha, gamma, sampled=batches is not None)
        result = _single(loop, point, forms, batches, callback, settings)
    else:
        source = PenaltyHypergradient(
            upper,
            lower,
            point.x,
            inner,
            sigma=sigma,
            inner_steps=inner_steps,
            tolerance=tolerance,
            rate=rate,
            deterministic=True,
        )
        result = _double(source, point, forms, settings, callback)
    if disp:
        print(
            f"{result.message}\n         Upper level's value: {result.fun:.6g}\n"
            f"         Iterations: {result.nit}\n         Gradients of the lower level: {result.nlower}"
        )
    return result


def _check_method(method: str, settings: Settings, batches: Any) -> None:
    if method not in ("double-loop", "single-loop"):
        raise ValueError(f"{_OWNER}: method must be 'double-loop' or 'single-loop', got {shown(method)}")
    if method == "double-loop" and batches is not None:
        raise ValueError(
            f"{_OWNER}: the double loop looks at no batches; use method='single-loop', or hand them to "
            "OptEx.rounds with a PenaltyHypergradient"
        )
    if settings.evaluator == "vectorized" or isinstance(settings.evaluator, VectorizedEvaluator):
        raise ValueError(
            f"{_OWNER}: evaluator must not be vectorized, as torch.func cannot differentiate a hypergradient's "
            "solves; use evaluator=None, or workers="
        )
    if method == "single-loop" and not (settings.evaluator is None and settings.workers is None):
        raise ValueError(
            f"{_OWNER}: the single loop is sequential, each step depends on all before it; drop evaluator and "
            "workers, or use method='double-loop'"
        )


def _rates(lr: float | None, rate: float | None) -> tuple[float, float]:
    missing = [name for name, value in (("lr", lr), ("rate", rate)) if value is None]
    if missing:
        raise ValueError(
            f"{_OWNER}: the single loop needs {' and '.join(missing)}; take lr = 0.5 / L_psi and rate = "
            "1 / (L_g + sigma L_f) for gradients that are Lipschitz with these, lr well below rate"
        )
    return check_positive(_OWNER, "lr", lr, "try less"), check_positive(_OWNER, "rate", rate, "try less")


class _BetweenRounds:
    """What a run calls after a round: keeps the round's solutions to start from, then asks the caller."""

    def __init__(
        self, source: PenaltyHypergradient, inner_form: PointForm, callback: Callable[..., Any] | None
    ) -> None:
        self._source, self._form, self._callback = source, inner_form, callback

    def __call__(self, intermediate_result: OptimizeResult) -> Any:
        try:
            self._source.accept()
        except NonFiniteError:
            return None  # the next round says so, and names the point
        if self._callback is None:
            return None
        saved = self._source.state_dict()
        intermediate_result.y = self._form.present(saved["y"])
        intermediate_result.z = self._form.present(saved["z"])
        return Callback(self._callback).ask(intermediate_result)


def _double(
    source: PenaltyHypergradient,
    point: Point,
    forms: tuple[PointForm, PointForm],
    settings: Settings,
    callback: Callable[..., Any] | None,
) -> OptimizeResult:
    base = build_base(settings, point.x, _OWNER)
    inner = read_evaluator(settings.evaluator, settings.workers, point, None, _OWNER)
    tracker = Tracker(inner, settings.gtol, _OWNER)
    try:
        wrapper = OptEx(base, parallelism=settings.parallelism, evaluator=tracker, shard=False)
        between = _BetweenRounds(source, forms[1], callback)
        run = Run(wrapper, source, tracker, forms[0], between, automatic=settings.automatic)
        found = run.until(settings.maxiter, None)
    finally:
        if isinstance(tracker.inner, WorkersEvaluator) and tracker.inner is not settings.evaluator:
            tracker.inner.close()
    with torch.no_grad():
        point.x.copy_(tracker.point.view_as(point.x))
    solved = source.solve()
    found.penalty, found.fun = found.fun, solved.upper
    found.y, found.z = (forms[1].present(vector) for vector in (solved.y, solved.z))
    found.nlower, found.sigma = source.lower_gradients, source.sigma
    return found


def _single(
    loop: SingleLoop,
    point: Point,
    forms: tuple[PointForm, PointForm],
    batches: Iterable[Any] | None,
    callback: Callable[..., Any] | None,
    settings: Settings,
) -> OptimizeResult:
    status, message, batch = 1, "Maximum number of iterations has been exceeded.", None
    left = itertools.repeat(None) if batches is None else iter(batches)
    told = Callback(callback)
    while loop.steps < settings.maxiter:
        try:
            batch = next(left)
        except StopIteration:
            if not loop.steps:
                raise ValueError(f"{_OWNER}: batches must hold at least one batch, got none") from None
            status, message = 1, "There are no batches left."
            break
        loop.step(batch)
        largest = max(float(part.abs().max()) for part in loop.direction)
        if not math.isfinite(largest) or not bool(point.x.isfinite().all()):
            status = 2
            message = f"The direction of x is not finite after {loop.steps} steps; lower lr, or rate."
            break
        if batches is None and largest <= settings.gtol:
            status, message = 0, "Optimization terminated successfully: the direction is within gtol."
            break
        if told.stops(lambda: _single_result(loop, forms, 99, _STOPPED, batch)) is not None:  # noqa: B023
            status, message = 99, _STOPPED
            break
    return _single_result(loop, forms, status, message, batch)


def _single_result(
    loop: SingleLoop, forms: tuple[PointForm, PointForm], status: int, message: str, batch: Any
) -> OptimizeResult:
    levels = loop.levels
    x = levels.read()
    loss, upper, _ = levels.penalty(x, loop.y, loop.z, batch)
    per_step = 6 if loop.sampled else 3
    return OptimizeResult(
        x=forms[0].present(x[0]),
        y=forms[1].present(loop.y),
        z=forms[1].present(loop.z),
        fun=float(upper),
        penalty=float(loss),
        jac=forms[0].present(loop.direction[0]),
        nit=loop.steps,
        nstep=loop.steps,
        nlower=per_step * loop.steps,
        sigma=levels.sigma,
        success=status == 0,
        status=status,
        message=message,
    )
