"""The commands and their options. What a command needs is loaded when it runs, so that ``--help`` is quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from optex.studies.cli.app import app

__all__ = ["advise", "compare", "fetch_data", "list_names", "reproduce"]

_Problems = Annotated[list[str], typer.Argument(metavar="PROBLEM", help="Names from `optex list`.")]
_Problem = Annotated[str, typer.Argument(metavar="PROBLEM", help="A name from `optex list`.")]
_Optimizer = Annotated[str, typer.Option(help="Base optimizer, a name from `optex list`.")]
_Rate = Annotated[
    float | None, typer.Option(help="Learning rate.", show_default="the optimizer's in `optex list`")
]
_Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="A further option of a problem; `optex list` has all, with their values and defaults.",
    ),
]
_Threads = Annotated[int, typer.Option(help="Threads for torch.")]


@app.command()
def compare(
    problems: _Problems,
    optimizer: _Optimizer = "adam",
    lr: _Rate = None,
    parallelism: Annotated[int, typer.Option(help="N, gradients evaluated at once in a round.")] = 5,
    stride: Annotated[
        str,
        typer.Option(help="The most steps that optex drafts for each gradient: auto, or a number from 1 on."),
    ] = "auto",
    history: Annotated[
        int | None, typer.Option(help="T0, pairs to predict from.", show_default="each method's own")
    ] = None,
    rounds: Annotated[
        int, typer.Option(help="Rounds of every method; vanilla runs N to 4 N times as many.")
    ] = 60,
    seeds: Annotated[int, typer.Option(help="Starts of each problem: seeds 0, 1, ...")] = 5,
    dim: Annotated[int, typer.Option(help="Dimension of the functions; data sets have their own.")] = 10_000,
    noise: Annotated[
        float, typer.Option(help="Standard deviation of the functions' gradient noise, per component.")
    ] = 0.0,
    batch_size: Annotated[
        int | None, typer.Option(help="Of the problems with minibatches.", show_default="each problem's own")
    ] = None,
    settings: _Settings = None,
    methods: Annotated[
        str,
        typer.Option(help="Names from `optex list`, comma-separated. Vanilla is always run, to measure by."),
    ] = "vanilla,target,optex-paper,optex",
    threads: _Threads = 1,
    json: Annotated[Path | None, typer.Option(help="Write every run, round by round, to this file.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw loss against rounds into this file (.png, .pdf, .svg, ...).")
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(help="Write one page for a browser: plots to read values from, table, settings."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep the runs in the file of --json, and make the others.")
    ] = False,
) -> None:
    """Run methods on problems and print what each reached.

    Acceleration: vanilla's rounds to the same loss over the method's rounds, so vanilla's is 1 and target's
    is N where the loss falls steadily. The gradients of a round are evaluated in turn here, and the seconds
    include that. A method pays if a gradient takes longer than its break-even, where N gradients at once take
    the time of one. Ctrl-C keeps the runs that are finished.
    """
    from optex.studies.cli.compare import Output, run

    run(
        output=Output(json, plot, html, resume),
        threads=threads,
        problems=problems,
        methods=methods,
        optimizer=optimizer,
        lr=lr,
        parallelism=parallelism,
        stride=stride,
        history_size=history,
        rounds=rounds,
        seeds=seeds,
        dim=dim,
        noise=noise,
        batch_size=batch_size,
        settings=settings or [],
    )


@app.command()
def advise(
    problem: _Problem,
    optimizer: _Optimizer = "adam",
    lr: _Rate = None,
    seed: Annotated[int, typer.Option(help="Of the start and the batches.")] = 0,
    dim: Annotated[
        int | None, typer.Option(help="Dimension of a function.", show_default="the function's own")
    ] = None,
    noise: Annotated[
        float | None,
        typer.Option(
            help="Standard deviation of a function's gradient noise, per component.", show_default="0"
        ),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Of minibatches.", show_default="the problem's own")
    ] = None,
    settings: _Settings = None,
    seconds: Annotated[float, typer.Option(help="To spend on measuring, about.")] = 10.0,
    workers: Annotated[
        int | None,
        typer.Option(help="Also measure so many worker processes; -1 is one a core.", show_default="none"),
    ] = None,
    threads: _Threads = 1,
    json: Annotated[Path | None, typer.Option(help="Write what was measured to this file.")] = None,
) -> None:
    """Measure whether OptEx pays on a problem, on this machine, and with which settings.

    Measures at the problem's start, in seconds. For a model of your own call optex.advise.
    """
    from optex.studies.cli.advise import run

    options = {"dim": dim, "noise": noise, "batch_size": batch_size}
    run(problem, optimizer, lr, seed, options, settings or [], seconds, workers, threads, json)


@app.command("fetch")
def fetch_data(
    names: Annotated[list[str], typer.Argument(metavar="NAME", help="fashion-mnist, cifar10, shakespeare.")],
) -> None:
    """Download public data sets into the user's cache, and verify their checksums."""
    from optex.studies.cli.fetch import run

    run(names)


@app.command("list")
def list_names() -> None:
    """What can be compared: problems, methods, optimizers; and the family's solvers and regularisers."""
    from optex.studies.cli.listing import run

    run()


@app.command()
def reproduce(
    figures: Annotated[list[str], typer.Argument(metavar="FIGURE", help="fig2, fig3, fig4, fig6.")],
    scale: Annotated[
        str, typer.Option(help="small: minutes to an hour on 2 cores. paper: the paper's sizes.")
    ] = "small",
    seeds: Annotated[
        int | None,
        typer.Option(help="Starts of each problem: seeds 0, 1, ...", show_default="each figure's own"),
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(help="Rounds of every method but vanilla.", show_default="each figure's own"),
    ] = None,
    dim: Annotated[
        int | None,
        typer.Option(help="Dimension of the functions of fig2 and fig6.", show_default="the scale's"),
    ] = None,
    workers: Annotated[int, typer.Option(help="Runs made at once, each in one thread.")] = 1,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep the runs in the JSON in OUT, and make the others.")
    ] = False,
    out: Annotated[
        Path, typer.Option(help="Folder for a JSON, a PNG and a page of text for each figure.")
    ] = Path("out"),
) -> None:
    """Reproduce figures of the OptEx paper: run, print, draw, and check its claims.

    The JSON has every run; picture and page are made from it. A page that exists keeps its text and gets new
    tables. After an interruption, --resume makes the runs that are missing.
    """
    from optex.studies.cli.reproduce import run

    run(figures, scale, seeds, rounds, dim, workers, resume, out)
