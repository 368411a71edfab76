"""Tables in Markdown, put into the pages that show them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

__all__ = ["fill", "fill_text", "markdown_table", "places"]


def markdown_table(
    head: Sequence[str],  # [columns]
    rows: Iterable[Sequence[str]],  # each [columns]
) -> str:
    """A table in Markdown.

    Raises:
        ValueError: a row has more or fewer cells than the head.

    >>> print(markdown_table(["method", "loss"], [["vanilla", "3.1"], ["optex", "1.2"]]))
    | method | loss |
    |---|---|
    | vanilla | 3.1 |
    | optex | 1.2 |
    """
    lines = [_line(head), "|" + "---|" * len(head)]
    for row in rows:
        if len(row) != len(head):
            raise ValueError(f"markdown_table: {len(row)} cells under a head of {len(head)}: {list(row)}")
        lines.append(_line(row))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def places(text: str) -> set[str]:
    r"""Names of the tables that a page has places for.

    >>> places("<!-- table:loss -->\n<!-- end -->")
    {'loss'}
    """
    return set(re.findall(r"<!-- table:(\S+) -->", text))


def fill_text(text: str, tables: Mapping[str, str]) -> str:
    r"""The page with each table between its marker and the next end marker.

    Args:
        text: with ``<!-- table:NAME -->`` and ``<!-- end -->`` lines.
        tables: what to put between them, by name: tables, or any lines of text.

    Raises:
        ValueError: the page has no place for one of the tables.

    >>> print(fill_text("<!-- table:loss -->\nold\n<!-- end -->", {"loss": "new"}))
    <!-- table:loss -->
    new
    <!-- end -->
    """
    for name, table in tables.items():
        pattern = re.compile(rf"(<!-- table:{re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
        text, count = pattern.subn(lambda match, table=table: f"{match[1]}{table}\n{match[2]}", text)
        if not count:
            raise ValueError(f"fill: the page has no place for {name!r}, between its marker and an end marker")
    return text


def fill(path: Path, tables: Mapping[str, str]) -> None:
    """Put tables into a page, a file in UTF-8, as ``fill_text`` does.

    Raises:
        ValueError: the page has no place for one of the tables; it is left as it is.
    """
    try:
        text = fill_text(path.read_text(encoding="utf-8"), tables)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    path.write_text(text, encoding="utf-8")
