"""What every evaluator answers: losses and true gradients at several points at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optex.vectors import ParameterVector, Presence

__all__ = ["ClosureSource", "Draws", "Evaluation", "Evaluator", "GradientSource", "ObjectiveSource"]


@dataclass(frozen=True)
class Evaluation:
    """True gradients at n points.

    Attributes:
        losses: [n].
        gradients: [n, d], zero where a parameter received no gradient.
        present: per point, which parameters received a gradient.
        noise_variance: [n], variance of one component's noise where the source knows it.
    """

    losses: Tensor
    gradients: Tensor
    present: tuple[Presence, ...]
    noise_variance: Tensor | None = None


class GradientSource(ABC):
    """Leaves the gradient of one loss in the parameters' ``.grad``; told apart by who backpropagates."""

    @abstractmethod
    def backpropagate(self, batch: Any) -> Tensor:  # []
        """Evaluate at the parameters' present values; the loss, detached."""


@dataclass(frozen=True)
class ClosureSource(GradientSource):
    """torch's closure: clears the gradients, backpropagates, returns the loss. It is handed no batch."""

    closure: Callable[[], Any]

    def backpropagate(self, batch: Any) -> Tensor:
        return scalar_loss(self.closure(), "closure").detach()


@dataclass(frozen=True)
class ObjectiveSource(GradientSource):
    """A function of a batch that returns the loss and leaves backpropagation to us."""

    objective: Callable[[Any], Tensor]

    def backpropagate(self, batch: Any) -> Tensor:
        loss = scalar_loss(self.objective(batch), "objective")
        if not loss.requires_grad:
            raise ValueError(
                "objective: the loss does not depend on any parameter through autograd; compute it from the "
                "model's output, without .item(), .detach() or torch.no_grad()"
            )
        loss.backward()
        return loss.detach()


def scalar_loss(loss: Any, name: str) -> Tensor:  # []
    """The loss as a tensor without dimensions, or an error that names who returned it."""
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


class Draws:
    """The random numbers of a step, dropout's say: the same ones each time the step is evaluated.

    The first evaluation takes them from torch's generators as they stand, and moves those on, just as the
    plain loop would; a later one starts from the state remembered and leaves the generators as they were.

    Attributes:
        state: of torch's generators before the first evaluation: the CPU's, then every CUDA device's if CUDA is
            in use; None before it.
    """

    def __init__(self, state: list[Tensor] | None = None) -> None:
        self.state = state

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Evaluate the step in here."""
        now = _generator_states()
        if self.state is None:
            self.state = now
            yield
            return
        _set_generator_states(self.state)
        try:
            yield
        finally:
            _set_generator_states(now)


def _generator_states() -> list[Tensor]:
    states = [torch.get_rng_state()]
    return states + torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else states


def _set_generator_states(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state_all(states[1:])


class Evaluator(ABC):
    """Computes N gradients at once. The parameters' values after a call are those before it."""

    @abstractmethod
    def evaluate(
        self,
        source: GradientSource,
        vector: ParameterVector,
        points: Tensor,  # [n, d]
        batches: Sequence[Any],  # n
        draws: Sequence[Draws],  # n
    ) -> Evaluation:
        """Losses and true gradients of ``source`` at each point, each with its own batch and random draws."""
