"""The caller's callback, as SciPy calls it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.optimize import OptimizeResult

__all__ = ["Callback", "stops_by_result"]


class Callback:
    """Calls the caller's function after every iteration; it may end the run.

    Args:
        function: ``function(intermediate_result=result)`` where its one parameter has that name, else
            ``function(x)``; with None nothing is called.
    """

    def __init__(self, function: Callable[..., Any] | None) -> None:
        self._function = function
        self._modern = function is not None and _takes_intermediate_result(function)

    def ask(self, now: OptimizeResult) -> Any:
        """The function's answer to the run as it is now; ``StopIteration`` passes through."""
        if self._function is None:
            return None
        return self._function(intermediate_result=now) if self._modern else self._function(now.x)

    def stops(self, result: Callable[[], OptimizeResult]) -> str | None:
        """The message to stop with, if the function asks for that; None to go on.

        Args:
            result: makes the run's result as it is now; called only where there is a function to hand it to.
        """
        if self._function is None:
            return None
        try:
            answer = self.ask(result())
        except StopIteration:
            return "`callback` raised `StopIteration`."
        return "`callback` returned True." if isinstance(answer, (bool, np.bool_)) and answer else None


def stops_by_result(function: Callable[[OptimizeResult], Any], now: OptimizeResult) -> bool:
    """Whether a callback that takes the result, whatever its parameter is called, asks to stop."""
    try:
        return function(now) is True
    except StopIteration:
        return True


def _takes_intermediate_result(callback: Callable[..., Any]) -> bool:
    """SciPy's rule: the one parameter has that name."""
    try:
        return set(inspect.signature(callback).parameters) == {"intermediate_result"}
    except ValueError:  # a builtin that does not tell
        return False
