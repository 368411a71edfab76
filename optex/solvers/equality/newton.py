"""The iteration: a Newton direction of the Lagrangian, a line search on the exact augmented Lagrangian."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from scipy.optimize import OptimizeResult

from optex.errors import RankDeficientError
from optex.solvers.equality.derivatives import OWNER, Array, Expansion, Form, Smooth
from optex.solvers.equality.linear import InnerSolve
from optex.solvers.outcome import Status, outcome

__all__ = ["Constants", "Merit", "Newton", "Point"]

# The released code's: the least δ, the largest η₁, the least η₂, and the least eigenvalue with which a reduced
# Hessian counts as positive.
_LEAST_DELTA: Final = 1e-6
_MOST_ETA1: Final = 1e8
_LEAST_ETA2: Final = 1e-8
_CURVED: Final = 1e-6

_LOST: Final = 0.05  # of the Jacobian's least singular value at the start: below, it is losing rank
_HALVINGS: Final = 50
_SLACK: Final = 10  # roundings of the merit that a step may seem to rise by


@dataclass(frozen=True)
class Constants:
    """The paper's letters; ``xi``, ξ_B, bounds the modified Hessian's curvature, ``psi_factor`` is in Ψ."""

    beta: float
    nu: float
    theta: float
    xi: float
    inner_maxiter: int
    psi_factor: float = 20.0


@dataclass(frozen=True)
class Point:
    """A primal-dual point and what is known there.

    Attributes:
        x: [n].
        lam: λ [m].
        f, c: around x.
        gradient: ∇_x L = ∇f + J'λ [n].
        kkt: ‖(∇_x L, c)‖.
    """

    x: Array
    lam: Array
    f: Expansion
    c: Expansion
    gradient: Array = field(init=False)
    kkt: float = field(init=False)

    def __post_init__(self) -> None:
        with np.errstate(all="ignore"):
            gradient = self.f.jacobian[0] + self.c.jacobian.T @ self.lam
            object.__setattr__(self, "gradient", gradient)
            residual = np.concatenate([gradient, self.c.value])
            object.__setattr__(self, "kkt", float(np.linalg.norm(residual)))

    @property
    def violation(self) -> float:
        """‖c‖."""
        return float(np.linalg.norm(self.c.value))

    @property
    def finite(self) -> bool:
        """Whether all that is known is numbers."""
        parts = (self.f.value, self.f.jacobian, self.c.value, self.c.jacobian, self.gradient)
        return all(bool(np.isfinite(part).all()) for part in parts)

    def hessian(self) -> Array:  # [n, n]
        """∇²_xx L, symmetric to the bit."""
        matrix = self.f.curvature(np.ones(1)) + self.c.curvature(self.lam)
        return (matrix + matrix.T) / 2


@dataclass
class Merit:
    """f + λ'c + η₁/2 ‖c‖² + η₂/2 ‖∇_x L‖², the exact augmented Lagrangian (equation 4 of the paper)."""

    eta1: float
    eta2: float

    def value(self, point: Point) -> float:
        c, g = point.c.value, point.gradient
        plain = point.f.value[0] + point.lam @ c
        return float(plain + self.eta1 / 2 * (c @ c) + self.eta2 / 2 * (g @ g))

    def scale(self, point: Point) -> float:
        """The size of the largest term of the merit, which its rounding is relative to."""
        parts = np.concatenate([point.f.value, point.lam * point.c.value, [self.value(point)]])
        return float(np.abs(parts).max())

    def gradient(
        self,
        point: Point,
        hessian: Array,  # ∇²_xx L [n, n]
    ) -> Array:  # [n + m], in x and λ
        # d/dx ½ ‖∇_x L‖² = ∇²_xx L ∇_x L: the Lagrangian's Hessian, not that of f.
        c, J, g = point.c.value, point.c.jacobian, point.gradient
        return np.concatenate([g + self.eta2 * (hessian @ g) + self.eta1 * (J.T @ c), c + self.eta2 * (J @ g)])


