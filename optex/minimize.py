"""minimize: a SciPy-style front door over OptEx, for one deterministic function of one array."""

from __future__ import annotations

import inspect
import itertools
import math
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from functools import partial
from numbers import Real
from typing import Any, Final, Literal

import numpy as np
import torch
from scipy.optimize import OptimizeResult
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from optex.checks import check_integer
from optex.errors import NonFiniteError, NotPositiveDefiniteError, WorkerLostError
from optex.estimators import Estimator
from optex.evaluators import (
    Evaluation,
    EvaluationRequest,
    Evaluator,
    SequentialEvaluator,
    VectorizedEvaluator,
    WorkersEvaluator,
    WrappingEvaluator,
)
from optex.optimizer import OptEx
from optex.round import Acceptance
from optex.sources import GradientSource
from optex.sources.functions import Point, PointForm, check_function, function_source, read_start
from optex.stepping import base_optimizer, check_settings, default_rate

__all__ = ["minimize", "scipy_method"]

_WITHIN_GTOL: Final = "Optimization terminated successfully: the gradient is within gtol."
_WITHIN_FTOL: Final = "Optimization terminated successfully: fun changed by no more than ftol in a round."
_OUT_OF_ROUNDS: Final = "Maximum number of iterations has been exceeded."
_PRECISION_LOSS: Final = "Desired error not necessarily achieved due to precision loss."


# What people who come from SciPy pass, and what does it here.
_ELSEWHERE: Final = {
    "method": "optimizer= names the algorithm; scipy.optimize.minimize takes method=optex.scipy_method",
    "tol": "gtol= bounds the gradient, ftol= the change of fun",
    "disp": "a callback can print; the result has a message",
    "options": "pass each option as an argument of its own",
    "constraints": "the optimizers here are unconstrained; use scipy.optimize.minimize(method='SLSQP')",
    "learning_rate": "lr= is the learning rate",
    "tolerance": "acceptance=optex.WithinTolerance(...) has the tolerance of a round, gtol= that of the result",
}


