"""Conjugate gradients with the symmetric relaxation as their preconditioner."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.optimize import OptimizeResult

from optex.errors import NotPositiveDefiniteError
from optex.small import Array
from optex.solvers.outcome import Status
from optex.solvers.relaxation.progress import Progress
from optex.solvers.relaxation.system import System, check_omega, read_system

__all__ = ["ssor_pcg"]


def ssor_pcg(
    A: Any,
    b: Any,
    omega: float = 1.0,
    x0: Any = None,
    *,
    tol: float = 1e-8,
    maxiter: int = 10_000,
    callback: Callable[[OptimizeResult], Any] | None = None,
) -> OptimizeResult:
    """Solve A x = b, A symmetric positive definite, by conjugate gradients with the SSOR preconditioner.

        P = (D + ω L) D⁻¹ (D + ω L)ᵀ / (ω (2 - ω))        until ‖b - A x‖ ≤ tol ‖b‖

    with D the diagonal of A and L what is below it. ω matters less than it does for ``sor``.

    Args:
        A: [n, n], symmetric, with a positive diagonal; SciPy sparse, a NumPy array, or a tensor, dense or
            sparse. A dense tensor on an accelerator stays there; a sparse one is solved in main memory.
        b: [n]. With A it decides the dtype: float32 where both are, else float64.
        omega: ω, in (0, 2).
        x0: [n], where to start; zero by default.
        tol: on the residual, relative to b's norm; before a run ends by it, b - A x itself is computed.
        maxiter: most iterations, at least 1.
        callback: as of ``sor``.

    Returns:
        ``scipy.optimize.OptimizeResult``, as of ``sor``; STALLED where rounding leaves nothing to gain.

    Raises:
        TypeError, ValueError: an argument cannot work; the message says why.
        NotPositiveDefiniteError: A is not positive definite: its diagonal is not, or a direction p with p·A p ≤
            0 was met.

    Source: Khodak, Chow, Balcan, Talwalkar, arXiv 2310.02246; Axelsson, *A class of iterative methods for
    finite element equations*, 1976.

    >>> import numpy as np
    >>> A = 2 * np.eye(50) - np.eye(50, k=1) - np.eye(50, k=-1)
    >>> result = ssor_pcg(A, np.ones(50), 1.8)
    >>> result.success, result.nit < 30
    (True, True)
    """
    omega = check_omega("ssor_pcg", omega)
    system = read_system("ssor_pcg", A, b, x0, symmetric=True)
    progress = Progress("ssor_pcg", system, tol, maxiter, callback)
    if progress.trivial:
        return progress.zero()
    with np.errstate(over="ignore", invalid="ignore"):
        return progress.result(_iterate(system, progress, _preconditioner(system, omega)))


def _preconditioner(system: System, omega: float) -> Callable[[Array], Array]:
    """r [n] to P⁻¹ r."""
    # With T = D/ω + L, D + ω L is ω T, so that P⁻¹ = (2 - ω)/ω · T⁻ᵀ D T⁻¹.
    triangle = system.matrix.triangle(omega)
    weight = system.matrix.diagonal * ((2 - omega) / omega)
    return lambda r: triangle.solve_transposed(weight * triangle.solve(r))


def _iterate(system: System, progress: Progress, precondition: Callable[[Array], Array]) -> Status:
    matrix, right, x = system.matrix, system.right, system.start
    residual = right - matrix.product(x)
    if (status := progress.ended(x, matrix.norm(residual))) is not None:
        return status
    direction, energy = 0 * x, 1.0
    carried_on = False
    while True:
        conditioned = precondition(residual)
        before, energy = energy, float(residual @ conditioned)
        direction = conditioned + (energy / before) * direction if carried_on else conditioned
        image = matrix.product(direction)
        curvature = float(direction @ image)
        if energy == 0:  # a product of residuals so small that nothing is left of it
            return Status.BREAKDOWN
        if curvature <= 0:
            raise NotPositiveDefiniteError(
                f"ssor_pcg: A must be positive definite, but p·A p = {curvature:.3g} along a direction p, in "
                f"iteration {len(progress.norms)}; use a solver for indefinite matrices, such as "
                "scipy.sparse.linalg.minres"
            )
        x = x + (energy / curvature) * direction
        residual = residual - (energy / curvature) * image
        carried_on = True
        norm = matrix.norm(residual)
        if norm <= progress.goal:
            # The residual that is carried along drifts from b - A x by rounding.
            residual = right - matrix.product(x)
            norm = matrix.norm(residual)
            carried_on = False  # where it is not there yet, begin anew from the measured residual
        if (status := progress.ended(x, norm)) is not None:
            return status
