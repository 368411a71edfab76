"""``optex fetch``: download public data sets."""

from __future__ import annotations

from typing import Annotated

import typer

from optex.studies.cli.app import app, refuse
from optex.studies.problems.data import DATA_SETS, fetch

__all__ = ["fetch_data"]


@app.command("fetch")
def fetch_data(
    names: Annotated[list[str], typer.Argument(metavar="NAME", help=f"Of {', '.join(DATA_SETS)}.")],
) -> None:
    """Download public data sets into the user's cache, and verify their checksums."""
    for name in names:
        try:
            paths = fetch(name)
        except (ValueError, ImportError, OSError) as error:
            refuse(error)
        typer.echo(f"{name}: {paths[0].parent}")