def minimize(
    fun: Callable[..., Any],
    x0: Any,
    args: Any = (),
    *,
    jac: Callable[..., Any] | Literal[True] | None = None,
    optimizer: str | Callable[..., Optimizer] = "adam",
    lr: float | None = None,
    parallelism: int = 4,
    stride: float | Literal["auto"] = "auto",
    history_size: int | None = None,
    estimator: Estimator | None = None,
    acceptance: Acceptance | None = None,
    evaluator: Evaluator | Literal["sequential", "vectorized"] | None = None,
    workers: int | Executor | Callable[..., Iterable[Any]] | None = None,
    scheduler: Callable[[Optimizer], LRScheduler] | None = None,
    bounds: None = None,
    callback: Callable[..., Any] | None = None,
    maxiter: int = 1000,
    gtol: float = 1e-5,
    ftol: float | None = None,
    **optimizer_options: Any,
) -> OptimizeResult:
    """Minimise a function by rounds of ``parallelism`` steps of a first-order optimizer.

    The run is that of ``OptEx(optimizer([x], lr=lr), parallelism=N)``. Round t starts at x_{t,0} = x_{t-1},
    drafts x_{t,i+1} = step(x_{t,i}, ĝ_{t,i}) on gradients predicted from those seen so far, evaluates
    f and ∇f at x_{t,0}, ..., x_{t,N-1} at once, and advances by the 1..N steps that ``acceptance`` keeps.
    It stops at a point x evaluated in round t with

        ‖∇f(x)‖_∞ ≤ gtol  and  f(x) ≤ f(x_{t,0})              x_{t,0} itself is one
        |f(x_{t,0}) - f(x_{t-1,0})| ≤ ftol · max(|f(x_{t,0})|, |f(x_{t-1,0})|, 1)

    and returns it in the first case; in all others the point of least f evaluated so far. Either way x, fun
    and jac belong together: f and ∇f were evaluated at this x. First-order optimizers with a constant learning
    rate may circle a minimum without meeting gtol: lower ``lr``, or let a ``scheduler`` do it.

    Args:
        fun: ``fun(x, *args)``, the same value whenever it is asked. Every call gets a copy of its own.
        x0: where to start, finite. A floating-point tensor of any shape: ``fun`` gets tensors of its shape,
            dtype and device, and the result holds such. Anything else, a number or [d], is taken as a float64
            array: ``fun`` gets and the result holds float64 arrays [d] (with ``jac=None`` ``fun`` gets float64
            tensors [d]).
        args: further arguments of ``fun`` and ``jac``.
        jac: True: ``fun`` returns ``(f, g)``. A function: ``jac(x, *args)`` returns the gradient, of x's
            shape. None: ``fun`` is written in torch, and autograd differentiates it. There are no finite
            differences.
        optimizer: a key of ``optex.stepping.OPTIMIZERS``, or a function of a list of one parameter (and ``lr``
            and ``optimizer_options``, where given) that returns a ``torch.optim.Optimizer``.
        lr: its learning rate; by default ``optex.stepping.default_rate(optimizer)`` for one that is named, 0.01
            for Adam, and what it is built with for a function.
        parallelism, stride, history_size, estimator, acceptance: as in :class:`~optex.OptEx`.
        evaluator: how the N gradients of a round are computed: ``"sequential"`` (default), ``"vectorized"``
            (``jac=None`` only: ``fun`` goes through ``torch.func.vmap``), or an :class:`~optex.Evaluator`; of a
            ``VectorizedEvaluator`` ``chunk_size`` and ``randomness`` are used, its model is not.
        workers: in place of ``evaluator``, SciPy's argument: so many processes (-1: one a core), a
            ``concurrent.futures.Executor``, or a function like ``map``, as in
            :class:`~optex.WorkersEvaluator`; 1 and None evaluate here. ``fun`` is sent to processes once: it
            must be possible to pickle it, and what it writes stays with them.
        scheduler: takes the optimizer and returns a learning-rate scheduler, which ticks once a step.
        bounds: refused; here for SciPy's sake.
        callback: after every round ``callback(intermediate_result)`` if that is its parameter's name, with
            the result that stopping now would give, else ``callback(x)`` with that result's x. It stops the
            run by raising ``StopIteration`` or returning True.
        maxiter: most rounds, at least 1.
        gtol: largest component of the gradient to stop at, in units of fun per unit of x.
        ftol: relative change of fun from one round's start to the next to stop at; None: never.
        optimizer_options: go to the optimizer, as ``betas`` or ``weight_decay``.

    Returns:
        ``scipy.optimize.OptimizeResult``: ``x``, ``fun`` (a float), ``jac``, ``nit`` (rounds), ``nstep``
        (steps kept), ``nfev`` and ``njev`` (points evaluated), ``success``, ``message`` and ``status``: 0
        within gtol or ftol; 1 maxiter reached; 2 numbers at a round's start or end that are not finite, or a
        history that cannot be fitted; 3 workers that do not answer any more; 99 stopped by ``callback``.

    Raises:
        TypeError, ValueError: an argument cannot work, ``fun`` or ``jac`` answer in a form that cannot, or are
            not finite at x0; the message names it and the remedy.
        WorkerLostError: no worker could evaluate x0.

    Source: Shu et al., NeurIPS 2024, Algorithm 1, in the form that :class:`~optex.OptEx` gives it.

    >>> import optex
    >>> from scipy.optimize import rosen, rosen_der
    >>> result = optex.minimize(rosen, [-1.2, 1.0], jac=rosen_der, optimizer="adam", lr=0.1, parallelism=5)
    >>> result.success, result.x.round(4)
    (True, array([1., 1.]))
    >>> result.nit < result.nstep / 2          # rounds, against the steps of Adam they stand for
    True
    """
    check_function(fun, jac)
    _check_options(bounds, callback, scheduler)
    _check_limits(maxiter, gtol, ftol)
    form, start = read_start(x0)
    point = Point(start)
    base = _build_base(optimizer, point.x, lr, optimizer_options)
    tracker = _Tracker(_read_evaluator(evaluator, workers, point, jac), gtol)
    wrapper = OptEx(
        base,
        parallelism=parallelism,
        stride=stride,
        history_size=history_size,
        estimator=estimator,
        acceptance=acceptance,
        evaluator=tracker,
        scheduler=None if scheduler is None else scheduler(base),
        shard=False,  # the tracker looks at whole points
    )
    vectorized = isinstance(tracker.inner, VectorizedEvaluator)
    arguments = args if isinstance(args, tuple) else (args,)
    source = function_source(fun, jac, arguments, point, form, vectorized=vectorized)
    try:
        return _Run(wrapper, source, tracker, form, callback).until(maxiter, ftol)
    finally:
        if isinstance(tracker.inner, WorkersEvaluator) and tracker.inner is not evaluator:
            tracker.inner.close()


