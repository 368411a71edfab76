"""Write the measured values in the sentences of all pages, from the committed records.

    python benchmarks/pages.py            # write them
    python benchmarks/pages.py --check    # write nothing; name the pages that would change, and exit with 1

Tables are written by the command that each page names beside them. A place for a value is described by
`optex.studies.values.fill_values`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from optex.studies.values import fill_values

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("*.md", "docs/*.md", "docs/*/*.md", "examples/*.md", "results/*.md", "results/*/*.md")


def main(arguments: Sequence[str] | None = None) -> int:
    """Fill or check every page; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with 1 if a page would change"
    )
    options = parser.parse_args(arguments)
    stale = False
    for page in sorted(page for pattern in PAGES for page in ROOT.glob(pattern)):
        text = page.read_text(encoding="utf-8")
        try:
            filled = fill_values(text, ROOT / "results")
        except ValueError as error:
            sys.exit(f"{page.relative_to(ROOT)}: {error}")
        if filled != text:
            stale = True
            print(page.relative_to(ROOT))
            if not options.check:
                page.write_text(filled, encoding="utf-8")
    return int(stale and options.check)


if __name__ == "__main__":
    sys.exit(main())
