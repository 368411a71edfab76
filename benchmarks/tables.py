"""Tables of results, put into the pages that show them."""

from __future__ import annotations

import re
from pathlib import Path


def fill(path: Path, tables: dict[str, str]) -> None:
    """Replace what stands between a table's marker and the end marker."""
    text = path.read_text()
    for name, table in tables.items():
        pattern = rf"(<!-- table:{name} -->\n).*?(<!-- end -->)"
        text = re.sub(
            pattern, lambda match, table=table: f"{match[1]}{table}\n{match[2]}", text, flags=re.DOTALL
        )
    path.write_text(text)
