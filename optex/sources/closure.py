"""Gradients of torch's closure, which backpropagates by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from optex.checks import check_callable, check_flag
from optex.sources.interface import GradientSource, scalar_loss

__all__ = ["ClosureSource"]


@dataclass(frozen=True)
class ClosureSource(GradientSource):
    """torch's closure: clears the gradients, backpropagates, returns the loss. It is handed no batch.

    Args:
        closure: as for ``torch.optim.Optimizer.step``.
        deterministic: it draws no minibatch of its own.

    Raises:
        TypeError: the closure cannot be called, or ``deterministic`` is neither True nor False.
    """

    closure: Callable[[], Any]
    deterministic: bool = False

    def __post_init__(self) -> None:
        check_callable("ClosureSource", "closure", self.closure)
        check_flag("ClosureSource", "deterministic", self.deterministic)

    def gradient(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        return scalar_loss(self.closure(), "closure").detach(), None
