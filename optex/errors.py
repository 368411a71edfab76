"""Errors and warnings with names of their own, so that a caller can catch just them."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Final

__all__ = [
    "ConvergenceWarning",
    "JitterWarning",
    "LowerLevelWarning",
    "NonFiniteError",
    "NonFiniteWarning",
    "NotDeterministicWarning",
    "NotPositiveDefiniteError",
    "PlainStepWarning",
    "RankDeficientError",
    "RankLostError",
    "WorkerLostError",
    "warn",
]

# Folders whose frames are not the user's: this package, and what torch wraps around every optimizer's step.
_PACKAGE: Final = f"{Path(__file__).parent}{os.sep}"
_TORCHS: Final = tuple(f"{Path('torch', folder)}{os.sep}" for folder in ("optim", "utils"))


class NonFiniteError(ArithmeticError):
    """A loss, gradient or parameter was NaN or infinite where the round cannot go on without it.

    The parameters and the base optimizer's state are those of before the round.
    """


class NonFiniteWarning(RuntimeWarning):
    """A step was skipped because something was NaN or infinite; the message says which, and what."""


class NotDeterministicWarning(RuntimeWarning):
    """A source that was declared deterministic gave two losses at one point."""


class PlainStepWarning(RuntimeWarning):
    """``OptEx.step`` was called without a closure: one plain step of the base optimizer, nothing predicted."""


class NotPositiveDefiniteError(ArithmeticError):
    """A matrix that has to be positive definite is not.

    A kernel matrix has no Cholesky factor, not even with the largest jitter; or a solver that needs a symmetric
    positive definite matrix met a direction along which its form is not positive.
    """


class RankDeficientError(ArithmeticError):
    """Rows that have to be independent are not: the Jacobian of constraints, the columns of a basis."""


class RankLostError(RuntimeError):
    """Another rank of a distributed run died, left, or did not answer in time.

    Neither the round nor the process group can go on; the job has to be started again.
    """


class WorkerLostError(RuntimeError):
    """No worker answered for the round's start, at the second try either.

    The parameters and the base optimizer's state are those of before the round, which can be tried again.
    """


class JitterWarning(RuntimeWarning):
    """A kernel matrix needed jitter on its diagonal; the message says how much."""


class ConvergenceWarning(RuntimeWarning):
    """An iterative solve stopped short of its tolerance; the message says how far it came."""


class LowerLevelWarning(RuntimeWarning):
    """A bilevel problem's lower level has too little curvature, or too little precision, for its penalty.

    The message says how much there is, and how wrong the hypergradient may be.
    """


def warn(message: str, category: type[Warning]) -> None:
    """Warn at the caller's line: the innermost one outside this package and torch's wrappers."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and _is_ours(frame.f_code.co_filename):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level + 1)


def _is_ours(filename: str) -> bool:
    return filename.startswith(_PACKAGE) or any(folder in filename for folder in _TORCHS)
