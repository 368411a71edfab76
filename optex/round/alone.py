"""One thread at a time: a round changes parameters, base state and history in place."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

__all__ = ["OneThread", "alone"]

_Args = ParamSpec("_Args")
_Owner = TypeVar("_Owner")
_Answer = TypeVar("_Answer")


class OneThread:
    """A reentrant lock that refuses a second thread instead of letting it wait.

    A second thread that waited for its turn would take steps that its caller did not mean to follow the first
    one's. Copies and unpickled ones are not held by anyone.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __reduce__(self) -> tuple[type[OneThread], tuple[()]]:
        return OneThread, ()

    @contextmanager
    def entered(self, what: str) -> Iterator[None]:
        """Hold the lock inside the block; ``what`` names the caller in the error.

        Raises:
            RuntimeError: another thread holds it; nothing has changed.
        """
        if not self._lock.acquire(blocking=False):
            raise RuntimeError(
                f"{what}: another thread is in a round of this optimizer, whose parameters and state are in "
                "between two steps; nothing was changed. Give each thread an OptEx over parameters of its own, "
                "or guard this one by a lock; WorkersEvaluator is what computes gradients in threads"
            )
        try:
            yield
        finally:
            self._lock.release()


def alone(
    method: Callable[Concatenate[_Owner, _Args], _Answer],
) -> Callable[Concatenate[_Owner, _Args], _Answer]:
    """Make a method one that a single thread at a time may run, by the owner's ``_rounds.one_thread``."""

    @wraps(method)
    def guarded(self: _Owner, *args: _Args.args, **kwargs: _Args.kwargs) -> _Answer:
        with cast(Any, self)._rounds.one_thread.entered(f"OptEx.{method.__name__}"):
            return method(self, *args, **kwargs)

    return guarded
