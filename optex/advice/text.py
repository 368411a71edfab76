"""Advice as a text of 80 columns, in ASCII."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Final

from optex.advice.candidate import Candidate

__all__ = ["at_once_table", "candidates_table", "duration", "heading", "size", "wrapped"]

_WIDTH: Final = 80
_NAME: Final = 10  # letters of an evaluator's name
_LEGEND: Final = (
    "steps: kept in a round. stride: steps drafted for a gradient. error: of predicted gradients, relative; at "
    "1 they say nothing. overhead: a round's time beyond its gradients. vs plain: time of a step, the plain "
    "loop's being 1. pays above: how slow a gradient must be for this to be faster. memory: beyond the "
    "base optimizer's."
)


def heading(
    optimizer: str, dimension: int, gradient_seconds: float, step_seconds: float, deterministic: bool
) -> list[str]:
    """The optimizer, and the time that a step of the plain loop takes."""
    kind = "deterministic" if deterministic else "sampled"
    plain = gradient_seconds + step_seconds
    return [
        f"{optimizer}, {dimension:,} parameters, {kind} gradients",
        f"plain loop: {duration(plain)} a step, {duration(gradient_seconds)} of it the gradient",
    ]


def at_once_table(at_once: Mapping[str, Mapping[int, float]], refused: Mapping[str, str]) -> list[str]:
    """Seconds of N gradients, an evaluator a row, and why others have none."""
    counts = sorted({count for row in at_once.values() for count in row})
    rows = [("gradients", *(f"N = {count}" for count in counts))]
    for name, row in at_once.items():
        rows.append((_evaluator(name), *(duration(row[c]) if c in row else "-" for c in counts)))
    lines = _table(rows, left=1)
    for name, why in refused.items():
        lines += wrapped(f"{_evaluator(name)}: no, {why}", " ")
    return lines


def candidates_table(candidates: Sequence[Candidate], chosen: Candidate | None) -> list[str]:
    """A candidate a row, the chosen one with a star, and what the columns mean."""
    heads = (
        ("N", "gradients", "rounds", "steps", "stride", "error", "over-", "vs", "pays", "memory"),
        ("", "", "run", "", "", "", "head", "plain", "above", ""),
    )
    rows = [_row(candidate, chosen=candidate == chosen) for candidate in candidates]
    return ['rounds of OptEx, stride "auto":', *_table([*heads, *rows]), *wrapped(_LEGEND)]


def _evaluator(name: str) -> str:
    return "in turn" if name == "sequential" else name


def _row(candidate: Candidate, *, chosen: bool) -> tuple[str, ...]:
    pays = candidate.break_even_seconds
    return (
        ("*" if chosen else "") + str(candidate.parallelism),
        _evaluator(candidate.evaluator)[:_NAME],
        str(candidate.rounds),
        f"{candidate.steps:.1f}",
        f"{candidate.stride_reached:.1f}",
        _ratio(candidate.prediction_error),
        duration(candidate.overhead_seconds),
        _ratio(candidate.relative_time),
        "never" if math.isinf(pays) else duration(pays),
        size(candidate.memory_bytes),
    )


def _ratio(value: float) -> str:
    """Two decimals in five characters."""
    if math.isnan(value):
        return "?"
    return f"{value:.2f}" if value < 99.995 else ">99"


def _table(rows: Sequence[tuple[str, ...]], left: int = 0) -> list[str]:
    """Columns as wide as they have to be; the first ``left`` are flush left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        " "
        + "  ".join(
            f"{cell:<{width}}" if i < left else f"{cell:>{width}}"
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def wrapped(text: str, indent: str = "") -> list[str]:
    """Lines of a paragraph, with the first one's indent."""
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=indent,
        subsequent_indent=" " * len(indent),
        break_long_words=True,
        break_on_hyphens=False,
    )


def duration(seconds: float) -> str:
    """Three figures and a unit.

    >>> duration(0.00123), duration(4.5e-05), duration(12.0)
    ('1.23 ms', '45.0 us', '12.0 s')
    """
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * factor >= 0.9995 or unit == "us":
            value = seconds * factor
            return f"{value:,.0f} {unit}" if value >= 99.95 else f"{value:#.3g} {unit}"
    raise AssertionError


def size(count: float) -> str:
    """Bytes in a unit that suits them.

    >>> size(1234), size(5e9)
    ('1.2 kB', '5.0 GB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" or count >= 10 else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError
