"""Gradients of an objective: a function of a batch that returns the loss and leaves the backward pass to us."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from optex.batching import variance_of_mean
from optex.checks import check_callable, check_flag, check_parameters, shown
from optex.sources.interface import GradientSource, scalar_loss

__all__ = ["AccumulatingSource", "LossModule", "ObjectiveSource", "backpropagate"]


def backpropagate(
    loss: Tensor,  # []
    *,
    create_graph: bool = False,
) -> None:
    """``loss.backward``, without torch's warning that a graph kept in ``.grad`` makes a reference cycle.

    Callers that ask for the graph (optimizers that observe evaluations) release it.

    Raises:
        TypeError: the loss is no tensor, or ``create_graph`` neither True nor False.
        ValueError: the loss is no scalar, or depends on no parameter through autograd.
    """
    check_flag("backpropagate", "create_graph", create_graph)
    if not isinstance(loss, Tensor):
        raise TypeError(f"backpropagate: loss must be a scalar tensor, got {type(loss).__name__}")
    if loss.numel() != 1 or not loss.requires_grad:
        raise ValueError(
            "backpropagate: loss must be a scalar that depends on a parameter through autograd, got "
            f"{shown(loss)}"
        )
    if not create_graph:
        loss.backward()
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Using backward\(\) with create_graph=True", UserWarning)
        loss.backward(create_graph=True)


class LossModule(nn.Module):
    """The objective as a module that owns the model, so that functional_call can swap its parameters."""

    def __init__(self, model: nn.Module, objective: Callable[[Any], Tensor]) -> None:
        super().__init__()
        check_callable("LossModule", "objective", objective)
        self.model = model
        # In a tuple, or an objective that is itself a module would be registered a second time, and
        # functional_call would leave its swapped parameters behind.
        self._objective = (objective,)

    def forward(self, batch: Any) -> Tensor:
        return scalar_loss(self._objective[0](batch), "objective")


@dataclass(frozen=True)
class ObjectiveSource(GradientSource):
    """The gradient of ``objective(batch)`` by one backward pass; what ``rounds`` makes of a plain function.

    Args:
        objective: the scalar loss of a batch at the parameters' present values, without backward.
        deterministic: it answers the same whenever it is asked at a point, whatever the batch.
        create_graph: keep the graph of the gradient, for optimizers that differentiate it again.

    Raises:
        TypeError: the objective cannot be called, or a flag is neither True nor False.
        TypeError, ValueError: at evaluation: the loss is no real scalar, or depends on no parameter through
            autograd.
    """

    objective: Callable[[Any], Tensor]
    deterministic: bool = False
    create_graph: bool = False
    module: nn.Module | None = field(init=False, default=None, compare=False)

    def __post_init__(self) -> None:
        _check("ObjectiveSource", self.objective, self.create_graph)
        check_flag("ObjectiveSource", "deterministic", self.deterministic)
        if isinstance(self.objective, nn.Module):
            object.__setattr__(self, "module", self.objective)

    def gradient(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        loss = scalar_loss(self.objective(batch), "objective")
        if not loss.requires_grad:
            raise ValueError(
                "objective: the loss does not depend on any parameter through autograd; compute it from the "
                "model's output, without .item(), .detach() or torch.no_grad()"
            )
        backpropagate(loss, create_graph=self.create_graph)
        return loss.detach(), None

    def with_graph(self) -> ObjectiveSource:
        return replace(self, create_graph=True)


@dataclass(frozen=True)
class AccumulatingSource(GradientSource):
    """A step's gradient summed up over micro-batches, for batches whose graph does not fit into memory.

    The batch is a sequence of micro-batches; loss and gradient are the means over them. With ``parameters`` the
    spread of the micro-batches' gradients g_k about their mean ḡ tells how noisy ḡ is: each component's
    variance is about ``Σ_k ‖g_k - ḡ‖² / (d m (m - 1))`` for m micro-batches, and the estimators use it.

    Args:
        objective: the scalar loss of one micro-batch, without backward.
        parameters: those that are optimised, to measure the noise at; costs one more copy of their gradients.
            None leaves the noise unknown.
        create_graph: keep the graphs of all micro-batches' gradients; that takes their memory at once.

    Raises:
        TypeError, ValueError: an argument cannot work; at evaluation: a loss is no real scalar, or a batch has
            no micro-batches.

    >>> import torch, optex
    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = optex.OptEx(torch.optim.SGD(model.parameters(), lr=0.1))
    >>> source = optex.AccumulatingSource(lambda x: model(x).square().mean(), list(model.parameters()))
    >>> batches = [[torch.randn(4, 2), torch.randn(4, 2)] for _ in range(6)]
    >>> sum(report.accepted for report in optimizer.rounds(batches, source))
    6
    """

    objective: Callable[[Any], Tensor]
    parameters: Sequence[Tensor] | None = None
    create_graph: bool = False

    def __post_init__(self) -> None:
        _check("AccumulatingSource", self.objective, self.create_graph)
        if self.parameters is not None:
            check_parameters("AccumulatingSource", self.parameters)

    def gradient(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        total, squares = None, []
        for micro_batch in batch:
            before = None if self.parameters is None else _gradients(self.parameters)
            loss = scalar_loss(self.objective(micro_batch), "objective") / len(batch)
            backpropagate(loss, create_graph=self.create_graph)
            total = loss.detach() if total is None else total + loss.detach()
            if self.parameters is not None and before is not None:
                added = [after - then for after, then in zip(_gradients(self.parameters), before, strict=True)]
                squares.append(_squared_norm(added))
        if total is None:
            raise ValueError("AccumulatingSource: a batch has no micro-batches; a batch is a sequence of them")
        return total, self._noise_variance(squares)

    def with_graph(self) -> AccumulatingSource:
        return replace(self, create_graph=True)

    def _noise_variance(self, squares: Sequence[Tensor]) -> Tensor | None:  # m of ‖g_k / m‖²
        count = len(squares)
        if self.parameters is None or count < 2:
            return None
        # What micro-batch k added to the sum is g_k / m.
        norms = count**2 * torch.stack(list(squares))
        dimension = sum(p.numel() for p in self.parameters)
        return variance_of_mean(norms, _squared_norm(_gradients(self.parameters))) / dimension


def _check(owner: str, objective: Any, create_graph: Any) -> None:
    check_callable(owner, "objective", objective)
    check_flag(owner, "create_graph", create_graph)


def _gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for p in parameters]


def _squared_norm(tensors: Sequence[Tensor]) -> Tensor:  # []
    return torch.stack(torch._foreach_norm(list(tensors))).square().sum()
