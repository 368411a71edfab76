"""Maximising a dual of one problem: L-BFGS-B, and Newton's method where only rounding stops it."""

from __future__ import annotations

from typing import Final, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import LinAlgError, solve
from scipy.optimize import minimize
from torch import Tensor

from optex.solvers.outcome import Status
from optex.solvers.transport.projection import Evaluated, dual, semi_dual

__all__ = ["Ascent", "Maximum"]

_CORRECTIONS: Final = 10  # pairs that L-BFGS-B keeps, SciPy's default
_RESTARTS: Final = 1  # at a kink its pairs are worthless, and new ones may go on
_FLAT: Final = float(np.finfo(float).eps)  # of the value: no progress
_NEWTON: Final = 20
_NEAR: Final = 1e-2  # of the largest mass: errors beneath which supports are worth a Newton step
_DENSE: Final = 2000  # potentials for which Newton's matrix is written down
_RIDGE: Final = 1e-12  # of its largest diagonal: constants, and sources nobody uses, have no curvature

Array = NDArray[np.float64]


class Maximum(NamedTuple):
    """Where it ended.

    Attributes:
        alpha: [m]
        found: the dual at these.
        status: CONVERGED, STALLED or LIMIT.
        nit, nfev: iterations, and evaluations of the dual.
    """

    alpha: Tensor
    found: Evaluated
    status: Status
    nit: int
    nfev: int


class Ascent:
    """One problem's dual over its potentials: α in the semi-dual, α and β in the dual."""

    def __init__(
        self,
        a: Tensor,  # [m]
        b: Tensor,  # [n]
        costs: Tensor,  # [n, m]
        gamma: float,
        k: int,
        form: Literal["semi-dual", "dual"],
    ) -> None:
        # Where to stop, and the first step, are then the same in any unit of the costs.
        self._scale = float(costs.abs().max()) or gamma
        self._costs, self._gamma = costs / self._scale, gamma / self._scale
        self._a, self._b, self._k = a, b, k
        self._both = form == "dual"
        self._masses = (torch.cat([a, b]) if self._both else a).cpu().numpy()
        self._nfev = 0

    def maximum(
        self,
        alpha: Tensor,  # [m]
        tol: float,
        maxiter: int,
    ) -> Maximum:
        """Until no mass is wrong by more than ``tol`` of the largest."""
        point, goal, nit = self._start(alpha / self._scale), tol * float(self._masses.max()), 0
        best, status = -np.inf, Status.STALLED
        for _ in range(_RESTARTS + 1):
            # A value's error is of second order in that of its gradient; Newton's steps do the rest.
            limits = {
                "gtol": goal,
                "ftol": max(tol**2, _FLAT),
                "maxiter": maxiter - nit,
                "maxfun": 100 * maxiter,
            }
            found = minimize(
                self._negative, point, jac=True, method="L-BFGS-B", options=limits | {"maxcor": _CORRECTIONS}
            )
            point, nit = found.x, nit + found.nit
            if nit < maxiter:
                point, steps = self._newton(point, goal, min(_NEWTON, maxiter - nit))
                nit += steps
            loss, slope = self._negative(point)
            if np.abs(slope).max() <= goal:
                status = Status.CONVERGED
                break
            if nit >= maxiter:
                status = Status.LIMIT
                break
            if -loss - best <= _FLAT * abs(loss):
                break
            best = -loss
        value, plan, beta = self._at(point)
        found = Evaluated(self._scale * value, plan, self._scale * beta)
        return Maximum(self._scale * self._split(point)[0], found, status, nit, self._nfev)

    def _start(self, alpha: Tensor) -> Array:
        if not self._both:
            return alpha.cpu().numpy()
        beta = semi_dual(alpha, self._a, self._b, self._costs, self._gamma, self._k).beta
        return torch.cat([alpha, beta]).cpu().numpy()

    def _split(self, point: Array) -> tuple[Tensor, Tensor]:  # [m], [n] or []
        potentials = torch.from_numpy(point.copy()).to(self._costs)
        return potentials[: len(self._a)], potentials[len(self._a) :]

    def _at(self, point: Array) -> Evaluated:
        alpha, beta = self._split(point)
        self._nfev += 1
        if self._both:
            return dual(alpha, beta, self._a, self._b, self._costs, self._gamma, self._k)
        return semi_dual(alpha, self._a, self._b, self._costs, self._gamma, self._k)

    def _slope(self, found: Evaluated) -> Array:
        """The plan's mass at each source (and target), less the mass given: the negative gradient."""
        moved = found.plan.sum(0)
        if self._both:
            moved = torch.cat([moved, found.plan.sum(1)])
        return moved.cpu().numpy() - self._masses

    def _negative(self, point: Array) -> tuple[float, Array]:
        found = self._at(point)
        return -float(found.value), self._slope(found)

    def _newton(self, point: Array, goal: float, most: int) -> tuple[Array, int]:
        """Newton steps while each halves the error; the gradient is piecewise linear, so few are needed."""
        found = self._at(point)
        slope, taken = self._slope(found), 0
        error = np.abs(slope).max()
        if len(point) > _DENSE or error > _NEAR * self._masses.max():
            return point, 0
        while error > goal and taken < most:
            curvature = self._curvature(found.plan.cpu().numpy() > 0)
            curvature[np.diag_indices_from(curvature)] += _RIDGE * curvature.max()
            try:
                trial = point - solve(curvature, slope, assume_a="pos")
            except LinAlgError:
                break
            ahead = self._at(trial)
            further = self._slope(ahead)
            if not np.abs(further).max() <= error / 2:
                break
            point, found, slope, taken = trial, ahead, further, taken + 1
            error = np.abs(slope).max()
        return point, taken

    def _curvature(
        self,
        support: NDArray[np.bool_],  # [n, m]
    ) -> Array:  # [m, m] or [m + n, m + n]
        """Minus the Hessian on the piece that has this support."""
        used = support.astype(float)
        counts = used.sum(1)
        if self._both:
            corner = np.diag(counts)
            return np.block([[np.diag(used.sum(0)), used.T], [used, corner]]) / self._gamma
        shares = used / np.maximum(counts, 1)[:, None]
        return (np.diag(used.sum(0)) - used.T @ shares) / self._gamma
