"""Gradients one after the other, on the parameters in place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from optex.evaluators.interface import Draws, Evaluation, Evaluator, GradientSource
from optex.stepping.parameters import ParameterVector

__all__ = ["SequentialEvaluator"]


class SequentialEvaluator(Evaluator):
    """Swap each point into the parameters, backpropagate, and put the parameters back whatever happens.

    Buffers (BatchNorm's running statistics) pass from point to point, as in the plain loop; the round keeps
    those of its last accepted step.

    Works with every model and every closure, and gains nothing in time: it is the reference the parallel
    evaluators are held to, and the way to count rounds without hardware for them.
    """

    def __init__(self) -> None:
        self._checked: list[Tensor] | None = None  # parameters of the vector that was evaluated before

    def evaluate(
        self,
        source: GradientSource,
        vector: ParameterVector,
        points: Tensor,
        batches: Sequence[Any],
        draws: Sequence[Draws],
    ) -> Evaluation:
        unknown = vector.buffers is None and self._checked is not vector.parameters
        before, buffers_before = vector.read(), vector.read_buffers()
        gradients = torch.empty_like(points)
        losses, present, buffers = [], [], []
        try:
            with _refusing_stray_statistics() if unknown else nullcontext():
                for point, batch, drawn, row in zip(points, batches, draws, gradients, strict=True):
                    vector.write(point)
                    vector.clear_gradients()
                    torch.clear_autocast_cache()  # or a caller's autocast keeps the last point's weights
                    with torch.enable_grad(), drawn.replayed():
                        losses.append(source.backpropagate(batch))
                    _check_gradients(vector)
                    gradient, there = vector.read_gradients()
                    row.copy_(gradient)
                    present.append(there)
                    buffers.append(vector.read_buffers())
        finally:
            vector.write(before)
            vector.write_buffers(buffers_before)
            torch.clear_autocast_cache()
            vector.clear_gradients()
        if unknown:
            self._checked = vector.parameters
        stacked = torch.stack([loss.to(points.device) for loss in losses])
        return Evaluation(stacked, gradients, tuple(present), buffers=tuple(buffers))


@contextmanager
def _refusing_stray_statistics() -> Iterator[None]:
    """Refuse a BatchNorm whose running statistics nobody would put back: every proxy would leave its mark."""

    def check(module: nn.Module, _: Any) -> None:
        is_norm = isinstance(module, nn.modules.batchnorm._NormBase)
        if is_norm and module.training and module.running_mean is not None:
            raise ValueError(
                f"OptEx: {type(module).__name__} updates running statistics that would follow every point "
                "evaluated, not the steps taken; hand the module that owns it to OptEx(..., model=model)"
            )

    handle = register_module_forward_pre_hook(check)
    try:
        yield
    finally:
        handle.remove()


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
