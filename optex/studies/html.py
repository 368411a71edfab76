"""A comparison as one page for a browser: plots to read values from, the tables, the settings, the machine.

The page needs no network: it contains its style, program and data, and its content security policy forbids
loading anything else. The program is ``page/page.js``; its data are the record that compare's JSON has.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any, Final, Protocol

from optex.studies.comparison import Run
from optex.studies.measures import VANILLA
from optex.studies.plots import METHOD_MARKERS, method_label, method_style
from optex.studies.records import finite_or_null

__all__ = ["check_page_path", "html_page", "readable_on_dark"]

_SUFFIXES: Final = (".html", ".htm")
_DARK: Final = "#161616"  # the page's background, as page.css has it
_INK: Final = "#ececec"  # of the page's text on that background
_CONTRAST: Final = 4.0  # WCAG 2.2 asks for 3 from lines


class Told(Protocol):
    """A comparison in words and cells, as the command line tells it."""

    @property
    def heading(self) -> str:
        """What was run."""
        ...

    @property
    def headers(self) -> Sequence[str]:
        """[columns], of every table."""
        ...

    @property
    def tables(self) -> Sequence[tuple[str, Sequence[Sequence[str]]]]:
        """A line and rows, each [columns], for every problem."""
        ...

    @property
    def notes(self) -> Sequence[str]:
        """Below the tables."""
        ...


def check_page_path(path: Path) -> None:
    """Refuse a file name that no browser would open as a page.

    Raises:
        ValueError: the suffix is neither .html nor .htm.
    """
    if path.suffix.lower() not in _SUFFIXES:
        raise ValueError(f"html: {path.name!r} must end in one of {', '.join(_SUFFIXES)}")


def html_page(meta: Mapping[str, Any], runs: Sequence[Run], told: Told) -> str:
    """The page.

    Args:
        meta: as from ``describe``.
        runs: at least one; vanilla's line ends where the other methods have used up their gradients or seconds.
        told: the comparison in words and cells.
    """
    methods = dict.fromkeys(run.method for run in runs)
    parallelism = runs[0].parallelism
    document = {
        "meta": meta,
        "plot": {
            "vanilla": VANILLA,
            "rounds": runs[0].rounds,
            "minimum": meta["minimum"],
            "styles": {method: _style(method, parallelism) for method in methods},
        },
        "runs": [run.record() for run in runs],
    }
    title = f"optex compare: {', '.join(dict.fromkeys(run.problem for run in runs))}"
    return _filled(
        _part("page.html"),
        {
            "title": escape(title),
            "heading": escape(told.heading),
            "style": _part("page.css").strip(),
            "script": _part("page.js").strip(),
            "tables": _tables(told),
            "settings": _settings(meta),
            "data": _embedded(document),
        },
    )


def _part(name: str) -> str:
    return (files("optex.studies") / "page" / name).read_text(encoding="utf-8")


def _filled(template: str, parts: Mapping[str, str]) -> str:
    # In one pass: text that is put in may have braces of its own, which must stay as they are.
    return re.sub(r"{{(\w+)}}", lambda match: parts[match[1]], template)


def _embedded(document: Mapping[str, Any]) -> str:
    """JSON for a script element; ``<``, ``>`` and ``&`` are escaped, so that no text in it can end that."""
    text = json.dumps(finite_or_null(dict(document)), allow_nan=False)
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text


def _style(method: str, parallelism: int) -> dict[str, Any]:
    style = method_style(method)
    line, width = style["linestyle"], style["linewidth"]
    return {
        "label": method_label(method, parallelism),
        "light": style["color"],
        "dark": readable_on_dark(style["color"]),
        "width": width,
        "dash": "none" if line == "-" else " ".join(f"{width * part:g}" for part in line[1]),
        "marker": METHOD_MARKERS.get(method, "o"),
    }


def readable_on_dark(colour: str) -> str:
    """The colour, mixed with as much white as it takes to be visible on the page's dark background.

    Visible means a contrast of 4, where WCAG 2.2 asks for 3 (Success Criterion 1.4.11). Black, the colour of
    the text, becomes the colour of the text on the dark background.

    Args:
        colour: as ``#rrggbb``.

    >>> readable_on_dark("#e69f00"), readable_on_dark("#00573f"), readable_on_dark("#000000")
    ('#e69f00', '#4c8979', '#ececec')
    """
    if colour == "#000000":
        return _INK
    mixtures = ([round(v + step / 20 * (255 - v)) for v in _channels(colour)] for step in range(21))
    behind = _luminance(_channels(_DARK)) + 0.05
    seen = next(mixed for mixed in mixtures if (_luminance(mixed) + 0.05) / behind >= _CONTRAST)
    return "#" + "".join(f"{value:02x}" for value in seen)


def _channels(colour: str) -> list[int]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def _luminance(channels: Iterable[int]) -> float:
    """Relative luminance of an sRGB colour, as WCAG 2.2 defines it."""
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (c / 255 for c in channels)]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def _tables(told: Told) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in told.headers)
    lines = []
    for title, rows in told.tables:
        lines.append(f"<h2>{escape(title)}</h2>")
        lines.append(
            _scrolling(title, f"<thead><tr>{head}</tr></thead><tbody>{''.join(map(_row, rows))}</tbody>")
        )
    lines += [f'<p class="note">{escape(note)}</p>' for note in told.notes]
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    first, *others = map(escape, cells)
    return f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in others)}</tr>'


def _scrolling(title: str, rows: str) -> str:
    """A table in a frame that scrolls on a narrow screen, also by the keyboard."""
    label = escape(title, quote=True)
    return f'<div class="scroll" role="region" aria-label="{label}" tabindex="0"><table>{rows}</table></div>'


def _settings(meta: Mapping[str, Any]) -> str:
    options = meta["options"]
    machine = {key: value for key, value in meta.items() if key not in ("options", "minimum", "summary")}
    rows = [
        f'<tr><th scope="row">{escape(key.replace("_", " "))}</th><td>{escape(_worded(value))}</td></tr>'
        for key, value in {**options, **machine}.items()
    ]
    return f'<table class="settings"><tbody>{"".join(rows)}</tbody></table>'


def _worded(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_worded(entry)}" for key, entry in value.items() if entry is not None) or "–"
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return "default" if value is None else str(value)
