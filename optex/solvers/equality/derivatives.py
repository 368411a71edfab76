"""Values, Jacobians and Hessians of the user's functions: by autograd, or as the user gives them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from optex.checks import shown

__all__ = ["OWNER", "Array", "Expansion", "Form", "Smooth", "of_torch", "read_form", "smooth"]

OWNER = "minimize_equality"
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Form:
    """How the caller sees a point: a float64 array, or a tensor of the start's shape, dtype and device."""

    arrays: bool
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def tensor(
        self,
        x: Array,  # [n]
    ) -> Tensor:  # [...]
        """A copy as torch functions get it."""
        return torch.from_numpy(x.copy()).reshape(self.shape).to(self.device, self.dtype)

    def present(
        self,
        x: Array,  # [n]
    ) -> Any:  # [...]
        """A copy as the caller gave the start."""
        return x.copy() if self.arrays else self.tensor(x)

    def multipliers(
        self,
        values: Array,  # [m]
    ) -> Any:  # [m]
        """A copy of one number a constraint, or a variable, in the caller's kind."""
        return values.copy() if self.arrays else torch.from_numpy(values.copy()).to(self.device, self.dtype)

    @property
    def rounding(self) -> float:
        """The relative rounding error of what the functions answer."""
        return torch.finfo(self.dtype).eps


def read_form(x0: Any) -> tuple[Form, Array]:
    """The form of the start, and its numbers [n].

    Raises:
        TypeError, ValueError: it is no real, finite array with at least one number; or an array of more than
            one dimension that is no tensor.
    """
    if isinstance(x0, Tensor) and x0.is_floating_point() and x0.layout is torch.strided:
        form = Form(False, tuple(x0.shape), x0.dtype, x0.device)
        start = x0.detach().to("cpu", torch.float64, copy=True).reshape(-1).numpy()
    elif isinstance(x0, Tensor):
        raise TypeError(f"{OWNER}: x0 must be a dense floating-point tensor, got {x0.dtype}, {x0.layout}")
    else:
        start = np.atleast_1d(numbers(x0, "x0"))
        form = Form(True, start.shape, torch.float64, torch.device("cpu"))
        if start.ndim != 1:
            raise ValueError(
                f"{OWNER}: x0 must have one dimension, got shape {start.shape}; flatten it, or pass a torch "
                "tensor, which may have any shape"
            )
    if not start.size:
        raise ValueError(f"{OWNER}: x0 is empty; there is nothing to optimise")
    if not np.isfinite(start).all():
        raise ValueError(f"{OWNER}: x0 has components that are not finite")
    return form, start


def numbers(
    value: Any,
    name: str,
    shape: tuple[int, ...] | None = None,
) -> Array:  # of this shape
    """``value`` as real numbers in float64, copied.

    Raises:
        TypeError, ValueError: it holds no real numbers, or not as many as the shape does.
    """
    if isinstance(value, Tensor):
        value = value.detach().to_dense().cpu()
    elif hasattr(value, "toarray"):  # SciPy's sparse matrices
        value = value.toarray()
    try:
        array = np.asarray(value)
    except ValueError as error:  # rows of different lengths
        raise TypeError(f"{OWNER}: {name} must be real numbers: {error}") from error
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{OWNER}: {name} must be real numbers, got {type(value).__name__} of {array.dtype}")
    if shape is not None and array.size != int(np.prod(shape)):
        raise ValueError(f"{OWNER}: {name} must have shape {shape}, got {array.shape}")
    return np.array(array if shape is None else array.reshape(shape), dtype=np.float64)


@dataclass(frozen=True)
class Expansion:
    """F: ℝⁿ → ℝᵏ around a point.

    Attributes:
        value: F [k].
        jacobian: [k, n].
        curvature: of weights w [k], the Hessian of w'F [n, n].
    """

    value: Array
    jacobian: Array
    curvature: Callable[[Array], Array]


class Smooth(ABC):
    """A function of the user's with two derivatives.

    Attributes:
        calls, curvatures: how often the function, and a Hessian, were asked for.
    """

    def __init__(self, name: str, function: Callable[..., Any], form: Form) -> None:
        self.name = name
        self.function = function
        self.form = form
        self.calls = 0
        self.curvatures = 0

    @abstractmethod
    def at(
        self,
        x: Array,  # [n]
    ) -> Expansion:
        """Value, Jacobian and curvature at a point.

        Raises:
            TypeError, ValueError: the function answers in a form that cannot work.
        """