def scipy_method(
    fun: Callable[..., Any],
    x0: Any,
    args: Any = (),
    jac: Callable[..., Any] | Literal[True] | None = None,
    hess: Any = None,
    hessp: Any = None,
    bounds: Any = None,
    constraints: Any = (),
    callback: Callable[..., Any] | None = None,
    tol: float | None = None,
    **options: Any,
) -> OptimizeResult:
    """:func:`minimize` in the form that ``scipy.optimize.minimize(..., method=optex.scipy_method)`` calls.

    SciPy hands ``options`` on as keywords, and ``tol``, which stands for ``gtol`` where options have none. With
    its ``jac=True`` a point is evaluated once. SciPy turns names of finite differences into ``jac=None``, so
    ``fun`` must then be written in torch, as in :func:`minimize`.

    Args:
        fun, x0, args, jac, callback: as in :func:`minimize`.
        hess, hessp: not used, with SciPy's warning.
        bounds, constraints: refused.
        tol: as ``gtol``.
        options: any other argument of :func:`minimize`.

    Raises:
        TypeError, ValueError: as in :func:`minimize`.

    >>> import optex
    >>> from scipy.optimize import minimize, rosen, rosen_der
    >>> result = minimize(
    ...     rosen, [-1.2, 1.0], jac=rosen_der, method=optex.scipy_method, options={"lr": 0.1, "parallelism": 5}
    ... )
    >>> result.success, result.x.round(4)
    (True, array([1., 1.]))
    """
    if constraints is not None and not (isinstance(constraints, (tuple, list)) and not constraints):
        raise ValueError(
            "scipy_method: constraints cannot be kept, the optimizers here are unconstrained; use "
            "scipy.optimize.minimize(method='SLSQP'), or add a penalty to fun"
        )
    for name, value in (("hess", hess), ("hessp", hessp)):
        if value is not None:
            text = f"scipy_method: the method does not use second derivatives ({name})"
            warnings.warn(text, RuntimeWarning, stacklevel=3)
    if tol is not None:
        options.setdefault("gtol", tol)
    return minimize(fun, x0, args, jac=jac, bounds=bounds, callback=callback, **options)


# ---------------------------------------------------------------------- the run


class _Tracker(WrappingEvaluator):
    """Hands points on to an evaluator, counts them, and holds on to the one to be returned.

    That is the point of least loss so far, until a round meets ``gtol``.
    """

    def __init__(self, inner: Evaluator, gtol: float) -> None:
        super().__init__(inner)
        self.gtol = gtol
        self.count = 0
        self.stationary = False
        self.start_loss = math.inf  # at the first point of the last round
        self.loss = math.inf
        self.point = self.gradient = torch.empty(0)  # [d] each, from the first evaluation on

    def evaluate(self, request: EvaluationRequest) -> Evaluation:
        # Without a history there is nothing to predict, and most optimizers draft a first round that stays
        # where it is: the function is deterministic, so one answer serves for all.
        points = request.points
        distinct = 1 if bool((points == points[0]).all()) else len(points)
        evaluation = self.inner.evaluate(request.rows(slice(distinct)))
        self._note(points, evaluation)
        self.count += distinct - len(evaluation.lost)
        return evaluation if distinct == len(points) else _repeated(evaluation, len(points))

    def _note(
        self,
        points: Tensor,  # [n, d]
        evaluation: Evaluation,
    ) -> None:
        losses = evaluation.losses.to(points.device)
        norms = torch.linalg.vector_norm(evaluation.gradients, math.inf, dim=1)
        finite = losses.isfinite() & norms.isfinite()
        self.start_loss = float(losses[0])
        if not self.count and not finite[0]:
            raise ValueError(
                f"minimize: at x0 fun is {self.start_loss:g} and the largest component of its gradient "
                f"{float(norms[0]):g}; start where both are finite"
            )
        stationary = finite & (norms <= self.gtol) & (losses <= losses[0])
        self.stationary = bool(stationary.any())
        ranked = torch.where(stationary if self.stationary else finite, losses, math.inf)
        best = int(ranked.argmin())
        if self.stationary or float(ranked[best]) < self.loss:
            self.loss = float(losses[best])
            self.point = points[best].clone()
            self.gradient = evaluation.gradients[best].clone()


