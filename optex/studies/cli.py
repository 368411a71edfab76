"""The command line: compare methods on problems, list what there is."""

from __future__ import annotations

import math
import sys
import textwrap
import warnings
from collections import Counter
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from optex.stepping.bases import OPTIMIZERS
from optex.studies.baselines import METHODS
from optex.studies.comparison import (
    Comparison,
    Row,
    Run,
    Spread,
    acceleration,
    default_rate,
    describe,
    run_case,
    summarise,
    write_json,
)
from optex.studies.plots import check_plot_path, plot_comparison, write_plot
from optex.studies.problems import PROBLEMS, ProblemEntry
from optex.studies.problems.data import DATA_SETS, fetch, find
from optex.studies.reproduce import (
    FIGURES,
    Choice,
    Figure,
    Record,
    cases,
    checks,
    draw,
    make_figure,
    meta,
    numbers,
    read_record,
    run_missing,
    write_page,
    write_record,
)

__all__ = ["app"]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _refuse(message: object) -> NoReturn:
    """One line on stderr and exit code 2: the user's mistake, not ours."""
    typer.echo("optex: " + " ".join(str(message).split()), err=True)
    raise typer.Exit(2)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"optex {version('optex')}")
        raise typer.Exit


@app.callback()
def main(
    asked: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Several steps of a first-order optimizer in the time of one."""


# ---------------------------------------------------------------------- compare


@app.command()
def compare(
    problems: Annotated[list[str], typer.Argument(metavar="PROBLEM", help="Names from `optex list`.")],
    optimizer: Annotated[str, typer.Option(help="Base optimizer, a name from `optex list`.")] = "adam",
    lr: Annotated[
        float | None, typer.Option(help="Learning rate.", show_default="the optimizer's in `optex list`")
    ] = None,
    parallelism: Annotated[int, typer.Option(help="N, gradients evaluated at once in a round.")] = 5,
    history: Annotated[
        int | None, typer.Option(help="T0, pairs to predict from.", show_default="20 up to N = 8, else 32")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Rounds of every method; vanilla runs N times as many.")] = 60,
    seeds: Annotated[int, typer.Option(help="Starts of each problem: seeds 0, 1, ...")] = 5,
    dim: Annotated[int, typer.Option(help="Dimension of the functions; data sets have their own.")] = 10_000,
    noise: Annotated[
        float, typer.Option(help="Standard deviation of the functions' gradient noise, per component.")
    ] = 0.0,
    batch_size: Annotated[
        int | None, typer.Option(help="Of the problems with minibatches.", show_default="each problem's own")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A further option of a problem, as in `optex list`."),
    ] = None,
    methods: Annotated[
        str, typer.Option(help="Names from `optex list`, comma-separated. Vanilla, the ruler, is always run.")
    ] = "vanilla,target,optex-paper,optex",
    threads: Annotated[
        int | None, typer.Option(help="Threads for torch.", show_default="torch's own choice")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write every run, round by round, to this file.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw loss against rounds into this file (.png, .pdf, .svg, ...).")
    ] = None,
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
            history_size=history,
            rounds=rounds,
            seeds=seeds,
            dim=dim,
            noise=noise,
            batch_size=batch_size,
            problem_options=_read_settings(problems, settings or []),
        )
        _check_threads(threads)
        _check_outputs(json, plot)
        comparison.check()
    except (ValueError, ImportError, FileNotFoundError) as error:
        _refuse(error)
    if threads is not None:
        torch.set_num_threads(threads)
    meta = describe(comparison)
    runs, notes = _run_all(comparison)
    _print_result(comparison, meta, summarise(runs), notes)
    try:
        if json is not None:
            write_json(json, {**meta, "command": ["optex", *sys.argv[1:]]}, runs)
        if plot is not None:
            write_plot(plot, plot_comparison(runs, meta["minimum"]))
    except OSError as error:
        _refuse(error)


def _read_settings(problems: Sequence[str], settings: Sequence[str]) -> dict[str, Any]:
    """``key=value`` for each, the value of the type that the problems say."""
    types: dict[str, type] = {}
    for name in problems:
        types.update(PROBLEMS[name].options if name in PROBLEMS else {})
    found: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = (part.strip() for part in setting.partition("="))
        if not equals:
            raise ValueError(f"set: {setting!r} must be KEY=VALUE")
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


def _check_threads(threads: int | None) -> None:
    if threads is not None and threads < 1:
        raise ValueError(f"threads: must be at least 1, got {threads}")


def _check_outputs(json: Path | None, plot: Path | None) -> None:
    if plot is not None:
        check_plot_path(plot)
    for name, path in (("json", json), ("plot", plot)):
        if path is not None and path.is_dir():
            raise ValueError(f"{name}: {path} is a folder; name a file in it")
        if path is not None:
            _make_folder(name, path.parent)


def _make_folder(name: str, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{name}: cannot make the folder {folder}: {error.strerror}") from error


def _run_all(comparison: Comparison) -> tuple[list[Run], list[str]]:
    """All runs, and the warnings that came up in them, each kind once with its count."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    runs: list[Run] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            cases = comparison.cases()
            task = progress.add_task("", total=len(cases))
            for case in cases:
                progress.update(task, description=f"{case.problem}, seed {case.seed}: {case.method}")
                runs.append(run_case(comparison, case))
                progress.advance(task)
    counts = Counter(warning.category.__name__ for warning in caught)
    first = {warning.category.__name__: str(warning.message) for warning in reversed(caught)}
    return runs, [f"{count} × {kind}, the first: {first[kind]}" for kind, count in counts.items()]


def _print_result(
    comparison: Comparison, meta: dict[str, Any], rows: Sequence[Row], notes: Sequence[str]
) -> None:
    console = Console(highlight=False)
    seeds = f"{comparison.seeds} seed" + "s" * (comparison.seeds > 1)
    console.print(
        f"{comparison.optimizer}, lr {comparison.learning_rate:g}, N = {comparison.parallelism}, "
        f"T0 = {comparison.history_size}, {comparison.rounds} rounds, {seeds}"
    )
    for problem in comparison.problems:
        console.print()
        console.print(_problem_line(comparison, meta, problem), style="bold")
        gap = 2 if console.width >= 90 else 1
        console.print(_table(comparison, [row for row in rows if row.problem == problem], gap))
    console.print()
    for line in (*_footnotes(comparison, rows), *notes):
        console.print(line, style="dim", markup=False)


def _problem_line(comparison: Comparison, meta: dict[str, Any], problem: str) -> str:
    options = PROBLEMS[problem].options
    parts = [f"{problem}: d = {meta['dimension'][problem]:,}"]
    if "noise" in options and comparison.noise:
        parts.append(f"noise {comparison.noise:g}")
    if meta["batch_size"][problem] is not None:
        parts.append(f"batches of {meta['batch_size'][problem]}")
    parts += [f"{key} {value}" for key, value in comparison.problem_options.items() if key in options]
    if meta["minimum"][problem] is not None:
        parts.append(f"minimum {meta['minimum'][problem]:.4g}")
    return ", ".join(parts)


def _table(comparison: Comparison, rows: Sequence[Row], gap: int) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0), header_style="dim")
    table.add_column("method", no_wrap=True)
    headers = ("final loss", "as good\nat round", "acceleration", "gradients", "seconds", "pays\nabove")
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    ceiling = _most_acceleration(comparison)
    for row in rows:
        table.add_row(
            row.method,
            _loss_cell(row),
            _round_cell(row),
            _acceleration_cell(row.acceleration, ceiling),
            f"{row.gradients:.0f}",
            f"{row.seconds:.2f}",
            _duration(row.break_even_seconds),
        )
    return table


