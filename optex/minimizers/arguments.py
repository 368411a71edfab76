"""The arguments of ``minimize``: collected, checked, and turned into evaluator and base optimizer."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, fields, replace
from functools import partial
from numbers import Integral, Real
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from optex.checks import as_float, check_callable, check_integer, check_number, shown
from optex.estimators import Estimator
from optex.evaluators import Evaluator, SequentialEvaluator, VectorizedEvaluator, WorkersEvaluator
from optex.round import Acceptance
from optex.sources.functions import Point
from optex.stepping import OPTIMIZERS, base_optimizer, check_settings, default_rate

__all__ = ["Settings", "build_base", "check_disp", "read_evaluator"]

# Keywords of SciPy's and torch's functions, and what takes their place here.
_ELSEWHERE: Final = {
    "constraints": "the optimizers here are unconstrained; use scipy.optimize.minimize(method='SLSQP')",
    "learning_rate": "lr= is the learning rate",
    "tolerance": "acceptance=optex.WithinTolerance(...) has the tolerance of a round, gtol= that of the result",
}


@dataclass(frozen=True)
class Settings:
    """The settings of a run that ``options`` of ``minimize`` may hold, named as its arguments."""

    optimizer: str | Callable[..., Optimizer]
    lr: float | None
    parallelism: int
    stride: float | Literal["auto"]
    history_size: int | None
    estimator: Estimator | None
    acceptance: Acceptance | None
    evaluator: Any
    workers: int | Executor | Callable[..., Any] | None
    scheduler: Callable[[Optimizer], Any] | None
    maxiter: int
    gtol: float
    ftol: float | None
    disp: bool
    optimizer_options: Mapping[str, Any]

    @property
    def automatic(self) -> bool:
        """Whether the learning rate is chosen by the run: neither caller nor scheduler sets it."""
        return self.lr is None and self.scheduler is None and isinstance(self.optimizer, str)

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> Settings:
        """The settings from the arguments of ``minimize``, with ``options`` and ``tol`` applied.

        Raises:
            TypeError, ValueError: one is unknown, of the wrong kind or out of range.
        """
        options = given["options"]
        if options is not None and not isinstance(options, Mapping):
            raise TypeError(f"minimize: options must be a dict or None, got {type(options).__name__}")
        names = [field.name for field in fields(cls) if field.name != "optimizer_options"]
        found = {name: given[name] for name in names}
        rest = dict(given["optimizer_options"])
        for name, value in (options or {}).items():
            (found if name in names else rest)[name] = value
        if found["gtol"] is None:
            found["gtol"] = 1e-5 if given["tol"] is None else given["tol"]
        settings = cls(**found, optimizer_options=rest)
        _check_options(options or {}, names, settings)
        _check_functions(given["bounds"], given["callback"], settings.scheduler)
        _check_limits(settings, given["tol"])
        return replace(
            settings,
            lr=None if settings.lr is None else check_number("minimize", "lr", settings.lr),
            gtol=float(settings.gtol),
            ftol=None if settings.ftol is None else float(settings.ftol),
            optimizer_options=_numbers(settings.optimizer, rest),
        )


def _numbers(optimizer: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, checked to be numbers where the defaults are; torch would fail later, if at all."""
    factory = OPTIMIZERS.get(optimizer) if isinstance(optimizer, str) else optimizer
    try:
        known = inspect.signature(factory).parameters if callable(factory) else {}
    except ValueError:  # a builtin without a signature
        known = {}
    checked = {
        name: _number(name, value)
        for name, value in options.items()
        if name in known
        and isinstance(known[name].default, (int, float))
        and not isinstance(known[name].default, bool)
    }
    return {**options, **checked}


def _check_options(options: Mapping[str, Any], names: list[str], settings: Settings) -> None:
    """Refuse keywords and options that nobody takes."""
    optimizer, rest = settings.optimizer, settings.optimizer_options
    if not (isinstance(optimizer, str) or callable(optimizer)):
        raise TypeError(
            "minimize: optimizer must be a name or a function of a list of one parameter, as 'adam' or "
            f"torch.optim.Adam, got {type(optimizer).__name__}"
        )
    known = _parameters(optimizer)
    unknown = [] if known is None else [name for name in options if name in rest and name not in known]
    if unknown:
        raise TypeError(
            f"minimize: there is no option {', '.join(map(repr, unknown))}; options are {', '.join(names)}, "
            f"and what optimizer {optimizer!r} takes: {', '.join(known or ())}"
        )
    remedies = {**_ELSEWHERE, "method": _instead_of_method(rest.get("method"))}
    check_settings("minimize", optimizer, rest, remedies)


def _parameters(optimizer: Any) -> list[str] | None:
    """Options that the optimizer takes; None where its signature does not tell."""
    factory = OPTIMIZERS.get(optimizer) if isinstance(optimizer, str) else optimizer
    try:
        parameters = inspect.signature(factory).parameters if callable(factory) else None
    except ValueError:  # a builtin without a signature
        parameters = None
    if parameters is None or any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return None
    return [name for name in parameters if name not in ("params", "lr")]


def _instead_of_method(method: Any) -> str:
    text = "optimizer= names the base optimizer, whose steps are taken"
    if isinstance(method, str) and method.lower() in OPTIMIZERS:
        return f"{text}: optimizer={method.lower()!r}"
    given = f"method={method!r}" if isinstance(method, str) else "method=..."
    return (
        f"{text} ({', '.join(OPTIMIZERS)}). SciPy's own methods are in scipy.optimize.minimize({given}), where "
        "method=optex.scipy_method is this one"
    )


