"""Small dense algebra in float64, and long inner products that keep their digits."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from typing import Final, TypeVar

import torch
from torch import Tensor

from optex.errors import ConvergenceWarning, JitterWarning, NotPositiveDefiniteError

__all__ = [
    "combine_rows",
    "conjugate_gradients",
    "inner_products",
    "jitter_unsaid",
    "jittered_cholesky",
    "one_thread",
    "squared_distances",
    "squared_norms",
    "threads_for",
]

JITTERS: Final = (1e-10, 1e-8, 1e-6, 1e-4, 1e-2)
_BLOCK: Final = 256  # columns summed in float32
_SLAB: Final = 4096 * _BLOCK  # columns handled at a time, which bounds the scratch memory
_SHORT: Final = 32_768  # torch splits elementwise work among threads from this length on
Answer = TypeVar("Answer")
_UNSAID: ContextVar[bool] = ContextVar("jitter_unsaid", default=False)


def jitter_unsaid(function: Callable[[], Answer]) -> Answer:
    """Call it without warnings of jitter, in this thread: for models that are judged by how they predict."""

    def quietly() -> Answer:
        _UNSAID.set(True)
        return function()

    return copy_context().run(quietly)  # so that nothing has to be set back


@contextmanager
def one_thread() -> Iterator[None]:
    """Small systems are solved on one thread, whatever the user's setting.

    A second thread gains nothing on matrices of T0 × T0, and where another program holds its core every one of
    the
    many small products waits for it: rounds have been seen to take ten times as long. The setting is this
    thread's and comes back; a thread of the user's that computes for the first time in between would start
    with it, too.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        yield
        return
    try:
        torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def threads_for(width: int) -> Iterator[None]:
    """One thread for rows this short, the user's setting for longer ones."""
    if width >= _SHORT:
        yield
        return
    with one_thread():
        yield


def _slabs(dimension: int) -> list[slice]:
    return [slice(start, start + _SLAB) for start in range(0, dimension, _SLAB)]


def _working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Half precision is for storage only: sums of its products are taken in float32."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def inner_products(
    left: Tensor,  # [n, d]
    right: Tensor,  # [m, d]
) -> Tensor:  # [n, m] float64
    """All inner products of two sets of rows, as float64.

    Rows in lower precision are multiplied in short blocks and the blocks summed in float64. The distance of
    nearby iterates is a difference of such products, and one float32 sum over d = 100,000 terms of a sign, as
    Adam's steps make them, loses a digit more than the difference has.
    """
    if left.dtype == right.dtype == torch.float64:
        return left @ right.mT
    dtype = _working_dtype(torch.promote_types(left.dtype, right.dtype))
    total = torch.zeros(left.shape[0], right.shape[0], dtype=torch.float64, device=left.device)
    for slab in _slabs(left.shape[1]):
        a, b = left[:, slab].to(dtype), right[:, slab].to(dtype)
        whole = a.shape[1] - a.shape[1] % _BLOCK
        blocks = torch.bmm(
            a[:, :whole].unflatten(1, (-1, _BLOCK)).transpose(0, 1),  # [blocks, n, _BLOCK]
            b[:, :whole].unflatten(1, (-1, _BLOCK)).permute(1, 2, 0),  # [blocks, _BLOCK, m]
        )
        total += blocks.sum(0, dtype=torch.float64)
        total += a[:, whole:] @ b[:, whole:].mT
    return total


def squared_norms(
    rows: Tensor,  # [n, d]
) -> Tensor:  # [n] float64
    """Squared norms with the precision of ``inner_products``."""
    return torch.stack([inner_products(row[None], row[None])[0, 0] for row in rows])


def combine_rows(
    coefficients: Tensor,  # [m] or [n, m] float64
    rows: Tensor,  # [m, d]
) -> Tensor:  # [d] or [n, d], in the rows' dtype, float32 at least
    """``coefficients @ rows``, with half-precision rows widened a piece at a time."""
    dtype = _working_dtype(rows.dtype)
    coefficients = coefficients.to(dtype)
    if rows.dtype == dtype:
        return coefficients @ rows
    return torch.cat([coefficients @ rows[:, slab].to(dtype) for slab in _slabs(rows.shape[1])], dim=-1)


def squared_distances(
    left_norms: Tensor,  # [n] squared norms
    right_norms: Tensor,  # [m] squared norms
    products: Tensor,  # [n, m] inner products
) -> Tensor:  # [n, m]
    """‖a‖² + ‖b‖² - 2 a·b, never negative."""
    return (left_norms[:, None] + right_norms - 2 * products).clamp_min(0)


def jittered_cholesky(
    matrix: Tensor,  # [n, n] symmetric, float64
) -> Tensor:  # [n, n] lower triangular
    """Cholesky factor of a kernel matrix: plain first, then with jitter and a warning that says how much.

    Raises:
        NotPositiveDefiniteError: not even jitter of 1e-2 of the mean diagonal helps.
    """
    with one_thread():
        factor, info = torch.linalg.cholesky_ex(matrix)
    if not info:
        return factor
    scale = matrix.diagonal().mean()
    identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    for jitter in JITTERS:
        with one_thread():
            factor, info = torch.linalg.cholesky_ex(matrix + jitter * scale * identity)
        if not info and _UNSAID.get():
            return factor
        if not info:
            warnings.warn(
                f"kernel matrix of size {len(matrix)} is not positive definite; added {jitter:g} of its mean "
                f"diagonal ({scale.item():.3g}). A larger noise_variance avoids this.",
                JitterWarning,
                stacklevel=2,
            )
            return factor
    raise NotPositiveDefiniteError(
        f"kernel matrix of size {len(matrix)} is not positive definite even with jitter {JITTERS[-1]:g}; "
        "raise noise_variance, or check the history for non-finite values"
    )


def conjugate_gradients(
    product: Callable[[Tensor], Tensor],
    right: Tensor,  # [...]
    preconditioner: Callable[[Tensor], Tensor],
    *,
    tolerance: float = 1e-12,
    iterations: int = 2000,
) -> Tensor:  # [...]
    """Preconditioned conjugate gradients for a symmetric positive definite product of tensors of one shape.

    Stops when the residual's norm is ``tolerance`` times the right side's; warns when it cannot get there.

    Source: Golub and Van Loan, *Matrix Computations*, 4th edition, algorithm 11.5.1.
    """
    solution, residual = torch.zeros_like(right), right
    goal = tolerance * right.norm()
    direction = conditioned = preconditioner(residual)
    energy = (residual * conditioned).sum()
    for _ in range(iterations):
        if residual.norm() <= goal:
            return solution
        image = product(direction)
        length = energy / (direction * image).sum()
        solution = solution + length * direction
        residual = residual - length * image
        conditioned = preconditioner(residual)
        energy, before = (residual * conditioned).sum(), energy
        direction = conditioned + (energy / before) * direction
    reached = (right - product(solution)).norm() / right.norm()
    if reached > 1e-6:
        warnings.warn(
            f"conjugate gradients stopped after {iterations} iterations at a relative residual of "
            f"{reached.item():.1e}; a larger noise_variance makes the system easier",
            ConvergenceWarning,
            stacklevel=2,
        )
    return solution
