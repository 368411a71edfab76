"""What SOR and CG have in common: when to stop, the best iterate, and the result."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import torch
from scipy.optimize import OptimizeResult

from optex.callback import stops_by_result
from optex.checks import check_callable, check_integer
from optex.small import Array
from optex.solvers.outcome import Status, check_tolerance, outcome
from optex.solvers.relaxation.system import System

__all__ = ["Progress"]

# Iterations without a lower residual, at the level of rounding, after which nothing more is to be had.
_PATIENCE: Final = 100


class Progress:
    """Residual norms of a run, and why it ends.

    Args:
        owner: the function, for messages.
        system: what is solved.
        tol: on ‖b - A x‖ / ‖b‖.
        maxiter: most iterations.
        callback: as ``sor`` says.

    Attributes:
        goal: the residual's norm to reach.
        norms: of the residuals so far, the start's first.
    """

    def __init__(self, owner: str, system: System, tol: Any, maxiter: Any, callback: Any) -> None:
        check_callable(owner, "callback", callback, optional=True)
        self._system = system
        self._callback: Callable[[OptimizeResult], Any] | None = callback
        self._limit = check_integer(owner, "maxiter", maxiter)
        tolerance = check_tolerance(owner, tol, system.dtype)
        self._scale = system.matrix.norm(system.right)
        if not math.isfinite(self._scale):
            raise ValueError(f"{owner}: the norm of b overflows; scale the system")
        self.goal: float = tolerance * self._scale
        self._epsilon = torch.finfo(system.dtype).eps
        self._best, self._best_norm, self._best_at = system.start, math.inf, 0
        self._ceiling = self._scale / self._epsilon
        self.norms: list[float] = []

    @property
    def trivial(self) -> bool:
        """b = 0, which x = 0 solves."""
        return self._scale == 0

    def ended(
        self,
        x: Array,  # [n]
        norm: float,  # ‖b - A x‖
    ) -> Status | None:
        """Record an iterate, beginning with the start; returns why to stop here, or None."""
        # In the order of what is likely: on small systems this takes as long as the arithmetic.
        taken = len(self.norms)
        self.norms.append(norm)
        if norm < self._best_norm:
            self._best, self._best_norm, self._best_at = x, norm, taken
            if norm <= self.goal:
                return Status.CONVERGED
            if taken == 0:
                self._ceiling = max(self._scale, norm) / self._epsilon
        elif not norm <= self._ceiling:
            return Status.BREAKDOWN if math.isfinite(norm) else Status.NON_FINITE
        elif taken - self._best_at >= _PATIENCE and self._at_rounding(x, norm):
            return Status.STALLED
        if self._callback is not None and taken and self._stopped(x, norm, taken):
            return Status.STOPPED
        return Status.LIMIT if taken >= self._limit else None

    def result(self, status: Status, message: str = "") -> OptimizeResult:
        """The run's result: the best iterate, with its residual computed anew."""
        matrix, right = self._system.matrix, self._system.right
        return outcome(
            self._system.present(self._best),
            status,
            nit=len(self.norms) - 1,
            message=message,
            residual_norm=matrix.norm(right - matrix.product(self._best)),
            residual_norms=self.norms,
        )

    def zero(self) -> OptimizeResult:
        """The result for b = 0."""
        self._best, self.norms = 0 * self._system.right, [0.0]
        return self.result(Status.CONVERGED, "b is zero, and so is x.")

    def _at_rounding(self, x: Array, norm: float) -> bool:
        # What b - A x is known to, where A x has entries much larger than b has: about ε ‖A‖ ‖x‖.
        matrix = self._system.matrix
        return norm <= 1e3 * self._epsilon * (self._scale + matrix.norm(matrix.diagonal * x))

    def _stopped(self, x: Array, norm: float, taken: int) -> bool:
        assert self._callback is not None
        now = OptimizeResult(x=self._system.present(x), residual_norm=norm, nit=taken)
        return stops_by_result(self._callback, now)
