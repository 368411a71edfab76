"""Hypergradients of bilevel problems from first derivatives alone, by a penalty.

Kwon, Kwon, Wright, Nowak: *On Penalty Methods for Nonconvex Bilevel Optimization and First-Order Stochastic
Approximation*, ICLR 2024, arXiv 2309.01753.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from optex.checks import check_flag, check_integer, check_positive, saved_tensor
from optex.errors import ConvergenceWarning, LowerLevelWarning, NonFiniteError, NonFiniteWarning, warn
from optex.sources.descent import Found, gradient_descent, limited_memory_bfgs
from optex.sources.interface import GradientSource
from optex.sources.levels import Level, Levels

__all__ = ["LowerLevels", "PenaltyHypergradient"]

_OWNER: Final = "PenaltyHypergradient"
_SHARE: Final = 0.5  # of the upper level's gradient that σ may change before it is no small penalty


class PenaltyHypergradient(GradientSource):
    """The gradient of min_x f(x, y*(x)), y*(x) = argmin_y g(x, y), without second derivatives.

    The two levels are mixed in h_σ(x, y) = σ f(x, y) + g(x, y). With l(x, σ) = min_y h_σ(x, y)

        ψ_σ(x)  = (l(x, σ) - l(x, 0)) / σ
        ∇ψ_σ(x) = ∇_x f(x, y) + (∇_x g(x, y) - ∇_x g(x, z)) / σ
        y = argmin_y h_σ(x, y),   z = argmin_y g(x, y)

    and ψ_σ and its gradient are O(σ)-close to those of the bilevel problem, where h_σ is steep enough about its
    minima (strongly convex, or the paper's proximal error bound). The loss of an answer is ψ_σ(x). Where
    that steepness μ depends on x, σ has to be small against the smallest μ that x can reach: otherwise ψ_σ is
    far below f(x, y*(x)) where the lower level is nearly singular, and a descent is drawn there.

    **Warm starts.** A pair (y, z) is stored, and every answer's two solves start at it, so that an answer
    depends on the point, the batch and the pair alone, in whatever order and process answers are computed. The
    pair changes when :meth:`accept` is called and at no other time: call it between rounds. Workers then get
    the new one.

    Args:
        upper: f; ``upper(x, y, batch)`` is a scalar. x and y have the forms of ``parameters`` and ``start``:
            one tensor, or a tuple of tensors. It must use these, not the parameters themselves.
        lower: g, in the same form.
        parameters: x, that is optimised: one tensor, or a sequence of them.
        start: y and z at first: one tensor, or a sequence; copied.
        sigma: σ, positive. The bias is O(σ); rounding and what the solves leave grow as 1/σ.
        inner_steps: most steps of each solve.
        tolerance: each solve ends at ‖∇_y‖ ≤ ``tolerance · σ ‖∇_y f(x, z)‖``, at the stored z: what is left
            then changes the second term by about that share, times the lower level's condition number. None
            takes all ``inner_steps``, as the paper's double loop does (T steps from the warm start).
        rate: γ of the paper's inner step ``y ← y - γ ∇_y h_σ(x, y)``, 1 / (L_g + σ L_f) for gradients that are
            Lipschitz with L_g and L_f. None (the default) solves by L-BFGS, which needs no such constants.
        deterministic: the levels do not look at the batch.

    Attributes:
        evaluations: gradients of f or g at most, ``2 (inner_steps + 1) + 3``; line searches may take more.
        lower_gradients: ∇_y of h_σ or g computed so far, in this process.

    Raises:
        TypeError, ValueError: an argument cannot work; σ is so small that the dtype leaves nothing of the
            difference.

    Warns:
        LowerLevelWarning: σ ≤ 1e-3 in less than float64; or going from z to y changes ∇_y f by more than half,
            so that σ is not small against the lower level's curvature, which may be singular. Once each.
        ConvergenceWarning: ``inner_steps`` did not reach the tolerance; the message says by how much. Once.
        NonFiniteWarning: a level is NaN or infinite at a finite x; the answer is then NaN. Once.

    Source: Kwon, Kwon, Wright, Nowak, ICLR 2024, arXiv 2309.01753.

    >>> import torch, optex
    >>> x = torch.nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    >>> source = optex.PenaltyHypergradient(
    ...     lambda x, y, _: ((y - 1) ** 2).sum() / 2,             # f: y should be 1
    ...     lambda x, y, _: ((y - 3 * x) ** 2).sum() / 2,         # g: y follows 3 x
    ...     x, torch.zeros(1, dtype=torch.float64), sigma=1e-3, deterministic=True,
    ... )
    >>> loss, _ = source.gradient(None)
    >>> x.grad                                                    # 3 (3 x - 1) = 15, over 1 + σ
    tensor([14.9850], dtype=torch.float64)
    """

    def __init__(
        self,
        upper: Level,
        lower: Level,
        parameters: Tensor | Sequence[Tensor],
        start: Tensor | Sequence[Tensor],
        *,
        sigma: float = 1e-2,
        inner_steps: int = 500,
        tolerance: float | None = 1e-4,
        rate: float | None = None,
        deterministic: bool = False,
    ) -> None:
        self.sigma: float = check_positive(
            _OWNER, "sigma", sigma, "its bias is of the order of sigma: try 1e-2"
        )
        self.inner_steps: int = check_integer(_OWNER, "inner_steps", inner_steps)
        self.tolerance: float | None = (
            None if tolerance is None else check_positive(_OWNER, "tolerance", tolerance, "try 1e-4")
        )
        self.rate: float | None = (
            None if rate is None else check_positive(_OWNER, "rate", rate, "take 1 / (L_g + sigma L_f)")
        )
        self.deterministic: bool = check_flag(_OWNER, "deterministic", deterministic)
        self.levels: Levels = Levels(_OWNER, upper, lower, parameters, start, self.sigma)
        self.evaluations: float = 2.0 * (self.inner_steps + 1) + 3
        self.lower_gradients: int = 0
        # [d] each; changed in place by accept alone
        self._y, self._z = self.levels.start(), self.levels.start()
        self._said: set[str] = set()
        self._last: tuple[list[Tensor], Tensor, Tensor] | None = None

    # ------------------------------------------------------------------ answers

    def gradient(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        x = self.levels.read()
        found = self._solved(x, batch)
        loss, _, gradients = self.levels.penalty(x, found.y, found.z, batch)
        self._check_values(x, loss, gradients)
        if self.deterministic and bool(loss.isfinite()):
            self._last = (x, found.y, found.z)
        for parameter, gradient in zip(self.levels.parameters, gradients, strict=True):
            parameter.grad = gradient
        return loss, None

    def solve(self, batch: Any = None) -> LowerLevels:
        """Both lower levels at the parameters' present values, from the stored pair, which stays as it is."""
        x = self.levels.read()
        found = self._solved(x, batch)
        loss, upper, _ = self.levels.penalty(x, found.y, found.z, batch)
        form = self.levels.form
        return LowerLevels(form(found.y), form(found.z), float(loss), float(upper), *found.residuals)

    # ------------------------------------------------------------------ warm starts

    def accept(self, batch: Any = None) -> None:
        """Make the solutions at the parameters' present values the start of all answers from here on.

        Call it between rounds, never while answers are being computed. They are solved for, from the old pair,
        unless a deterministic source has just answered here.

        Raises:
            NonFiniteError: there are none at these values; the pair stays as it was.
        """
        x, last = self.levels.read(), self._last
        if last is not None and all(torch.equal(a, b) for a, b in zip(x, last[0], strict=True)):
            _, y, z = last
        else:
            found = self._solved(x, batch)
            y, z = found.y, found.z
        if not bool(y.isfinite().all() and z.isfinite().all()):
            raise NonFiniteError(
                f"{_OWNER}: the lower level has no finite solution at the present parameters; the stored pair "
                "is unchanged. Lower the outer learning rate, or start elsewhere."
            )
        self._last = None
        self._y.copy_(y)
        self._z.copy_(z)

    def state_dict(self) -> dict[str, Tensor]:
        """The stored pair, which a resumed run needs."""
        return {"y": self._y.clone(), "z": self._z.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put a stored pair back.

        Raises:
            ValueError: it is of another lower level, or not finite; nothing has changed.
        """
        shape = tuple(self._y.shape)
        y, z = (saved_tensor(_OWNER, state, name, shape) for name in ("y", "z"))
        self._last = None
        self._y.copy_(y)
        self._z.copy_(z)

    def replica(self) -> tuple[GradientSource, list[Tensor]]:
        other = copy.copy(self)  # the pair is shared: accept changes it in place for all
        parameters = [p.detach().clone() for p in self.levels.parameters]
        other.levels = self.levels.at(parameters)
        return other, parameters

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}

    # ------------------------------------------------------------------ solving

    def _solved(self, x: list[Tensor], batch: Any) -> _Solved:
        if not all(bool(part.isfinite().all()) for part in x):
            lost = torch.full_like(self._y, math.nan)
            return _Solved(lost, lost, (math.nan, math.nan))  # the caller names such a point
        levels, sigma = self.levels, self.sigma
        with torch.enable_grad():
            _, pull = levels.slope(x, self._z, batch, 1.0, 0.0)
            height, _ = levels.slope(x, self._z, batch, 0.0, 1.0)
            goal = self._goal(pull, height)
            z = self._descend(lambda v: levels.slope(x, v, batch, 0.0, 1.0), self._z, goal)
            y = self._descend(lambda v: levels.slope(x, v, batch, sigma, 1.0), self._y, goal)
            if self._reached((y, z), goal):
                self._check_shift(x, y.point, z.point, batch)
        self.lower_gradients += y.calls + z.calls
        return _Solved(y.point, z.point, (y.residual, z.residual))

    def _goal(
        self,
        pull: Tensor,  # [d] ∇_y f
        height: Tensor,  # [] g
    ) -> float:
        """At z, ∇_y h_σ is σ ∇_y f: that is what there is to be resolved, down to rounding."""
        if self.tolerance is None:
            return 0.0
        rounding = torch.finfo(pull.dtype).eps ** 0.75 * max(1.0, abs(float(height)))
        return max(self.tolerance * self.sigma * float(torch.linalg.vector_norm(pull)), rounding)

    def _descend(
        self,
        function: Callable[[Tensor], tuple[Tensor, Tensor]],
        start: Tensor,  # [d]
        goal: float,
    ) -> Found:
        if self.rate is None:
            return limited_memory_bfgs(function, start, goal, self.inner_steps)
        return gradient_descent(function, start, goal, self.inner_steps, self.rate)

    # ------------------------------------------------------------------ what is said

    def _say(self, kind: str, message: str, category: type[Warning]) -> None:
        if kind not in self._said:
            self._said.add(kind)
            warn(f"{_OWNER}: {message}", category)

    def _reached(self, found: tuple[Found, Found], goal: float) -> bool:
        residual = max(one.residual for one in found)
        if not math.isfinite(residual):
            return False
        if self.tolerance is None or residual <= goal:
            return True
        self._say(
            "unsolved",
            f"a lower level was left at a gradient of {residual:.1e} after {found[0].steps} and "
            f"{found[1].steps} steps; tolerance {self.tolerance:g} asks for {goal:.1e}. The second term is "
            f"wrong by {residual / goal * self.tolerance:.1e} of itself, times the lower level's condition "
            "number. Raise inner_steps, sigma or tolerance; add a little ‖y‖² to g if it has no least value.",
            ConvergenceWarning,
        )
        return False

    def _check_shift(
        self,
        x: list[Tensor],
        y: Tensor,  # [d]
        z: Tensor,  # [d]
        batch: Any,
    ) -> None:
        """How far σ bends the upper level: ∇_y f at y against z, which is O(σ) where g has curvature."""
        if "shift" in self._said or not bool(y.isfinite().all() and z.isfinite().all()):
            return
        _, there = self.levels.slope(x, y, batch, 1.0, 0.0)
        _, here = self.levels.slope(x, z, batch, 1.0, 0.0)
        before = float(torch.linalg.vector_norm(here))
        share = float(torch.linalg.vector_norm(there - here)) / before if before > 0 else 0.0
        apart = y - z
        length = float(apart @ apart)
        if share > _SHARE and length > 0:
            curvature = self.sigma * -float(there @ apart) / length
            self._say(
                "shift",
                f"sigma {self.sigma:g} moves the lower level's solution so far that the upper level's gradient "
                f"changes by {share:.0%}; the lower level's curvature along the way is {curvature:.1e}. It is "
                "nearly singular there, or sigma is too large: the hypergradient's bias is of the order of "
                "that share. Lower sigma, or add a little ‖y‖² to g.",
                LowerLevelWarning,
            )

    def _check_values(self, x: list[Tensor], loss: Tensor, gradients: list[Tensor]) -> None:
        if not all(bool(part.isfinite().all()) for part in x):
            return
        if not bool(loss.isfinite()) or not all(bool(part.isfinite().all()) for part in gradients):
            text = "the penalty's loss is" if not bool(loss.isfinite()) else "the hypergradient is"
            self._say(
                "finite",
                f"{text} not finite at finite parameters ({self.levels.blame}); this point counts as lost. "
                "Lower the outer learning rate; or rate, where the inner steps diverge.",
                NonFiniteWarning,
            )


@dataclass(frozen=True)
class _Solved:
    y: Tensor  # [d]
    z: Tensor  # [d]
    residuals: tuple[float, float]


@dataclass(frozen=True)
class LowerLevels:
    """What :meth:`PenaltyHypergradient.solve` found.

    Attributes:
        y, z: minimisers of σ f + g and of g, in the form of ``start``.
        penalty: ψ_σ(x).
        upper: f(x, z), the bilevel problem's value.
        y_residual, z_residual: lengths of the gradients that the solves left.
    """

    y: Any
    z: Any
    penalty: float
    upper: float
    y_residual: float
    z_residual: float
