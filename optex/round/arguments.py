"""The arguments of ``OptEx``: checked, and made as the paper has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from optex.checks import check_kind, shown
from optex.estimators import Estimator, SeparableEstimator
from optex.estimators.kernels import Kernel
from optex.evaluators import Evaluator, SequentialEvaluator, VectorizedEvaluator, WrappingEvaluator
from optex.round.acceptance import SELECTIONS, Acceptance, Last, LowestLoss, WithinTolerance
from optex.round.stride import read_stride
from optex.sources import GradientSource, ObjectiveSource
from optex.stepping import ObservesEvaluations

__all__ = [
    "PLAIN_STEP",
    "check_choices",
    "check_evaluator",
    "check_layout",
    "check_parts",
    "check_run",
    "check_stride",
    "is_exact",
    "named_evaluator",
    "published_parts",
    "source_of",
    "unwrapped",
]

PLAIN_STEP: Final = (
    "OptEx.step was called without a closure: a plain step of the base optimizer with the gradients that are "
    "there, and nothing is predicted. Use optimizer.rounds(batches, objective), or optimizer.step(closure) "
    "with a closure that backpropagates and returns the loss."
)


def unwrapped(optimizer: Any) -> Any:
    """The optimizer inside Lightning's wrapper, a subclass of its class whose ``step`` takes closures alone."""
    inner = getattr(optimizer, "_optimizer", None)
    return inner if isinstance(optimizer, type(inner)) else optimizer


def published_parts(
    kernel: Kernel | str,
    lengthscale: float | Literal["median", "leave-one-out"],
    noise_variance: float | Literal["leave-one-out"],
    selection: str,
    evaluate: str,
) -> tuple[Estimator, Acceptance]:
    """Estimator and acceptance of Algorithm 1; arguments and errors as in ``OptEx.from_paper``."""
    if not isinstance(selection, str) or selection not in SELECTIONS:
        raise ValueError(
            f"OptEx.from_paper: selection must be one of {', '.join(SELECTIONS)}, got {shown(selection)}"
        )
    if evaluate not in ("all", "last"):
        raise ValueError(f"OptEx.from_paper: evaluate must be 'all' or 'last', got {shown(evaluate)}")
    if evaluate == "last" and selection != "last":
        raise ValueError(
            f"OptEx.from_paper: selection {selection!r} compares all proxies; it needs evaluate='all'"
        )
    estimator = SeparableEstimator(kernel, lengthscale, noise_variance, prior_mean="zero")
    return estimator, Last(evaluate) if selection == "last" else SELECTIONS[selection]()


def named_evaluator(evaluator: Any, model: Any) -> Any:
    """The evaluator of that name, built for the model where it needs one; anything else passes through.

    Raises:
        ValueError: the name is unknown, or the evaluator needs a module and there is none.
    """
    if evaluator is None or evaluator == "sequential":
        return SequentialEvaluator()
    if not isinstance(evaluator, str):
        return evaluator
    if evaluator != "vectorized":
        raise ValueError(
            f"OptEx: evaluator must be 'sequential', 'vectorized' or an Evaluator, got {shown(evaluator)}"
        )
    if not isinstance(model, nn.Module):
        raise ValueError(
            "OptEx: evaluator 'vectorized' computes gradients through the module whose parameters they are of; "
            "say which: model=model"
        )
    return VectorizedEvaluator(model)


def check_parts(
    base: Optimizer, estimator: Any, acceptance: Any, evaluator: Any, scheduler: Any, model: Any
) -> None:
    """Refuse parts of the wrong type, or that do not work with the base optimizer.

    Raises:
        TypeError, ValueError: one is; the message names it.
    """
    check_kind("OptEx", "estimator", estimator, Estimator, "an optex.estimators.Estimator")
    check_kind("OptEx", "acceptance", acceptance, Acceptance, "an optex.Acceptance")
    check_evaluator(base, evaluator)
    check_kind("OptEx", "scheduler", scheduler, LRScheduler, "a torch.optim.lr_scheduler.LRScheduler")
    check_kind("OptEx", "model", model, nn.Module, "the torch.nn.Module whose buffers follow the steps taken")
    if isinstance(scheduler, ReduceLROnPlateau):
        raise TypeError(
            "OptEx: scheduler cannot be ReduceLROnPlateau, whose tick needs a metric; tick it yourself "
            "between rounds"
        )
    if isinstance(acceptance, LowestLoss) and any(group.get("maximize") for group in base.param_groups):
        raise ValueError("OptEx: acceptance keeps the lowest loss, but base was built with maximize=True")


