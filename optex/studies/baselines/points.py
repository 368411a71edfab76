"""Gradients at points that a method chooses, for the methods that are not OptEx."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from optex.evaluators import Evaluation, EvaluationRequest, RandomDraws, SequentialEvaluator
from optex.stepping import Buffers, ParameterVector
from optex.studies.problems import Problem

__all__ = ["Points"]


class Points:
    """Evaluates a problem at points; BatchNorm's running statistics follow the point that is kept.

    Args:
        problem: whose losses and gradients are evaluated.
        vector: its parameters.
    """

    def __init__(self, problem: Problem, vector: ParameterVector) -> None:
        self._source, self._vector = problem.source(), vector
        self._buffers, self._evaluator = Buffers.of(problem), SequentialEvaluator()
        self._after: Sequence[list[Tensor]] | None = None

    def evaluate(
        self,
        points: Tensor,  # [n, d]
        batches: Sequence[Any],  # [n]
        draws: Sequence[RandomDraws],  # [n]
    ) -> Evaluation:
        """Losses and gradients, one after the other; the parameters are left as they were."""
        request = EvaluationRequest(self._source, self._vector, points, batches, draws, buffers=self._buffers)
        evaluation = self._evaluator.evaluate(request)
        self._after = evaluation.buffers
        return evaluation

    def keep(self, index: int) -> None:
        """Set the statistics to those after this point of the last evaluation and all points before it."""
        if self._after is not None:
            self._buffers.write(self._after[index])
