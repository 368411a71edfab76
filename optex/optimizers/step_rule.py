"""What all step rules of the family share: torch's contract, and the checks before a step."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from optex.checks import check_flag
from optex.errors import NonFiniteError

__all__ = ["FreezingStepRule", "StepRule", "all_finite", "checked_gradients"]


class StepRule(Optimizer):
    """A step rule of the family: a ``torch.optim.Optimizer`` whose steps happen whole or not at all.

    A step collects the gradients of all groups and refuses what it cannot use, before anything changes; a
    subclass says in ``_update`` how a group's parameters and state move.
    """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with the defaults for what it does not set.

        Raises:
            ValueError, TypeError: a setting is out of range, or a parameter complex; no group was added.
        """
        super().add_param_group(param_group)
        try:
            if any(p.is_complex() for p in self.param_groups[-1]["params"]):
                raise TypeError(
                    f"{type(self).__name__}: complex parameters; optimise torch.view_as_real(parameter) instead"
                )
            if "maximize" in self.param_groups[-1]:
                check_flag(type(self).__name__, "maximize", self.param_groups[-1]["maximize"])
            self._check(self.param_groups[-1])
        except BaseException:
            self.param_groups.pop()
            raise

    @abstractmethod
    def _check(self, group: dict[str, Any]) -> None:
        """Refuse a group's settings that are out of range; the message names the argument.

        Raises:
            ValueError, TypeError: a setting is out of range.
        """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step.

        Args:
            closure: clears the gradients, backpropagates, returns the loss; called once.

        Returns:
            What the closure returned; None without one.

        Raises:
            NonFiniteError: a gradient is NaN or infinite; the message names its parameter. Parameters and state
                are as before.
            TypeError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found = [(group, *self._gradients(i, group)) for i, group in enumerate(self.param_groups)]
        self._prepare([(group, parameters, gradients) for group, parameters, gradients in found if parameters])
        for group, parameters, gradients in found:
            if parameters:
                self._update(group, parameters, gradients)
        return loss

    def _prepare(self, groups: list[tuple[dict[str, Any], list[Tensor], list[Tensor]]]) -> None:
        """Compute what a step needs from all groups together, such as a norm; nothing by default."""

    @abstractmethod
    def _update(
        self,
        group: dict[str, Any],
        parameters: list[Tensor],
        gradients: list[Tensor],  # of the parameters' shapes; not to be changed
    ) -> None:
        """Move a group's parameters and state, along gradients of what is to be minimised."""

    def _gradients(self, number: int, group: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
        """A group's parameters that have a gradient, and these gradients, negated where it maximises."""
        parameters, gradients = checked_gradients(type(self).__name__, number, group)
        if group.get("maximize"):
            gradients = list(torch._foreach_neg(gradients))
        return parameters, gradients


class FreezingStepRule(StepRule):
    """A step rule that keeps its estimate of the curvature fixed in steps on predictions.

    It implements ``optex.stepping.FreezesWhileDrafting``; ``_frozen`` is True inside ``drafting``.
    """

    _frozen = False  # of the class: torch copies and pickles an optimizer's state and groups alone

    @contextmanager
    def drafting(self) -> Iterator[None]:
        """Steps inside use predicted gradients, from which no curvature is learned."""
        before, self._frozen = self._frozen, True
        try:
            yield
        finally:
            self._frozen = before


def checked_gradients(
    owner: str,
    number: int,
    group: dict[str, Any],
) -> tuple[list[Tensor], list[Tensor]]:
    """A group's parameters that have a gradient, and these gradients, detached.

    Args:
        owner: the class, for the message.
        number: of the group, for the message.
        group: as in ``param_groups``.

    Raises:
        NonFiniteError: a gradient is NaN or infinite.
        TypeError: a gradient is sparse.
    """
    parameters = [p for p in group["params"] if p.grad is not None]
    for p in parameters:
        if p.grad.is_sparse:
            raise TypeError(
                f"{owner}: a gradient is sparse, and steps need dense ones; build the embedding with "
                "sparse=False"
            )
    gradients = [p.grad.detach() for p in parameters]
    if gradients and not torch.compiler.is_compiling():
        _check_finite(owner, number, group, parameters, gradients)
    return parameters, gradients


def _check_finite(
    owner: str, number: int, group: dict[str, Any], parameters: list[Tensor], gradients: list[Tensor]
) -> None:
    if all_finite(gradients):
        return
    position = int((~_norms(gradients, math.inf).isfinite()).nonzero()[0])
    names = group.get("param_names")
    shape = tuple(parameters[position].shape)
    which = f"{names[_place(group, parameters[position])]!r}" if names else f"{position}"
    raise NonFiniteError(
        f"{owner}: the gradient of parameter {which} {shape} of group {number} is not "
        "finite; parameters and state are those of before the step. Check the batch, or lower the rate"
    )


def all_finite(
    tensors: Sequence[Tensor],  # at least one
) -> bool:
    """Whether every entry is finite, with one transfer from the device for all tensors."""
    # Squares may overflow where entries are finite, but on CPUs the largest entry takes twenty times as long to
    # find: it is computed only where the sum of squares is not finite.
    return any(bool(_norms(tensors, order).isfinite().all()) for order in (2.0, math.inf))


def _norms(tensors: Sequence[Tensor], order: float) -> Tensor:  # [tensors]
    home = tensors[0].device
    return torch.stack([norm.to(home, torch.float32) for norm in torch._foreach_norm(list(tensors), order)])


def _place(group: dict[str, Any], parameter: Tensor) -> int:
    return next(i for i, p in enumerate(group["params"]) if p is parameter)
