"""Gradients at all points in one batched computation, by torch.func."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import grad_and_value, vmap
from torch.utils import _pytree as pytree

from optex.checks import check_integer, shown
from optex.evaluators.buffers import refuse_running_statistics
from optex.evaluators.interface import Evaluation, EvaluationRequest, Evaluator, with_hook
from optex.functional import called_with
from optex.sources import LossModule, ObjectiveSource
from optex.stepping import GradientMask, ParameterVector

__all__ = ["VectorizedEvaluator"]


class VectorizedEvaluator(Evaluator):
    """Evaluate all points in one ``vmap``: for models too small to fill the device by themselves.

    Needs ``rounds(batches, objective)``: a closure that backpropagates by itself cannot be vectorized. The
    objective must read the parameters through ``model``. Batches of one shape are evaluated in one call; those
    of another shape, such as the last one of a loader, in a call of their own.

    Args:
        model: the module whose parameters are optimised, as the objective uses it.
        chunk_size: points a call, at least 1; all of them by default. Memory grows with it.
        randomness: what dropout and the like do across points: ``"error"`` (refuse), ``"different"`` or
            ``"same"`` draws, as in ``torch.func.vmap``. A step that is evaluated again draws anew; the other
            evaluators repeat a step's random numbers.

    Raises:
        TypeError: ``model`` is no module; at evaluation, gradients come from a closure or from a source that
            backpropagates by itself.
        ValueError: ``chunk_size`` or ``randomness`` is out of range; at evaluation, for BatchNorm that would
            update its running statistics, for parameters that are not the model's, and for random operations
            under ``randomness="error"``.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        chunk_size: int | None = None,
        randomness: Literal["error", "different", "same"] = "error",
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"VectorizedEvaluator: model must be a torch.nn.Module, got {type(model).__name__}")
        if chunk_size is not None:
            check_integer("VectorizedEvaluator", "chunk_size", chunk_size)
        if randomness not in ("error", "different", "same"):
            raise ValueError(
                "VectorizedEvaluator: randomness must be 'error', 'different' or 'same', "
                f"got {shown(randomness)}"
            )
        self.model: nn.Module = model
        self.chunk_size: int | None = chunk_size
        self.randomness: Literal["error", "different", "same"] = randomness
        self._mask: tuple[list[Tensor], GradientMask] | None = None

    def evaluate(self, request: EvaluationRequest) -> Evaluation:
        source, vector, points, batches = request.source, request.vector, request.points, request.batches
        if not isinstance(source, ObjectiveSource):
            raise TypeError(
                "VectorizedEvaluator: step(closure) and gradient sources of your own backpropagate by "
                "themselves and cannot be vectorized; use rounds(batches, objective), or the "
                "SequentialEvaluator"
            )
        refuse_running_statistics(
            "VectorizedEvaluator",
            self.model,
            "Points evaluated at once cannot share them; use SequentialEvaluator()",
        )
        names = self._names(vector)
        loss = LossModule(self.model, source.objective)
        losses = torch.empty(len(points), dtype=points.dtype, device=points.device)
        gradients = torch.empty_like(points)
        for indices in _alike(batches):
            part = self._evaluate_alike(loss, names, vector, points[indices], [batches[i] for i in indices])
            losses[indices] = part[0].to(losses.dtype)
            gradients[indices] = part[1]
        masks = (self._mask_of(source, vector, batches[0]),) * len(points)
        return with_hook(request, Evaluation(losses, gradients, masks))

    def _evaluate_alike(
        self,
        loss: LossModule,
        names: list[str],
        vector: ParameterVector,
        points: Tensor,  # [n, d]
        batches: Sequence[Any],
    ) -> tuple[Tensor, Tensor]:  # [n], [n, d]
        pieces = points.split(vector.sizes, dim=1)
        stacked = {
            name: piece.reshape(len(points), *p.shape).to(p.device, p.dtype)
            for name, piece, p in zip(names, pieces, vector.parameters, strict=True)
        }
        batch, batch_dims = _stack(batches)

        def loss_of(parameters: dict[str, Tensor], batch: Any) -> Tensor:
            return called_with(loss, parameters, batch)

        evaluate = vmap(
            grad_and_value(loss_of),
            in_dims=(0, batch_dims),
            chunk_size=self.chunk_size,
            randomness=self.randomness,
        )
        try:
            gradients, losses = evaluate(stacked, batch)
        except RuntimeError as error:
            if "randomness" not in str(error):
                raise
            raise ValueError(
                "VectorizedEvaluator: the model draws random numbers (dropout?) and randomness='error'; pass "
                "randomness='different', put the model in eval(), or use the SequentialEvaluator"
            ) from error
        rows = [gradients[name].reshape(len(points), -1).to(points.device, points.dtype) for name in names]
        return losses, torch.cat(rows, dim=1)

    def _names(self, vector: ParameterVector) -> list[str]:
        known = {id(p): f"model.{name}" for name, p in self.model.named_parameters()}
        missing = [i for i, p in enumerate(vector.parameters) if id(p) not in known]
        if missing:
            raise ValueError(
                f"VectorizedEvaluator: {len(missing)} of the optimizer's parameters (first: number "
                f"{missing[0]}) are not parameters of model; pass the module that owns them"
            )
        return [known[id(p)] for p in vector.parameters]

    def _mask_of(self, source: ObjectiveSource, vector: ParameterVector, batch: Any) -> GradientMask:
        # vmap returns zeros for parameters that the loss does not depend on; a base optimizer must see None
        # there (it would decay their weights). One plain backward pass the first time tells which ones they
        # are. A ParameterVector never replaces its list of parameters, so the list's identity tells vectors
        # apart.
        if self._mask is None or self._mask[0] is not vector.parameters:
            with torch.enable_grad(), torch.random.fork_rng(enabled=self.randomness != "error"):
                loss = source.objective(batch)
                found = torch.autograd.grad(loss, vector.parameters, allow_unused=True)
            self._mask = (vector.parameters, tuple(gradient is not None for gradient in found))
        return self._mask[1]


def _alike(batches: Sequence[Any]) -> list[list[int]]:
    """Indices of batches, grouped by structure, shapes and non-tensor content."""
    groups: dict[Any, list[int]] = {}
    for i, batch in enumerate(batches):
        leaves, structure = pytree.tree_flatten(batch)
        signature = tuple(
            (leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else (repr(leaf),) for leaf in leaves
        )
        groups.setdefault((repr(structure), signature), []).append(i)
    return list(groups.values())


def _stack(batches: Sequence[Any]) -> tuple[Any, Any]:
    """Batches of one shape as one with a leading dimension, and vmap's in_dims for it."""
    flat = [pytree.tree_flatten(batch)[0] for batch in batches]
    structure = pytree.tree_flatten(batches[0])[1]
    leaves, dims = [], []
    for column in zip(*flat, strict=True):
        is_tensor = isinstance(column[0], Tensor)
        leaves.append(torch.stack(column) if is_tensor else column[0])
        dims.append(0 if is_tensor else None)
    if not any(dim == 0 for dim in dims):
        return batches[0], None
    return pytree.tree_unflatten(leaves, structure), pytree.tree_unflatten(dims, structure)
