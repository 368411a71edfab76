"""The two levels of a bilevel problem, their gradients, and the constants that bound errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optex.checks import check_flag, check_number, shown
from optex.errors import NonFiniteError
from optex.sources.interface import scalar_loss

__all__ = ["LowerLevelError", "SmoothBilevel", "lower_gradient", "norm_of", "upper_gradient"]

Constant = float | Callable[..., float]


class LowerLevelError(ArithmeticError):
    """The lower level cannot be solved or inverted: a singular or indefinite Hessian, or no convergence."""


@dataclass(frozen=True)
class SmoothBilevel:
    """min over θ of g(x̂(θ)), x̂(θ) = argmin over x of h(x, θ), and the constants that bound errors.

    Args:
        lower: ``h(x, *theta)``, twice differentiable by autograd, strongly convex in x; a scalar.
        upper: ``g(x)``; a scalar.
        start: of the first lower solve, finite, of x's shape.
        strong_convexity: μ > 0 with ∇ₓₓh ≥ μ; a number, or a function of ``*theta``.
        upper_lipschitz: L_g, of ∇g; at least 0.
        lower_lipschitz: L ≥ μ with ∇ₓₓh ≤ L, likewise; None finds it by the power method and doubles it where a
            step falls short, for one more evaluation of h a step.
        hessian_lipschitz, cross_lipschitz: L_A and L_B, of ∇ₓₓh and ∇ₓθh in x. Where one is None its part of
            the bound is measured along one direction, and the bound is an estimate.
        convex_upper: g is convex, which makes its lower bound tighter.

    Raises:
        TypeError, ValueError: a function cannot be called, a constant is out of range, the start is not finite.
    """

    lower: Callable[..., Tensor]
    upper: Callable[[Tensor], Tensor]
    start: Tensor
    strong_convexity: Constant
    upper_lipschitz: float
    lower_lipschitz: Constant | None = None
    hessian_lipschitz: float | None = None
    cross_lipschitz: float | None = None
    convex_upper: bool = True

    def __post_init__(self) -> None:
        for name in ("lower", "upper"):
            if not callable(getattr(self, name)):
                raise TypeError(f"SmoothBilevel: {name} must be callable, got {shown(getattr(self, name))}")
        if not isinstance(self.start, Tensor) or not self.start.is_floating_point():
            raise TypeError(f"SmoothBilevel: start must be a floating-point tensor, got {shown(self.start)}")
        if not self.start.numel() or not bool(self.start.isfinite().all()):
            raise ValueError("SmoothBilevel: start must have components, all finite; zeros will do")
        check_flag("SmoothBilevel", "convex_upper", self.convex_upper)
        positive = {"strong_convexity": self.strong_convexity, "lower_lipschitz": self.lower_lipschitz}
        for name, value in positive.items():
            if not callable(value) and (value is not None or name == "strong_convexity"):
                check_number("SmoothBilevel", name, value, open_below=True)
        for name in ("upper_lipschitz", "hessian_lipschitz", "cross_lipschitz"):
            value = getattr(self, name)
            if value is not None or name == "upper_lipschitz":
                check_number("SmoothBilevel", name, value)

    def constant(self, name: str, theta: Sequence[Tensor]) -> float:
        """``strong_convexity`` or ``lower_lipschitz`` at a θ."""
        value = getattr(self, name)
        if not callable(value):
            return float(value)
        return check_number("SmoothBilevel", f"{name}(θ)", value(*(t.detach() for t in theta)), open_below=True)


def lower_gradient(
    problem: SmoothBilevel, theta: Sequence[Tensor], x: Tensor
) -> tuple[Tensor, Tensor]:  # [], of x's shape
    """h and ∇ₓh at a point."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        value = scalar_loss(problem.lower(x, *theta), "lower")
    if not value.requires_grad:
        raise ValueError("lower: its value does not depend on x through autograd; compute it from x in torch")
    (gradient,) = torch.autograd.grad(value, x)
    return value.detach(), gradient


def upper_gradient(problem: SmoothBilevel, x: Tensor) -> tuple[Tensor, Tensor]:  # [], of x's shape
    """g and ∇g at a point, finite."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        value = scalar_loss(problem.upper(x), "upper")
    if not value.requires_grad:
        raise ValueError("upper: its value does not depend on x through autograd; compute it from x in torch")
    (gradient,) = torch.autograd.grad(value, x)
    if not bool(value.isfinite()) or not bool(gradient.isfinite().all()):
        raise NonFiniteError("upper: its value or gradient is not finite at a lower solution")
    return value.detach(), gradient


def norm_of(tensors: Sequence[Tensor]) -> float:
    """Euclidean length of all of them together."""
    return math.sqrt(sum(float(t.square().sum()) for t in tensors))
