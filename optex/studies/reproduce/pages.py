"""The page of a figure: what was run, its numbers, and which claims hold, all from the record."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from optex.studies.measures import VANILLA, Spread
from optex.studies.reproduce.claims import checks
from optex.studies.reproduce.numbers import interval, last_rewards, numbers, percent, runs_of
from optex.studies.reproduce.record import Record
from optex.studies.reproduce.studies import Figure
from optex.studies.tables import fill_text, markdown_table, places

__all__ = ["write_page"]

_YES: Final = "yes"
_NO: Final = "**no**"


def write_page(path: Path, figure: Figure, about: dict[str, Any], runs: Sequence[Record]) -> None:
    """Write the page, or fill in the tables of the one that is there and leave its words alone.

    Tables stand between ``<!-- table:NAME -->`` and ``<!-- end -->``; their names are run, numbers, checks. A
    page that exists need not have all of them.

    Args:
        path: of the page.
        figure: whose page it is.
        about: the record's ``meta``.
        runs: the record's runs.
    """
    numbers_table = _rewards_table if figure.judged_by == "reward" else _numbers_table
    tables = {
        "run": _run_table(about, runs),
        "numbers": numbers_table(about, runs),
        "checks": markdown_table(
            ("where", "claim", "measured", "holds"),
            [
                (check.where, check.claim, check.measured, _YES if check.holds else _NO)
                for check in checks(about, runs)
            ],
        ),
    }
    name = figure.name
    title = f"{name.capitalize()}: {figure.title}"
    text = path.read_text(encoding="utf-8") if path.exists() else _empty_page(title, name)
    shown = places(text)
    filled = fill_text(text, {table: tables[table] for table in tables if table in shown})
    path.write_text(filled, encoding="utf-8")


def _empty_page(title: str, name: str) -> str:
    parts = [f"# {title}", f"![{name}]({name}.png)"]
    for heading, table in (("What was run", "run"), ("Numbers", "numbers"), ("Claims", "checks")):
        parts += [f"## {heading}", f"<!-- table:{table} -->\n<!-- end -->"]
    return "\n\n".join(parts) + "\n"


def _run_table(about: dict[str, Any], runs: Sequence[Record]) -> str:
    rows = [
        (
            name,
            f"{part['problem']}, d = {part['dimension']:,}"
            + (f", batches of {part['batch_size']}" if part["batch_size"] else ""),
            f"{part['optimizer']}, lr {part['lr']:g}",
            str(part["parallelism"]),
            str(part["history_size"] or "each method's own"),
            f"{part['rounds']} (vanilla {part['vanilla_rounds']})",
            str(part["seeds"]),
        )
        for name, part in about["sections"].items()
    ]
    seconds = sum(run["seconds"] for run in runs)
    return (
        markdown_table(("section", "problem", "base optimizer", "N", "T0", "rounds", "seeds"), rows)
        + f"\n\n`{' '.join(about['command'])}` on {about['date'][:10]}: optex {about['optex']}, torch "
        f"{about['torch']}, Python {about['python']}, {about['cpus']} × {about['cpu']}, {about['threads']} "
        f"thread{'s' * (about['threads'] != 1)} a run, {seconds / 60:.1f} minutes of runs."
    )


def _numbers_table(about: dict[str, Any], runs: Sequence[Record]) -> str:
    lines = numbers(about, runs)
    tested = any(line.test.count for line in lines)
    timed = any(line.summary.acceleration.count for line in lines)
    head = ["section", "method", "last loss", "rounds to vanilla's", "of its rounds"]
    head += ["acceleration"] * timed + ["last test"] * tested
    rows = []
    for line in lines:
        summary = line.summary
        rounds = f"{summary.rounds_to_vanilla.mean:.1f}" if summary.rounds_to_vanilla.count else "–"
        cells = [line.section, line.label, _spread(summary.final_loss, summary.seeds), rounds, percent(line)]
        cells += [_spread(summary.acceleration, summary.seeds, ".2f")] * timed
        cells += [_spread(line.test, summary.seeds)] * tested
        rows.append([*cells, f"{summary.accepted:.2f}", f"{summary.gradients:.0f}", f"{summary.seconds:.1f}"])
    return markdown_table([*head, "steps a round", "gradients", "seconds of the run"], rows)


def _spread(spread: Spread, seeds: int, form: str = ".4g") -> str:
    if not spread.count:
        return "–"
    deviation = (
        "" if math.isnan(spread.deviation) else f" ± {spread.deviation:{'.2f' if form == '.2f' else '.1g'}}"
    )
    return f"{spread.mean:{form}}{deviation}" + (f" ({spread.count} seeds)" if spread.count < seeds else "")


def _rewards_table(about: dict[str, Any], runs: Sequence[Record]) -> str:
    rows = []
    for name, part in about["sections"].items():
        vanilla = last_rewards(runs, name, VANILLA)
        for label in part["curves"]:
            rewards = last_rewards(runs, name, label)
            group = runs_of(runs, name, label)
            rows.append(
                (
                    name,
                    label,
                    interval(rewards),
                    "–" if label == VANILLA else interval(rewards - vanilla),
                    "–" if label == VANILLA else f"{int((rewards >= vanilla).sum())} of {len(rewards)}",
                    f"{np.mean([run['steps'][-1] for run in group]) / part['rounds']:.2f}",
                    f"{np.mean([run['gradients'][-1] for run in group]):.0f}",
                    f"{np.mean([run['seconds'] for run in group]):.1f}",
                )
            )
    head = ("task", "method", "cumulative average reward", "more than vanilla", "seeds no worse")
    return markdown_table((*head, "steps a round", "gradients", "seconds of the run"), rows)
