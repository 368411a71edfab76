"""Gradients of torch's closure, which backpropagates by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from optex.sources.interface import GradientSource, scalar_loss

__all__ = ["ClosureSource"]


@dataclass(frozen=True)
class ClosureSource(GradientSource):
    """torch's closure: clears the gradients, backpropagates, returns the loss. It is handed no batch.

    Args:
        closure: as for ``torch.optim.Optimizer.step``.
        deterministic: it draws no minibatch of its own.
    """

    closure: Callable[[], Any]
    deterministic: bool = False

    def gradient(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        return scalar_loss(self.closure(), "closure").detach(), None
