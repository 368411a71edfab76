"""How a solver says what it came to: SciPy's result, with statuses that mean the same everywhere."""

from __future__ import annotations

from enum import IntEnum
from typing import Any, Final

import torch
from scipy.optimize import OptimizeResult

from optex.checks import check_number, shown

__all__ = ["Status", "check_tolerance", "outcome"]


class Status(IntEnum):
    """Why a solver ended; ``success`` is ``status == Status.CONVERGED``."""

    CONVERGED = 0
    LIMIT = 1
    STALLED = 2
    BREAKDOWN = 3
    NON_FINITE = 4
    STOPPED = 5


_MESSAGES: Final = {
    Status.CONVERGED: "The tolerance was reached.",
    Status.LIMIT: "maxiter was reached before the tolerance; raise maxiter, or start from x.",
    Status.STALLED: "No more progress was made before the tolerance was reached; x is the best iterate.",
    Status.BREAKDOWN: "The iteration broke down; x is the best iterate.",
    Status.NON_FINITE: "A number was NaN or infinite; x is the last iterate before it.",
    Status.STOPPED: "The callback asked to stop.",
}


def outcome(x: Any, status: Status, *, nit: int, message: str = "", **figures: Any) -> OptimizeResult:
    """A solver's result.

    Args:
        x: the best iterate, in the form in which the problem was given.
        status: why it ended.
        nit: iterations taken.
        message: in place of the status's usual sentence.
        figures: whatever else there is to tell: residual norms, evaluations.

    >>> result = outcome([1.0], Status.LIMIT, nit=3, residual=0.5)
    >>> result.success, int(result.status), result.nit, result.residual
    (False, 1, 3, 0.5)
    """
    return OptimizeResult(
        x=x,
        success=status == Status.CONVERGED,
        status=int(status),
        message=message or _MESSAGES[status],
        nit=nit,
        **figures,
    )


def check_tolerance(owner: str, tol: Any, dtype: torch.dtype, *, name: str = "tol") -> float:
    """A relative tolerance that this precision can reach.

    Raises:
        ValueError: it is no positive number below 1, or smaller than the dtype resolves.

    >>> check_tolerance("sor", 1e-8, torch.float64)
    1e-08
    """
    number = check_number(owner, name, tol, open_below=True, most=1.0, open_above=True)
    least = torch.finfo(dtype).eps
    if number < least:
        raise ValueError(
            f"{owner}: {name} must be at least {least:.2g}, which is what {dtype} resolves, got {shown(tol)};"
            " raise it, or compute in a wider dtype"
        )
    return number
