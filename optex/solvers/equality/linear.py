"""Inner solvers: directions from K d = r to an accuracy that may be sharpened on the way."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Final, Literal, get_args

import numpy as np
from scipy.sparse.linalg import minres

from optex.checks import shown
from optex.solvers.equality.derivatives import OWNER, Array

__all__ = ["SOLVERS", "InnerSolve", "LinearSolver", "check_solver"]

LinearSolver = Literal["minres", "direct", "gv", "rk"]

_BLOCK: Final = 64  # sketches drawn at a time


class InnerSolve(ABC):
    """An approximate solution of K d = r, K symmetric and regular, which can be made more accurate.

    Args:
        matrix: K [N, N].
        rhs: r [N].
        random: of the sketches.

    Attributes:
        direction: d [N].
        residual: r - K d [N].
        iterations: taken so far.
    """

    def __init__(self, matrix: Array, rhs: Array, random: np.random.Generator) -> None:
        self.matrix: Array = matrix
        self.rhs: Array = rhs
        self.random: np.random.Generator = random
        self.direction: Array = np.zeros_like(rhs)
        self.residual: Array = rhs.copy()
        self.iterations: int = 0

    def reach(self, target: float, most: int) -> None:
        """Go on until ‖r - K d‖ ≤ target, for ``most`` iterations at most, or until rounding ends it."""
        self.iterations += self._iterate(target, most)

    @abstractmethod
    def _iterate(self, target: float, most: int) -> int:
        """As ``reach``; returns the iterations taken."""

    def _correct(
        self,
        step: Array,  # [N]
    ) -> bool:
        """Take the step if it leaves less than half of the residual."""
        residual = self.rhs - self.matrix @ (self.direction + step)
        less = bool(_norm(residual) < 0.5 * _norm(self.residual))
        if less:
            self.direction, self.residual = self.direction + step, residual
        return less

    def _measure(self) -> None:
        """Compute r - K d anew: a residual that is updated step by step drifts from it by rounding."""
        self.residual = self.rhs - self.matrix @ self.direction


class Minres(InnerSolve):
    """SciPy's MINRES, begun anew on what is left until the true residual is small enough."""

    def _iterate(self, target: float, most: int) -> int:
        taken = 0

        def count(_: Array) -> None:
            nonlocal taken
            taken += 1

        while _norm(self.residual) > target and taken < most:
            # SciPy measures against ‖K‖ ‖d‖ + ‖r‖, of which ‖r‖ is never the larger part by much: a smaller
            # tolerance costs a few iterations, a larger one another start.
            relative = max(0.1 * target / _norm(self.residual), 1e-15)
            limit = min(5 * self.rhs.size, most - taken)
            step, _ = minres(self.matrix, self.residual, rtol=relative, maxiter=limit, callback=count)
            if not self._correct(step):
                break
        return taken


class Direct(InnerSolve):
    """LAPACK's factorisation, and steps of refinement."""

    def _iterate(self, target: float, most: int) -> int:
        taken = 0
        while taken < min(most, 3) and _norm(self.residual) > target:
            taken += 1
            try:
                step: Array = np.linalg.solve(self.matrix, self.residual).astype(np.float64, copy=False)
            except np.linalg.LinAlgError:
                break
            if not self._correct(step):
                break
        return taken


class GaussianVector(InnerSolve):
    """d ← d + K s (s'ρ) / ‖K s‖² with ρ the residual and s ~ N(0, I)."""

    def _iterate(self, target: float, most: int) -> int:
        taken = 0
        while taken < most and _norm(self.residual) > target:
            direction, residual = self.direction, self.residual  # changed in place
            sketches = self.random.standard_normal((min(_BLOCK, most - taken), self.rhs.size))
            rows = sketches @ self.matrix  # K s for each
            changes = rows @ self.matrix
            lengths = np.square(rows).sum(1)
            for sketch, row, change, length in zip(sketches, rows, changes, lengths, strict=True):
                factor = (sketch @ residual) / length
                direction += factor * row
                residual -= factor * change
                taken += 1
                if _norm(residual) <= target:
                    break
            self._measure()
        return taken


class Kaczmarz(InnerSolve):
    """d ← d + a_i ρ_i / ‖a_i‖² with a_i a row of K, each as likely as the others."""

    def _iterate(self, target: float, most: int) -> int:
        gram, taken = self.matrix @ self.matrix, 0
        lengths = np.diag(gram).copy()
        while taken < most and _norm(self.residual) > target:
            direction, residual = self.direction, self.residual  # changed in place
            chosen = self.random.integers(self.rhs.size, size=min(_BLOCK, most - taken))
            for i in chosen.tolist():
                factor = residual[i] / lengths[i]
                direction += factor * self.matrix[i]
                residual -= factor * gram[i]
                taken += 1
                if _norm(residual) <= target:
                    break
            self._measure()
        return taken


def _norm(vector: Array) -> float:
    return float(np.sqrt(vector @ vector))


SOLVERS: Final[dict[str, type[InnerSolve]]] = {
    "minres": Minres,
    "direct": Direct,
    "gv": GaussianVector,
    "rk": Kaczmarz,
}
assert tuple(SOLVERS) == get_args(LinearSolver)


def check_solver(name: object) -> type[InnerSolve]:
    """The inner solver of this name.

    Raises:
        ValueError: there is no solver of that name.
    """
    if not isinstance(name, str) or name not in SOLVERS:
        raise ValueError(
            f"{OWNER}: linear_solver must be one of {', '.join(map(repr, SOLVERS))}, got {shown(name)}"
        )
    return SOLVERS[name]
