"""``newton_schulz_inverse``: an inverse by products of matrices alone, its residual squared at every iteration.

Fu, Chen, Jia, Sharan: Transformers Learn to Achieve Second-Order Convergence Rates for In-Context Linear
Regression, NeurIPS 2024, arXiv 2310.17086; Schulz, ZAMM 13 (1933), 57-59.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import OptimizeResult
from torch import Tensor

from optex.callback import stops_by_result
from optex.checks import check_callable, check_integer, check_number, shown
from optex.errors import NotPositiveDefiniteError, RankDeficientError
from optex.solvers.outcome import Status, check_tolerance, outcome

__all__ = ["newton_schulz_inverse"]

_OWNER: Final = "newton_schulz_inverse"
_RUNNING: Final = -1
# From the least to the most telling, where matrices of a batch end differently.
_SEVERITY: Final = (
    Status.CONVERGED,
    Status.LIMIT,
    Status.STALLED,
    Status.BREAKDOWN,
    Status.NON_FINITE,
)
_MESSAGES: Final = {
    Status.STALLED: "No more progress: S is singular, or worse conditioned than its precision and tol allow; x"
    " is the best iterate.",
    Status.BREAKDOWN: 'The residual grew: S is not positive definite, which init="trace" needs; x is the best'
    ' iterate. Use init="norm".',
}


def newton_schulz_inverse(
    S: Tensor | NDArray[Any],  # [..., d, d]
    *,
    tol: float | None = None,
    maxiter: int = 100,
    init: Literal["trace", "norm"] | float | Tensor | NDArray[Any] = "trace",
    callback: Callable[[OptimizeResult], Any] | None = None,
) -> OptimizeResult:
    """Inverses of matrices by the iterative Newton method.

        E = I - S M,   M <- M (2 I - S M) = M + M E,   so that   E <- E²

    A direction whose eigenvalue of the first E is 1 - δ takes log2(1 / δ) iterations until it counts, and a
    handful more to full precision: with κ the condition number of S, about log2 κ from the trace and 2 log2 κ
    from the norm. An iteration is two products of matrices. Gradients are not followed.

    Args:
        S: matrices to invert, float32 or float64; any number of leading dimensions. Those of one call iterate
            together, each until it is done.
        tol: of the relative residual ‖I - S M‖_F / √d; by default the square root of what the dtype resolves.
        maxiter: most iterations.
        init: the first M. ``"trace"``: I / tr(S), for symmetric positive definite S. ``"norm"``:
            Sᵀ / ‖S Sᵀ‖_F, as the authors' code has it, for any S that is not singular, at up to twice the
            iterations. A number α: α Sᵀ, with 0 < α < 2 / ‖S‖₂² for every S (a singular value decomposition
            checks it). An array [..., d, d]: a warm start with ‖I - S M‖_F < 1, the inverse of a nearby matrix.
        callback: called after every iteration with x, ``residual`` and ``nit``; ends the run by returning True
            or raising StopIteration.

    Returns:
        A result with ``x``, the inverses [..., d, d] in the form of S; ``residual``, as under ``tol``, and
        ``statuses`` of each matrix [...]; ``nit``, iterations of the slowest. ``status`` is the worst of all.
        Of a singular S the result is ``STALLED`` from the norm, with the pseudo-inverse as far as rounding
        allows. From the trace, an S that is not definite ends in ``BREAKDOWN``, and a singular one in
        that or ``STALLED``, depending on rounding, with an x that means nothing in the null space.

    Raises:
        TypeError: S is no float32 or float64 array, or a warm start or callback has the wrong type.
        ValueError: S is not square, symmetric (from the trace) or finite; α is at or beyond its boundary,
            where E keeps an eigenvalue of size 1 or more; a warm start is too far away.
        NotPositiveDefiniteError: a diagonal entry is not positive, from the trace.
        RankDeficientError: a matrix is zero.

    Source: arXiv 2310.17086, section 3; Schulz 1933. The first M from the trace, the rule to stop and batches
    are ours.

    >>> import numpy as np
    >>> result = newton_schulz_inverse(np.array([[2.0, 1.0], [1.0, 2.0]]))
    >>> result.success, result.nit, result.x.round(6)
    (True, 6, array([[ 0.666667, -0.333333],
           [-0.333333,  0.666667]]))
    """
    matrices = _read(S, "S")  # [..., d, d]
    shape, dtype = matrices.shape, matrices.dtype
    if len(shape) < 2 or shape[-1] != shape[-2] or matrices.numel() == 0:
        raise ValueError(f"{_OWNER}: S must be square matrices [..., d, d], got the shape {tuple(shape)}")
    if not bool(matrices.isfinite().all()):
        raise ValueError(f"{_OWNER}: S holds numbers that are not finite; mask them first")
    tol = math.sqrt(torch.finfo(dtype).eps) if tol is None else check_tolerance(_OWNER, tol, dtype)
    check_integer(_OWNER, "maxiter", maxiter)
    check_callable(_OWNER, "callback", callback, optional=True)
    # Entries of size 1: no square of an entry overflows, and the residual does not change.
    size = matrices.abs().amax(dim=(-2, -1), keepdim=True)  # [..., 1, 1]
    if not bool((size > 0).all()):
        raise RankDeficientError(f"{_OWNER}: S holds a matrix of zeros, which has no inverse; leave it out")
    scaled = (matrices / size).reshape(-1, *shape[-2:])  # [b, d, d]
    first = _first(scaled, init, size.reshape(-1, 1, 1), shape)

    def present(run: _Run, status: Status) -> OptimizeResult:
        numpy = isinstance(S, np.ndarray)
        statuses = torch.where(run.status.eq(_RUNNING), int(status), run.status)
        parts = (
            run.best.reshape(shape) / size,
            run.least.reshape(shape[:-2]),
            statuses.reshape(shape[:-2]),
        )
        x, residual, ended = (part.numpy() if numpy else part for part in parts)
        message = _MESSAGES.get(status, "")
        return outcome(x, status, nit=run.nit, message=message, residual=residual, statuses=ended)

    run = _Run(scaled, first, tol, definite=isinstance(init, str) and init == "trace")
    while run.running() and run.nit < maxiter:
        run.iterate()
        if callback is not None and stops_by_result(callback, present(run, Status.LIMIT)):
            return present(run, Status.STOPPED)
    return present(run, run.worst())


class _Run:
    """Iterates of all matrices, and the best of each.

    Attributes:
        best: the iterates to hand out [b, d, d].
        least: their relative residuals [b].
        status: a ``Status`` of each, -1 while it runs [b].
    """

    def __init__(
        self,
        matrices: Tensor,  # [b, d, d]
        first: Tensor,  # [b, d, d]
        tol: float,
        *,
        definite: bool,
    ) -> None:
        self._matrices, self._now, self._tol, self._definite = matrices, first, tol, definite
        self._eps = torch.finfo(matrices.dtype).eps
        self._identity = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
        # Reused in every iteration: fresh memory of this size costs more than the products do.
        self._error, self._step = torch.empty_like(first), torch.empty_like(first)
        self.least = self._measure()
        self._moved = torch.full_like(self.least, math.inf)
        self.best = first.clone()
        self.nit = 0
        self.status = torch.full_like(self.least, _RUNNING, dtype=torch.int64)
        self.status[self.least <= tol] = Status.CONVERGED

    def _measure(self) -> Tensor:  # [b]
        """I - S M, and its relative size."""
        torch.baddbmm(self._identity, self._matrices, self._now, alpha=-1, out=self._error)
        return torch.linalg.matrix_norm(self._error) / math.sqrt(self._error.shape[-1])

    def running(self) -> bool:
        """Whether any has not ended."""
        return bool((self.status == _RUNNING).any())

    def iterate(self) -> None:
        """One step of those that run, and how each stands after it."""
        going = self.status.eq(_RUNNING)
        torch.bmm(self._now, self._error, out=self._step)
        self._now += self._step.masked_fill_(~going[:, None, None], 0.0)
        self.nit += 1
        residual = self._measure()
        length = torch.linalg.matrix_norm(self._now)
        moved = torch.linalg.matrix_norm(self._step) / length
        lost = going & ~residual.isfinite()
        reached = going & (residual <= self._tol)
        # In exact arithmetic the residual never grows: E is symmetric there, with eigenvalues in [0, 1]. A
        # step no larger than what rounding does to S M says that no further one will help; so does one near
        # that which is larger than the last: rounding has entered the null space, and doubles there.
        floor = self._eps * torch.linalg.matrix_norm(self._matrices) * length
        grown = going & (residual > self.least * (1 + math.sqrt(self._eps)))
        idle = going & ((moved <= floor) | ((moved > self._moved) & (self._moved <= 1000 * floor)))
        self._moved = moved
        indefinite = grown & self._definite & (self.least * math.sqrt(self._identity.shape[0]) >= 1)
        # Of a singular S the residual stays while rounding makes M grow in the null space: no better without
        # need.
        margin = 1 - 16 * self._identity.shape[0] * self._eps
        better = reached | (going & (residual < self.least * margin))
        better |= idle & ~grown & (moved <= math.sqrt(self._eps))
        torch.where(better[:, None, None], self._now, self.best, out=self.best)
        self.least = torch.where(better, residual, self.least)
        for which, status in (
            (grown | idle, Status.STALLED),
            (indefinite, Status.BREAKDOWN),
            (reached, Status.CONVERGED),
            (lost, Status.NON_FINITE),
        ):
            self.status[which] = status

    def worst(self) -> Status:
        """The status of the whole, once nothing goes on."""
        self.status[self.status == _RUNNING] = Status.LIMIT
        found = set(self.status.tolist())
        return max((status for status in _SEVERITY if int(status) in found), key=_SEVERITY.index)


def _read(value: Any, name: str) -> Tensor:
    if not isinstance(value, (Tensor, np.ndarray)):
        raise TypeError(f"{_OWNER}: {name} must be a tensor or a NumPy array, got {type(value).__name__}")
    tensor = value.detach() if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
    if tensor.dtype not in (torch.float32, torch.float64) or tensor.layout != torch.strided:
        raise TypeError(
            f"{_OWNER}: {name} must be dense float32 or float64, got {tensor.dtype}, {tensor.layout};"
            " convert it first"
        )
    return tensor


def _first(
    matrices: Tensor,  # [b, d, d], largest entry 1
    init: Any,
    size: Tensor,  # [b, 1, 1], what they were divided by
    shape: torch.Size,  # of S
) -> Tensor:  # [b, d, d]
    """The first iterates, of the matrices divided by their sizes."""
    transposed = matrices.mT
    if isinstance(init, str) and init == "trace":
        return _from_trace(matrices)
    if isinstance(init, str) and init == "norm":
        return transposed / torch.linalg.matrix_norm(matrices @ transposed)[:, None, None]
    if isinstance(init, (Tensor, np.ndarray)):
        start = _read(init, "init")
        if start.shape != shape or start.dtype != matrices.dtype or start.device != matrices.device:
            raise ValueError(
                f"{_OWNER}: init must be of S's shape, dtype and device, {tuple(shape)} {matrices.dtype} "
                f"{matrices.device}, got {tuple(start.shape)} {start.dtype} {start.device}"
            )
        first = start.reshape(matrices.shape) * size
        identity = torch.eye(shape[-1], dtype=matrices.dtype, device=matrices.device)
        away = float(torch.linalg.matrix_norm(identity - matrices @ first).max())
        if not away < 1:
            raise ValueError(
                f"{_OWNER}: init must have ‖I - S init‖_F below 1 to converge surely, got {away:g};"
                ' start from "trace" or "norm"'
            )
        return first
    if isinstance(init, str):
        raise ValueError(f'{_OWNER}: init must be "trace", "norm", a number or matrices, got {shown(init)}')
    scale = check_number(_OWNER, "init", init, open_below=True)
    boundary = float((2 / (torch.linalg.matrix_norm(matrices, 2) * size[:, 0, 0]).square()).min())
    # At the boundary itself rounding decides.
    if not scale < boundary * (1 - 1e-6):
        raise ValueError(
            f"{_OWNER}: init must be below 2 / ‖S‖₂², here {boundary:g}, got {scale:g}; there I - init S Sᵀ has"
            " an eigenvalue of size 1 or more, which squaring never reduces"
        )
    return scale * transposed * size.square()


def _from_trace(
    matrices: Tensor,  # [b, d, d]
) -> Tensor:  # [b, d, d]
    apart = float((matrices - matrices.mT).abs().max())
    if apart > 100 * torch.finfo(matrices.dtype).eps:
        raise ValueError(
            f'{_OWNER}: init="trace" needs symmetric S, and entries differ from their mirror images by'
            f' {apart:.2g} of the largest; use init="norm"'
        )
    diagonal = matrices.diagonal(dim1=-2, dim2=-1)  # [b, d]
    if not bool((diagonal > 0).all()):
        raise NotPositiveDefiniteError(
            f'{_OWNER}: init="trace" needs positive definite S, and a diagonal entry is not positive;'
            ' use init="norm"'
        )
    identity = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    return identity / diagonal.sum(dim=-1)[:, None, None]
