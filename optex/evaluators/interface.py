"""What every evaluator answers: losses and true gradients at several points at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from optex.stepping.parameters import ParameterVector, Presence, Walk

__all__ = [
    "AccumulatingSource",
    "ClosureSource",
    "Draws",
    "Evaluation",
    "Evaluator",
    "GradientSource",
    "ObjectiveSource",
]


@dataclass(frozen=True)
class Evaluation:
    """True gradients at n points.

    Attributes:
        losses: [n].
        gradients: [n, d], zero where a parameter received no gradient.
        present: per point, which parameters received a gradient.
        noise_variance: [n], variance of one component's noise where the source knows it.
        buffers: per point, the vector's buffers after its evaluation and those of the points before it; None
            where the evaluator leaves buffers alone.
        retried: indices of points that got no answer at the first try.
        lost: those that got none at all; their loss is NaN. Never the first point.
    """

    losses: Tensor
    gradients: Tensor
    present: tuple[Presence, ...]
    noise_variance: Tensor | None = None
    buffers: tuple[list[Tensor], ...] | None = None
    retried: tuple[int, ...] = ()
    lost: tuple[int, ...] = ()


class GradientSource(ABC):
    """Leaves the gradient of one loss in the parameters' ``.grad``; told apart by who backpropagates."""

    @abstractmethod
    def backpropagate(self, batch: Any) -> Tensor:  # []
        """Evaluate at the parameters' present values; the loss, detached."""

    def with_own_parameters(self) -> tuple[GradientSource, list[Tensor]] | None:
        """A source for another thread, parameters of its own and all else shared; None: needs a copy."""
        return None


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


@dataclass(frozen=True)
class AccumulatingSource(GradientSource):
    """A step's gradient summed up over micro-batches, for batches whose graph does not fit into memory.

    The batch is a sequence of micro-batches; loss and gradient are the means over them.

    Args:
        objective: the scalar loss of one micro-batch, without backward.

    >>> import torch, optex
    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = optex.OptEx(torch.optim.SGD(model.parameters(), lr=0.1))
    >>> source = optex.AccumulatingSource(lambda x: model(x).square().mean())
    >>> batches = [[torch.randn(4, 2), torch.randn(4, 2)] for _ in range(6)]
    >>> sum(report.accepted for report in optimizer.rounds(batches, source))
    6
    """

    objective: Callable[[Any], Tensor]

    def backpropagate(self, batch: Any) -> Tensor:
        total = None
        for micro_batch in batch:
            loss = scalar_loss(self.objective(micro_batch), "objective") / len(batch)
            loss.backward()
            total = loss.detach() if total is None else total + loss.detach()
        if total is None:
            raise ValueError("AccumulatingSource: a batch has no micro-batches; a batch is a sequence of them")
        return total


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
        now = generator_states()
        if self.state is None:
            self.state = now
            yield
            return
        set_generator_states(self.state)
        try:
            yield
        finally:
            set_generator_states(now)


def generator_states() -> list[Tensor]:
    """Where torch's generators stand: the CPU's, then every CUDA device's if CUDA is in use."""
    states = [torch.get_rng_state()]
    return states + torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else states


def set_generator_states(states: list[Tensor]) -> None:
    """Put them back there; CUDA's only where there are as many devices."""
    torch.set_rng_state(states[0].cpu())
    if len(states) > 1 and torch.cuda.is_available() and torch.cuda.device_count() == len(states) - 1:
        torch.cuda.set_rng_state_all([state.cpu() for state in states[1:]])


class Evaluator(ABC):
    """Computes N gradients at once. The parameters and buffers after a call are those before it."""

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

    def evaluate_hooked(
        self,
        source: GradientSource,
        vector: ParameterVector,
        points: Tensor,  # [n, d]
        batches: Sequence[Any],  # n
        draws: Sequence[Draws],  # n
        hook: Callable[[], Any] | None,
    ) -> Evaluation:
        """``evaluate``, then let the hook change the gradients, each with the parameters at its point."""
        evaluation = self.evaluate(source, vector, points, batches, draws)
        if hook is not None:
            run_hook(hook, vector, points, evaluation)
        return evaluation

    def lay_out(self, base: Optimizer, parameters: Iterable[Tensor], scheduler: LRScheduler | None) -> Walk:
        """The base optimizer ready to walk, on vectors that this evaluator takes."""
        return Walk(base, ParameterVector(parameters), scheduler)

    def state_dict(self) -> dict[str, Any]:
        """What the evaluator has to know to go on."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over where another evaluator of this kind was; of any other kind there is nothing to take."""


def run_hook(
    hook: Callable[[], Any],
    vector: ParameterVector,
    points: Tensor,  # [n, d]
    evaluation: Evaluation,
) -> None:
    """Let the hook change the gradients in place, each with the parameters at its point."""
    before = vector.read()
    try:
        for point, gradient, present in zip(points, evaluation.gradients, evaluation.present, strict=True):
            vector.write(point)
            vector.write_gradients(gradient, present)
            with torch.enable_grad():
                hook()
            gradient.copy_(vector.read_gradients()[0])
    finally:
        vector.write(before)
        vector.clear_gradients()
