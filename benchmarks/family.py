"""The family's papers: every number that an implementation is held to, measured, and the pages filled from it.

    python benchmarks/family.py optimizers                 # run all papers of a room, write, fill the pages
    python benchmarks/family.py optimizers --only scale    # one of them
    python benchmarks/family.py optimizers --report        # run nothing; fill the pages from committed JSON

A paper is a file of ``benchmarks/papers/`` with ``ROOM``, the room it belongs to, ``CHECKS``, and, where it has
a picture, ``curves() -> dict`` and ``draw(curves) -> Figure``. A check says what is asked, and measures. Its
record is ``results/family/PAPER.json``, its picture ``results/family/PAPER.png``; the table goes to
``docs/family/PAPER.md``, between ``<!-- table:checks -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import optex
from optex.studies.plots import write_plot
from optex.studies.records import finite_or_null
from optex.studies.tables import fill, markdown_table, places

ROOT = Path(__file__).parents[1]
RESULTS, PAGES = ROOT / "results" / "family", ROOT / "docs" / "family"
PAPERS = Path(__file__).parent / "papers"
ROOMS = ("optimizers", "sources", "solvers")


def papers(room: str) -> dict[str, ModuleType]:
    """The papers of a room, by the name of their file."""
    names = sorted(path.stem for path in PAPERS.glob("*.py") if path.stem != "__init__")
    modules = {name: importlib.import_module(f"papers.{name}") for name in names}
    return {name: module for name, module in modules.items() if room == module.ROOM}


def measured(module: ModuleType) -> dict[str, Any]:
    """All checks of a paper, and its curves."""
    found = []
    for check in module.CHECKS:
        started = time.perf_counter()
        figure, holds = check.run()
        seconds = time.perf_counter() - started
        found.append({**check.described(), "measured": figure, "holds": holds, "seconds": round(seconds, 1)})
        print(f"  {'holds' if holds else 'FAILS'}  {check.name}: {figure}  (asked: {check.asked})", flush=True)
    curves = module.curves() if hasattr(module, "curves") else None
    return {"meta": meta(), "checks": found, "curves": curves}


def meta() -> dict[str, Any]:
    """What was measured on, and with."""
    return {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "optex": optex.__version__,
    }


def report(name: str, module: ModuleType) -> None:
    """Page and picture of a paper, from its committed record."""
    record = json.loads((RESULTS / f"{name}.json").read_text())
    rows = [
        (check["name"], check["asked"], check["measured"], "holds" if check["holds"] else "**does not hold**")
        for check in record["checks"]
    ]
    tables = {"checks": markdown_table(("check", "asked", "measured", ""), rows)}
    if hasattr(module, "tables"):
        tables |= module.tables(record)
    page = PAGES / f"{name}.md"
    known = places(page.read_text())
    fill(page, {key: table for key, table in tables.items() if key in known})
    if record["curves"] is not None:
        write_plot(RESULTS / f"{name}.png", module.draw(record["curves"]))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the papers of a room one after the other, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("room", choices=ROOMS)
    parser.add_argument("--only", help="papers, with commas", default="")
    parser.add_argument("--report", action="store_true", help="run nothing; fill the pages from the JSON")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    found, only = papers(options.room), [name for name in options.only.split(",") if name]
    if unknown := [name for name in only if name not in found]:
        parser.error(f"--only: {unknown[0]!r} is not one of {', '.join(found)}")
    for name, module in found.items():
        if only and name not in only:
            continue
        if not options.report:
            print(name, flush=True)
            RESULTS.mkdir(parents=True, exist_ok=True)
            text = json.dumps(finite_or_null(measured(module)), indent=1, allow_nan=False)
            (RESULTS / f"{name}.json").write_text(text + "\n")
        report(name, module)


if __name__ == "__main__":
    main()
