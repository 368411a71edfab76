"""Base optimizers whose steps are linear in the gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from optex.stepping.parameters import ParameterVector

__all__ = ["LinearRule", "linear_rule"]

_SETTINGS = ("lr", "momentum", "dampening", "nesterov", "weight_decay", "maximize")


@dataclass(frozen=True)
class LinearRule:
    """A step of ``torch.optim.SGD``: with g the gradient, negated to maximize,

        d = g + weight_decay θ,    b ← momentum b + (1 - dampening) d (d itself in a run's first step),
        θ ← θ - lr (d + momentum b with nesterov, b with momentum, d without).

    Points, gradients and buffers may be anything that can be added and multiplied by numbers: vectors, or
    their coefficients on a basis.

    Attributes:
        buffer: [d], b as it is; None before the first step.
    """

    lr: float
    momentum: float
    dampening: float
    nesterov: bool
    weight_decay: float
    maximize: bool
    buffer: Tensor | None = None

    def step(self, point: Any, gradient: Any, buffer: Any) -> tuple[Any, Any]:
        """The next point and buffer; ``point`` is the iterate itself, not its displacement from an anchor."""
        direction = -gradient if self.maximize else gradient
        if self.weight_decay:
            direction = direction + self.weight_decay * point
        if self.momentum:
            kept = None if buffer is None else self.momentum * buffer
            buffer = direction if kept is None else kept + (1 - self.dampening) * direction
            direction = direction + self.momentum * buffer if self.nesterov else buffer
        return point - self.lr * direction, buffer


def linear_rule(base: Optimizer, vector: ParameterVector) -> LinearRule | None:
    """The rule of a base optimizer as it is set now; None where it has none, or groups differ."""
    if type(base) is not torch.optim.SGD:
        return None
    groups = [group for group in base.param_groups if group["params"]]
    settings = [tuple(group[name] for name in _SETTINGS) for group in groups]
    numbers = all(isinstance(value, (int, float)) for group in settings for value in group)
    if not numbers or len(set(settings)) != 1:
        return None
    buffers = [base.state.get(p, {}).get("momentum_buffer") for p in vector.parameters]
    if not settings[0][1] or all(buffer is None for buffer in buffers):
        return LinearRule(*settings[0])
    if any(buffer is None for buffer in buffers):
        return None
    return LinearRule(*settings[0], buffer=vector.flatten(buffers))