def _repeated(evaluation: Evaluation, count: int) -> Evaluation:
    """One point's evaluation as that of ``count`` equal points."""
    return Evaluation(
        evaluation.losses.repeat(count),
        evaluation.gradients.repeat(count, 1),
        evaluation.masks * count,
        retried=evaluation.retried,
    )


class _Run:
    """The rounds of one call of ``minimize``, and its result at any time."""

    def __init__(
        self,
        optimizer: OptEx,
        source: GradientSource,
        tracker: _Tracker,
        form: PointForm,
        callback: Callable[..., Any] | None,
    ) -> None:
        self._rounds = optimizer.rounds(itertools.repeat(None), source)
        self._tracker = tracker
        self._form = form
        self._callback = callback
        self._modern = callback is not None and _takes_intermediate_result(callback)
        self._taken = 0
        self._accepted = 0

    def until(self, maxiter: int, ftol: float | None) -> OptimizeResult:
        """Rounds until a tolerance is met, the callback stops them or ``maxiter`` is reached."""
        tracker = self._tracker
        before = math.nan
        for _ in range(maxiter):
            try:
                self._accepted += next(self._rounds).accepted
            except (NonFiniteError, NotPositiveDefiniteError) as error:
                if tracker.stationary:  # the failure is the step's that nobody needs any more
                    return self._result(0, _WITHIN_GTOL)
                return self._result(2, f"{_PRECISION_LOSS} {error}")
            except WorkerLostError as error:
                if not tracker.count:
                    raise
                return self._result(3, str(error))
            self._taken += 1
            stopped = self._call_back()
            if stopped:
                return self._result(99, stopped)
            if tracker.stationary:
                return self._result(0, _WITHIN_GTOL)
            here = tracker.start_loss
            if ftol is not None and abs(here - before) <= ftol * max(abs(here), abs(before), 1.0):
                return self._result(0, _WITHIN_FTOL)
            before = here
        return self._result(1, _OUT_OF_ROUNDS)

    def _call_back(self) -> str | None:
        """The message to stop with, if the callback asks for it."""
        if self._callback is None:
            return None
        result = self._result(1, "The run has not ended.")
        try:
            answer = self._callback(intermediate_result=result) if self._modern else self._callback(result.x)
        except StopIteration:
            return "`callback` raised `StopIteration`."
        return "`callback` returned True." if isinstance(answer, (bool, np.bool_)) and answer else None

    def _result(self, status: int, message: str) -> OptimizeResult:
        tracker = self._tracker
        return OptimizeResult(
            x=self._form.present(tracker.point),
            fun=tracker.loss,
            jac=self._form.present(tracker.gradient),
            nit=self._taken,
            njev=tracker.count,
            nfev=tracker.count,
            nstep=self._accepted,
            success=status == 0,
            status=status,
            message=message,
        )


# ---------------------------------------------------------------------- the arguments


