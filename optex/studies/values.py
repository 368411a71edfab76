"""Measured values in the sentences of a page, read from committed records."""

from __future__ import annotations

import json
import re
from pathlib import Path

__all__ = ["fill_values", "read_value"]

_PLACE = re.compile(
    r"(?P<head><!-- value:(?P<record>[^#\s]+)#(?P<path>.+?)(?: \| (?P<form>\S+))? -->).*?<!-- end -->",
    re.DOTALL,
)
_NUMBER = re.compile(r"[-−]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?")


def read_value(record: object, path: str) -> object:
    """What stands at a path of a record.

    Each part of the path, between slashes, is one of these: a key of an object; a position in a list; in a list
    of objects, the ``name`` of one or its beginning; the position of a number in a text.

    Args:
        record: what a JSON file holds.
        path: for example ``checks/cosine/measured/1``, the second number in the text ``measured`` of the check
            whose name begins with "cosine".

    Raises:
        LookupError: nothing, or more than one element, is there.

    >>> record = {"checks": [{"name": "cosine at the start", "measured": "0.99 and 0.02"}]}
    >>> read_value(record, "checks/cosine/measured/1")
    '0.02'
    """
    here = record
    for part in path.split("/"):
        found = _inside(here, part)
        if len(found) != 1:
            raise LookupError(f"{len(found)} elements at {part!r} of {path!r}; exactly one was looked for")
        here = found[0]
    return here


def _inside(here: object, part: str) -> list[object]:
    if isinstance(here, dict):
        return [here[part]] if part in here else []
    if isinstance(here, str):
        here = _NUMBER.findall(here)
    if not isinstance(here, list):
        return []
    if re.fullmatch(r"-?\d+", part):
        return here[int(part) :][:1]
    named = [(str(each["name"]), each) for each in here if isinstance(each, dict) and "name" in each]
    exact: list[object] = [each for name, each in named if name == part]
    return exact or [each for name, each in named if name.startswith(part)]


def _written(value: object, form: str | None) -> str:
    """The value in a sentence; the percent sign stands apart, as on all pages."""
    if form is None:
        return str(value)
    return format(float(value) if isinstance(value, str) else value, form).replace("%", " %")


def fill_values(text: str, records: Path) -> str:
    """The page with every value in its sentences as its record has it.

    A place is ``<!-- value:RECORD#PATH -->``, what stands there, ``<!-- end -->``. RECORD is a JSON file
    below ``records``, without ``.json``; PATH is as in ``read_value``. With ``| FORM`` behind PATH the value is
    written with that format specification of Python (``.2f``, ``.0%``), otherwise as it is.

    Args:
        text: the page, in Markdown.
        records: the folder of the records.

    Raises:
        ValueError: a record, or the value in it, is missing, or cannot be written in that form.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "a.json").write_text('{"share": 0.418}')
    ...     print(fill_values("About <!-- value:a#share | .0% -->a third<!-- end -->.", Path(folder)))
    About <!-- value:a#share | .0% -->42 %<!-- end -->.
    """
    known: dict[str, object] = {}

    def filled(place: re.Match[str]) -> str:
        name = place["record"]
        try:
            if name not in known:
                known[name] = json.loads((records / f"{name}.json").read_text(encoding="utf-8"))
            new = _written(read_value(known[name], place["path"]), place["form"])
        except (OSError, LookupError, ValueError, TypeError) as error:
            raise ValueError(f"fill_values: {name}.json#{place['path']}: {error}") from error
        return f"{place['head']}{new}<!-- end -->"

    return _PLACE.sub(filled, text)
