"""Records of runs in JSON: numbers that JSON cannot write, files whose later records replace earlier ones."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

__all__ = [
    "finite_or_null",
    "latest",
    "null_to_nan",
    "read_lines",
    "significant",
    "this_machine",
    "write_whole",
]


def significant(value: float, digits: int) -> float | None:
    """The value rounded to so many significant digits; None, JSON's null, where it is not finite.

    >>> significant(0.123456, 3), significant(math.nan, 3)
    (0.123, None)
    """
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


def null_to_nan(values: Iterable[float | None]) -> list[float]:
    """The values with NaN in place of None, which ``significant`` and ``finite_or_null`` wrote.

    >>> null_to_nan([1.0, None])
    [1.0, nan]
    """
    return [math.nan if value is None else value for value in values]


def finite_or_null(value: Any) -> Any:
    """A document with None in place of every float that is not finite, which JSON cannot write.

    >>> finite_or_null({"loss": [1.0, math.inf]})
    {'loss': [1.0, None]}
    """
    if isinstance(value, dict):
        return {key: finite_or_null(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_null(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def latest(records: Iterable[dict[str, Any]], keys: Sequence[str]) -> list[dict[str, Any]]:
    """Of records that agree in ``keys`` the last one: a run that was made again replaces the earlier one.

    >>> latest([{"seed": 0, "loss": 2.0}, {"seed": 1, "loss": 3.0}, {"seed": 0, "loss": 1.0}], ["seed"])
    [{'seed': 0, 'loss': 1.0}, {'seed': 1, 'loss': 3.0}]
    """
    return list({tuple(record[key] for key in keys): record for record in records}.values())


def read_lines(path: Path, keys: Sequence[str]) -> list[dict[str, Any]]:
    """The latest records of a file with a JSON list of records on each line; none where there is no file."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return latest((record for line in lines for record in json.loads(line)), keys)


def this_machine() -> str:
    """Where a record was made: architecture, system, number of cores.

    >>> this_machine().endswith(" cores")
    True
    """
    return f"{platform.machine()}, {platform.system()}, {os.cpu_count()} cores"


def write_whole(path: Path, text: str) -> None:
    """Write a file in UTF-8, making its folder; an old file is replaced when the new one is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)