def check_evaluator(base: Optimizer, evaluator: Any) -> None:
    """Refuse what is no evaluator, or one that cannot hand the base optimizer all that its steps need.

    Raises:
        TypeError, ValueError: it is such.
    """
    check_kind("OptEx", "evaluator", evaluator, Evaluator, "an optex.evaluators.Evaluator")
    if evaluator is not None and isinstance(base, ObservesEvaluations) and not evaluator.observes:
        while isinstance(evaluator, WrappingEvaluator):
            evaluator = evaluator.inner
        raise ValueError(
            f"OptEx: evaluator {type(evaluator).__name__} answers gradients alone, and {type(base).__name__} "
            "needs more of a backward pass than that; pass evaluator=SequentialEvaluator(), or none"
        )


def check_run(batches: Any, objective: Any) -> None:
    """Refuse batches that cannot be iterated, and an objective that cannot be called.

    Raises:
        TypeError: they are such.
    """
    if not hasattr(batches, "__iter__") and not hasattr(batches, "__getitem__"):
        raise TypeError(
            f"OptEx.rounds: batches must be iterable, got {type(batches).__name__}; hand over a list or a "
            "DataLoader, or itertools.repeat(None, n) where the objective needs no batch"
        )
    if not isinstance(objective, GradientSource) and not callable(objective):
        raise TypeError(
            "OptEx.rounds: objective must be a function of a batch that returns the scalar loss, or a "
            f"GradientSource, got {type(objective).__name__}"
        )


def source_of(
    base: Optimizer, objective: Callable[[Any], Tensor] | GradientSource, *, deterministic: bool
) -> GradientSource:
    """A source of the objective's gradients, with their graph where the base optimizer differentiates them."""
    given = isinstance(objective, GradientSource)
    source = objective if given else ObjectiveSource(objective, deterministic)
    needs_graph = isinstance(base, ObservesEvaluations) and base.needs_graph
    return source.with_graph() if needs_graph else source


def check_stride(stride: Any, acceptance: Acceptance) -> float:
    """The largest stride.

    Raises:
        TypeError, ValueError: ``stride`` is not one, or the acceptance takes no steps on predictions alone.
    """
    try:
        largest = read_stride(stride)
    except (TypeError, ValueError) as error:
        raise type(error)(f"OptEx: {error}") from None
    if stride != "auto" and largest > 1 and not acceptance.strides:
        raise ValueError(
            f"OptEx: stride {stride} would take steps without gradients of their own, which "
            f"{type(acceptance).__name__} does not; pass stride=1, or acceptance=WithinTolerance() with a "
            "positive tolerance"
        )
    return largest


def is_exact(acceptance: Acceptance, parallelism: int, stride: float) -> bool:
    """Whether the run is promised to be the base optimizer's, bit for bit."""
    return isinstance(acceptance, WithinTolerance) and (
        acceptance.tolerance == 0 or (parallelism == 1 and stride == 1)
    )


def check_choices(deterministic: Any, gradient_hook: Any, on_nonfinite: Any) -> None:
    """Refuse values that these settings do not have.

    Raises:
        TypeError, ValueError: one came; the message names the setting.
    """
    if not isinstance(deterministic, bool):
        raise TypeError(
            "OptEx: deterministic must be True (the same answer whenever it is asked at a point) or False, got "
            f"{shown(deterministic)}"
        )
    if gradient_hook is not None and not callable(gradient_hook):
        raise TypeError(
            "OptEx: gradient_hook must be a function without arguments, as "
            f"lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0), got {shown(gradient_hook)}"
        )
    if on_nonfinite not in ("raise", "skip"):
        raise ValueError(f"OptEx: on_nonfinite must be 'raise' or 'skip', got {shown(on_nonfinite)}")


def check_layout(shard: Any, history_dtype: Any, history_device: Any) -> None:
    """Refuse values that do not say where vectors and the history are kept.

    Raises:
        TypeError, ValueError: one came; the message names the argument.
    """
    check_kind("OptEx", "shard", shard, bool, "True, False or None")
    check_kind("OptEx", "history_dtype", history_dtype, torch.dtype, "a floating-point torch.dtype or None")
    if history_dtype is not None and not history_dtype.is_floating_point:
        raise ValueError(
            f"OptEx: history_dtype must be a floating-point torch.dtype, got {shown(history_dtype)}"
        )
    try:
        device = None if history_device is None else torch.device(history_device)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            "OptEx: history_device must be a torch.device or the name of one, "
            f"got {shown(history_device)} ({error})"
        ) from None
    if device is not None and device.type == "meta":
        raise ValueError("OptEx: history_device 'meta' keeps no numbers; the history needs a device that does")
