"""``optex reproduce``: the paper's figures."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import typer

from optex.checks import check_integer
from optex.studies.cli.app import INTERRUPTED, Printer, make_folder, progress, refuse
from optex.studies.cli.table import figures as significant_figures
from optex.studies.cli.table import rounds_cell
from optex.studies.plots import write_plot
from optex.studies.reproduce import (
    Choice,
    Figure,
    Record,
    checks,
    draw,
    make_figure,
    meta,
    numbers,
    planned_runs,
    read_record,
    run_missing,
    write_page,
    write_record,
)

__all__ = ["run"]


def run(
    figures: Sequence[str],
    scale: str,
    seeds: int | None,
    rounds: int | None,
    dim: int | None,
    workers: int,
    resume: bool,
    out: Path,
) -> None:
    """Make every figure, one after the other; each is written as soon as it is finished."""
    try:
        choice = Choice(scale, seeds, rounds, dim)
        plans = [make_figure(name, choice) for name in figures]
        check_integer(None, "workers", workers)
        make_folder("out", out)
        for plan in plans:
            for section in plan.sections:
                section.comparison.check()
        torch.set_num_threads(1)  # problems this small gain nothing from a second thread
        for plan in plans:
            about = meta(plan, choice, ["optex", *sys.argv[1:]])
            record = out / f"{plan.name}.json"
            about, kept = read_record(record, about) if resume else (about, [])
            runs = _reproduce(plan, choice, about, record, kept, workers)
            write_plot(out / f"{plan.name}.png", draw(plan, about, runs))
            write_page(out / f"{plan.name}.md", plan, about, runs)
            _print_figure(plan, about, runs, out)
    except (ValueError, ImportError, OSError) as error:
        refuse(error)
    except KeyboardInterrupt:
        typer.echo(f"optex: interrupted; the same command with --resume goes on from {out}", err=True)
        raise typer.Exit(INTERRUPTED) from None


def _reproduce(
    plan: Figure, choice: Choice, about: dict[str, Any], record: Path, kept: list[Record], workers: int
) -> list[Record]:
    """Make all runs of a figure that are missing, and write the record after each."""
    runs = list(kept)
    with progress(len(planned_runs(plan)), len(runs)) as tell:
        for run in run_missing(plan, choice, runs, workers):
            runs.append(run)
            write_record(record, about, runs)
            tell(f"{run['section']}, seed {run['seed']}: {run['label']}")
    return runs


def _print_figure(plan: Figure, about: dict[str, Any], runs: Sequence[Record], out: Path) -> None:
    printer = Printer()
    printer.line(f"{plan.name}: {plan.title}, {about['choice']['scale']} scale", style="bold")
    headers = ("section", "method", "last loss", "as good\nat round", "steps\na round", "gradients")
    rows = [
        (
            line.section,
            line.label,
            significant_figures(line.summary.final_loss.mean, 4)
            if line.summary.final_loss.count
            else "diverged",
            rounds_cell(line.summary),
            f"{line.summary.accepted:.2f}",
            f"{line.summary.gradients:.0f}",
        )
        for line in numbers(about, runs)
    ]
    printer.table(headers, rows, left=("method",))
    printer.line()
    for check in checks(about, runs):
        sign = "holds" if check.holds else "fails"
        printer.line(f"{sign}  {check.where}: {check.claim}: {check.measured}", wrap=False)
    printer.line(f"{out / plan.name}.json, .png, .md", style="dim")
    printer.line()
