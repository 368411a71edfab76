"""The numbers of a figure, from its record: a line for every curve, over the seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optex.studies.measures import VANILLA, Spread, acceleration, rounds_to_level
from optex.studies.plots import bootstrap_interval
from optex.studies.records import null_to_nan
from optex.studies.reproduce.record import Record, rounds_of

__all__ = ["CurveSummary", "interval", "last_rewards", "losses_of", "numbers", "percent", "runs_of"]


@dataclass(frozen=True)
class CurveSummary:
    """A curve of a section over its seeds.

    Attributes:
        section, label: names.
        seeds: runs made.
        loss: after the section's last round; NaN for runs that stopped are left out.
        rounds: to vanilla's loss at the section's level round, over the runs that got there.
        share: of vanilla's rounds that this is, over the same runs.
        acceleration: as ``optex.studies.measures.acceleration``; none where vanilla is not run far enough.
        test: the last test error.
        steps: kept a round, mean.
        gradients, seconds: of a run, mean.
        stopped: runs that ended early.
    """

    section: str
    label: str
    seeds: int
    loss: Spread
    rounds: Spread
    share: Spread
    acceleration: Spread
    test: Spread
    steps: float
    gradients: float
    seconds: float
    stopped: int


def numbers(about: dict[str, Any], runs: Sequence[Record]) -> list[CurveSummary]:
    """A line for every curve of every section, in their order.

    Args:
        about: the record's ``meta``.
        runs: the record's runs.
    """
    lines = []
    for name, part in about["sections"].items():
        for label in part["curves"]:
            group = runs_of(runs, name, label)
            vanilla = {run["seed"]: run for run in runs_of(runs, name, VANILLA)}
            lines.append(_line(part, group, [vanilla[run["seed"]] for run in group]))
    return lines


def _line(part: dict[str, Any], group: Sequence[Record], vanilla: Sequence[Record]) -> CurveSummary:
    last = rounds_of(group[0]).index(part["rounds"])
    pairs = [(run, losses_of(run), losses_of(its)) for run, its in zip(group, vanilla, strict=True)]
    level = rounds_of(vanilla[0]).index(part["level_round"])
    rounds = [rounds_to_level(loss, its[level], rounds_of(run)) for run, loss, its in pairs]
    return CurveSummary(
        section=group[0]["section"],
        label=group[0]["label"],
        seeds=len(group),
        loss=Spread.over(loss[last] for _, loss, _ in pairs),
        rounds=Spread.over(rounds),
        share=Spread.over(value / part["level_round"] for value in rounds),
        acceleration=Spread.over(
            acceleration(loss[: last + 1], its, run["parallelism"])
            for run, loss, its in pairs
            if part["vanilla_rounds"] >= run["parallelism"] * part["rounds"]
        ),
        test=Spread.over(null_to_nan(run["test"].get(str(run["rounds"])) for run in group)),
        steps=float(np.mean([run["steps"][last] / part["rounds"] for run in group])),
        gradients=float(np.mean([run["gradients"][last] for run in group])),
        seconds=float(np.mean([run["seconds"] for run in group])),
        stopped=sum(run["stopped"] is not None for run in group),
    )


def runs_of(runs: Sequence[Record], section: str, label: str) -> list[Record]:
    """Those of one curve, all its seeds."""
    return [run for run in runs if (run["section"], run["label"]) == (section, label)]


def losses_of(run: Record) -> list[float]:
    """Its losses, NaN after it stopped."""
    return null_to_nan(run["loss"])


def last_rewards(runs: Sequence[Record], section: str, label: str) -> NDArray[np.float64]:  # [seeds]
    """Cumulative average reward after the last round; a run that stopped keeps what it had earned."""
    group = runs_of(runs, section, label)
    return np.array([-[loss for loss in run["loss"] if loss is not None][-1] for run in group])


def percent(line: CurveSummary) -> str:
    """The share of vanilla's rounds, in words."""
    if line.rounds.count == 0:
        return "not reached"
    reached = f" ({line.rounds.count} of {line.seeds} seeds)" if line.rounds.count < line.seeds else ""
    return f"{100 * line.share.mean:.1f} %{reached}"


def interval(
    values: NDArray[np.float64],  # [seeds]
) -> str:
    """Mean and its 95 % bootstrap interval, in words."""
    low, high = bootstrap_interval(values[:, None])
    return f"{values.mean():.4g} ({low[0]:.4g} to {high[0]:.4g})"