def _most_acceleration(comparison: Comparison) -> float:
    """What a method gets that is better than the ruler ever is."""
    ruler_length = comparison.parallelism * comparison.rounds + 1
    return acceleration([0.0] + [-math.inf] * comparison.rounds, [0.0] * ruler_length)


def _loss_cell(row: Row) -> str:
    if row.final_loss.count == 0:
        return "diverged"
    if row.final_loss.count < row.seeds:
        return _figures(row.final_loss.mean, 3) + _only(row.final_loss, row.seeds)
    mean, deviation = _figures(row.final_loss.mean, 3), row.final_loss.deviation
    return mean if math.isnan(deviation) else f"{mean} ± {_figures(deviation, 1)}"


def _round_cell(row: Row) -> str:
    reached = row.rounds_to_vanilla
    return f"{reached.mean:.1f}{_only(reached, row.seeds)}" if reached.count else "–"


def _only(spread: Spread, seeds: int) -> str:
    return f" ({spread.count})" if 0 < spread.count < seeds else ""


def _acceleration_cell(spread: Spread, ceiling: float) -> str:
    mean = "≥ " * _is_at_ceiling(spread.mean, ceiling) + f"{spread.mean:.2f}"
    return mean if math.isnan(spread.deviation) else f"{mean} ± {spread.deviation:.2f}"


