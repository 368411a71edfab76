"""``optex compare``: methods on problems."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from optex.checks import check_integer
from optex.studies.cli.app import app, make_folder, progress_bar, refuse
from optex.studies.cli.table import print_result
from optex.studies.comparison import Comparison, Run, describe, run_case, summarise, write_json
from optex.studies.plots import check_plot_path, plot_comparison, write_plot
from optex.studies.problems import PROBLEMS

__all__ = ["compare", "read_settings"]

_Problems = Annotated[list[str], typer.Argument(metavar="PROBLEM", help="Names from `optex list`.")]
_Optimizer = Annotated[str, typer.Option(help="Base optimizer, a name from `optex list`.")]
_Rate = Annotated[
    float | None, typer.Option(help="Learning rate.", show_default="the optimizer's in `optex list`")
]
_Parallelism = Annotated[int, typer.Option(help="N, gradients evaluated at once in a round.")]
_Stride = Annotated[
    str, typer.Option(help="Steps optex drafts at most for each gradient: auto, a number, 1 for none.")
]
_History = Annotated[
    int | None, typer.Option(help="T0, pairs to predict from.", show_default="each method's own")
]
_Rounds = Annotated[int, typer.Option(help="Rounds of every method; vanilla runs N to 4 N times as many.")]
_Seeds = Annotated[int, typer.Option(help="Starts of each problem: seeds 0, 1, ...")]
_Dimension = Annotated[int, typer.Option(help="Dimension of the functions; data sets have their own.")]
_Noise = Annotated[
    float, typer.Option(help="Standard deviation of the functions' gradient noise, per component.")
]
_BatchSize = Annotated[
    int | None, typer.Option(help="Of the problems with minibatches.", show_default="each problem's own")
]
_Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A further option of a problem, as in `optex list`."),
]
_Methods = Annotated[
    str, typer.Option(help="Names from `optex list`, comma-separated. Vanilla is always run, to measure by.")
]
_Threads = Annotated[int | None, typer.Option(help="Threads for torch.", show_default="torch's own choice")]
_Json = Annotated[Path | None, typer.Option(help="Write every run, round by round, to this file.")]
_Plot = Annotated[
    Path | None, typer.Option(help="Draw loss against rounds into this file (.png, .pdf, .svg, ...).")
]


@app.command()
def compare(
    problems: _Problems,
    optimizer: _Optimizer = "adam",
    lr: _Rate = None,
    parallelism: _Parallelism = 5,
    stride: _Stride = "auto",
    history: _History = None,
    rounds: _Rounds = 60,
    seeds: _Seeds = 5,
    dim: _Dimension = 10_000,
    noise: _Noise = 0.0,
    batch_size: _BatchSize = None,
    settings: _Settings = None,
    methods: _Methods = "vanilla,target,optex-paper,optex",
    threads: _Threads = None,
    json: _Json = None,
    plot: _Plot = None,
) -> None:
    """Run methods on problems and print what each reached.

    Acceleration: vanilla's rounds to the same loss over the method's rounds, so vanilla's is 1 and target's
    is N where the loss falls steadily. Gradients of a round are evaluated in turn here, and the seconds say
    so; the break-even is how slow a gradient must be for the method to pay where N of them at once take the
    time of one.
    """
    try:
        comparison = Comparison(
            problems=tuple(problems),
            methods=tuple(name.strip() for name in methods.split(",") if name.strip()),
            optimizer=optimizer,
            lr=lr,
            parallelism=parallelism,
            stride=_read_stride(stride),
            history_size=history,
            rounds=rounds,
            seeds=seeds,
            dim=dim,
            noise=noise,
            batch_size=batch_size,
            problem_options=read_settings(problems, settings or []),
        )
        _check_before_running(comparison, threads, json, plot)
    except (ValueError, ImportError, FileNotFoundError) as error:
        refuse(error)
    if threads is not None:
        torch.set_num_threads(threads)
    _run_and_report(comparison, json, plot)


def _read_stride(text: str) -> Any:
    """``"auto"`` or a number, whose range ``Comparison`` checks."""
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise ValueError(f"stride: must be auto or a number of at least 1, got {text!r}") from None


def _run_and_report(comparison: Comparison, json: Path | None, plot: Path | None) -> None:
    """Make the runs, print their table, write the record and the picture that were asked for."""
    meta = describe(comparison)
    runs, notes = _run_all(comparison)
    print_result(comparison, meta, summarise(runs), notes)
    try:
        if json is not None:
            write_json(json, {**meta, "command": ["optex", *sys.argv[1:]]}, runs)
        if plot is not None:
            write_plot(plot, plot_comparison(runs, meta["minimum"]))
    except OSError as error:
        refuse(error)


def read_settings(problems: Sequence[str], settings: Sequence[str]) -> dict[str, Any]:
    """``key=value`` for each, the value of the type that the problems say."""
    types: dict[str, type] = {}
    for name in problems:
        types.update(PROBLEMS[name].options if name in PROBLEMS else {})
    found: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = (part.strip() for part in setting.partition("="))
        if not equals:
            raise ValueError(f"set: {setting!r} must be KEY=VALUE")
        if key in ("dim", "noise", "batch_size"):
            raise ValueError(f"set: {key} has an option of its own, --{key.replace('_', '-')}")
        found[key] = _value(key, text, types.get(key, str))
    return found


def _value(key: str, text: str, kind: type) -> Any:
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"set: {key} must be true or false, got {text!r}")
        return text.lower() == "true"
    try:
        return kind(text)
    except ValueError as error:
        raise ValueError(f"set: {key} must be of type {kind.__name__}, got {text!r}") from error


def _check_before_running(
    comparison: Comparison, threads: int | None, json: Path | None, plot: Path | None
) -> None:
    if threads is not None:
        check_integer(None, "threads", threads)
    if plot is not None:
        check_plot_path(plot)
    for name, path in (("json", json), ("plot", plot)):
        if path is not None and path.is_dir():
            raise ValueError(f"{name}: {path} is a folder; name a file in it")
        if path is not None:
            make_folder(name, path.parent)
    comparison.check()


def _run_all(comparison: Comparison) -> tuple[list[Run], list[str]]:
    """All runs, and the warnings raised in them, each kind once with its count."""
    runs: list[Run] = []
    with warnings.catch_warnings(record=True) as caught, progress_bar() as progress:
        warnings.simplefilter("always")
        cases = comparison.cases()
        task = progress.add_task("", total=len(cases))
        for case in cases:
            progress.update(task, description=f"{case.problem}, seed {case.seed}: {case.method}")
            runs.append(run_case(comparison, case))
            progress.advance(task)
    counts = Counter(warning.category.__name__ for warning in caught)
    first = {warning.category.__name__: str(warning.message) for warning in reversed(caught)}
    return runs, [f"{count} × {kind}, the first: {first[kind]}" for kind, count in counts.items()]
