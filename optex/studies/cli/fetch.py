"""``optex fetch``: download public data sets."""

from __future__ import annotations

from collections.abc import Sequence

import typer

from optex.studies.cli.app import refuse
from optex.studies.problems.data import fetch

__all__ = ["run"]


def run(names: Sequence[str]) -> None:
    """Fetch each data set, and print the folder that it is in."""
    for name in names:
        try:
            paths = fetch(name)
        except (ValueError, ImportError, OSError) as error:
            refuse(error)
        typer.echo(f"{name}: {paths[0].parent}")
