"""The numbers of a figure, from its record: a summary of every curve over its seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optex.studies.measures import VANILLA, Outcome, Spread, Summary, acceleration, rounds_to_level
from optex.studies.plots import bootstrap_interval
from optex.studies.records import null_to_nan
from optex.studies.reproduce.record import Record, rounds_of

__all__ = ["CurveSummary", "interval", "last_rewards", "losses_of", "numbers", "percent", "runs_of"]


@dataclass(frozen=True)
class CurveSummary:
    """A curve of a section over its seeds.

    Attributes:
        section, label: names.
        summary: of the runs; the final loss is that after the section's last round, and ``rounds_to_vanilla``
            counts to vanilla's loss at the section's level round.
        share: ``rounds_to_vanilla`` over the level round.
        test: the last test error.
    """

    section: str
    label: str
    summary: Summary
    share: Spread
    test: Spread


def numbers(about: dict[str, Any], runs: Sequence[Record]) -> list[CurveSummary]:
    """A summary of every curve of every section, in their order.

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
    outcomes = [_outcome(part, run, its_vanilla) for run, its_vanilla in zip(group, vanilla, strict=True)]
    return CurveSummary(
        section=group[0]["section"],
        label=group[0]["label"],
        summary=Summary.over(outcomes),
        share=Spread.over(outcome.rounds_to_vanilla / part["level_round"] for outcome in outcomes),
        test=Spread.over(null_to_nan(run["test"].get(str(run["rounds"])) for run in group)),
    )


def _outcome(part: dict[str, Any], run: Record, vanilla: Record) -> Outcome:
    last = rounds_of(run).index(part["rounds"])
    loss, of_vanilla = losses_of(run), losses_of(vanilla)
    level = of_vanilla[rounds_of(vanilla).index(part["level_round"])]
    comparable = part["vanilla_rounds"] >= run["parallelism"] * part["rounds"]
    return Outcome(
        final_loss=loss[last],
        rounds_to_vanilla=rounds_to_level(loss, level, rounds_of(run)),
        acceleration=acceleration(loss[: last + 1], of_vanilla, run["parallelism"]) if comparable else math.nan,
        accepted=run["steps"][last] / part["rounds"],
        gradients=run["gradients"][last],
        seconds=run["seconds"],
        stopped=run["stopped"] is not None,
    )


def runs_of(runs: Sequence[Record], section: str, label: str) -> list[Record]:
    """The runs of one curve, of all its seeds."""
    return [run for run in runs if (run["section"], run["label"]) == (section, label)]


def losses_of(run: Record) -> list[float]:
    """The run's losses at its recorded rounds; NaN after it stopped."""
    return null_to_nan(run["loss"])


def last_rewards(runs: Sequence[Record], section: str, label: str) -> NDArray[np.float64]:  # [seeds]
    """Cumulative average reward after the last round; a run that stopped keeps what it had earned."""
    group = runs_of(runs, section, label)
    return np.array([-[loss for loss in run["loss"] if loss is not None][-1] for run in group])


def percent(line: CurveSummary) -> str:
    """The share of vanilla's rounds, in words."""
    if line.share.count == 0:
        return "not reached"
    seeds = line.summary.seeds
    reached = f" ({line.share.count} of {seeds} seeds)" if line.share.count < seeds else ""
    return f"{100 * line.share.mean:.1f} %{reached}"


def interval(
    values: NDArray[np.float64],  # [seeds]
) -> str:
    """Mean and its 95 % bootstrap interval, in words."""
    low, high = bootstrap_interval(values[:, None])
    return f"{values.mean():.4g} ({low[0]:.4g} to {high[0]:.4g})"