def _is_at_ceiling(gained: float, ceiling: float) -> bool:
    return gained > 0.999 * ceiling


def _figures(value: float, digits: int) -> str:
    """So many significant figures, and an exponent only where the number is far from 1."""
    return f"{float(f'{value:.{digits}g}'):g}"


def _duration(seconds: float) -> str:
    if math.isnan(seconds):
        return "–"
    if math.isinf(seconds):
        return "never"
    scale, unit = next((s, u) for s, u in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")) if seconds >= s or s == 1e-6)
    return f"{_figures(seconds / scale, 2)} {unit}"


def _footnotes(comparison: Comparison, rows: Sequence[Row]) -> list[str]:
    lines = [
        f"as good at round: the first with a loss no higher than vanilla's after round {comparison.rounds}",
        "seconds: of a run on this machine, with the gradients of a round evaluated in turn",
        "pays above: where N gradients at once take the time of one, the method pays if a",
        "    gradient takes longer than this: overhead of a round / (acceleration - 1)",
    ]
    if any(0 < spread.count < row.seeds for row in rows for spread in (row.final_loss, row.rounds_to_vanilla)):
        lines.append("(n): only n of the seeds came that far")
    if any(_is_at_ceiling(row.acceleration.mean, _most_acceleration(comparison)) for row in rows):
        lines.append("≥: better than vanilla ever gets; more cannot be measured")
    tuned = [row for row in rows if row.method == "data-parallel"]
    if tuned:
        rates = ", ".join(f"{row.problem} {' or '.join(f'{lr:.3g}' for lr in row.lr)}" for row in tuned)
        lines.append(f"data-parallel took the best lr of × 1, √N, N for each seed: {rates}")
    return lines


# ---------------------------------------------------------------------- reproduce


@app.command()
def reproduce(
    figures: Annotated[list[str], typer.Argument(metavar="FIGURE", help=f"Of {', '.join(FIGURES)}.")],
    scale: Annotated[
        str, typer.Option(help="small: minutes to an hour on 2 cores. paper: the paper's sizes.")
    ] = "small",
    seeds: Annotated[
        int | None,
        typer.Option(help="Starts of each problem: seeds 0, 1, ...", show_default="each figure's own"),
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(help="Rounds of every method but vanilla.", show_default="each figure's own")
    ] = None,
    dim: Annotated[
        int | None,
        typer.Option(help="Dimension of the functions of fig2 and fig6.", show_default="the scale's"),
    ] = None,
    workers: Annotated[int, typer.Option(help="Runs made at once, each in one thread.")] = 1,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep the runs that the JSON in OUT holds, and make the others.")
    ] = False,
    out: Annotated[
        Path, typer.Option(help="Folder for a JSON, a PNG and a page of text for each figure.")
    ] = Path("out"),
) -> None:
    """Make figures of the OptEx paper again: run, print, draw, and hold to its claims.

    The JSON has every run; picture and page are made from it. A page that is there keeps its words and gets
    new tables. An interrupted command goes on with --resume.
    """
    try:
        choice = Choice(scale, seeds, rounds, dim)
        plans = [make_figure(name, choice) for name in figures]
        if workers < 1:
            raise ValueError(f"workers: must be at least 1, got {workers}")
        _make_folder("out", out)
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
            write_page(out / f"{plan.name}.md", plan.title, about, runs)
            _print_figure(plan, about, runs, out)
    except (ValueError, ImportError, OSError) as error:
        _refuse(error)


