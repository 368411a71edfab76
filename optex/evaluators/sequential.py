"""Gradients one after the other, on the parameters in place."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Final

import torch
from torch import Tensor

from optex.evaluators.buffers import statistics_watched
from optex.evaluators.interface import Evaluation, EvaluationRequest, Evaluator, stack_noise, with_hook
from optex.sources import GradientSource
from optex.stepping import Buffers, ParameterVector

__all__ = ["SequentialEvaluator", "gradient_of"]

_REMEDY: Final = "Hand the module that owns them to OptEx(..., model=model)"


class SequentialEvaluator(Evaluator):
    """Write each point into the parameters, backpropagate, and put the parameters back, even after an error.

    Buffers (BatchNorm's running statistics) pass from point to point, as in the plain loop; the round keeps
    those of its last accepted step.

    Works with every model and every closure, and saves no time: it is the reference for the evaluators that
    compute at once, and counts rounds where there is no hardware for those.

    Raises:
        ValueError: at evaluation, where no parameter received a gradient, or a model that is not known updates
            running statistics.
        TypeError: at evaluation, where a gradient is sparse.
    """

    observes = True

    def __init__(self) -> None:
        self._watched: list[Tensor] | None = None  # parameters of a model that was seen to update no statistics

    def evaluate(self, request: EvaluationRequest) -> Evaluation:
        vector, buffers = request.vector, request.buffers or Buffers()
        unknown = request.buffers is None and self._watched is not vector.parameters
        before, buffers_before = vector.read(), buffers.read()
        gradients = torch.empty_like(request.points)
        losses, masks, after, noise, observations = [], [], [], [], []
        try:
            with statistics_watched("OptEx", _REMEDY) if unknown else nullcontext():
                for point, batch, drawn, row in zip(
                    request.points, request.batches, request.draws, gradients, strict=True
                ):
                    vector.write(point)
                    vector.clear_gradients()
                    torch.clear_autocast_cache()  # a caller's autocast would keep the last point's weights
                    with torch.enable_grad(), drawn.replayed():
                        loss, variance = gradient_of(request.source, batch)
                        if request.observe is not None:
                            observations.append(request.observe())
                    _check_gradients(vector)
                    gradient, mask = vector.read_gradients()
                    row.copy_(gradient)
                    losses.append(loss.to(request.points.device))
                    noise.append(variance)
                    masks.append(mask)
                    after.append(buffers.read())
        finally:
            vector.write(before)
            buffers.write(buffers_before)
            torch.clear_autocast_cache()
            vector.clear_gradients()
        if unknown:
            self._watched = vector.parameters
        evaluation = Evaluation(
            torch.stack(losses),
            gradients,
            tuple(masks),
            stack_noise(noise),
            tuple(after),
            None if request.observe is None else tuple(observations),
        )
        return with_hook(request, evaluation)


def gradient_of(source: GradientSource, batch: Any) -> tuple[Tensor, Tensor | None]:  # [], []
    """The source's loss, and the variance of its gradient's noise where it knows that.

    Raises:
        RuntimeError: the source raised ``StopIteration``, which would silently end the caller's own loop.
    """
    try:
        return source.gradient(batch)
    except StopIteration as error:
        raise RuntimeError(
            "OptEx: the objective or closure raised StopIteration: an iterator that it draws from has ended. "
            "Hand the batches to rounds(batches, objective), or let the closure's iterator go on for ever"
        ) from error


def _check_gradients(vector: ParameterVector) -> None:
    found = [p.grad for p in vector.parameters if p.grad is not None]
    if not found:
        raise ValueError(
            "closure: no parameter received a gradient; call loss.backward() in a closure (an objective needs "
            "none), and compute the loss from the parameters this optimizer was built with"
        )
    if any(gradient.layout is not torch.strided for gradient in found):
        raise TypeError(
            "closure: a parameter received a sparse gradient; OptEx needs dense ones "
            "(torch.nn.Embedding(..., sparse=False))"
        )
