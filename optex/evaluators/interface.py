"""What every evaluator is asked and answers: losses and true gradients at several points at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optex.evaluators.randomness import RandomDraws
from optex.sources import GradientSource
from optex.stepping import Buffers, GradientMask, ParameterVector

if TYPE_CHECKING:
    from optex.distributed.ranks import Ranks

__all__ = ["Evaluation", "EvaluationRequest", "Evaluator", "WrappingEvaluator", "stack_noise", "with_hook"]


@dataclass(frozen=True)
class EvaluationRequest:
    """Gradients to compute.

    Attributes:
        source: of the gradients.
        vector: the parameters that points are written into; how it lies in memory is not an evaluator's choice.
        points: [n, width], rows of the vector.
        batches: n, one for each point.
        draws: n, the random numbers of each point's step.
        gradient_hook: changes a gradient in place, with the parameters at its point and it in their ``.grad``.
        buffers: what an evaluation changes beside the gradients; None where that is not known.
        observe: called after each backward pass, for what the base optimizer needs beside the gradient; None
            for an evaluator that cannot call it (``observes`` is False).
    """

    source: GradientSource
    vector: ParameterVector
    points: Tensor
    batches: Sequence[Any]
    draws: Sequence[RandomDraws]
    gradient_hook: Callable[[], Any] | None = None
    buffers: Buffers | None = None
    observe: Callable[[], Any] | None = None

    def __len__(self) -> int:
        """n, how many points."""
        return len(self.points)

    def rows(self, rows: slice) -> EvaluationRequest:
        """The same request for some of its points."""
        return replace(self, points=self.points[rows], batches=self.batches[rows], draws=self.draws[rows])


@dataclass(frozen=True)
class Evaluation:
    """True gradients at n points.

    Attributes:
        losses: [n]; NaN where a point was lost.
        gradients: [n, width], as the request's hook left them; zero where a parameter received no gradient.
        masks: n, which parameters received a gradient at each point.
        noise_variance: [n], variance of the noise in one component of the gradient; NaN where the source does
            not know it. None where it is known at no point.
        buffers: n, the values of the request's buffers after each point and all points before it were
            evaluated; None where the evaluator leaves buffers alone.
        observations: n, what ``observe`` returned at each point; None where the request has no ``observe``.
        retried: indices of points that got no answer at the first try.
        lost: indices of points that got no answer at all. The first point is never among them.
    """

    losses: Tensor
    gradients: Tensor
    masks: tuple[GradientMask, ...]
    noise_variance: Tensor | None = None
    buffers: tuple[list[Tensor], ...] | None = None
    observations: tuple[Any, ...] | None = None
    retried: tuple[int, ...] = ()
    lost: tuple[int, ...] = ()


class Evaluator(ABC):
    """Computes the gradients of a request, at once if it can; parameters and buffers are left as they were.

    Attributes:
        observes: backward passes run in this process and on the parameters themselves, so that a base optimizer
            can read more off them than gradients (``optex.stepping.ObservesEvaluations``).
    """

    observes: bool = False

    @abstractmethod
    def evaluate(self, request: EvaluationRequest) -> Evaluation:
        """Losses and true gradients at each point, each with its own batch and random draws.

        The request's hook has run on every gradient; :func:`with_hook` does that for evaluators that have no
        better moment.
        """

    def connect(self, parameters: Sequence[Tensor]) -> Ranks | None:
        """Connect to the other processes that take part in the run; None where there are none.

        Called once, before the first request. Vectors may then be split among the ranks that are returned.

        Args:
            parameters: those to be optimised.
        """
        return None

    def state_dict(self) -> dict[str, Any]:
        """What an evaluator needs to continue a saved run."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue a saved run.

        Args:
            state: ``state_dict()`` of the run's evaluator; empty where that was of a kind that saves nothing.
        """


class WrappingEvaluator(Evaluator):
    """An evaluator around another one of any kind; methods that a subclass does not override are the other's.

    Attributes:
        inner: the other evaluator.
    """

    def __init__(self, inner: Evaluator) -> None:
        self.inner: Evaluator = inner
        self.observes: bool = inner.observes

    def connect(self, parameters: Sequence[Tensor]) -> Ranks | None:
        return self.inner.connect(parameters)

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state)


def with_hook(request: EvaluationRequest, evaluation: Evaluation) -> Evaluation:
    """The evaluation after the request's hook, if any, changed its gradients in place."""
    hook, vector = request.gradient_hook, request.vector
    if hook is None:
        return evaluation
    before = vector.read()
    try:
        for point, gradient, mask in zip(request.points, evaluation.gradients, evaluation.masks, strict=True):
            vector.write(point)
            vector.write_gradients(gradient, mask)
            with torch.enable_grad():
                hook()
            gradient.copy_(vector.read_gradients()[0])
    finally:
        vector.write(before)
        vector.clear_gradients()
    return evaluation


def stack_noise(
    found: Sequence[Tensor | float | None],  # n
) -> Tensor | None:  # [n] float64
    """The variances that a source gave for n points, as ``Evaluation.noise_variance`` has them."""
    if all(variance is None for variance in found):
        return None
    return torch.tensor([torch.nan if v is None else float(v) for v in found], dtype=torch.float64)
