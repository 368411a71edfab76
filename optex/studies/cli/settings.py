"""``--set KEY=VALUE``: further options of problems."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from optex.checks import shown
from optex.studies.problems import PROBLEMS

__all__ = ["read_settings"]


def read_settings(problems: Sequence[str], settings: Sequence[str]) -> dict[str, Any]:
    """Options by their keys, each value of the type that the problems declare.

    Args:
        problems: names.
        settings: each ``KEY=VALUE``.

    Raises:
        ValueError: a setting has another form, a value another type, or a key an option of its own.
    """
    types: dict[str, type] = {}
    for name in problems:
        types.update(PROBLEMS[name].options if name in PROBLEMS else {})
    found: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = (part.strip() for part in setting.partition("="))
        if not equals:
            raise ValueError(f"set: {setting!r} must be KEY=VALUE")
        if key in ("dim", "noise", "batch_size"):
            raise ValueError(f"set: {key} has an option of its own, --{key.replace('_', '-')}")
        found[key] = _value(key, text, types.get(key, str))
    return found


def _value(key: str, text: str, kind: type) -> Any:
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"set: {key} must be true or false, got {shown(text)}")
        return text.lower() == "true"
    try:
        return kind(text)
    except ValueError as error:
        raise ValueError(f"set: {key} must be of type {kind.__name__}, got {shown(text)}") from error