@dataclass(frozen=True)
class _System:
    """The Newton system at a point, and the bounds Ψ and Υ of the accuracy condition."""

    matrix: Array  # K [n + m, n + m]
    rhs: Array  # [n + m]
    hessian: Array  # ∇²_xx L [n, n]
    psi: float
    upsilon: float

    @classmethod
    def at(cls, point: Point, hessian: Array, constants: Constants, rounding: float) -> _System:
        """With the Hessian made positive on the null space of J where it is not.

        Raises:
            RankDeficientError: the rows of J are dependent.
        """
        J = point.c.jacobian
        m, n = J.shape
        _, lengths, basis = np.linalg.svd(J)
        if lengths[-1] <= lengths[0] * rounding * max(m, n):
            raise RankDeficientError(_dependent(point, lengths))
        reduced = basis[m:] @ hessian @ basis[m:].T  # [n - m, n - m]
        B = hessian
        if n > m and np.linalg.eigvalsh(reduced)[0] < _CURVED:
            B = hessian + (constants.xi + np.linalg.norm(hessian)) * np.eye(n)
        matrix = np.block([[B, J.T], [J, np.zeros((m, m))]])
        least = min(lengths[-1] ** 2, 1.0) * min(constants.xi, 1.0)
        psi = constants.psi_factor * max(float(np.linalg.norm(B)) ** 2, 1.0) / least
        upsilon = max(float(np.linalg.norm(J)), float(np.linalg.norm(hessian)), 1.0)
        return cls(matrix, -np.concatenate([point.gradient, point.c.value]), hessian, float(psi), upsilon)


def _dependent(point: Point, lengths: Array) -> str:
    J = point.c.jacobian
    empty = [i for i, row in enumerate(J) if not row.any()]
    where = f"constraints {empty} do not change with x there" if empty else "constraints are dependent there"
    return (
        f"{OWNER}: the Jacobian of c does not have full row rank at x = "
        f"{np.array2string(point.x, threshold=6)} (singular values {lengths[0]:.2g} to "
        f"{lengths[-1]:.2g}): {where}; drop constraints that follow from "
        "others, or start elsewhere"
    )