def _check_options(bounds: Any, callback: Any, scheduler: Any) -> None:
    if bounds is not None:
        raise ValueError(
            "minimize: bounds cannot be kept, the optimizers here are unconstrained; use "
            "scipy.optimize.minimize(method='L-BFGS-B'), or change variables (x = exp(z) is positive)"
        )
    if not (callback is None or callable(callback)):
        raise TypeError(f"minimize: callback must be callable or None, got {type(callback).__name__}")
    if not (scheduler is None or callable(scheduler)):
        raise TypeError(
            "minimize: scheduler must be a function of the optimizer, as lambda base: "
            f"torch.optim.lr_scheduler.ExponentialLR(base, 0.99), got {type(scheduler).__name__}"
        )


def _check_limits(maxiter: Any, gtol: Any, ftol: Any) -> None:
    check_integer("minimize", "maxiter", maxiter)
    for name, value in (("gtol", gtol), ("ftol", 0.0 if ftol is None else ftol)):
        if not (isinstance(value, Real) and float(value) >= 0):
            raise ValueError(f"minimize: {name} must be a number that is not negative, got {value!r}")


def _read_evaluator(evaluator: Any, workers: Any, point: Point, jac: Any) -> Evaluator:
    """The evaluator that is named or given; one that goes through a module is made to go through ``point``."""
    if not (workers is None or workers is map or (workers == 1 and not isinstance(workers, bool))):
        if evaluator is not None:
            raise ValueError(
                "minimize: evaluator and workers both say how gradients are computed; leave one out "
                "(evaluator=optex.WorkersEvaluator(workers, timeout=60) has more to set)"
            )
        return WorkersEvaluator(workers)
    if evaluator is None or evaluator == "sequential":
        return SequentialEvaluator()
    if evaluator == "vectorized":
        evaluator = VectorizedEvaluator(point)
    if not isinstance(evaluator, Evaluator):
        raise TypeError(
            "minimize: evaluator must be 'sequential', 'vectorized' or an optex.evaluators.Evaluator, got "
            f"{evaluator!r}"
        )
    if not isinstance(evaluator, VectorizedEvaluator):
        return evaluator
    if jac is not None:
        raise ValueError(
            "minimize: evaluator 'vectorized' differentiates fun by torch.func, so jac must be None; drop jac "
            "and write fun in torch, or use evaluator='sequential'"
        )
    return VectorizedEvaluator(point, chunk_size=evaluator.chunk_size, randomness=evaluator.randomness)


def _build_base(
    optimizer: str | Callable[..., Optimizer],
    x: nn.Parameter,  # [...]
    lr: float | None,
    options: dict[str, Any],
) -> Optimizer:
    if not (isinstance(optimizer, str) or callable(optimizer)):
        raise TypeError(
            "minimize: optimizer must be a name or a function of a list of one parameter, as 'adam' or "
            f"torch.optim.Adam, got {type(optimizer).__name__}"
        )
    if isinstance(optimizer, str) and lr is None:
        lr = default_rate(optimizer)
    settings = options if lr is None else {"lr": lr, **options}
    check_settings("minimize", optimizer, options, _ELSEWHERE)
    make = partial(base_optimizer, optimizer) if isinstance(optimizer, str) else optimizer
    try:
        base = make([x], **settings)
    except TypeError as error:
        given = ", ".join(settings) or "no options"
        raise TypeError(f"minimize: optimizer {optimizer!r} cannot be built with {given}: {error}") from error
    if not isinstance(base, Optimizer):
        raise TypeError(f"minimize: optimizer must return a torch.optim.Optimizer, got {type(base).__name__}")
    if [id(p) for group in base.param_groups for p in group["params"]] != [id(x)]:
        raise ValueError("minimize: optimizer must be built over the list that it is handed, and nothing else")
    if any(group.get("maximize") for group in base.param_groups):
        raise ValueError("minimize: optimizer has maximize=True; minimise -fun instead")
    return base


def _takes_intermediate_result(callback: Callable[..., Any]) -> bool:
    """SciPy's rule: the one parameter has that name."""
    try:
        return set(inspect.signature(callback).parameters) == {"intermediate_result"}
    except ValueError:  # a builtin that does not tell
        return False
