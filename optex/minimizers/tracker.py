"""What a run of ``minimize`` has evaluated, and which of the points it returns."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from optex.evaluators import Evaluation, EvaluationRequest, Evaluator, WrappingEvaluator

__all__ = ["Tracker"]


class Tracker(WrappingEvaluator):
    """Passes points to an evaluator, counts them, and keeps the one to be returned.

    That is the point of least loss so far, until a round meets ``gtol``.

    Args:
        inner: evaluates the points.
        gtol: largest component of the gradient to stop at.
        owner: the caller's function, for messages.

    Attributes:
        count: points evaluated.
        stationary: whether the last request met ``gtol``.
        start_loss: the loss at the first point of the last round.
        loss, point, gradient: of the point to be returned; point and gradient are [d] after an evaluation.
        points: [n, d], of the last request, with ``evaluation`` as its answer and ``norms`` [n], the largest
            components of its gradients; infinite where loss or gradient are not finite.
        known: a point [d] and its evaluation, which answers a round that asks for nothing else.
    """

    evaluation: Evaluation

    def __init__(self, inner: Evaluator, gtol: float, owner: str = "minimize") -> None:
        super().__init__(inner)
        self._owner = owner
        self.gtol: float = gtol
        self.count: int = 0
        self.stationary: bool = False
        self.start_loss: float = math.inf
        self.loss: float = math.inf
        self.point: Tensor = torch.empty(0)
        self.gradient: Tensor = torch.empty(0)
        self.points: Tensor = torch.empty(0)
        self.norms: Tensor = torch.empty(0)
        self.known: tuple[Tensor, Evaluation] | None = None

    def evaluate(self, request: EvaluationRequest) -> Evaluation:
        # Without a history there is nothing to predict, and most optimizers draft a first round that stays
        # where it is: the function is deterministic, so one answer serves for all.
        points = request.points
        distinct = 1 if bool((points == points[0]).all()) else len(points)
        if distinct == 1 and self.known is not None and torch.equal(points[0], self.known[0]):
            return _repeated(self.known[1], len(points))
        evaluation = self.inner.evaluate(request.rows(slice(distinct)))
        self.start_loss = float(evaluation.losses[0])
        self._note(points[:distinct], evaluation)
        return evaluation if distinct == len(points) else _repeated(evaluation, len(points))

    def attempt(self, request: EvaluationRequest) -> Evaluation:
        """Evaluate points outside any round, those of the search for a rate."""
        evaluation = self.inner.evaluate(request)
        self._note(request.points, evaluation)
        return evaluation

    def row(self, index: int) -> Evaluation:
        """The last request's answer for one of its points."""
        rows = slice(index, index + 1)
        evaluation = self.evaluation
        seen = evaluation.observations
        return Evaluation(
            evaluation.losses[rows],
            evaluation.gradients[rows],
            evaluation.masks[rows],
            observations=None if seen is None else seen[rows],
        )

    def _note(
        self,
        points: Tensor,  # [n, d]
        evaluation: Evaluation,
    ) -> None:
        losses = evaluation.losses.to(points.device)
        norms = torch.linalg.vector_norm(evaluation.gradients, math.inf, dim=1)
        finite = losses.isfinite() & norms.isfinite()
        if not self.count and not finite[0]:
            raise ValueError(
                f"{self._owner}: at x0 fun is {self.start_loss:g} and the largest component of its gradient "
                f"{float(norms[0]):g}; start where both are finite"
            )
        self.count += len(points) - len(evaluation.lost)
        stationary = finite & (norms <= self.gtol) & (losses <= self.start_loss)
        self.stationary = bool(stationary.any())
        ranked = torch.where(stationary if self.stationary else finite, losses, math.inf)
        best = int(ranked.argmin())
        if self.stationary or float(ranked[best]) < self.loss:
            self.loss = float(losses[best])
            self.point = points[best].clone()
            self.gradient = evaluation.gradients[best].clone()
        self.points, self.evaluation = points, evaluation
        self.norms = torch.where(finite, norms, math.inf)


def _repeated(evaluation: Evaluation, count: int) -> Evaluation:
    """One point's evaluation, repeated for ``count`` equal points."""
    return Evaluation(
        evaluation.losses.repeat(count),
        evaluation.gradients.repeat(count, 1),
        evaluation.masks * count,
        observations=None if evaluation.observations is None else evaluation.observations * count,
        retried=evaluation.retried,
    )