class Newton:
    """A run.

    Attributes:
        point: the last point that was accepted.
        best: the point of least KKT residual.
        steps: the α that were taken.
    """

    point: Point
    best: Point

    def __init__(
        self,
        f: Smooth,
        c: Smooth,
        form: Form,
        solver: type[InnerSolve],
        merit: Merit,
        delta: float,
        constants: Constants,
        random: np.random.Generator,
    ) -> None:
        self._f, self._c, self._form = f, c, form
        self._solver, self._random = solver, random
        self._merit, self._delta, self._constants = merit, delta, constants
        self._inner = 0
        self.steps: list[float] = []

    def expand(
        self,
        x: Array,  # [n]
        lam: Array | None,  # [m]
    ) -> Point:
        """The point with all that is known there; λ = 0 where there is none."""
        f, c = self._f.at(x), self._c.at(x)
        return Point(x, np.zeros(c.value.size) if lam is None else lam, f, c)

    def run(
        self,
        start: Point,
        tol: float,
        maxiter: int,
        stops: Callable[[OptimizeResult], bool],
    ) -> OptimizeResult:
        """Steps until the KKT residual is within ``tol``, or something else ends them."""
        self._start = self.point = self.best = self._nearest = start
        self._tol = tol
        while self.point.kkt > tol:
            if len(self.steps) == maxiter:
                return self._ended(Status.LIMIT)
            try:
                ended = self._step()
            except RankDeficientError as error:
                if not self.steps:
                    raise
                ended = (Status.BREAKDOWN, str(error))
            if ended is not None:
                return self._ended(*ended)
            if stops(self.result(Status.LIMIT, "The run has not ended.")):
                return self._ended(Status.STOPPED)
        return self._ended(Status.CONVERGED)

    def _step(self) -> tuple[Status, str] | None:
        """One outer iteration; why the run ends, if it does."""
        hessian = self.point.hessian()
        if not np.isfinite(hessian).all():
            return (
                Status.NON_FINITE,
                "A second derivative was NaN or infinite; x is the best iterate.",
            )
        system = _System.at(self.point, hessian, self._constants, self._form.rounding)
        direction, slope = self._direction(system)
        if not slope < 0:
            return Status.BREAKDOWN, (
                "No direction of descent was found, however the penalties were chosen; x is the best iterate. "
                "linear_solver='direct' has the most accurate directions."
            )
        return self._search(direction, slope)

    def _direction(self, system: _System) -> tuple[Array, float]:  # [n + m]
        """Inexact and accurate enough to descend, penalties raised for it; and the merit's slope along it."""
        constants, merit = self._constants, self._merit
        length, solve = float(np.linalg.norm(system.rhs)), self._solver(system.matrix, system.rhs, self._random)
        bound = float(np.linalg.norm(system.matrix)) * system.psi
        self._sharpen(self._delta, system)
        while True:
            solve.reach(constants.theta * self._delta * length / bound, constants.inner_maxiter)
            slope = float(merit.gradient(self.point, system.hessian) @ solve.direction)
            enough = slope <= -merit.eta2 / 2 * length**2
            if enough or merit.eta1 > _MOST_ETA1 or merit.eta2 < _LEAST_ETA2:
                self._inner += solve.iterations
                return solve.direction, slope
            merit.eta1 *= constants.nu**2
            merit.eta2 /= constants.nu
            self._sharpen(self._delta / constants.nu**4, system)

    def _sharpen(self, delta: float, system: _System) -> None:
        merit = self._merit
        sizes = (1 + merit.eta1 + merit.eta2) * system.upsilon**2 * system.psi**2
        self._delta = max(min(delta, (0.5 - self._constants.beta) * merit.eta2 / sizes), _LEAST_DELTA)

    def _search(
        self,
        direction: Array,  # [n + m]
        slope: float,
    ) -> tuple[Status, str] | None:
        """Armijo's rule: halve until the merit has fallen by β times what the slope promises."""
        here, n = self.point, self.point.x.size
        before = self._merit.value(here)
        # Close to a solution the merit's fall is beneath its rounding.
        slack = _SLACK * self._form.rounding * self._merit.scale(here)
        alpha, there = 1.0, here
        for _ in range(_HALVINGS):
            there = self.expand(here.x + alpha * direction[:n], here.lam + alpha * direction[n:])
            bound = before + alpha * self._constants.beta * slope + slack
            if there.finite and self._merit.value(there) <= bound:
                self.point = there
                self.best = min(self.best, there, key=lambda point: point.kkt)
                self._nearest = min(self._nearest, there, key=lambda point: point.violation)
                self.steps.append(alpha)
                return None
            alpha /= 2
        return (Status.STALLED if there.finite else Status.NON_FINITE), ""

    def _ended(self, status: Status, message: str = "") -> OptimizeResult:
        if status in (Status.STALLED, Status.BREAKDOWN) and (text := self._infeasible()):
            self.point = self._nearest
            return self.result(Status.STALLED, text)
        if status not in (Status.CONVERGED, Status.STOPPED):
            self.point = self.best
        return self.result(status, message)

    def _infeasible(self) -> str:
        """What to say if the run ended since the constraints seem to have no solution; else nothing."""
        # Where ‖c‖ has a least value that is not 0 the rows of J are dependent, and the iterates get stuck near
        # such points: there J' c is small, or a step along the constraints is very long.
        first, last = (np.linalg.svd(at.c.jacobian)[1][-1] for at in (self._start, self.point))
        if self.point.violation <= self._tol or last > _LOST * first:
            return ""
        return (
            f"The constraints seem infeasible: no x was found with ‖c‖ below {self._nearest.violation:.3g}, "
            f"and the least singular value of their Jacobian fell from {first:.2g} to {last:.2g}; x is the "
            "iterate where ‖c‖ is least. Start elsewhere, or drop constraints that contradict each other."
        )

    def result(self, status: Status, message: str = "") -> OptimizeResult:
        """What stopping now would give."""
        point, form = self.point, self._form
        gradient: Any = form.present(point.f.jacobian[0])
        return outcome(
            form.present(point.x),
            status,
            nit=len(self.steps),
            message=message,
            fun=float(point.f.value[0]),
            jac=gradient,
            lam=form.multipliers(point.lam),
            constr=form.multipliers(point.c.value),
            constr_violation=float(np.abs(point.c.value).max()),
            kkt=point.kkt,
            step=self.steps[-1] if self.steps else None,
            inner_nit=self._inner,
            eta1=self._merit.eta1,
            eta2=self._merit.eta2,
            delta=self._delta,
            nfev=self._f.calls,
            ncev=self._c.calls,
            nhev=self._f.curvatures,
        )
