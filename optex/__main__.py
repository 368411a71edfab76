"""The command ``optex``, also as ``python -m optex``."""

from __future__ import annotations

import sys
from typing import Final

__all__ = ["main"]

# The library itself needs none of these, so it does not ask for them: they come with the extra `studies`.
_PACKAGES: Final = ("matplotlib", "rich", "typer")


def main() -> None:
    """Run the command line, or say in one line what it needs and leave with exit code 2."""
    try:
        from optex.studies.cli import app

        app()
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _PACKAGES:
            raise
        print(f'optex: the command line needs {package}: pip install "optex[studies]"', file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
