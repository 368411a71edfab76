"""Errors and warnings with names of their own, so that a caller can catch just them."""

from __future__ import annotations

__all__ = [
    "ConvergenceWarning",
    "JitterWarning",
    "NonFiniteError",
    "NonFiniteWarning",
    "NotPositiveDefiniteError",
    "RankLostError",
    "WorkerLostError",
]


class NonFiniteError(ArithmeticError):
    """A loss, gradient or parameter was NaN or infinite where the round cannot go on without it.

    The parameters and the base optimizer's state are those of before the round.
    """


class NonFiniteWarning(RuntimeWarning):
    """A step was skipped because something was NaN or infinite; the message says which, and what."""


class NotPositiveDefiniteError(ArithmeticError):
    """A kernel matrix has no Cholesky factor, not even with the largest jitter."""


class RankLostError(RuntimeError):
    """Another rank of a distributed run died, left, or did not answer in time.

    The round cannot be finished, and neither can the process group; the job has to start anew.
    """


class WorkerLostError(RuntimeError):
    """No worker answered for the round's start, at the second try either.

    The parameters and the base optimizer's state are those of before the round, which can be tried again.
    """


class JitterWarning(RuntimeWarning):
    """A kernel matrix needed jitter on its diagonal; the message says how much."""


class ConvergenceWarning(RuntimeWarning):
    """An iterative solve stopped short of its tolerance; the message says how far it came."""
