"""The paper's claims about a figure, and ours, checked against the record."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np

from optex.studies.measures import VANILLA, rounds_behind
from optex.studies.reproduce.numbers import (
    CurveSummary,
    interval,
    last_rewards,
    losses_of,
    numbers,
    percent,
    runs_of,
)
from optex.studies.reproduce.record import Record
from optex.studies.reproduce.studies import FITTED, LAST_ONLY

__all__ = ["Check", "checks"]


@dataclass(frozen=True)
class Check:
    """A claim, what was measured, and whether it holds here.

    Attributes:
        where: the section, or the curves, that it is about.
        claim: in words; whose claim it is comes first.
        measured: in words.
        holds: whether the measured numbers agree with it.
    """

    where: str
    claim: str
    measured: str
    holds: bool


def checks(about: dict[str, Any], runs: Sequence[Record]) -> list[Check]:
    """The paper's claims about a figure, and ours, checked against the record.

    Args:
        about: the record's ``meta``.
        runs: the record's runs.
    """
    lines = {(line.section, line.label): line for line in numbers(about, runs)}
    return list(_CHECKS[about["figure"]](about, runs, lines))


_Lines = dict[tuple[str, str], CurveSummary]


def _within(line: CurveSummary, share: float) -> bool:
    return line.share.count == line.summary.seeds and line.share.mean <= share


def _fig2(about: dict[str, Any], runs: Sequence[Record], lines: _Lines) -> Iterator[Check]:
    for name, part in about["sections"].items():
        reached = lines[name, "optex-paper"]
        paper, ours, target = (lines[name, label].summary for label in ("optex-paper", "optex", "target"))
        root = math.sqrt(part["parallelism"])
        yield Check(
            name,
            "paper: OptEx reaches vanilla's last gap in fewer rounds",
            percent(reached),
            _within(reached, 1 - 1 / part["level_round"]),
        )
        yield Check(
            name,
            f"paper, in theory and for SGD: OptEx is worth √N = {root:.2f} of vanilla's rounds",
            f"{paper.acceleration.mean:.2f}",
            paper.acceleration.mean >= root,
        )
        yield Check(
            name,
            "paper: target ends no higher than OptEx",
            f"{target.final_loss.mean:.4g}, {paper.final_loss.mean:.4g}",
            target.final_loss.mean <= paper.final_loss.mean,
        )
        behind, compared = _behind(runs, name)
        yield Check(
            name,
            "ours: `optex` is not behind vanilla after any round of any seed",
            f"behind after {behind} of {compared}",
            behind == 0,
        )
        yield Check(
            name,
            "ours: `optex` is worth as much as `optex-paper`, or more",
            f"{ours.acceleration.mean:.2f}, {paper.acceleration.mean:.2f}",
            ours.acceleration.mean >= paper.acceleration.mean,
        )


def _behind(runs: Sequence[Record], section: str) -> tuple[int, int]:
    """After how many rounds, over all seeds, `optex` is behind vanilla; and how many rounds there are."""
    vanilla = {run["seed"]: losses_of(run) for run in runs_of(runs, section, VANILLA)}
    ours = {run["seed"]: losses_of(run) for run in runs_of(runs, section, "optex")}
    behind = sum(rounds_behind(loss, vanilla[seed]) for seed, loss in ours.items())
    return behind, sum(len(loss) - 1 for loss in ours.values())


def _fig3(about: dict[str, Any], runs: Sequence[Record], _: _Lines) -> Iterator[Check]:
    for name in about["sections"]:
        for label, whose, ends, holds in (
            ("optex-paper", "paper", "a higher", operator.gt),
            (FITTED, "paper", "a higher", operator.gt),
            ("optex", "ours", "no lower", operator.ge),
        ):
            gain = last_rewards(runs, name, label) - last_rewards(runs, name, VANILLA)
            claim = f"{whose}: `{label}` ends with {ends} reward than vanilla"
            yield Check(name, claim, f"difference {interval(gain)}", bool(holds(gain.mean(), 0)))


def _fig4(about: dict[str, Any], runs: Sequence[Record], lines: _Lines) -> Iterator[Check]:
    for name, part in about["sections"].items():
        if part["parallelism"] == 16:
            yield from _sixteen(name, runs, lines)
            continue
        for whose, label, share in (
            ("paper", "optex-paper", 0.99),
            ("ideal", "target", 1 / part["parallelism"]),
            ("ours", "optex", 0.3),
            ("ours", "optex-paper", 0.6),
            ("ours", FITTED, 0.6),
        ):
            line = lines[name, label]
            yield Check(
                name,
                f"{whose}: `{label}` at vanilla's last loss within {100 * share:.0f} % of its rounds",
                percent(line),
                _within(line, share),
            )
        ours, target = lines[name, "optex"].test, lines[name, "target"].test
        spread = 0.0 if math.isnan(target.deviation) else target.deviation
        yield Check(
            name,
            "ours: test error after the last round above target's by no more than its spread over seeds",
            f"{ours.mean:.4g}, {target.mean:.4g} ± {spread:.2g}",
            ours.mean <= target.mean + spread,
        )


def _sixteen(name: str, runs: Sequence[Record], lines: _Lines) -> Iterator[Check]:
    ours = lines[name, "optex"].summary
    means = {
        label: np.mean([losses_of(run)[10::10] for run in runs_of(runs, name, label)], axis=0)
        for label in ("optex", "optex-paper", FITTED)
    }
    yield Check(name, "ours: `optex` does not diverge", f"{ours.stopped} runs stopped", ours.stopped == 0)
    yield Check(
        name, "ours: at least 5 steps kept a round, on average", f"{ours.accepted:.2f}", ours.accepted >= 5
    )
    for label in ("optex-paper", FITTED) if len(means["optex"]) else ():
        yield Check(
            name,
            f"ours: `optex` below `{label}` after every tenth round, means over the seeds",
            "; ".join(f"{a:.4g}, {b:.4g}" for a, b in zip(means["optex"], means[label], strict=True)),
            bool((means["optex"] < means[label]).all()),
        )


def _fig6(about: dict[str, Any], _: Sequence[Record], lines: _Lines) -> Iterator[Check]:
    (name,) = about["sections"]

    def pair(claim: str, better: str, worse: str) -> Check:
        a, b = (_rounds_needed(lines[name, label]) for label in (better, worse))
        measured = ", ".join("not reached" if math.isinf(n) else f"{n:.1f} rounds" for n in (a, b))
        return Check(f"`{better}`, `{worse}`", claim, measured, a <= b)

    yield pair("(a) evaluating all proxies is no slower than the last alone", "optex-paper", LAST_ONLY)
    for other in ("keep lowest-loss", "keep smallest-gradient"):
        yield pair("(b) keeping the last result is no slower than another choice", "optex-paper", other)
    for longer, shorter in pairwise(("T0 = 40", "optex-paper", "T0 = 10", "T0 = 5", "T0 = 2")):
        yield pair("(c) a longer history is no slower", longer, shorter)
    for wider, narrower in pairwise(("N = 16", "N = 10", "optex-paper", "N = 2")):
        yield pair("(d) more parallelism is no slower", wider, narrower)
    for wider, narrower in pairwise(("optex, N = 16", "optex, N = 10", "optex", "optex, N = 2")):
        yield pair("(f) more parallelism is no slower, verified", wider, narrower)


def _rounds_needed(line: CurveSummary) -> float:
    """Mean rounds to vanilla's level over the seeds; infinite where a seed did not reach it."""
    rounds = line.summary.rounds_to_vanilla
    return rounds.mean if rounds.count == line.summary.seeds else math.inf


_CHECKS: Final[dict[str, Callable[[dict[str, Any], Sequence[Record], _Lines], Iterator[Check]]]] = {
    "fig2": _fig2,
    "fig3": _fig3,
    "fig4": _fig4,
    "fig6": _fig6,
}
