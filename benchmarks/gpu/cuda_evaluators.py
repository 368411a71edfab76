"""Two more ways of evaluating N gradients on a GPU: one vmap replayed as a CUDA graph, and N streams."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value
from torch.utils import _pytree as pytree

from optex import VectorizedEvaluator
from optex.stepping import ParameterVector


def require_cuda(what: str) -> None:
    """Refuse where there is no GPU.

    Raises:
        RuntimeError: there is none.
    """
    if not torch.cuda.is_available():
        raise RuntimeError(f"{what} needs a CUDA device, and torch sees none here")


@dataclass
class _Captured:
    """A graph, and the memory that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    points: Tensor
    leaves: list[Any]  # of the batches
    losses: Tensor
    gradients: Tensor


class GraphedEvaluator(VectorizedEvaluator):
    """The vmap of all points, captured once for each number of points and shape of batches, then replayed.

    A replay costs the host one launch, whatever the model's layers are; that is what small models wait for.
    The model's buffers are read where they were at the capture: they may change in place, not be replaced.

    Raises:
        RuntimeError: there is no CUDA device.
    """

    def __init__(self, model: nn.Module) -> None:
        require_cuda("GraphedEvaluator")
        super().__init__(model, randomness="different")
        self._captured: dict[Any, _Captured] = {}

    def _evaluate_alike(
        self, loss: Any, names: list[str], vector: ParameterVector, points: Tensor, batches: Sequence[Any]
    ) -> tuple[Tensor, Tensor]:
        leaves, structure = pytree.tree_flatten(list(batches))
        key = (
            points.shape,
            str(structure),
            tuple(x.shape if isinstance(x, Tensor) else repr(x) for x in leaves),
        )
        if key not in self._captured:
            still = points.clone(), [x.clone() if isinstance(x, Tensor) else x for x in leaves]

            def compute(still: tuple[Tensor, list[Any]] = still) -> tuple[Tensor, Tensor]:
                again = pytree.tree_unflatten(still[1], structure)
                return VectorizedEvaluator._evaluate_alike(self, loss, names, vector, still[0], again)

            graph, found = _capture(compute)
            self._captured[key] = _Captured(graph, *still, *found)
        captured = self._captured[key]
        captured.points.copy_(points)
        for here, leaf in zip(captured.leaves, leaves, strict=True):
            if isinstance(leaf, Tensor):
                here.copy_(leaf)
        captured.graph.replay()
        return captured.losses.clone(), captured.gradients.clone()


def _capture(
    compute: Callable[[], tuple[Tensor, Tensor]],
) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, Tensor]]:
    """Its graph, after a few runs beside: libraries choose kernels and take workspaces at the first ones."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            compute()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = compute()
    return graph, found


class StreamsEvaluator(VectorizedEvaluator):
    """Each point on a stream of its own: kernels too small to fill the device run beside each other.

    Raises:
        RuntimeError: there is no CUDA device.
    """

    def __init__(self, model: nn.Module) -> None:
        require_cuda("StreamsEvaluator")
        super().__init__(model, randomness="different")
        self._streams: list[torch.cuda.Stream] = []

    def _evaluate_alike(
        self, loss: Any, names: list[str], vector: ParameterVector, points: Tensor, batches: Sequence[Any]
    ) -> tuple[Tensor, Tensor]:
        while len(self._streams) < len(points):
            self._streams.append(torch.cuda.Stream())
        main, found = torch.cuda.current_stream(), []
        for stream, point, batch in zip(self._streams, points, batches, strict=False):
            stream.wait_stream(main)
            with torch.cuda.stream(stream):
                found.append(one_gradient(loss, names, vector, point, batch))
        for stream in self._streams[: len(points)]:
            main.wait_stream(stream)
        for value in (value for pair in found for value in pair):
            value.record_stream(main)  # or its memory would be free for its own stream while main reads it
        losses, gradients = zip(*found, strict=True)
        return torch.stack(losses), torch.stack(gradients)


def one_gradient(
    loss: nn.Module, names: list[str], vector: ParameterVector, point: Tensor, batch: Any
) -> tuple[Tensor, Tensor]:  # [], [d]
    """Loss and gradient of one point, without writing it into the model."""
    pieces = point.split(vector.sizes)
    parameters = {
        name: piece.reshape(p.shape).to(p.device, p.dtype)
        for name, piece, p in zip(names, pieces, vector.parameters, strict=True)
    }
    gradients, value = grad_and_value(lambda given: functional_call(loss, given, (batch,)))(parameters)
    return value, torch.cat([gradients[name].reshape(-1).to(point.dtype) for name in names])