def _check_functions(bounds: Any, callback: Any, scheduler: Any) -> None:
    if bounds is not None:
        raise ValueError(
            "minimize: bounds cannot be kept, the optimizers here are unconstrained; use "
            "scipy.optimize.minimize(method='L-BFGS-B'), or change variables (x = exp(z) is positive)"
        )
    check_callable("minimize", "callback", callback, optional=True)
    if not (scheduler is None or callable(scheduler)):
        raise TypeError(
            "minimize: scheduler must be a function of the optimizer, as lambda base: "
            f"torch.optim.lr_scheduler.ExponentialLR(base, 0.99), got {type(scheduler).__name__}"
        )


def _number(name: str, value: Any) -> Any:
    number = check_number("minimize", name, value, least=-math.inf)
    whole = isinstance(value, Integral) and abs(number) < 2**53
    return value if whole or isinstance(value, Tensor) else number


def _is_tolerance(value: Any) -> bool:
    return 0 <= value <= sys.float_info.max or value == math.inf


def _check_limits(settings: Settings, tol: Any) -> None:
    check_integer("minimize", "maxiter", settings.maxiter)
    for name, value in (("tol", tol), ("gtol", settings.gtol), ("ftol", settings.ftol)):
        if not (value is None or (isinstance(value, Real) and _is_tolerance(value))):
            raise ValueError(f"minimize: {name} must be a number that is not negative, got {shown(value)}")
    check_disp("minimize", settings.disp)


def check_disp(owner: str, value: Any) -> None:
    """Refuse a ``disp`` that is neither a truth value nor, as SciPy's may be, an integer.

    Raises:
        TypeError: it is neither.
    """
    if not isinstance(value, int):
        raise TypeError(f"{owner}: disp must be True or False, got {shown(value)}")


def read_evaluator(evaluator: Any, workers: Any, point: Point, jac: Any, owner: str = "minimize") -> Evaluator:
    """The evaluator that is named or given; a vectorized one is rebuilt over ``point``.

    Raises:
        TypeError, ValueError: it is none, contradicts ``workers``, or cannot be used with ``jac``.
    """
    if not (
        workers is None
        or workers is map
        or (isinstance(workers, int) and workers == 1 and not isinstance(workers, bool))
    ):
        if evaluator is not None:
            raise ValueError(
                f"{owner}: evaluator and workers both say how gradients are computed; leave one out "
                "(evaluator=optex.WorkersEvaluator(workers, timeout=60) has more to set)"
            )
        return WorkersEvaluator(workers)
    if evaluator is None or evaluator == "sequential":
        return SequentialEvaluator()
    if evaluator == "vectorized":
        evaluator = VectorizedEvaluator(point)
    if not isinstance(evaluator, Evaluator):
        raise TypeError(
            f"{owner}: evaluator must be 'sequential', 'vectorized' or an optex.evaluators.Evaluator, got "
            f"{shown(evaluator)}"
        )
    if not isinstance(evaluator, VectorizedEvaluator):
        return evaluator
    if jac is not None:
        raise ValueError(
            f"{owner}: evaluator 'vectorized' differentiates fun by torch.func, so jac must be None; drop jac "
            "and write fun in torch, or use evaluator='sequential'"
        )
    return VectorizedEvaluator(point, chunk_size=evaluator.chunk_size, randomness=evaluator.randomness)


def build_base(
    settings: Settings,
    x: nn.Parameter,  # [...]
    owner: str = "minimize",
) -> Optimizer:
    """The base optimizer over x.

    Raises:
        TypeError, ValueError: it cannot be built, or not over x alone.
    """
    optimizer, lr = settings.optimizer, settings.lr
    if isinstance(optimizer, str) and lr is None:
        lr = default_rate(optimizer)
    choices = {**({} if lr is None else {"lr": lr}), **settings.optimizer_options}
    make = partial(base_optimizer, optimizer) if isinstance(optimizer, str) else optimizer
    try:
        base = make([x], **choices)
    except TypeError as error:
        given = ", ".join(choices) or "no options"
        raise TypeError(
            f"{owner}: optimizer {shown(optimizer)} cannot be built with {given}: {error}"
        ) from error
    if not isinstance(base, Optimizer):
        raise TypeError(f"{owner}: optimizer must return a torch.optim.Optimizer, got {type(base).__name__}")
    if [id(p) for group in base.param_groups for p in group["params"]] != [id(x)]:
        raise ValueError(f"{owner}: optimizer must be built over the list that it is handed, and nothing else")
    if any(group.get("maximize") for group in base.param_groups):
        raise ValueError(f"{owner}: optimizer has maximize=True; minimise -fun instead")
    _check_sizes(owner, base, x)
    return base


def _check_sizes(owner: str, base: Optimizer, x: nn.Parameter) -> None:
    """Refuse settings that torch could not turn into numbers of x's kind in a step."""
    largest = torch.finfo(x.dtype).max
    for name, value in ((name, value) for group in base.param_groups for name, value in group.items()):
        if isinstance(value, int | float) and abs(value) > largest:
            raise ValueError(
                f"{owner}: {name}={as_float(value):g} is beyond {largest:g}, the largest number of {x.dtype}; "
                "pass a smaller one, or x0 in float64"
            )
