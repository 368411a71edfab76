"""Checks of arguments that every room makes, with one wording."""

from __future__ import annotations

from numbers import Integral
from typing import Any

__all__ = ["check_integer", "check_kind"]


def check_integer(owner: str | None, name: str, value: Any, *, least: int = 1, most: int | None = None) -> int:
    """The value as an int.

    Args:
        owner: class or function whose argument it is, for the message; None where the name says enough.
        name: of the argument.
        value: what came; NumPy's integers pass, booleans do not.
        least, most: the smallest and the largest value allowed.

    Raises:
        ValueError: it is no integer, or out of this range.

    >>> check_integer("OptEx", "parallelism", 4)
    4
    """
    fits = isinstance(value, Integral) and not isinstance(value, bool)
    if not fits or value < least or (most is not None and value > most):
        wanted = f"an integer of at least {least}" if most is None else f"between {least} and {most}"
        raise ValueError(
            f"{f'{name}:' if owner is None else f'{owner}: {name}'} must be {wanted}, got {value!r}"
        )
    return int(value)


def check_kind(owner: str, name: str, value: Any, kind: type, wanted: str) -> None:
    """Refuse a value that is neither None nor of the kind.

    Raises:
        TypeError: with ``wanted`` as what to pass instead.
    """
    if value is not None and not isinstance(value, kind):
        raise TypeError(f"{owner}: {name} must be {wanted}, got {value!r}")
