"""Gradients one after the other, on the parameters in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from optex.evaluators.interface import Draws, Evaluation, Evaluator, GradientSource
from optex.vectors import ParameterVector

__all__ = ["SequentialEvaluator"]


class SequentialEvaluator(Evaluator):
    """Swap each point into the parameters, backpropagate, and put the parameters back whatever happens.

    Works with every model and every closure, and gains nothing in time: it is the reference the parallel
    evaluators are held to, and the way to count rounds without hardware for them.
    """

    def evaluate(
        self,
        source: GradientSource,
        vector: ParameterVector,
        points: Tensor,
        batches: Sequence[Any],
        draws: Sequence[Draws],
    ) -> Evaluation:
        before = vector.read()
        gradients = torch.empty_like(points)
        losses, present = [], []
        try:
            for point, batch, drawn, row in zip(points, batches, draws, gradients, strict=True):
                vector.write(point)
                vector.clear_gradients()
                with torch.enable_grad(), drawn.replayed():
                    losses.append(source.backpropagate(batch))
                _check_gradients(vector)
                gradient, there = vector.read_gradients()
                row.copy_(gradient)
                present.append(there)
        finally:
            vector.write(before)
            vector.clear_gradients()
        return Evaluation(torch.stack([loss.to(points.device) for loss in losses]), gradients, tuple(present))


def _check_gradients(vector: ParameterVector) -> None:
    found = [p.grad for p in vector.parameters if p.grad is not None]
    if not found:
        raise ValueError(
            "closure: no parameter received a gradient; call loss.backward() in it, and make sure that the "
            "loss is computed from the parameters this optimizer was built with"
        )
    if any(gradient.layout is not torch.strided for gradient in found):
        raise TypeError(
            "closure: a parameter received a sparse gradient; OptEx needs dense ones "
            "(torch.nn.Embedding(..., sparse=False))"
        )
