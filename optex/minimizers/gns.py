"""``minimize_gns``: second-order steps regularised by the gradient's norm, with trials computed at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from numbers import Real
from typing import Any, Final, Literal

import torch
from scipy.optimize import OptimizeResult
from torch import Tensor

from optex.callback import Callback
from optex.checks import check_callable, check_integer, check_number, shown
from optex.errors import WorkerLostError
from optex.evaluators import (
    Evaluation,
    EvaluationRequest,
    Evaluator,
    RandomDraws,
    SequentialEvaluator,
    VectorizedEvaluator,
    WorkersEvaluator,
)
from optex.minimizers.arguments import check_disp, read_evaluator
from optex.minimizers.second import Second
from optex.optimizers.gns import Curvature, Metric, SearchSettings, StepSearch, Trial
from optex.sources import GradientSource
from optex.sources.functions import Point, PointForm, check_function, function_source, read_start
from optex.stepping import ParameterVector

__all__ = ["minimize_gns"]

_WITHIN_GTOL: Final = "Optimization terminated successfully: the gradient is within gtol."
_OUT_OF_ITERATIONS: Final = "Maximum number of iterations has been exceeded."
_NONE_TAKEN: Final = (
    "Desired error not necessarily achieved due to precision loss: none of {trials} trials lowered fun enough."
)
_AT_ONCE: Final = 4  # the default where several are computed at once, as in ``minimize``


def minimize_gns(
    fun: Callable[..., Any],
    x0: Any,
    args: Any = (),
    *,
    jac: Callable[..., Any] | Literal[True] | None = None,
    hess: Callable[..., Any] | None = None,
    hessp: Callable[..., Any] | None = None,
    curvature: Literal["exact", "none"] | Callable[..., Curvature] = "exact",
    metric: Any = None,
    smoothness: float = 1.0,
    least_smoothness: float = 1e-9,
    eps: float = 1e-8,
    trials: int = 41,
    cg_tolerance: float = 0.1,
    cg_iterations: int = 200,
    parallelism: int | None = None,
    evaluator: Evaluator | Literal["sequential", "vectorized"] | None = None,
    workers: int | Executor | Callable[..., Iterable[Any]] | None = None,
    callback: Callable[..., Any] | None = None,
    maxiter: int = 1000,
    gtol: float = 1e-5,
    disp: bool = False,
) -> OptimizeResult:
    """Newton's method regularised by the gradient's norm over γ, the gradient-normalized smoothness.

        λ = ‖g‖* / (γ + eps),   h = -(H + λ B)⁻¹ g,   taken where   f(x) - f(x + h) ≥ ‖∇f(x + h)‖*² / (8 λ)

    (Algorithm 1.) An iteration tries γ, γ/2, γ/4, ... until one is taken, and the next begins with twice that.
    ``parallelism`` of these trials are evaluated at once, and the first in this order that passes is taken. The
    iterates are those of one trial at a time, in fewer rounds; bit for bit where a point's value does not
    depend on the other points of the request.

    Args:
        fun, x0, args, jac: as in :func:`~optex.minimize`.
        hess: ``hess(x, *args)``, the Hessian [d, d]; here and below x has the form in which ``fun`` gets it.
        hessp: ``hessp(x, v, *args)``, the Hessian times v, both of x's shape.
        curvature: H. ``"exact"``: ``hess``; without it conjugate gradients on ``hessp``; without both, and with
            ``jac=None``, on products by autograd. ``"none"``: H = 0, the normalized gradient method. A function
            ``curvature(x, *args)`` returns an ``optex.optimizers.Curvature`` of dimension d: a Gauss-Newton
            matrix, a Fisher matrix or another approximation of the Hessian.
        metric: B, as ``optex.optimizers.Metric`` takes it: None, [d] or [d, d].
        smoothness: the first γ.
        least_smoothness: γ is at least this after an accepted step.
        eps: added to γ in λ.
        trials: at most in an iteration.
        cg_tolerance, cg_iterations: of the conjugate gradients, as in ``optex.optimizers.ProductCurvature``.
        parallelism: trials evaluated at once; by default 1, and 4 where ``workers`` or ``evaluator`` are given.
        evaluator, workers: how they are computed, as in :func:`~optex.minimize`. ``hess``, ``hessp`` and
            ``curvature`` are called in this process.
        callback: as in :func:`~optex.minimize`, after every iteration.
        maxiter: most iterations.
        gtol: largest component of the gradient to stop at, not negative.
        disp: print at the end how it went.

    Returns:
        ``scipy.optimize.OptimizeResult``: ``x``, ``fun``, ``jac``, ``nit`` (steps taken), ``rounds`` (requests
        to the evaluator, that for x0 among them), ``nfev`` and ``njev`` (points evaluated), ``nhev`` (calls of
        ``hess`` or ``curvature``, or products), ``smoothness`` (γ at the end), ``success``, ``message`` and
        ``status``: 0 within gtol; 1 maxiter reached; 2 no trial was taken; 3 workers no longer answer; 99
        stopped by ``callback``. x is the last point that was taken, whatever the status.

    Raises:
        TypeError, ValueError: an argument cannot work, a function answers in a wrong form, or fun or its
            gradient is not finite at x0.
        WorkerLostError: no worker could evaluate x0.

    Source: Semenov, Jaggi, Doikov, ICLR 2026, arXiv 2506.13710, Algorithm 1; evaluating trials at once is ours.

    >>> import optex
    >>> from scipy.optimize import rosen, rosen_der, rosen_hess
    >>> result = optex.minimize_gns(rosen, [-1.2, 1.0], jac=rosen_der, hess=rosen_hess)
    >>> result.success, result.x.round(6), result.nit < 60
    (True, array([1., 1.]), True)
    """
    settings = SearchSettings(least_smoothness, eps, trials)
    settings.check("minimize_gns")
    smoothness = check_number("minimize_gns", "smoothness", smoothness, open_below=True)
    _check_rest(maxiter, gtol, callback, disp)
    check_number("minimize_gns", "cg_tolerance", cg_tolerance, most=1, open_above=True)
    check_integer("minimize_gns", "cg_iterations", cg_iterations)
    check_function(fun, jac)
    form, start = read_start(x0)
    point, arguments = Point(start), args if isinstance(args, tuple) else (args,)
    chosen = read_evaluator(evaluator, workers, point, jac, "minimize_gns")
    if parallelism is None:
        parallelism = 1 if isinstance(chosen, SequentialEvaluator) else _AT_ONCE
    check_integer("minimize_gns", "parallelism", parallelism)
    measured = metric if isinstance(metric, Metric) else Metric(metric)
    measured.check("minimize_gns", start.numel())
    second = Second(fun, jac, hess, hessp, curvature, arguments, form, cg_tolerance, cg_iterations)
    source = function_source(
        fun, jac, arguments, point, form, vectorized=isinstance(chosen, VectorizedEvaluator)
    )
    run = _Run(chosen, source, point, form, second, measured, settings, smoothness, parallelism)
    try:
        result = run.until(maxiter, gtol, Callback(callback))
    finally:
        if isinstance(chosen, WorkersEvaluator) and chosen is not evaluator:
            chosen.close()
    if disp:
        print(_report(result))
    return result


class _Run:
    """Iterations from the start, and the result at any time."""

    def __init__(
        self,
        evaluator: Evaluator,
        source: GradientSource,
        point: Point,
        form: PointForm,
        second: Second,
        metric: Metric,
        settings: SearchSettings,
        smoothness: float,
        parallelism: int,
    ) -> None:
        self._evaluator, self._source, self._form = evaluator, source, form
        self._vector = ParameterVector([point.x])
        self._second, self._metric, self._settings = second, metric, settings
        self._smoothness, self._parallelism = smoothness, parallelism
        self._point = self._vector.read()  # [d]
        self._gradient = torch.zeros_like(self._point)  # [d]
        self._loss = math.nan
        self._taken = self._rounds = self._count = 0

    def until(self, maxiter: int, gtol: float, callback: Callback) -> OptimizeResult:
        """Iterate until the gradient is within gtol, nothing more can be taken, or ``maxiter`` is reached."""
        self._begin()
        while True:
            if float(torch.linalg.vector_norm(self._gradient, math.inf)) <= gtol:
                return self._result(0, _WITHIN_GTOL)
            if self._taken == maxiter:
                return self._result(1, _OUT_OF_ITERATIONS)
            try:
                taken = self._iterate()
            except WorkerLostError as error:
                return self._result(3, str(error))
            if not taken:
                return self._result(2, _NONE_TAKEN.format(trials=self._settings.trials))
            if stopped := callback.stops(lambda: self._result(1, "The run has not ended.")):
                return self._result(99, stopped)

    def _begin(self) -> None:
        found = self._evaluate(self._point[None])
        self._loss, self._gradient = float(found.losses[0]), found.gradients[0]
        largest = float(torch.linalg.vector_norm(self._gradient, math.inf))
        if not (math.isfinite(self._loss) and math.isfinite(largest)):
            raise ValueError(
                f"minimize_gns: at x0 fun is {self._loss:g} and the largest component of its gradient "
                f"{largest:g}; start where both are finite"
            )

    def _evaluate(
        self,
        points: Tensor,  # [n, d]
    ) -> Evaluation:
        draws = [RandomDraws() for _ in points]
        request = EvaluationRequest(self._source, self._vector, points, [None] * len(points), draws)
        found = self._evaluator.evaluate(request)
        self._rounds += 1
        self._count += len(points) - len(found.lost)
        return found

    def _iterate(self) -> bool:
        """Search for a step and take it; whether there was one."""
        curvature = self._second.at(self._point)
        search = StepSearch(
            curvature, self._metric, self._loss, self._gradient, self._smoothness, self._settings
        )
        waiting: list[Trial] = []
        while waiting := waiting + search.next(self._parallelism - len(waiting)):
            points = torch.stack([self._point + trial.step for trial in waiting])
            found = self._evaluate(points)
            judged = 0
            for i, trial in enumerate(waiting):
                if i in found.lost:  # whether it passes is not known: later trials have to wait
                    break
                judged += 1
                loss, gradient = float(found.losses[i]), found.gradients[i]
                if search.accepts(trial, loss, gradient):
                    self._point, self._loss, self._gradient = points[i].clone(), loss, gradient.clone()
                    self._smoothness = search.following(trial)
                    self._taken += 1
                    return True
            waiting = waiting[judged:]
        return False

    def _result(self, status: int, message: str) -> OptimizeResult:
        return OptimizeResult(
            x=self._form.present(self._point),
            fun=self._loss,
            jac=self._form.present(self._gradient),
            nit=self._taken,
            rounds=self._rounds,
            nfev=self._count,
            njev=self._count,
            nhev=self._second.count,
            smoothness=self._smoothness,
            success=status == 0,
            status=status,
            message=message,
        )


def _check_rest(maxiter: Any, gtol: Any, callback: Any, disp: Any) -> None:
    check_integer("minimize_gns", "maxiter", maxiter)
    if not (isinstance(gtol, Real) and float(gtol) >= 0):
        raise ValueError(f"minimize_gns: gtol must be a number that is not negative, got {shown(gtol)}")
    check_callable("minimize_gns", "callback", callback, optional=True)
    check_disp("minimize_gns", disp)


def _report(result: OptimizeResult) -> str:
    """What ``disp=True`` prints, in SciPy's form."""
    entries = [
        ("Current function value", f"{result.fun:.6g}"),
        ("Iterations", f"{result.nit}"),
        ("Rounds of evaluations at once", f"{result.rounds}"),
        ("Function evaluations", f"{result.nfev}"),
        ("Gradient evaluations", f"{result.njev}"),
        ("Hessian evaluations or products", f"{result.nhev}"),
        ("Gradient-normalized smoothness", f"{result.smoothness:.6g}"),
    ]
    return "\n".join([result.message, *(f"         {name}: {value}" for name, value in entries)])
