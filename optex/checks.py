"""Checks of arguments that every room makes, with one wording."""

from __future__ import annotations

from numbers import Integral
from typing import Any

__all__ = ["check_integer", "check_kind"]


def check_integer(owner: str, name: str, value: Any, *, least: int = 1) -> int:
    """The value as an int.

    Args:
        owner: class or function whose argument it is, for the message.
        name: of the argument.
        value: what came; NumPy's integers pass, booleans do not.
        least: the smallest value allowed.

    Raises:
        ValueError: it is no integer, or less than ``least``.

    >>> check_integer("OptEx", "parallelism", 4)
    4
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{owner}: {name} must be an integer of at least {least}, got {value!r}")
    return int(value)


def check_kind(owner: str, name: str, value: Any, kind: type, wanted: str) -> None:
    """Refuse a value that is neither None nor of the kind.

    Raises:
        TypeError: with ``wanted`` as what to pass instead.
    """
    if value is not None and not isinstance(value, kind):
        raise TypeError(f"{owner}: {name} must be {wanted}, got {value!r}")
