"""``optex compare``: methods on problems."""

from __future__ import annotations

import sys
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
import typer

from optex.checks import check_integer, shown
from optex.studies.cli.app import INTERRUPTED, check_file, progress, refuse
from optex.studies.cli.settings import read_settings
from optex.studies.cli.table import Result, print_result, tell
from optex.studies.comparison import (
    Case,
    Comparison,
    Run,
    describe,
    measurable,
    read_runs,
    run_case,
    summarise,
    write_json,
)
from optex.studies.html import check_page_path, html_page
from optex.studies.plots import check_plot_path, plot_comparison, write_plot
from optex.studies.records import write_whole

__all__ = ["Output", "run"]

_WRITE_EVERY: Final = 30.0  # seconds between records of a comparison under way


@dataclass
class Output:
    """Where the runs go.

    Attributes:
        json: file of the record, None for none; written every half minute, so that little is lost if the
            machine fails.
        plot: file of the picture, None for none.
        html: file of the page, None for none.
        resume: whether runs that are in the record are kept.
        written: when the record was last written, by ``time.monotonic()``.
    """

    json: Path | None
    plot: Path | None
    html: Path | None
    resume: bool
    written: float = field(default_factory=time.monotonic)

    def check(self) -> None:
        """Refuse, before any run, files that could not be written.

        Raises:
            ValueError: a file cannot be written, its format is unknown, or there is no file to resume from.
        """
        if self.plot is not None:
            check_plot_path(self.plot)
        if self.html is not None:
            check_page_path(self.html)
        check_file("json", self.json)
        check_file("plot", self.plot)
        check_file("html", self.html)
        if self.resume and self.json is None:
            raise ValueError("resume: needs the file that has the runs; name it with --json")

    def keep(self, meta: dict[str, Any], runs: Sequence[Run], *, now: bool = False) -> None:
        """Write the record if one is asked for, and half a minute has passed since the last time or ``now``."""
        if self.json is not None and runs and (now or time.monotonic() - self.written > _WRITE_EVERY):
            write_json(self.json, meta, runs)
            self.written = time.monotonic()

    def draw(self, meta: dict[str, Any], runs: Sequence[Run], result: Result) -> None:
        """Write the picture and the page that are asked for."""
        if self.plot is not None:
            write_plot(self.plot, plot_comparison(runs, meta["minimum"]))
        if self.html is not None:
            write_whole(self.html, html_page(meta, runs, result))


def run(output: Output, threads: int, **choices: Any) -> None:
    """Make the runs, print their table, and write the record, the picture and the page that were asked for."""
    try:
        comparison = _comparison(**choices)
        check_integer(None, "threads", threads)
        output.check()
        comparison.check()
        torch.set_num_threads(threads)
        meta = {**describe(comparison), "command": ["optex", *sys.argv[1:]]}
        kept = read_runs(output.json, comparison) if output.resume and output.json is not None else []
        runs, notes, whole = _run_all(comparison, kept, output, meta)
        if whole or len(runs) > len(kept):
            output.keep(meta, runs, now=True)
        if shown := measurable(runs):
            result = tell(comparison, meta, summarise(shown), notes)
            print_result(result)
            output.draw(meta, shown, result)
    except (ValueError, ImportError, OSError) as error:
        refuse(error)
    if not whole:
        _say_how_to_go_on(len(runs), len(comparison.cases()), output)
        raise typer.Exit(INTERRUPTED)


def _comparison(
    problems: Sequence[str], methods: str, stride: str, settings: Sequence[str], **others: Any
) -> Comparison:
    return Comparison(
        problems=tuple(problems),
        methods=tuple(name.strip() for name in methods.split(",") if name.strip()),
        stride=_read_stride(stride),
        problem_options=read_settings(problems, settings),
        **others,
    )


def _read_stride(text: str) -> Any:
    """``"auto"`` or a number, whose range ``Comparison`` checks."""
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise ValueError(f"stride: must be auto or a number of at least 1, got {shown(text)}") from None


def _run_all(
    comparison: Comparison, kept: Sequence[Run], output: Output, meta: dict[str, Any]
) -> tuple[list[Run], list[str], bool]:
    """The runs, the warnings raised in them, each kind once with its count, and whether all were made."""
    cases, known = comparison.cases(), {run.case: run for run in kept}
    runs: list[Run] = []
    with warnings.catch_warnings(record=True) as caught, progress(len(cases), len(known)) as tell:
        warnings.simplefilter("always")
        try:
            for case in cases:
                if case in known:
                    runs.append(known[case])
                    continue
                runs.append(run_case(comparison, case))
                tell(f"{case.problem}, seed {case.seed}: {case.method}")
                output.keep(meta, [*runs, *_later(known, runs)])
        except KeyboardInterrupt:
            runs += _later(known, runs)
    counts = Counter(warning.category.__name__ for warning in caught)
    first = {warning.category.__name__: str(warning.message) for warning in reversed(caught)}
    notes = [f"{count} × {kind}, the first: {first[kind]}" for kind, count in counts.items()]
    return runs, notes, len(runs) == len(cases)


def _later(known: Mapping[Case, Run], runs: Sequence[Run]) -> list[Run]:
    """An earlier command's runs that come after these; a record written now must have them, too."""
    there = {run.case for run in runs}
    return [run for case, run in known.items() if case not in there]


def _say_how_to_go_on(made: int, planned: int, output: Output) -> None:
    remedy = (
        "the same command with --resume makes the others"
        if made and output.json is not None
        else "with --json FILE the runs that are finished are kept, and --resume makes the others"
    )
    typer.echo(f"optex: interrupted after {made} of {planned} runs; {remedy}", err=True)
