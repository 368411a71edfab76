"""Errors and warnings with names of their own, so that a caller can catch just them."""

from __future__ import annotations

__all__ = ["ConvergenceWarning", "JitterWarning", "NonFiniteError", "NotPositiveDefiniteError"]


class NonFiniteError(ArithmeticError):
    """A loss, gradient or parameter was NaN or infinite where the round cannot go on without it.

    The parameters and the base optimizer's state are those of before the round.
    """


class NotPositiveDefiniteError(ArithmeticError):
    """A kernel matrix has no Cholesky factor, not even with the largest jitter."""


class JitterWarning(RuntimeWarning):
    """A kernel matrix needed jitter on its diagonal; the message says how much."""


class ConvergenceWarning(RuntimeWarning):
    """An iterative solve stopped short of its tolerance; the message says how far it came."""
