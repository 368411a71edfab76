"""What every source of gradients answers, and what it declares of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["GradientSource", "scalar_loss"]


class GradientSource(ABC):
    """Where gradients come from: leaves the gradient of a loss in the parameters' ``.grad``.

    Subclass it where a gradient is more than a backward pass through one loss: estimated, accumulated,
    computed by a solver, measured with known noise. ``OptEx.rounds`` takes it in place of an objective, and
    every evaluator that does not differentiate by itself runs it.

    Attributes:
        deterministic: needs no batch, and answers the same loss and gradient whenever it is asked at a point.
            Declared, never guessed: with False (the default) gradients count as noisy samples.
        evaluations: how many evaluations of the user's function one gradient costs.
        module: the module whose buffers an evaluation changes, as BatchNorm's; None where there is none to
            tell.

    A source that knows how noisy its gradients are. The mean of n per-sample gradients has in each component
    the variance of one of them, over n; estimators then smooth by that much, and need not find it out:

    >>> import torch, optex
    >>> class PerSample(optex.GradientSource):
    ...     def __init__(self, weights):
    ...         self.weights = weights                               # [d]
    ...     def gradient(self, batch):                               # linear regression, rows x [n, d], y [n]
    ...         x, y = batch
    ...         residual = x @ self.weights.detach() - y
    ...         samples = residual[:, None] * x                      # the gradient of each sample [n, d]
    ...         self.weights.grad = samples.mean(0)
    ...         return residual.square().mean() / 2, samples.var(0).mean() / len(x)
    >>> _ = torch.manual_seed(0)
    >>> weights = torch.nn.Parameter(torch.zeros(3))
    >>> inputs = torch.randn(64, 16, 3)
    >>> batches = [(x, x @ torch.tensor([1.0, -2.0, 0.5]) + 0.1 * torch.randn(16)) for x in inputs]
    >>> optimizer = optex.OptEx(torch.optim.SGD([weights], lr=0.1), parallelism=4)
    >>> reports = list(optimizer.rounds(batches, PerSample(weights)))
    >>> len(reports) < 40, weights.detach().round(decimals=1)
    (True, tensor([ 1.0000, -2.0000,  0.5000]))
    """

    deterministic: bool = False
    evaluations: float = 1.0
    module: nn.Module | None = None

    @abstractmethod
    def gradient(self, batch: Any) -> tuple[Tensor, Tensor | None]:  # [], []
        """Evaluate at the parameters' present values.

        Args:
            batch: this step's, as ``rounds`` was given it; a deterministic source does not look at it.

        Returns:
            The loss, detached, and the variance of the noise of one component of the gradient, in squared
            units of the gradient, averaged over the components; None where the source does not know it, 0 is
            exact.
        """

    def replica(self) -> tuple[GradientSource, list[Tensor]] | None:
        """A source for another thread, and the parameters it evaluates at: its own, all else shared.

        None (the default) where that cannot be: the source is then copied whole.
        """
        return None

    def with_graph(self) -> GradientSource:
        """A source of the same gradients that keeps their graph, so that they can be differentiated again.

        By default the source itself: whether its gradients have one is up to it.

        Raises:
            ValueError: there is no such graph.
        """
        return self


def scalar_loss(loss: Any, name: str) -> Tensor:  # []
    """The loss as a tensor without dimensions, or an error that names who returned it.

    Raises:
        TypeError, ValueError: there is no loss, or it is not a real scalar.
    """
    if loss is None:
        raise TypeError(f"{name}: returned None; it must return the loss")
    if not isinstance(loss, Tensor):
        try:
            loss = torch.tensor(float(loss), dtype=torch.float64)
        except (TypeError, ValueError) as error:
            raise TypeError(f"{name}: must return the loss as a scalar, got {type(loss).__name__}") from error
    if loss.numel() != 1:
        raise ValueError(
            f"{name}: the loss must be a scalar, got shape {tuple(loss.shape)}; reduce it, "
            "with .mean() or .sum()"
        )
    if loss.is_complex():
        raise TypeError(f"{name}: the loss is complex; return a real scalar")
    return loss.reshape(())
