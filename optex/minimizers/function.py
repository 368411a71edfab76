"""``minimize``, and the form of it that SciPy calls."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor
from typing import Any, Literal

from scipy.optimize import OptimizeResult
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from optex.estimators import Estimator
from optex.evaluators import Evaluator, VectorizedEvaluator, WorkersEvaluator
from optex.minimizers.arguments import Settings, build_base, read_evaluator
from optex.minimizers.run import Run, report
from optex.minimizers.tracker import Tracker
from optex.optimizer import OptEx
from optex.round import Acceptance
from optex.round.arguments import source_of
from optex.sources.functions import Point, check_function, function_source, read_start

__all__ = ["minimize", "scipy_method"]


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
    tol: float | None = None,
    gtol: float | None = None,
    ftol: float | None = None,
    disp: bool = False,
    options: Mapping[str, Any] | None = None,
    **optimizer_options: Any,
) -> OptimizeResult:
    """Minimise a function by a first-order optimizer whose gradients are computed ``parallelism`` at a time.

    The run is that of ``OptEx(optimizer([x], lr=lr), parallelism=N)``. Round t starts at x_{t,0} = x_{t-1},
    drafts x_{t,i+1} = step(x_{t,i}, ĝ_{t,i}) on gradients predicted from those seen so far, evaluates f and ∇f
    at x_{t,0} and up to N - 1 later ones at once, and advances by those of its K = N · stride steps that
    ``acceptance`` keeps, one at least. It stops in round t where one of these holds,

        ‖∇f(x)‖_∞ ≤ gtol  and  f(x) ≤ f(x_{t,0})     at a point x that the round evaluated, x_{t,0} included
        |f(x_{t,0}) - f(x_{t-1,0})| ≤ ftol · max(|f(x_{t,0})|, |f(x_{t-1,0})|, 1)

    and returns x in the first case; in all others the point of least f evaluated so far. Either way x, fun
    and jac belong together: f and ∇f were evaluated at this x.

    **The learning rate.** With ``lr=None`` and a named ``optimizer`` it is chosen. f one step away from x0 is
    measured at N rates at once, on a grid around ``optex.stepping.default_rate(optimizer)`` that is extended
    while its end is best; the run begins with a quarter of the best rate. A round that measures a lower f than
    any before raises the rate by a tenth. After three rounds in a row that do not, the run returns to the best
    point, with the optimizer's state as at the start, and takes the one of five lower rates whose next steps
    come out lowest on predicted gradients, which costs no gradient. A trial that is not finite loses. The
    search's evaluations count in nit and nfev. A rate that is given stays: it may circle a minimum without
    meeting gtol.

    Args:
        fun: ``fun(x, *args)``, the same value whenever it is asked. Every call gets a copy of its own.
        x0: where to start, finite. With a floating-point tensor of any shape ``fun`` gets, and the result
            holds, tensors of its shape, dtype and device. Anything else, a number or [d], is taken as a float64
            array: ``fun`` gets and the result holds float64 arrays [d] (with ``jac=None`` ``fun`` gets float64
            tensors [d]).
        args: further arguments of ``fun`` and ``jac``.
        jac: True: ``fun`` returns ``(f, g)``. A function: ``jac(x, *args)`` returns the gradient, of x's
            shape. None: ``fun`` is written in torch, and autograd differentiates it. There are no finite
            differences.
        optimizer: a key of ``optex.stepping.OPTIMIZERS``, or a function of a list of one parameter (and ``lr``
            and ``optimizer_options``, where given) that returns a ``torch.optim.Optimizer``.
        lr: its learning rate, kept as it is. None: chosen and adapted as above where ``optimizer`` is a name
            and there is no ``scheduler``. With a scheduler a named optimizer begins at ``default_rate``; a
            function's optimizer has the rate that it was built with.
        parallelism, stride, history_size, estimator, acceptance: as in :class:`~optex.OptEx`.
        evaluator: how the N gradients of a round are computed: ``"sequential"`` (default), ``"vectorized"``
            (``jac=None`` only: ``fun`` goes through ``torch.func.vmap``), or an :class:`~optex.Evaluator`; of a
            ``VectorizedEvaluator`` ``chunk_size`` and ``randomness`` are used, its model is not.
        workers: in place of ``evaluator``, SciPy's argument: a number of processes (-1: one per core), a
            ``concurrent.futures.Executor``, or a function like ``map``, as in
            :class:`~optex.WorkersEvaluator`; 1 and None evaluate in this process. ``fun`` is sent to processes
            once: it must be possible to pickle it, and this process does not see what it changes there.
        scheduler: takes the optimizer and returns a learning-rate scheduler, which ticks once a step.
        bounds: refused unless None; named because SciPy passes it.
        callback: after every round ``callback(intermediate_result)`` if that is its parameter's name, with
            the result that stopping now would give, else ``callback(x)`` with that result's x. It stops the
            run by raising ``StopIteration`` or returning True.
        maxiter: most rounds, at least 1.
        tol: ``gtol`` where that is not given, as in SciPy.
        gtol: largest component of the gradient to stop at, in units of fun per unit of x; by default 1e-5.
        ftol: relative change of fun from one round's start to the next to stop at; None: never.
        disp: print at the end how it went, in SciPy's form.
        options: as SciPy takes them: a dict of these arguments by name, but for the first three, jac, bounds,
            callback and tol, and of ``optimizer_options``. They override the arguments outside.
        optimizer_options: keyword arguments of the optimizer, such as ``betas`` or ``weight_decay``.

    Returns:
        ``scipy.optimize.OptimizeResult``: ``x``, ``fun`` (a float), ``jac``, ``nit`` (rounds), ``nstep``
        (steps taken, including those that the rate rule took back), ``nfev`` and ``njev`` (points evaluated),
        ``lr`` (the first rate, given or chosen), ``lr_final``, ``success``, ``message`` and ``status``: 0
        within gtol or ftol; 1 maxiter reached; 2 numbers at a round's start or end that are not finite, a
        history that cannot be fitted, or a chosen rate so low that steps change nothing; 3 workers no longer
        answer; 99 stopped by ``callback``.

    Raises:
        TypeError, ValueError: an argument cannot work, ``fun`` or ``jac`` answer in a wrong form or are not
            finite at x0; the message names it and the remedy.
        WorkerLostError: no worker could evaluate x0.

    Source: Shu et al., NeurIPS 2024, Algorithm 1, in the form that :class:`~optex.OptEx` gives it.

    >>> import optex
    >>> from scipy.optimize import rosen, rosen_der
    >>> result = optex.minimize(rosen, [-1.2, 1.0], jac=rosen_der)
    >>> result.success, result.x.round(3), result.lr
    (True, array([1., 1.]), 0.04)
    >>> result = optex.minimize(rosen, [-1.2, 1.0], jac=rosen_der, lr=0.1, parallelism=5)
    >>> result.success, result.nit < result.nstep / 2     # rounds, against the steps of Adam they stand for
    (True, True)
    """
    settings = Settings.read(locals())
    check_function(fun, jac)
    form, start = read_start(x0)
    point = Point(start)
    base = build_base(settings, point.x)
    tracker = Tracker(read_evaluator(settings.evaluator, settings.workers, point, jac), settings.gtol)
    wrapper = OptEx(
        base,
        parallelism=settings.parallelism,
        stride=settings.stride,
        history_size=settings.history_size,
        estimator=settings.estimator,
        acceptance=settings.acceptance,
        evaluator=tracker,
        scheduler=None if settings.scheduler is None else settings.scheduler(base),
        shard=False,  # the tracker needs whole points
    )
    vectorized = isinstance(tracker.inner, VectorizedEvaluator)
    arguments = args if isinstance(args, tuple) else (args,)
    source = function_source(fun, jac, arguments, point, form, vectorized=vectorized)
    source = source_of(base, source, deterministic=True)
    try:
        run = Run(wrapper, source, tracker, form, callback, automatic=settings.automatic)
        result = run.until(settings.maxiter, settings.ftol)
    finally:
        if isinstance(tracker.inner, WorkersEvaluator) and tracker.inner is not settings.evaluator:
            tracker.inner.close()
    if settings.disp:
        print(report(result))
    return result


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

    SciPy passes ``options`` as keywords. With its ``jac=True``, ``fun`` is called once a point. SciPy turns
    names of finite differences into ``jac=None``, so ``fun`` must then be written in torch, as in
    :func:`minimize`.

    Args:
        fun, x0, args, jac, callback: as in :func:`minimize`.
        hess, hessp: not used, with SciPy's warning.
        bounds, constraints: refused.
        tol: ``gtol`` where options have none.
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
    return minimize(fun, x0, args, jac=jac, bounds=bounds, callback=callback, tol=tol, **options)
