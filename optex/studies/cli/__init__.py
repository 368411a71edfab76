"""The command line: compare methods, advise, reproduce the paper's figures, list all names, fetch data."""

from __future__ import annotations

from optex.studies.cli import commands  # noqa: F401  (adds the commands)
from optex.studies.cli.app import app

__all__ = ["app"]
