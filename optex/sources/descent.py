"""Minimising a smooth function of one vector by its gradients: what a lower level is solved with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

__all__ = ["Found", "gradient_descent", "limited_memory_bfgs"]

Function = Callable[[Tensor], tuple[Tensor, Tensor]]  # [d] to value [] and gradient [d]

_MEMORY: Final = 20
_TRIALS: Final = 40  # points of one line search: enough doublings to leave every scale, and halvings to return
_FLATTER: Final = 0.9  # the slope that a line search stops at, over that at its start


@dataclass(frozen=True)
class Found:
    """Where a descent ended.

    Attributes:
        point, gradient: [d] each.
        steps: how many were taken.
        calls: evaluations of the function.
    """

    point: Tensor
    gradient: Tensor
    steps: int
    calls: int

    @property
    def residual(self) -> float:
        """Length of the gradient; NaN where something was not finite."""
        return float(torch.linalg.vector_norm(self.gradient))


def gradient_descent(
    function: Function,
    start: Tensor,  # [d]
    goal: float,
    steps: int,
    rate: float,
) -> Found:
    """Steps ``y ← y - rate ∇``, until the gradient is no longer than ``goal``, at most ``steps`` of them."""
    point = start
    _, gradient = function(point)
    taken = 0
    while taken < steps and float(torch.linalg.vector_norm(gradient)) > goal:  # NaN ends it, too
        point = point - rate * gradient
        _, gradient = function(point)
        taken += 1
    return Found(point, gradient, taken, taken + 1)


def limited_memory_bfgs(
    function: Function,
    start: Tensor,  # [d]
    goal: float,
    steps: int,
) -> Found:
    """L-BFGS that looks at slopes along a line, until the gradient is no longer than ``goal``.

    Line searches by values end where their differences drown in rounding, at a gradient of about √ε; a
    penalty gradient with a small σ needs it shorter than that. Values only keep a step from going uphill.

    Source: Nocedal and Wright, *Numerical Optimization*, 2nd edition, algorithms 7.4 and 7.5; slopes in place
    of values near the minimum: Hager and Zhang, SIAM J. Optim. 16 (2005), section 4.
    """
    point = start
    value, gradient = function(point)
    calls, pairs = 1, []
    for taken in range(steps):
        if not float(torch.linalg.vector_norm(gradient)) > goal:
            return Found(point, gradient, taken, calls)
        direction = _direction(gradient, pairs)
        found = _along(function, point, value, gradient, direction, first=not pairs)
        calls += found.calls
        if found.point is None:
            if not pairs:
                return Found(point, gradient, taken, calls)
            pairs = []  # the remembered curvature misleads: try again, down the gradient
            continue
        step, change = found.point - point, found.gradient - gradient
        if float(step @ change) > 0:
            pairs = [*pairs[1 - _MEMORY :], (step, change)]
        point, value, gradient = found.point, found.value, found.gradient
    return Found(point, gradient, steps, calls)


def _direction(
    gradient: Tensor,  # [d]
    pairs: list[tuple[Tensor, Tensor]],
) -> Tensor:  # [d]
    """-H ∇ by the two-loop recursion over the remembered steps and changes of the gradient."""
    direction, weights = -gradient, []
    for step, change in reversed(pairs):
        weight = (step @ direction) / (step @ change)
        direction = direction - weight * change
        weights.append(weight)
    if pairs:
        step, change = pairs[-1]
        direction = direction * ((step @ change) / (change @ change))
    for (step, change), weight in zip(pairs, reversed(weights), strict=True):
        direction = direction + (weight - (change @ direction) / (step @ change)) * step
    return direction


@dataclass(frozen=True)
class _Trial:
    point: Tensor | None  # [d]; None where no length helped
    value: Tensor
    gradient: Tensor
    calls: int


def _along(
    function: Function,
    point: Tensor,  # [d]
    value: Tensor,  # []
    gradient: Tensor,  # [d]
    direction: Tensor,  # [d]
    *,
    first: bool,
) -> _Trial:
    """The first length, doubled or bisected, at which the slope is flatter and the value no higher."""
    slope = float(gradient @ direction)
    # What a value may rise by rounding alone.
    rounding = 100 * torch.finfo(value.dtype).eps * abs(float(value))
    shortest, longest = 0.0, float("inf")
    length = min(1.0, 1.0 / float(torch.linalg.vector_norm(gradient))) if first else 1.0
    calls = 0
    for call in range(1, _TRIALS + 1):
        trial = point + length * direction
        calls = call
        height, there = function(trial)
        tilt = float(there @ direction)
        if not slope < 0 or torch.equal(trial, point):
            break
        if not (bool(height.isfinite()) and tilt <= -_FLATTER * slope and float(height - value) <= rounding):
            longest = length
        elif tilt < _FLATTER * slope:
            shortest = length
        else:
            return _Trial(trial, height, there, calls)
        length = 2 * length if longest == float("inf") else (shortest + longest) / 2
    return _Trial(None, value, gradient, calls)
