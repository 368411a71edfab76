"""``optex reproduce``: the paper's figures."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from optex.checks import check_integer
from optex.studies.cli.app import app, make_folder, progress_bar, refuse
from optex.studies.cli.table import figures as significant_figures
from optex.studies.cli.table import rounds_cell
from optex.studies.plots import write_plot
from optex.studies.reproduce import (
    FIGURES,
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

__all__ = ["reproduce"]


_Figures = Annotated[list[str], typer.Argument(metavar="FIGURE", help=f"Of {', '.join(FIGURES)}.")]
_Scale = Annotated[str, typer.Option(help="small: minutes to an hour on 2 cores. paper: the paper's sizes.")]
_Seeds = Annotated[
    int | None, typer.Option(help="Starts of each problem: seeds 0, 1, ...", show_default="each figure's own")
]
_Rounds = Annotated[
    int | None, typer.Option(help="Rounds of every method but vanilla.", show_default="each figure's own")
]
_Dimension = Annotated[
    int | None, typer.Option(help="Dimension of the functions of fig2 and fig6.", show_default="the scale's")
]
_Workers = Annotated[int, typer.Option(help="Runs made at once, each in one thread.")]
_Resume = Annotated[
    bool, typer.Option("--resume", help="Keep the runs that the JSON in OUT holds, and make the others.")
]
_Out = Annotated[Path, typer.Option(help="Folder for a JSON, a PNG and a page of text for each figure.")]


@app.command()
def reproduce(
    figures: _Figures,
    scale: _Scale = "small",
    seeds: _Seeds = None,
    rounds: _Rounds = None,
    dim: _Dimension = None,
    workers: _Workers = 1,
    resume: _Resume = False,
    out: _Out = Path("out"),
) -> None:
    """Reproduce figures of the OptEx paper: run, print, draw, and check its claims.

    The JSON has every run; picture and page are made from it. An existing page keeps its text and gets new
    tables. An interrupted command continues with --resume.
    """
    try:
        choice = Choice(scale, seeds, rounds, dim)
        plans = [make_figure(name, choice) for name in figures]
        check_integer(None, "workers", workers)
        make_folder("out", out)
        for plan in plans:
            for section in plan.sections:
                section.comparison.check()
        torch.set_num_threads(1)  # problems this small gain nothing from a second
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


def _reproduce(
    plan: Figure, choice: Choice, about: dict[str, Any], record: Path, kept: list[Record], workers: int
) -> list[Record]:
    """All runs of a figure, the record written after each."""
    runs = list(kept)
    with progress_bar() as progress:
        task = progress.add_task(plan.name, total=len(planned_runs(plan)), completed=len(runs))
        for run in run_missing(plan, choice, runs, workers):
            progress.update(
                task, description=f"{run['section']}, seed {run['seed']}: {run['label']}", advance=1
            )
            runs.append(run)
            write_record(record, about, runs)
    return runs


def _print_figure(plan: Figure, about: dict[str, Any], runs: Sequence[Record], out: Path) -> None:
    console = Console(highlight=False)
    console.print(f"{plan.name}: {plan.title}, {about['choice']['scale']} scale", style="bold")
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    for header in ("section", "method", "last loss", "as good\nat round", "steps\na round", "gradients"):
        table.add_column(header, justify="left" if header in ("section", "method") else "right", no_wrap=True)
    for line in numbers(about, runs):
        loss = line.summary.final_loss
        table.add_row(
            line.section,
            line.label,
            significant_figures(loss.mean, 4) if loss.count else "diverged",
            rounds_cell(line.summary),
            f"{line.summary.accepted:.2f}",
            f"{line.summary.gradients:.0f}",
        )
    console.print(table)
    console.print()
    for check in checks(about, runs):
        sign = "holds" if check.holds else "fails"
        console.print(f"{sign}  {check.where}: {check.claim}: {check.measured}", markup=False, soft_wrap=True)
    console.print(f"{out / plan.name}.json, .png, .md", style="dim", markup=False)
    console.print()
