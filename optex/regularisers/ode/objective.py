"""``regularise``: an objective with a solver's heuristics added to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from optex.checks import check_callable, check_number, shown
from optex.regularisers.ode.flow import Flow
from optex.regularisers.ode.terms import GlobalRegularizer, LocalRegularizer, Regularizer

__all__ = ["RegularisedObjective", "regularise"]

_KINDS: dict[str, Callable[[], Regularizer]] = {
    "error": lambda: GlobalRegularizer("error"),
    "stiffness": lambda: GlobalRegularizer("stiffness"),
    "local": lambda: LocalRegularizer("error"),
    "local-stiffness": lambda: LocalRegularizer("stiffness"),
}


def regularise(
    objective: Callable[..., Tensor],
    flow: Flow,
    kind: str | Regularizer = "local",
    *,
    strength: float = 1.0,
) -> RegularisedObjective:
    """The objective plus ``strength`` times how hard its differential equation is to solve.

        L(θ) + λ R(θ),   R = E h or S: of one random step (local), of all steps (global)

    What is learnt then takes fewer evaluations of the field to predict with, at a tolerance that is kept.

    Args:
        objective: ``objective(*args)``, a scalar loss; it calls ``flow`` once or more.
        flow: the layer whose solves are regularised.
        kind: ``"local"`` or ``"local-stiffness"`` (one more step, however long the solve),
            ``"error"`` or ``"stiffness"`` (the solve's own steps); or a :class:`Regularizer`.
        strength: λ, not negative. E is in units of the tolerances. The papers let λ decay exponentially; set
            the attribute ``strength`` between steps for that.

    Returns:
        A function of the objective's arguments. Where ``flow`` is in evaluation mode, or gradients are off, or
        strength is 0, it is the objective, to the bit.

    Raises:
        TypeError: ``objective`` cannot be called, ``flow`` is no :class:`Flow`, the loss is no scalar tensor.
        ValueError: an unknown kind; a strength out of range; or, when called, an objective without a solve.

    Source: Pal, Ma, Shah, Rackauckas, arXiv 2105.03918; Pal, Edelman, Rackauckas, arXiv 2303.02262.

    >>> import torch
    >>> import optex
    >>> from optex.regularisers import Flow
    >>> weight = torch.nn.Parameter(torch.tensor(-3.0, dtype=torch.float64))
    >>> flow = Flow(lambda t, u: weight * u)
    >>> objective = optex.regularise(lambda start: flow(start).square().mean(), flow, "stiffness")
    >>> plain = torch.exp(2 * weight.detach())
    >>> start = torch.ones(1, 1, dtype=torch.float64)
    >>> round((objective(start) - plain).item(), 3)                 # |weight| / 3.5068
    0.855
    """
    if isinstance(kind, Regularizer):
        term = kind
    elif isinstance(kind, str) and kind in _KINDS:
        term = _KINDS[kind]()
    else:
        raise ValueError(
            f"regularise: kind must be one of {', '.join(map(repr, _KINDS))} or a Regularizer, "
            f"got {shown(kind)}"
        )
    return RegularisedObjective(objective, flow, term, strength)


class RegularisedObjective:
    """An objective and a loss term; :func:`regularise` makes one.

    Attributes:
        strength: λ, to be set between steps.
        last_term: the value of the term at the last call that had one, without strength; None before.

    Raises:
        TypeError: the objective cannot be called, ``flow`` is no :class:`Flow`, or ``term`` no regularizer.
        ValueError: the strength is no finite number of at least 0.
    """

    def __init__(
        self, objective: Callable[..., Tensor], flow: Flow, term: Regularizer, strength: float
    ) -> None:
        check_callable("regularise", "objective", objective)
        if not isinstance(flow, Flow):
            raise TypeError(f"regularise: flow must be an optex.regularisers.Flow, got {shown(flow)}")
        if not isinstance(term, Regularizer):
            raise TypeError(f"RegularisedObjective: term must be a Regularizer, got {shown(term)}")
        self._objective, self._flow, self._term = objective, flow, term
        self.strength = strength
        self.last_term: Tensor | None = None

    @property
    def strength(self) -> float:
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        self._strength = check_number("regularise", "strength", value)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:  # []
        if not (self._flow.training and torch.is_grad_enabled() and self._strength > 0):
            return self._objective(*args, **kwargs)
        with self._flow.recording() as solves:
            loss = self._objective(*args, **kwargs)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise TypeError(f"regularise: objective must return a scalar tensor, got {type(loss).__name__}")
        if not solves:
            raise ValueError(
                "regularise: objective did not call flow; pass the Flow that its model solves with"
            )
        term = torch.stack([self._term(solve) for solve in solves]).mean()
        self.last_term = term.detach()
        return loss + self._strength * term
