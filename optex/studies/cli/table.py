"""What ``optex compare`` prints and puts on a page: a table for every problem, and what the columns mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from optex.studies.baselines import METHODS
from optex.studies.cli.app import Printer
from optex.studies.comparison import Comparison, Row
from optex.studies.measures import Spread, Summary, largest_acceleration
from optex.studies.problems import PROBLEMS

__all__ = ["Result", "figures", "print_result", "rounds_cell", "tell"]

_HEADERS: Final = (
    *("method", "final loss", "as good\nat round", "acceleration", "gradients", "seconds", "pays\nabove"),
)


@dataclass(frozen=True)
class Result:
    """A comparison in words and cells.

    Attributes:
        heading: what was run.
        headers: [columns], of every table, with line breaks where they are long.
        tables: for every problem that has runs, its title and its rows, each [columns].
        notes: what the columns mean, and the warnings raised in the runs.
    """

    heading: str
    headers: Sequence[str]
    tables: Sequence[tuple[str, Sequence[Sequence[str]]]]
    notes: Sequence[str]


def tell(comparison: Comparison, meta: dict[str, Any], rows: Sequence[Row], notes: Sequence[str]) -> Result:
    """The comparison in words and cells.

    Args:
        comparison: what was to be made.
        meta: as from ``describe``.
        rows: as from ``summarise``.
        notes: the warnings raised in the runs.
    """
    seeds = f"{comparison.seeds} seed" + "s" * (comparison.seeds > 1)
    history = "each method's own T0" if comparison.history_size is None else f"T0 = {comparison.history_size}"
    of_problem = {name: [row for row in rows if row.problem == name] for name in comparison.problems}
    return Result(
        heading=f"{comparison.optimizer}, lr {comparison.learning_rate:g}, N = {comparison.parallelism}, "
        f"{history}, {comparison.rounds} rounds, {seeds}",
        headers=_HEADERS,
        tables=[
            (_problem_line(comparison, meta, name), _cells(comparison, chosen))
            for name, chosen in of_problem.items()
            if chosen  # none where it was interrupted before the first run
        ],
        notes=[*_footnotes(comparison, rows), *notes],
    )


def print_result(result: Result) -> None:
    """Print the result on the terminal, as wide as that is."""
    printer = Printer()
    printer.line(result.heading)
    for line, cells in result.tables:
        printer.line()
        printer.line(line, style="bold")
        printer.table(result.headers, cells)
    printer.line()
    for line in result.notes:
        printer.line(line, style="dim")


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


def _cells(comparison: Comparison, rows: Sequence[Row]) -> list[tuple[str, ...]]:
    ceiling = largest_acceleration(comparison.rounds, comparison.reach)
    return [
        (
            row.method,
            _loss_cell(row.summary),
            rounds_cell(row.summary),
            _acceleration_cell(row.summary.acceleration, ceiling),
            f"{row.summary.gradients:.0f}",
            f"{row.summary.seconds:.2f}",
            _duration(row.break_even_seconds),
        )
        for row in rows
    ]


def _loss_cell(summary: Summary) -> str:
    loss = summary.final_loss
    if loss.count == 0:
        return "diverged"
    if loss.count < summary.seeds:
        return figures(loss.mean, 3) + _only(loss, summary.seeds)
    mean = figures(loss.mean, 3)
    return mean if math.isnan(loss.deviation) else f"{mean} ± {figures(loss.deviation, 1)}"


def rounds_cell(summary: Summary) -> str:
    """Rounds to vanilla's loss, and how many of the seeds got there where not all did."""
    reached = summary.rounds_to_vanilla
    return f"{reached.mean:.1f}{_only(reached, summary.seeds)}" if reached.count else "–"


def _only(spread: Spread, seeds: int) -> str:
    return f" ({spread.count})" if 0 < spread.count < seeds else ""


def _acceleration_cell(spread: Spread, ceiling: float) -> str:
    mean = "≥ " * _is_at_ceiling(spread.mean, ceiling) + f"{spread.mean:.2f}"
    return mean if math.isnan(spread.deviation) else f"{mean} ± {spread.deviation:.2f}"


def _is_at_ceiling(gained: float, ceiling: float) -> bool:
    return gained > 0.999 * ceiling


def figures(value: float, digits: int) -> str:
    """A number with so many significant digits, and with an exponent only if it is very large or small."""
    return f"{float(f'{value:.{digits}g}'):g}"


def _duration(seconds: float) -> str:
    if math.isnan(seconds):
        return "–"
    if math.isinf(seconds):
        return "never"
    scale, unit = next((s, u) for s, u in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")) if seconds >= s or s == 1e-6)
    return f"{figures(seconds / scale, 2)} {unit}"


def _footnotes(comparison: Comparison, rows: Sequence[Row]) -> list[str]:
    lines = [
        f"as good at round: the first with a loss no higher than vanilla's after round {comparison.rounds}",
        "seconds: of a run on this machine, with the gradients of a round evaluated in turn",
        "pays above: where N gradients at once take the time of one, the method pays if a gradient takes "
        "longer than this: overhead of a round / (acceleration - 1)",
    ]
    summaries = [row.summary for row in rows]
    if any(0 < s.count < all_.seeds for all_ in summaries for s in (all_.final_loss, all_.rounds_to_vanilla)):
        lines.append("(n): only n of the seeds came that far")
    ceiling = largest_acceleration(comparison.rounds, comparison.reach)
    if any(_is_at_ceiling(summary.acceleration.mean, ceiling) for summary in summaries):
        length = comparison.reach * comparison.rounds
        lines.append(f"≥: better than vanilla in all of its {length} rounds; more cannot be measured")
    for method in dict.fromkeys(row.method for row in rows if METHODS[row.method].tunes_rate):
        tuned = [row for row in rows if row.method == method]
        rates = ", ".join(f"{row.problem} {' or '.join(f'{lr:.3g}' for lr in row.lr)}" for row in tuned)
        lines.append(f"{method} took the best lr of × 1, √N, N for each seed: {rates}")
    return lines
