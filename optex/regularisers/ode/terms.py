"""The loss terms: of all steps of a solve (global), or of one more step at a random time (local)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from optex.checks import check_flag, check_kind, shown
from optex.regularisers.ode.heuristics import error_estimate, stiffness_estimate
from optex.regularisers.ode.recording import Solve, Steps, first_size, one_step

__all__ = ["GlobalRegularizer", "LocalRegularizer", "Regularizer"]

Heuristic = Literal["error", "stiffness"]
Aggregate = Literal["mean", "sum", "max"]
Mode = Literal["unbiased", "biased"]


class Regularizer(ABC):
    """A loss term of a recorded solve; a scalar with a graph to the field's parameters."""

    @abstractmethod
    def __call__(self, solve: Solve) -> Tensor:  # []
        """The term, a mean over the rows."""


class GlobalRegularizer(Regularizer):
    """The solver's own estimates, gathered over the steps of the solve.

        R_E = agg_j E_j |h_j|      R_S = agg_j S_j

    (2105.03918) over the accepted steps j of a row, then the mean over rows. The gradient goes back through
    the whole solve, h_j held fixed. It takes no evaluation beyond the solve's own.

    Args:
        kind: ``"error"`` (E) or ``"stiffness"`` (S).
        aggregate: ``"mean"``, ``"sum"`` (the paper's formula) or ``"max"``. None: the mean of errors, the
            largest stiffness.

    Raises:
        ValueError: ``kind`` or ``aggregate`` is unknown.

    Source: Pal, Ma, Shah, Rackauckas, ICML 2021.
    """

    def __init__(self, kind: Heuristic = "error", aggregate: Aggregate | None = None) -> None:
        self.kind: Heuristic = kind
        _check_word("GlobalRegularizer", "kind", kind, get_args(Heuristic))
        default: Aggregate = "mean" if kind == "error" else "max"
        self.aggregate: Aggregate = default if aggregate is None else aggregate
        _check_word("GlobalRegularizer", "aggregate", self.aggregate, get_args(Aggregate))

    def __call__(self, solve: Solve) -> Tensor:  # []
        accepted = solve.steps.accepted
        # Rejected steps leave by selection: they may hold infinities, which a product with 0 would keep.
        values = torch.where(accepted, _values(self.kind, solve.steps, solve.rtol, solve.atol), 0.0)
        if self.aggregate == "max":
            return values.amax(0).mean()
        total = values.sum(0)
        return (total / accepted.sum(0).clamp(min=1) if self.aggregate == "mean" else total).mean()


class LocalRegularizer(Regularizer):
    """One step more, from a random time of the solve.

        R = E |h|  or  S,   of one step of Tsit5 from (t_1, u(t_1))

    (2303.02262), the mean over rows. t_1, u(t_1) and h are constants, so that the gradient needs that one step
    alone, whatever the solve's length or adjoint: 7 evaluations. Every row has a t_1 of its own, and h is the
    step that the solver took there.

    Args:
        kind: ``"error"`` (E |h|) or ``"stiffness"`` (S).
        mode: ``"unbiased"``: t_1 is uniform from start to end. ``"biased"``: t_1 is the start of an accepted
            step of the row, each as likely, so that more are drawn where steps are short.
        published: as the authors' code has it: h is the first step that the solver would try from t_1, which
            is cautious, and the first stage k_1 is a constant. Σ b̃_i k_i with one k_i held fixed is no longer
            a difference of two orders, so this gradient is not E's. For comparison.
        generator: of the draws; None is torch's global one.

    Raises:
        ValueError: ``kind`` or ``mode`` is unknown.
        TypeError: ``generator`` has the wrong type.

    Source: Pal, Edelman, Rackauckas, ICML 2023.
    """

    def __init__(
        self,
        kind: Heuristic = "error",
        mode: Mode = "unbiased",
        *,
        published: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        _check_word("LocalRegularizer", "kind", kind, get_args(Heuristic))
        _check_word("LocalRegularizer", "mode", mode, get_args(Mode))
        check_kind("LocalRegularizer", "generator", generator, torch.Generator, "a torch.Generator or None")
        self.kind: Heuristic = kind
        self.mode: Mode = mode
        self.published: bool = check_flag("LocalRegularizer", "published", published)
        self.generator = generator

    def __call__(self, solve: Solve) -> Tensor:  # []
        steps = solve.steps
        rows = torch.arange(len(solve.end), device=solve.end.device)
        if self.mode == "unbiased":
            share = torch.rand(
                solve.end.shape, generator=self.generator, dtype=solve.end.dtype, device=solve.end.device
            )
            times = steps.start[0] + share * (solve.end - steps.start[0])
            drawn, state = solve.step_at(times), solve.state_at(times)
        else:
            weights = steps.accepted.T.to(steps.size)
            drawn = torch.multinomial(weights, 1, generator=self.generator)[:, 0]
            times, state = steps.start[drawn, rows], steps.before[drawn, rows].detach()
        left = (solve.end - times).abs()
        size = steps.size[drawn, rows]
        size = size.sign() * torch.minimum(size.abs(), left)
        if self.published:
            size = first_size(solve.field, times, state, solve.end, solve.rtol, solve.atol)
        return self.at(solve.field, times, state, size, rtol=solve.rtol, atol=solve.atol)

    def at(
        self,
        field: Callable[[Tensor, Tensor], Tensor],
        times: Tensor,  # [n]
        state: Tensor,  # [n, d]
        size: Tensor,  # [n]
        *,
        rtol: float,
        atol: float,
    ) -> Tensor:  # []
        """The term at given times, for states of any solver: torchdiffeq's with its adjoint, for one.

        Args:
            field: ``field(t, u)`` of times [n] and states [n, d].
            times: t_1.
            state: u(t_1).
            size: h, as long as the solver's steps are there. Of all three no graph is followed.
            rtol, atol: the solver's tolerances.

        >>> import torch
        >>> from optex.regularisers import LocalRegularizer
        >>> half, size, state = torch.full((1,), 0.5), torch.full((1,), 0.1), torch.ones(1, 1)
        >>> stiff = LocalRegularizer("stiffness")
        >>> term = stiff.at(lambda t, u: -7.0 * u, half, state, size, rtol=1e-3, atol=1e-3)
        >>> round(term.item(), 2)                                 # 7 / 3.5068
        2.0
        """
        step = one_step(field, times.detach(), state.detach(), size.detach(), first_stage=not self.published)
        return _values(self.kind, step, rtol, atol).mean()


def _values(kind: Heuristic, steps: Steps, rtol: float, atol: float) -> Tensor:  # [s, n]
    if kind == "stiffness":
        return stiffness_estimate(steps)
    return error_estimate(steps, rtol, atol) * steps.size.abs()


def _check_word(owner: str, name: str, word: str, known: tuple[str, ...]) -> None:
    if word not in known:
        raise ValueError(f"{owner}: {name} must be one of {', '.join(map(repr, known))}, got {shown(word)}")
