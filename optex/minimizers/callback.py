"""The caller's callback, as SciPy calls it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.optimize import OptimizeResult

__all__ = ["Callback"]


class Callback:
    """Told of every iteration, and may end the run.

    Args:
        function: ``function(intermediate_result=result)`` where its one parameter has that name, else
            ``function(x)``; None is never told.
    """

    def __init__(self, function: Callable[..., Any] | None) -> None:
        self._function = function
        self._modern = function is not None and _takes_intermediate_result(function)

    def stops(self, result: Callable[[], OptimizeResult]) -> str | None:
        """The message to stop with, if the callback asks for it.

        Args:
            result: the run's, as it is now; asked for where there is someone to be told.
        """
        if self._function is None:
            return None
        now = result()
        try:
            answer = self._function(intermediate_result=now) if self._modern else self._function(now.x)
        except StopIteration:
            return "`callback` raised `StopIteration`."
        return "`callback` returned True." if isinstance(answer, (bool, np.bool_)) and answer else None


def _takes_intermediate_result(callback: Callable[..., Any]) -> bool:
    """SciPy's rule: the one parameter has that name."""
    try:
        return set(inspect.signature(callback).parameters) == {"intermediate_result"}
    except ValueError:  # a builtin that does not tell
        return False
