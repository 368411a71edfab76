"""Algebra of the size of a history: T0 × T0 systems in float64.

Arrays in main memory are computed by NumPy and LAPACK, whose calls take a fifth of the time of torch's; tensors
on an accelerator stay there, in torch. The functions here, and code written with them and with operators, take
both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from functools import cache
from typing import Any, Final, TypeVar

import numpy as np
import torch
from scipy.linalg import get_lapack_funcs
from threadpoolctl import ThreadpoolController
from torch import Tensor

from optex.errors import ConvergenceWarning, JitterWarning, NotPositiveDefiniteError, warn

__all__ = [
    "TINY",
    "Array",
    "array",
    "cholesky_inverse",
    "cholesky_solve",
    "concatenate",
    "copy",
    "conjugate_gradients",
    "eigh",
    "exp",
    "eye",
    "full",
    "jitter_unsaid",
    "jittered_cholesky",
    "maximum",
    "nonnegative",
    "plus_diagonal",
    "one_thread",
    "select",
    "sqrt",
    "squared_distances",
    "tensor",
    "tensors",
    "where",
]

Array = Any  # np.ndarray or torch.Tensor, float64
TINY: Final = float(np.finfo(np.float64).tiny)
JITTERS: Final = (1e-10, 1e-8, 1e-6, 1e-4, 1e-2)
Answer = TypeVar("Answer")
_potrf, _potrs = get_lapack_funcs(("potrf", "potrs"), dtype=np.float64)
_TENSORS: ContextVar[bool] = ContextVar("tensors", default=False)
_UNSAID: ContextVar[bool] = ContextVar("jitter_unsaid", default=False)


def jitter_unsaid(function: Callable[[], Answer]) -> Answer:
    """Call the function without warnings of jitter: for models that are judged by how they predict."""

    def quietly() -> Answer:
        _UNSAID.set(True)
        return function()

    return copy_context().run(quietly)  # a copy, so that the setting ends with the call


@cache
def _pools() -> tuple[Any, ...]:
    """The thread pools of NumPy's and SciPy's BLAS; found once, as looking for them takes milliseconds."""
    return tuple(pool for pool in ThreadpoolController().lib_controllers if pool.user_api == "blas")


@contextmanager
def one_thread() -> Iterator[None]:
    """Solve small systems on one thread, whatever the user's setting.

    A second thread gains nothing on T0 × T0 matrices, and where another program holds its core every one of the
    many small products waits for it: rounds have been seen to take ten times as long. The setting is restored
    afterwards; a thread of the user's that computes meanwhile may be held to one thread, too.
    """
    many = [(pool, threads) for pool in _pools() if (threads := pool.num_threads) and threads != 1]
    try:
        for pool, _ in many:
            pool.set_num_threads(1)
        yield
    finally:
        for pool, threads in many:
            pool.set_num_threads(threads)


@contextmanager
def tensors() -> Iterator[None]:
    """Compute in torch in main memory, too, as on an accelerator and under ``torch.compile``."""
    token = _TENSORS.set(True)
    try:
        yield
    finally:
        _TENSORS.reset(token)


# ------------------------------------------------------------------ arrays and tensors


def array(
    values: Tensor,  # [...]
) -> Array:  # [...]
    """The tensor as a NumPy array that shares its memory; the tensor itself where it is on an accelerator."""
    if values.device.type != "cpu" or torch.compiler.is_compiling() or _TENSORS.get():
        return values  # a context variable cannot be read in what torch compiles
    return values.numpy()


def tensor(values: Array) -> Tensor:
    """The array as a tensor that shares its memory; a tensor passes through."""
    return values if isinstance(values, Tensor) else torch.as_tensor(values)


def exp(values: Array) -> Array:
    """e to the power of each value."""
    return torch.exp(values) if isinstance(values, Tensor) else np.exp(values)


def sqrt(values: Array) -> Array:
    """The square root of each value."""
    return values.sqrt() if isinstance(values, Tensor) else np.sqrt(values)


def maximum(left: Array, right: Array) -> Array:
    """The larger value of each pair; NaN where either is NaN."""
    return torch.maximum(left, right) if isinstance(left, Tensor) else np.maximum(left, right)


def nonnegative(values: Array) -> Array:
    """Negative values set to 0; NaN stays."""
    return values.clamp_min(0) if isinstance(values, Tensor) else np.maximum(values, 0)


def where(condition: Array, left: Array, right: Array) -> Array:
    """The left where the condition holds, the right elsewhere."""
    pick = torch.where if isinstance(condition, Tensor) else np.where
    return pick(condition, left, right)


def full(
    shape: int | tuple[int, ...],
    value: float,
    like: Array,
) -> Array:
    """An array of the kind of ``like``, filled with one number."""
    if isinstance(like, Tensor):
        return like.new_full((shape,) if isinstance(shape, int) else shape, value)
    return np.full(shape, value)


def eye(size: int, like: Array) -> Array:
    """The identity matrix, of the kind of ``like``."""
    return torch.eye(size, dtype=like.dtype, device=like.device) if isinstance(like, Tensor) else np.eye(size)


def copy(values: Array) -> Array:
    """A copy."""
    return values.clone() if isinstance(values, Tensor) else values.copy()


def concatenate(parts: Sequence[Array]) -> Array:
    """One after the other along the first axis."""
    return torch.cat(tuple(parts)) if isinstance(parts[0], Tensor) else np.concatenate(parts)


def plus_diagonal(
    matrix: Array,  # [n, n]
    values: Array,  # [n]
) -> Array:  # [n, n]
    """A copy with these values added to the diagonal."""
    if isinstance(matrix, Tensor):
        return matrix + torch.diag(values)
    result = matrix.copy()
    result.reshape(-1)[:: len(matrix) + 1] += values
    return result


def select(
    matrix: Array,  # [n, n]
    slots: list[int],
) -> Array:  # [m, m]
    """The rows and columns of these slots, in order; the matrix itself where they are all of its slots."""
    return matrix if len(slots) == len(matrix) else matrix[slots][:, slots]


def squared_distances(
    left_norms: Array,  # [n] squared norms
    right_norms: Array,  # [m] squared norms
    products: Array,  # [n, m] inner products
) -> Array:  # [n, m]
    """‖a‖² + ‖b‖² - 2 a·b, never negative."""
    return nonnegative(left_norms[:, None] + right_norms - 2 * products)


# ------------------------------------------------------------------ systems


def _cholesky(matrix: Array) -> tuple[Array, bool]:
    """A lower factor, whose upper triangle holds anything, and whether there is one."""
    if isinstance(matrix, Tensor):
        factor, info = torch.linalg.cholesky_ex(matrix)
        return factor, not info
    if not len(matrix):
        return matrix, True
    factor, info = _potrf(matrix.T, lower=1, clean=0)  # .T: as Fortran lays it out
    return factor, info == 0


def jittered_cholesky(
    matrix: Array,  # [n, n] symmetric, float64
    remedy: str = "noise_variance",
) -> Array:  # [n, n], the lower triangle holds the factor
    """Cholesky factor of a kernel matrix: plain first, then with jitter and a warning that says how much.

    Args:
        matrix: to be factorised.
        remedy: the setting that adds to its diagonal, for the messages.

    Raises:
        NotPositiveDefiniteError: not even jitter of 1e-2 of the mean diagonal helps.
    """
    factor, done = _cholesky(matrix)
    if done:
        return factor
    scale = matrix.diagonal().mean()
    for jitter in JITTERS:
        factor, done = _cholesky(matrix + jitter * scale * eye(len(matrix), matrix))
        if done and _UNSAID.get():
            return factor
        if done:
            warn(
                f"kernel matrix of size {len(matrix)} is not positive definite; added {jitter:g} of its mean "
                f"diagonal ({float(scale):.3g}). A larger {remedy} avoids this.",
                JitterWarning,
            )
            return factor
    raise NotPositiveDefiniteError(
        f"kernel matrix of size {len(matrix)} is not positive definite even with jitter {JITTERS[-1]:g}; "
        f"raise {remedy}, or check the history for non-finite values"
    )


def cholesky_solve(
    right: Array,  # [n] or [n, m]
    factor: Array,  # [n, n]
) -> Array:  # as right
    """A⁻¹ R with the factor that ``jittered_cholesky`` found."""
    if isinstance(right, Tensor):
        columns = right if right.ndim == 2 else right[:, None]
        solution = torch.cholesky_solve(columns, factor)
        return solution if right.ndim == 2 else solution[:, 0]
    if not right.size:
        return right
    return _potrs(factor, right, lower=1)[0]


def cholesky_inverse(
    factor: Array,  # [n, n]
) -> Array:  # [n, n]
    """A⁻¹, both triangles."""
    if isinstance(factor, Tensor):
        return torch.cholesky_inverse(factor)
    return _potrs(factor, np.eye(len(factor)), lower=1)[0]


def eigh(
    matrix: Array,  # [n, n] symmetric
) -> tuple[Array, Array]:  # [n], [n, n]
    """Eigenvalues, ascending, and eigenvectors.

    Raises:
        NotPositiveDefiniteError: there are none to be found, as of a matrix that is not finite.
    """
    try:
        return torch.linalg.eigh(matrix) if isinstance(matrix, Tensor) else np.linalg.eigh(matrix)
    except (np.linalg.LinAlgError, torch.linalg.LinAlgError) as error:
        raise NotPositiveDefiniteError(
            f"Gram matrix of size {len(matrix)} has no eigenvalues ({error}); check the history for iterates "
            "that are not finite, or too far apart to be squared"
        ) from error


def conjugate_gradients(
    product: Callable[[Array], Array],
    right: Array,  # [...]
    preconditioner: Callable[[Array], Array],
    *,
    tolerance: float = 1e-12,
    iterations: int = 2000,
) -> Array:  # [...]
    """Preconditioned conjugate gradients for a symmetric positive definite product of arrays of one shape.

    Stops when the residual's norm is at most ``tolerance`` times the right-hand side's, or after that many
    iterations; warns if the relative residual is above 1e-6 then.

    Source: Golub and Van Loan, *Matrix Computations*, 4th edition, algorithm 11.5.1.
    """
    solution, residual = 0 * right, right
    goal = tolerance**2 * (right * right).sum()
    direction = conditioned = preconditioner(residual)
    energy = (residual * conditioned).sum()
    for _ in range(iterations):
        if (residual * residual).sum() <= goal:
            return solution
        image = product(direction)
        length = energy / (direction * image).sum()
        solution = solution + length * direction
        residual = residual - length * image
        conditioned = preconditioner(residual)
        energy, before = (residual * conditioned).sum(), energy
        direction = conditioned + (energy / before) * direction
    left = right - product(solution)
    reached = float((left * left).sum() / (right * right).sum()) ** 0.5
    if reached > 1e-6:
        warn(
            f"conjugate gradients stopped after {iterations} iterations at a relative residual of "
            f"{reached:.1e}; a larger noise_variance makes the system easier",
            ConvergenceWarning,
        )
    return solution
