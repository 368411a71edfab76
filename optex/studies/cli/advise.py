"""``optex advise``: whether OptEx pays on a named problem, on this machine."""

from __future__ import annotations

import json as json_module
import math
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer

import optex
from optex.checks import check_integer
from optex.stepping import base_optimizer, check_name, default_rate
from optex.studies.cli.app import app, make_folder, refuse
from optex.studies.cli.compare import read_settings
from optex.studies.problems import Problem, make_problem
from optex.studies.records import finite_or_null

__all__ = ["advise"]

_Problem = Annotated[str, typer.Argument(metavar="PROBLEM", help="A name from `optex list`.")]
_Optimizer = Annotated[str, typer.Option(help="Base optimizer, a name from `optex list`.")]
_Rate = Annotated[
    float | None, typer.Option(help="Learning rate.", show_default="the optimizer's in `optex list`")
]
_Seed = Annotated[int, typer.Option(help="Of the start and the batches.")]
_Dimension = Annotated[
    int | None, typer.Option(help="Dimension of a function.", show_default="the function's own")
]
_Noise = Annotated[
    float | None,
    typer.Option(help="Standard deviation of a function's gradient noise, per component.", show_default="0"),
]
_BatchSize = Annotated[int | None, typer.Option(help="Of minibatches.", show_default="the problem's own")]
_Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A further option of the problem, as in `optex list`."),
]
_Seconds = Annotated[float, typer.Option(help="To spend on measuring, about.")]
_Workers = Annotated[
    int | None,
    typer.Option(help="Measure so many worker processes, too; -1 is one a core.", show_default="none"),
]
_Threads = Annotated[int | None, typer.Option(help="Threads for torch.", show_default="torch's own choice")]
_Json = Annotated[Path | None, typer.Option(help="Write what was measured to this file.")]


@app.command()
def advise(
    problem: _Problem,
    optimizer: _Optimizer = "adam",
    lr: _Rate = None,
    seed: _Seed = 0,
    dim: _Dimension = None,
    noise: _Noise = None,
    batch_size: _BatchSize = None,
    settings: _Settings = None,
    seconds: _Seconds = 10.0,
    workers: _Workers = None,
    threads: _Threads = None,
    json: _Json = None,
) -> None:
    """Measure whether OptEx pays on a problem, on this machine, and with which settings.

    As optex.advise does for a model of one's own: at the problem's start, in seconds.
    """
    try:
        if threads is not None:
            check_integer(None, "threads", threads)
        if not 0 < seconds < math.inf:
            raise ValueError(f"seconds: must be positive and finite, got {seconds}")
        if json is not None and json.is_dir():
            raise ValueError(f"json: {json} is a folder; name a file in it")
        if json is not None:
            make_folder("json", json.parent)
        options = {"dim": dim, "noise": noise, "batch_size": batch_size}
        options.update(read_settings([problem], settings or []))
        start = make_problem(problem, seed=seed, **options)
        base = _base(start, optimizer, lr)
        if threads is not None:
            torch.set_num_threads(threads)
        advice = optex.advise(
            base, start.batches(), start.source(), model=start, seconds=seconds, workers=workers
        )
        if json is not None:
            meta = {"command": ["optex", *sys.argv[1:]], "problem": problem, "seed": seed, "options": options}
            document = finite_or_null({**meta, **advice.as_dict()})
            json.write_text(json_module.dumps(document, allow_nan=False) + "\n")
    except (ValueError, ImportError, OSError) as error:
        refuse(error)


def _base(start: Problem, optimizer: str, lr: float | None) -> torch.optim.Optimizer:
    if lr is not None and not 0 < lr < math.inf:
        raise ValueError(f"lr: must be positive and finite, got {lr}")
    check_name(optimizer)
    try:
        return base_optimizer(optimizer, start, lr=default_rate(optimizer) if lr is None else lr)
    except (TypeError, ValueError) as error:
        raise ValueError(f"optimizer: {optimizer} cannot optimise {start.name}: {error}") from error
