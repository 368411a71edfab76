"""A function of one array, NumPy's or torch's, as a source of gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from optex.checks import shown
from optex.sources.interface import GradientSource
from optex.sources.objective import ObjectiveSource

__all__ = ["Point", "PointForm", "check_function", "differentiated", "function_source", "read_start"]

Jac = Callable[..., Any] | Literal[True] | None


class Point(nn.Module):
    """The point that is optimised, as a module, so that ``torch.func`` can swap it."""

    def __init__(
        self,
        start: Tensor,  # [...]
    ) -> None:
        super().__init__()
        self.x: nn.Parameter = nn.Parameter(start)


@dataclass(frozen=True)
class PointForm:
    """How the caller sees a point: as a float64 array, or as a tensor of the start's kind."""

    arrays: bool
    shape: torch.Size
    dtype: torch.dtype

    def present(
        self,
        values: Tensor,  # [d] or the point's shape
    ) -> Any:  # [...]
        """A copy in the caller's form."""
        copied = values.detach().reshape(self.shape).to(self.dtype, copy=True)
        return copied.numpy() if self.arrays else copied


def read_start(x0: Any) -> tuple[PointForm, Tensor]:
    """The start as a tensor of its own memory, and the form that the caller sees points in.

    Raises:
        TypeError, ValueError: x0 is not real, not finite, empty, or an array of two dimensions or more.
    """
    start = _real_tensor(x0, "x0", "a real array or dense tensor").detach()
    start = start.clone(memory_format=torch.contiguous_format)
    if not start.is_floating_point():
        start = start.to(torch.float64)
    arrays = not isinstance(x0, Tensor)
    if arrays:
        start = torch.atleast_1d(start)
    if arrays and start.ndim != 1:
        raise ValueError(
            f"minimize: x0 must have one dimension, got shape {tuple(start.shape)}; flatten it, or pass "
            "a torch tensor, which may have any shape"
        )
    if not start.numel():
        raise ValueError(f"minimize: x0 is empty (shape {tuple(start.shape)}); there is nothing to optimise")
    if not start.isfinite().all():
        raise ValueError(
            "minimize: x0 has components that are not finite; start at a point where fun is defined"
        )
    return PointForm(arrays, start.shape, start.dtype), start


def check_function(fun: Any, jac: Any) -> None:
    """Refuse what cannot be a function and its gradient.

    Raises:
        TypeError: ``fun`` cannot be called.
        ValueError: ``jac`` is neither a function, True nor None.
    """
    if not callable(fun):
        raise TypeError(f"minimize: fun must be callable, got {type(fun).__name__}")
    if not (jac is None or jac is True or callable(jac)):
        raise ValueError(
            "minimize: jac must be True (fun returns (f, g)), a function for the gradient, or None (fun is "
            f"written in torch, for autograd), got {shown(jac)}; there are no finite differences"
        )


def function_source(
    fun: Callable[..., Any],
    jac: Jac,
    args: tuple[Any, ...],
    point: Point,
    form: PointForm,
    *,
    vectorized: bool,
) -> GradientSource:
    """``fun`` at ``point`` as a source of gradients: given by ``jac``, or by autograd where that is None.

    Args:
        fun, jac, args: as in ``optex.minimize``.
        point: holds the parameter at whose value the source evaluates.
        form: in which ``fun`` and ``jac`` are handed the point when ``jac`` is not None.
        vectorized: differentiate under ``torch.func`` instead of a tape.
    """
    if jac is not None:
        return _GivenGradient(fun, jac, args, point, form)
    if vectorized:
        return ObjectiveSource(lambda _: _torch_value(fun, point.x.clone(), args), deterministic=True)
    return _Autograd(fun, args, point)