def _reproduce(
    plan: Figure, choice: Choice, about: dict[str, Any], record: Path, kept: list[Record], workers: int
) -> list[Record]:
    """All runs of a figure, the record written after each."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    runs = list(kept)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(plan.name, total=len(cases(plan)), completed=len(runs))
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
        table.add_row(
            line.section,
            line.label,
            _figures(line.loss.mean, 4) if line.loss.count else "diverged",
            f"{line.rounds.mean:.1f}{_only(line.rounds, line.seeds)}" if line.rounds.count else "–",
            f"{line.steps:.2f}",
            f"{line.gradients:.0f}",
        )
    console.print(table)
    console.print()
    for check in checks(about, runs):
        sign = "holds" if check.holds else "fails"
        console.print(f"{sign}  {check.where}: {check.claim}: {check.measured}", markup=False, soft_wrap=True)
    console.print(f"{out / plan.name}.json, .png, .md", style="dim", markup=False)
    console.print()


# ---------------------------------------------------------------------- list


@app.command("list")
def list_names() -> None:
    """What can be compared: problems, methods, optimizers."""
    console = Console(highlight=False)
    groups = {
        "problems": {name: _problem_lines(entry) for name, entry in PROBLEMS.items()},
        "methods": {name: entry.description for name, entry in METHODS.items()},
        "optimizers": {name: _optimizer_line(name) for name in OPTIMIZERS},
    }
    for i, (title, group) in enumerate(groups.items()):
        console.print(("\n" if i else "") + title, style="bold")
        width = max(map(len, group))
        for name, text in group.items():
            first, *others = text.splitlines()
            console.print(f"  {name:{width}}  {first}", markup=False)
            for line in others:
                console.print(" " * (width + 4) + line, style="dim", markup=False)
    if any(entry.data is not None and find(entry.data) is None for entry in PROBLEMS.values()):
        console.print("\nno data yet: `optex fetch NAME` gets it", style="dim", markup=False)


def _problem_lines(entry: ProblemEntry) -> str:
    """What it is, whether its data is missing, and what --set can choose."""
    missing = entry.data is not None and find(entry.data) is None
    others = [option for option in entry.options if option not in ("dim", "noise", "batch_size")]
    chosen = textwrap.wrap(f"--set {', '.join(others)}", 50) if others else []
    return "\n".join([entry.description + " (no data yet)" * missing, *chosen])


def _optimizer_line(name: str) -> str:
    factory = OPTIMIZERS[name]
    made = factory.func if isinstance(factory, partial) else factory
    settings = factory.keywords if isinstance(factory, partial) else {}
    inside = ", ".join(f"{key}={value}" for key, value in settings.items())
    return f"lr {default_rate(name):<4g}  torch.optim.{made.__name__}" + f"({inside})" * bool(inside)


# ---------------------------------------------------------------------- fetch


@app.command("fetch")
def fetch_data(
    names: Annotated[list[str], typer.Argument(metavar="NAME", help=f"Of {', '.join(DATA_SETS)}.")],
) -> None:
    """Download public data sets into the user's cache, and check that they came whole."""
    for name in names:
        try:
            paths = fetch(name)
        except (ValueError, ImportError, OSError) as error:
            _refuse(error)
        typer.echo(f"{name}: {paths[0].parent}")