def smooth(
    name: str,
    function: Any,
    form: Form,
    jac: Any,
    hess: Any,
    names: tuple[str, str],
) -> Smooth:
    """The function with the derivatives that are given, or with autograd's where none is.

    Raises:
        TypeError: it cannot be called, or one derivative is given without the other.
    """
    if not callable(function):
        raise TypeError(f"{OWNER}: {name} must be a function, got {type(function).__name__}")
    if jac is None and hess is None:
        return _Autograd(name, function, form)
    for label, given in zip(names, (jac, hess), strict=True):
        if not callable(given):
            raise TypeError(
                f"{OWNER}: {label} must be a function, got {shown(given)}: pass {names[0]} and {names[1]}, or "
                f"neither with {name} written in torch; optex.equality_method has finite differences"
            )
    return _Given(name, function, form, jac, hess, names)


class _Autograd(Smooth):
    def at(
        self,
        x: Array,  # [n]
    ) -> Expansion:
        self.calls += 1
        leaf = self.form.tensor(x).requires_grad_()
        with torch.enable_grad():
            value = self._value(leaf)
            rows = [derivative(entry, leaf, create_graph=True) for entry in value]

        def curvature(
            weights: Array,  # [k]
        ) -> Array:  # [n, n]
            self.curvatures += 1
            gradient = leaf.new_zeros(x.size)
            for weight, row in zip(weights.tolist(), rows, strict=True):
                gradient = gradient + weight * row
            if not gradient.requires_grad:
                return np.zeros((x.size, x.size))
            return numbers(
                torch.stack([derivative(entry, leaf) for entry in gradient]), f"{self.name}'s Hessian"
            )

        jacobian = torch.stack(rows) if rows else leaf.new_zeros(0, x.size)
        return Expansion(numbers(value, self.name), numbers(jacobian, f"{self.name}'s Jacobian"), curvature)

    def _value(
        self,
        leaf: Tensor,  # [...]
    ) -> Tensor:  # [k]
        try:
            # The function gets a copy of the leaf, which it may change in place.
            value = self.function(leaf.clone())
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            error.add_note(
                f"{OWNER}: {self.name} was called with a torch tensor, for autograd; a NumPy function needs "
                "its derivatives given, or optex.equality_method"
            )
            raise
        return of_torch(value, self.name).reshape(-1)


def of_torch(value: Any, name: str) -> Tensor:
    """The function's answer, which autograd has to be able to differentiate."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        came = str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(
            f"{OWNER}: {name} must return a floating-point tensor, got {came}: write it in torch, or give its "
            "derivatives"
        )
    if value.numel() and not value.requires_grad:
        raise ValueError(
            f"{OWNER}: what {name} returns does not depend on x as far as autograd sees; compute it from x in "
            "torch, without .item(), .detach() or NumPy, or give its derivatives"
        )
    return value


def derivative(
    value: Tensor,  # []
    leaf: Tensor,  # [...], n numbers
    *,
    create_graph: bool = False,
) -> Tensor:  # [n]
    """The derivative of one number; 0 where that does not depend on the leaf."""
    if not value.requires_grad:
        return leaf.new_zeros(leaf.numel())
    (gradient,) = torch.autograd.grad(
        value, leaf, create_graph=create_graph, retain_graph=True, allow_unused=True
    )
    return leaf.new_zeros(leaf.numel()) if gradient is None else gradient.reshape(-1)


class _Given(Smooth):
    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        form: Form,
        jac: Any,
        hess: Any,
        names: tuple[str, str],
    ) -> None:
        super().__init__(name, function, form)
        self._jac, self._hess, self._names = jac, hess, names

    def at(
        self,
        x: Array,  # [n]
    ) -> Expansion:
        self.calls += 1
        present, size = self.form.present, x.size
        value = numbers(self.function(present(x)), self.name).reshape(-1)
        jacobian = numbers(self._jac(present(x)), self._names[0], (value.size, size))

        def curvature(
            weights: Array,  # [k]
        ) -> Array:  # [n, n]
            self.curvatures += 1
            answer = self._hess(present(x), self.form.multipliers(weights))
            return numbers(answer, self._names[1], (size, size))

        return Expansion(value, jacobian, curvature)