@dataclass(frozen=True)
class _GivenGradient(GradientSource):
    """The caller's own gradient; no tape is kept."""

    deterministic = True
    fun: Callable[..., Any]
    jac: Callable[..., Any] | Literal[True]
    args: tuple[Any, ...]
    point: Point
    form: PointForm

    def gradient(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        x = self.point.x
        answer = self.fun(self.form.present(x), *self.args)
        if self.jac is True:
            value, gradient = _pair(answer)
        else:
            value, gradient = answer, self.jac(self.form.present(x), *self.args)
        x.grad = _gradient(gradient, x, "the g of fun's (f, g)" if self.jac is True else "jac")
        return _scalar(value).detach(), None

    def replica(self) -> tuple[GradientSource, list[Tensor]]:
        point = Point(self.point.x.detach().clone())
        return replace(self, point=point), [point.x]

    def with_graph(self) -> GradientSource:
        raise ValueError(
            "minimize: optimizer needs second derivatives, and jac gives first ones alone; write fun in torch "
            "and leave jac out"
        )


@dataclass(frozen=True)
class _Autograd(GradientSource):
    """Reverse mode with respect to the point alone: other leaves that ``fun`` uses keep their ``.grad``."""

    deterministic = True
    fun: Callable[..., Any]
    args: tuple[Any, ...]
    point: Point
    create_graph: bool = False

    def gradient(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        # With a graph it is the point itself that is differentiated in again.
        leaf = self.point.x if self.create_graph else self.point.x.detach().clone().requires_grad_()
        value, self.point.x.grad = differentiated(self.fun, self.args, leaf, create_graph=self.create_graph)
        return value.detach(), None

    def replica(self) -> tuple[GradientSource, list[Tensor]]:
        point = Point(self.point.x.detach().clone())
        return replace(self, point=point), [point.x]

    def with_graph(self) -> GradientSource:
        return replace(self, create_graph=True)


def differentiated(
    fun: Callable[..., Any],
    args: tuple[Any, ...],
    leaf: Tensor,  # [...]
    *,
    create_graph: bool = False,
) -> tuple[Tensor, Tensor]:  # [], [...]
    """``fun``'s value by autograd, and the gradient.

    Args:
        fun, args: as in ``optex.minimize``.
        leaf: where; requires a gradient.
        create_graph: the gradient can be differentiated again.

    Raises:
        TypeError, ValueError: the value is no real torch scalar, or autograd does not see ``leaf`` in it.
    """
    # The function gets a copy of the leaf, which it may change in place.
    value = _torch_value(fun, leaf.clone(), args)
    (gradient,) = torch.autograd.grad(value, leaf, create_graph=create_graph, allow_unused=True)
    if gradient is None:
        raise ValueError(f"minimize: jac is None, and fun's value does not depend on x; {_REMEDY}")
    return value, gradient


_REMEDY = (
    "compute it from x in torch, without .item(), .detach() or NumPy, or pass jac=True (fun returns (f, g)) or "
    "jac=a function for the gradient. There are no finite differences."
)


def _torch_value(fun: Callable[..., Any], x: Tensor, args: tuple[Any, ...]) -> Tensor:  # []
    """``fun`` at a tensor, as a scalar that autograd can differentiate."""
    try:
        value = fun(x, *args)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        if _comes_from_numpy(error):
            raise TypeError(
                "minimize: jac is None, so fun was called with a torch tensor for autograd, and it computes in "
                f"NumPy ({error}); pass jac=True (fun returns (f, g)) or jac=a function for the gradient, or "
                "write fun in torch. There are no finite differences."
            ) from error
        error.add_note(
            "minimize: jac is None, so fun was called with a torch tensor; a NumPy function needs jac"
        )
        raise
    if not isinstance(value, Tensor):
        raise TypeError(
            f"minimize: jac is None, so fun must return a torch scalar, got {type(value).__name__}; {_REMEDY}"
        )
    if not value.requires_grad:
        raise ValueError(f"minimize: jac is None, and fun's value carries no autograd; {_REMEDY}")
    return _scalar(value)


def _comes_from_numpy(error: Exception) -> bool:
    """Whether NumPy was handed a tensor it cannot take: where the error arose, and torch's words for it."""
    if "numpy()" in str(error):
        return True
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__", "").partition(".")[0] == "numpy"


def _pair(answer: Any) -> tuple[Any, Any]:
    if not isinstance(answer, (tuple, list)) or len(answer) != 2:
        raise TypeError(
            f"minimize: jac=True needs fun to return the pair (f, g), got {type(answer).__name__}; pass "
            "jac=a function if the gradient is separate, jac=None if autograd is to find it"
        )
    return answer[0], answer[1]


def _scalar(value: Any) -> Tensor:  # []
    tensor = _real_tensor(value, "fun", "a real scalar")
    if tensor.numel() != 1:
        raise ValueError(
            f"minimize: fun must return a scalar, got shape {tuple(tensor.shape)}; sum or average it"
        )
    return tensor.reshape(())


def _gradient(
    value: Any,
    x: Tensor,  # [...]
    name: str,
) -> Tensor:  # [...], x's kind
    gradient = _real_tensor(value, name, "a real array of x's shape").detach()
    if gradient.ndim == 0 and x.numel() == 1:
        gradient = gradient.reshape(x.shape)
    if gradient.shape != x.shape:
        raise ValueError(
            f"minimize: {name} must have the shape of x, {tuple(x.shape)}, got {tuple(gradient.shape)}"
        )
    return gradient.to(x.device, x.dtype)


def _real_tensor(value: Any, name: str, wanted: str) -> Tensor:
    """A tensor as it is; anything else through NumPy, as a float64 tensor of its own memory."""
    if isinstance(value, Tensor):
        if not value.is_complex() and value.layout is torch.strided:
            return value
        came = f"a tensor of {value.dtype} and {value.layout}"
    else:
        try:
            array = np.asarray(value)
        except ValueError as error:  # rows of different lengths
            raise TypeError(f"minimize: {name} must be {wanted}: {error}") from error
        if array.dtype.kind in "biuf":
            return torch.from_numpy(np.array(array, dtype=np.float64))
        came = f"{type(value).__name__} of dtype {array.dtype}"
    raise TypeError(f"minimize: {name} must be {wanted}, got {came}")
