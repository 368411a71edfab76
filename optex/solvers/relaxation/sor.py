"""Successive over-relaxation, and the ω that is best for it where theory knows one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import torch
from scipy.optimize import OptimizeResult
from scipy.sparse.linalg import LinearOperator, eigsh

from optex.errors import NotPositiveDefiniteError
from optex.solvers.outcome import Status
from optex.solvers.relaxation.progress import Progress
from optex.solvers.relaxation.system import Matrix, check_omega, read_matrix, read_system

__all__ = ["optimal_omega", "sor"]

_DENSE: Final = 300  # up to this n all eigenvalues cost less than Lanczos's iterations


def sor(
    A: Any,
    b: Any,
    omega: float,
    x0: Any = None,
    *,
    tol: float = 1e-8,
    maxiter: int = 10_000,
    callback: Callable[[OptimizeResult], Any] | None = None,
) -> OptimizeResult:
    """Solve A x = b by successive over-relaxation.

        x ← x + (D / ω + L)⁻¹ (b - A x)        until ‖b - A x‖ ≤ tol ‖b‖

    with D the diagonal of A and L what is below it; ω = 1 is Gauss and Seidel's method. It converges for every
    ω in (0, 2) where A is symmetric positive definite (Ostrowski, Reich); how fast depends on ω very much.

    Args:
        A: [n, n], without a zero on its diagonal: SciPy sparse, a NumPy array, or a tensor, dense or sparse. A
            dense tensor on an accelerator stays there; a sparse one is solved in main memory.
        b: [n]. With A it decides the dtype: float32 where both are, else float64.
        omega: ω, in (0, 2).
        x0: [n], where to start; zero by default.
        tol: on the residual, relative to b's norm.
        maxiter: most iterations, at least 1.
        callback: called after every iteration with ``x``, ``residual_norm`` and ``nit``; ends the run by
            returning True or raising ``StopIteration``.

    Returns:
        ``scipy.optimize.OptimizeResult``: ``x`` [n] in b's form (that of the least residual, where the
        tolerance was not reached), ``residual_norm`` of it, ``residual_norms`` of the start and all iterates,
        ``nit``, ``success``, ``status`` (:class:`optex.solvers.Status`; BREAKDOWN where it diverges),
        ``message``.

    Raises:
        TypeError, ValueError: an argument cannot work; the message says why.

    Source: Khodak, Chow, Balcan, Talwalkar, arXiv 2310.02246 (there relative to the first residual, which is b
    where x0 is zero); Young, *Iterative Solution of Large Linear Systems*, 1971.

    >>> import numpy as np
    >>> A = np.array([[4.0, -1.0, 0.0], [-1.0, 4.0, -1.0], [0.0, -1.0, 4.0]])
    >>> result = sor(A, A @ np.ones(3), 1.05)
    >>> result.success, result.nit, result.x.round(6).tolist()
    (True, 7, [1.0, 1.0, 1.0])
    """
    omega = check_omega("sor", omega)
    system = read_system("sor", A, b, x0)
    progress = Progress("sor", system, tol, maxiter, callback)
    if progress.trivial:
        return progress.zero()
    matrix, right, x = system.matrix, system.right, system.start
    solve, product, norm = matrix.triangle(omega).solve, matrix.product, matrix.norm
    with np.errstate(over="ignore", invalid="ignore"):  # a diverging run overflows, and says so by its status
        residual = right - product(x)
        while (status := progress.ended(x, norm(residual))) is None:
            x = x + solve(residual)
            residual = right - product(x)
    diverged = "The residual grows without bound: relaxation with this omega does not converge for this A."
    return progress.result(status, diverged * (status == Status.BREAKDOWN))


def optimal_omega(A: Any) -> float:
    """The ω with which SOR converges fastest, if A is consistently ordered, as the Laplacian of a grid is.

        ω* = 2 / (1 + √(1 - β²)) = 1 + (β / (1 + √(1 - β²)))²,     β = ρ(I - D⁻¹ A)

    For other symmetric matrices it is a guess. β takes many products with A: for one system this costs more
    than it saves.

    Args:
        A: [n, n], symmetric, with a positive diagonal; as ``sor`` takes it.

    Raises:
        TypeError, ValueError: as ``sor``; or A is not symmetric.
        NotPositiveDefiniteError: the diagonal is not positive, or β ≥ 1, where the formula has no meaning.

    Source: Young, *Iterative Methods for Solving Partial Difference Equations of Elliptic Type*, 1954.

    >>> import numpy as np
    >>> A = 2 * np.eye(9) - np.eye(9, k=1) - np.eye(9, k=-1)
    >>> bool(abs(optimal_omega(A) - 2 / (1 + np.sin(np.pi / 10))) < 1e-12)
    True
    """
    radius = _jacobi_radius(read_matrix("optimal_omega", A, symmetric=True))
    if not radius < 1:
        raise NotPositiveDefiniteError(
            f"optimal_omega: Jacobi's iteration has spectral radius {radius:.6g}, not below 1, so that the "
            "formula has no meaning; A is not positive definite, or not consistently ordered"
        )
    return 2 / (1 + math.sqrt(1 - radius**2))


def _jacobi_radius(matrix: Matrix) -> float:
    """ρ(I - D⁻¹ A), by the symmetric matrix I - D^-½ A D^-½, which has the same eigenvalues."""
    size = matrix.size
    scale = torch.as_tensor(matrix.diagonal).double().cpu().numpy() ** -0.5  # [n]

    def product(v: np.ndarray) -> np.ndarray:  # [n] to [n]
        like = torch.as_tensor(matrix.diagonal)
        given = torch.as_tensor(scale * v.ravel()).to(like)
        image = matrix.product(given if isinstance(matrix.diagonal, torch.Tensor) else given.numpy())
        return v.ravel() - scale * torch.as_tensor(image).double().cpu().numpy()

    if size <= _DENSE:
        dense = np.stack([product(row) for row in np.eye(size)])
        return float(abs(np.linalg.eigvalsh((dense + dense.T) / 2)).max())
    make: Any = LinearOperator  # SciPy's types have the arguments of its subclasses
    operator = make((size, size), matvec=product, dtype=np.float64)
    start = np.random.default_rng(0).normal(size=size)
    return float(abs(eigsh(operator, k=1, which="LM", v0=start, return_eigenvectors=False)[0]))
