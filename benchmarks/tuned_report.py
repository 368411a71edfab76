"""Tables and pictures of `benchmarks/tuned.py`, from the JSON files that it wrote."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from optex.studies.measures import geometric_mean
from optex.studies.plots import METHOD_STYLES, method_label
from optex.studies.records import null_to_nan
from optex.studies.tables import fill, markdown_table
from optex.studies.tuning import FRACTIONS, Attempt, Choice, Tuned, tuned

ROOT = Path(__file__).resolve().parents[1]
VANILLA = "vanilla 1"
QUASI_NEWTON = ("lbfgs 1", "lbfgs-scipy 1", "lbfgs-scipy-50 1", "nonlinear-cg 1")
IN_TURN = (VANILLA, "optex 1", "nowcast 1", "nowcast-dmd 1", *QUASI_NEWTON)
AT_ONCE = tuple(
    f"{name} 8"
    for name in (
        "target",
        "data-parallel",
        "line-search",
        "hold-last",
        "picard",
        "nowcast",
        "nowcast-dmd",
        "optex-paper",
        "optex",
    )
)
BY_N = (VANILLA, "optex 1", "optex 4", "optex 8", "optex 16")
UNREACHED = 2.0  # what a level that is not reached counts as, in vanilla's rounds
WORTH = 0.85  # of tuned vanilla's gradients: from here on down a change of method is advised
GOALS = {"optex 1": (0.5, 0.85), "optex 8": (0.2, 0.3)}  # deterministic, stochastic: rounds over vanilla's
DRAWN = (
    VANILLA,
    "target 8",
    "lbfgs-scipy 1",
    "nowcast-dmd 1",
    "picard 8",
    "optex-paper 8",
    "optex 1",
    "optex 8",
)


@dataclass(frozen=True)
class Outcome:
    """A problem's record, each method at its best.

    Attributes:
        record: as in its file.
        best: method and N -> one for each level.
    """

    record: Mapping[str, Any]
    best: Mapping[str, Sequence[Tuned]]

    @property
    def deterministic(self) -> bool:
        """Whether gradients are exact."""
        return bool(self.record["deterministic"])

    def rounds(self, method: str, level: int = -1) -> float:
        """Gradients in turn to a level; infinite where it is not reached, NaN where the method was not run."""
        return self.best[method][level].rounds if method in self.best else math.nan

    def gradients(self, method: str, level: int = -1) -> float:
        """Gradients in all."""
        return self.best[method][level].gradients if method in self.best else math.nan

    def share(self, method: str, level: int, what: str = "rounds") -> float:
        """Of vanilla's; where the level is not reached twice that, for each gradient at once."""
        mine, vanilla = (getattr(self, what)(name, level) for name in (method, VANILLA))
        at_once = int(method.rpartition(" ")[2]) if what == "gradients" else 1
        return UNREACHED * at_once if math.isinf(mine) else mine / vanilla


def outcome(record: Mapping[str, Any]) -> Outcome:
    """Each method of a record at its best."""
    best = {}
    for method, entry in record["methods"].items():
        attempts = [
            Attempt(Choice(optimizer, rate), seed, _reached(rounds), _reached(gradients), null_to_nan(held), [])
            for optimizer, rate, seed, rounds, gradients, _, held in entry["runs"]
        ]
        best[method] = [tuned(attempts, level, record["seeds"]) for level in range(len(FRACTIONS))]
    return Outcome(record, best)


def _reached(counts: Iterable[float | None]) -> list[float]:
    return [math.inf if count is None else float(count) for count in counts]


# ------------------------------------------------------------------ tables


def number(value: float) -> str:
    """A count in a table."""
    if math.isnan(value):
        return ""
    return "–" if math.isinf(value) else f"{value:g}"


def title(method: str) -> str:
    """Its name, with N where there is more than one gradient at once."""
    name, _, n = method.rpartition(" ")
    return name if n == "1" and name != "optex" else f"{name}, N = {n}"


def count_table(found: Mapping[str, Outcome], methods: Sequence[str], what: str) -> str:
    """Gradients, in turn or in all, to vanilla's best loss; the fewest of each row in bold, target aside."""
    rows = []
    for name, entry in found.items():
        values = [getattr(entry, what)(method) for method in methods]
        rivals = [v for v, method in zip(values, methods, strict=True) if not method.startswith("target")]
        least = min((v for v in rivals if math.isfinite(v)), default=math.nan)
        cells = [
            f"**{number(v)}**" if v == least and not method.startswith("target") else number(v)
            for v, method in zip(values, methods, strict=True)
        ]
        rows.append([name, number(entry.rounds(VANILLA)), *cells] if VANILLA not in methods else [name, *cells])
    first = ["problem"] if VANILLA in methods else ["problem", "vanilla"]
    return markdown_table([*first, *map(title, methods)], rows)


def mean_share(entries: Sequence[Outcome], method: str, levels: Sequence[int], what: str) -> float:
    """Geometric mean of the shares over problems and levels; NaN where the method was not run on one."""
    if not entries or any(method not in entry.best for entry in entries):
        return math.nan
    return geometric_mean([entry.share(method, level, what) for entry in entries for level in levels], 1e-3)


def mean_table(entries: Sequence[Outcome]) -> str:
    """Of vanilla's gradients, in turn and in all, by level."""
    everywhere, rows = range(len(FRACTIONS)), []
    for method in dict.fromkeys((*IN_TURN, *BY_N, *AT_ONCE)):
        groups = [[level] for level in everywhere] + [list(everywhere)]
        cells = [mean_share(entries, method, group, "rounds") for group in groups]
        cells.append(mean_share(entries, method, list(everywhere), "gradients"))
        if not math.isnan(cells[-1]):
            rows.append([title(method), *(f"{value:.2f}" for value in cells)])
    marks = [f"R × {fraction:g}" for fraction in FRACTIONS]
    return markdown_table(["method", *marks, "all levels", "gradients in all"], rows)


def goal_lines(deterministic: Sequence[Outcome], stochastic: Sequence[Outcome]) -> str:
    """The goals of the study, and what came of them."""
    lines, levels = [], list(range(len(FRACTIONS)))
    for method, goals in GOALS.items():
        what = "gradients" if method.endswith(" 1") else "rounds"
        for kind, entries, goal in zip(
            ("deterministic", "stochastic"), (deterministic, stochastic), goals, strict=True
        ):
            value = mean_share(entries, method, levels, what)
            if not math.isnan(value):
                verdict = "met" if value <= goal else "missed"
                lines.append(
                    f"- {title(method)}, {kind} problems: {value:.3f} of vanilla's {what}, where at most "
                    f"{goal:g} was the goal: {verdict}."
                )
    return "\n".join(lines)


def winner_table(found: Mapping[str, Outcome]) -> str:
    """Who needs the fewest, on each problem."""
    rows = []
    for name, entry in found.items():
        groups = (
            ([m for m in entry.best if m.endswith(" 1")], "rounds"),
            ([m for m in entry.best if not m.startswith("target")], "rounds"),
            ([m for m in entry.best if not m.startswith("target")], "gradients"),
        )
        cells = []
        for methods, what in groups:
            best = min(methods, key=lambda m, what=what: getattr(entry, what)(m))
            cells.append(f"{title(best)}: {number(getattr(entry, what)(best))}")
        rows.append([name, number(entry.rounds(VANILLA)), *cells])
    head = ["problem", "vanilla", "one gradient at a time", "up to 16 at once, in turn", "gradients in all"]
    return markdown_table(head, rows)


def choice_table(found: Mapping[str, Outcome]) -> str:
    """The optimizers and rates that were best at vanilla's best loss."""
    methods = (VANILLA, "optex 1", "optex 8", "optex-paper 8", "picard 8", "data-parallel 8", "nowcast-dmd 1")
    rows = []
    for name, entry in found.items():
        chosen = [entry.best[m][-1].choice if m in entry.best else None for m in methods]
        rows.append([name, *("–" if c is None else f"{c.optimizer} {c.rate:g}" for c in chosen)])
    return markdown_table(["problem", *map(title, methods)], rows)


def held_table(found: Mapping[str, Outcome]) -> str:
    """What was held out, measured when vanilla's best loss is reached."""
    methods = [VANILLA, "optex 1", "optex 8", "target 8", "data-parallel 8", "optex-paper 8", "picard 8"]
    rows = []
    for name, entry in found.items():
        values = [entry.best[m][-1].held if m in entry.best else math.nan for m in methods]
        if not math.isnan(values[0]):
            rows.append([name, *("–" if math.isnan(v) else f"{v:.3g}" for v in values)])
    return markdown_table(["problem", *map(title, methods)], rows)


# ------------------------------------------------------------------ advice


def advise(entry: Outcome) -> str:
    """What to use, by rule.

    One gradient at a time: the quasi-Newton method where one needs the fewest; else optex where it needs at
    most ``WORTH`` of tuned vanilla's; else tune the rate and stay. Several at once: optex where it needs at
    most ``WORTH`` of that and no more rounds than every other at 8, else that other one.
    """
    vanilla, alone = entry.rounds(VANILLA), entry.rounds("optex 1")
    quasi = {m: entry.rounds(m) for m in QUASI_NEWTON if math.isfinite(entry.rounds(m))}
    choice = entry.best[VANILLA][-1].choice
    at_rate = "vanilla" if choice is None else f"vanilla with {choice.optimizer} {choice.rate:g}"
    best = min(quasi, key=lambda m: quasi[m]) if quasi else None
    if best is not None and quasi[best] < min(alone, vanilla):
        fewest = quasi[best]
        times = "" if math.isinf(alone) else f", {alone / fewest:.1f} times as many"
        first = f"**{title(best)}**, {number(fewest)} gradients; optex, N = 1: {number(alone)}{times}; "
        first += f"{at_rate}: {number(vanilla)}"
    elif alone <= WORTH * vanilla:
        fewest = alone
        first = f"**optex, N = 1**, {number(alone)} gradients; {at_rate}: {number(vanilla)}"
        if entry.deterministic:
            first += f"; quasi-Newton: {number(min(quasi.values(), default=math.inf))}"
    else:
        fewest = vanilla
        first = (
            f"**tune the rate, stay with the base optimizer**: {at_rate} needs {number(vanilla)} gradients, "
        )
        first += f"optex, N = 1: {number(alone)}"
    return f"{first}. {_several(entry, fewest)}"


def _several(entry: Outcome, fewest: float) -> str:
    ours = entry.rounds("optex 8")
    others = {m: entry.rounds(m) for m in AT_ONCE if m not in ("target 8", "optex 8") and m in entry.best}
    rival = min(others, key=lambda m: others[m], default=None)
    theirs = math.inf if rival is None else others[rival]
    if min(ours, theirs) > WORTH * fewest:
        return f"Eight at once gain nothing (optex {number(ours)} rounds)."
    if ours <= theirs:
        return f"Eight at once: **optex**, {number(ours)} rounds."
    return f"Eight at once: **{title(str(rival))}**, {number(theirs)} rounds; optex {number(ours)}."


def advice_lines(found: Mapping[str, Outcome]) -> str:
    """A line a problem."""
    return "\n".join(f"- *{name}*: {advise(entry)}" for name, entry in found.items())


# ------------------------------------------------------------------ pictures


REACHED = "the loss to reach"


def in_legend(method: str) -> str:
    """The method's title; of target, what it is."""
    name, _, n = method.rpartition(" ")
    return method_label(name, int(n)) if name == "target" else title(method)


def style_of(method: str) -> dict[str, Any]:
    """The method's own; with one gradient a round those are thin and dashed that also run with several."""
    name, _, n = method.rpartition(" ")
    style = dict(METHOD_STYLES[name])
    return (
        style | {"linestyle": (0, (4, 1.5)), "linewidth": 1.6} if n == "1" and f"{name} 8" in AT_ONCE else style
    )


def draw_profiles(deterministic: Sequence[Outcome], stochastic: Sequence[Outcome]) -> Figure:
    """Dolan and Moré's profiles: the share of problems and levels within a factor τ of the fewest of all."""
    figure = Figure(figsize=(11, 7.4), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey=True)
    factors = np.logspace(0, np.log10(32), 200)
    for row, (kind, entries) in zip(
        panels, (("deterministic", deterministic), ("stochastic", stochastic)), strict=True
    ):
        for axes, what in zip(row, ("rounds", "gradients"), strict=True):
            shown = [
                m for m in dict.fromkeys((*IN_TURN, *AT_ONCE)) if all(m in entry.best for entry in entries)
            ]
            shown = [m for m in shown if m != "target 8" and entries]
            counts = np.array(
                [
                    [getattr(entry, what)(m, level) for m in shown]
                    for entry in entries
                    for level in range(len(FRACTIONS))
                ]
            )
            for column, method in enumerate(shown):
                ratios = counts[:, column] / counts.min(axis=1)
                axes.plot(
                    factors, [(ratios <= f).mean() for f in factors], label=title(method), **style_of(method)
                )
            words = "in turn" if what == "rounds" else "in all"
            axes.set(xscale="log", title=f"{kind}: gradients {words}", ylim=(0, 1.02), xlim=(1, 32))
            axes.set_xticks([1, 2, 4, 8, 16, 32], ["1", "2", "4", "8", "16", "32"])
            axes.minorticks_off()
            axes.grid(alpha=0.3)
        row[0].set_ylabel("share of problems and levels")
        if entries:
            row[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    for axes in panels[1]:
        axes.set_xlabel("factor τ behind the fewest")
    return figure


def draw_curves(found: Mapping[str, Outcome]) -> Figure:
    """Loss against gradients in turn, seed 0, each method with its best choice."""
    columns = 3
    rows = max(1, math.ceil(len(found) / columns))
    figure = Figure(figsize=(12.5, 3.2 * rows + 0.6), layout="constrained")
    places = figure.subplots(rows, columns, squeeze=False).ravel()
    handles: dict[str, Any] = {}
    for axes, (name, entry) in zip(places, found.items(), strict=False):
        lowest, highest = math.inf, 0.0
        for method in [m for m in DRAWN if m in entry.best]:
            rounds, loss = entry.record["methods"][method]["curve"]
            values = np.array(null_to_nan(loss))
            lowest, highest = min(lowest, float(np.nanmin(values))), max(highest, float(np.nanmax(values)))
            style = style_of(method)
            depth = 2.5 - 0.1 * style["linewidth"]  # wide ones beneath, or they hide what coincides with them
            (handles[in_legend(method)],) = axes.plot(rounds, values, zorder=depth, **style)
        start = float(null_to_nan(entry.record["methods"][VANILLA]["curve"][1])[0])
        last = entry.record["levels"][0][-1]
        handles[REACHED] = axes.axhline(last, color="black", linewidth=0.7, alpha=0.6)
        axes.set(title=f"{name}, d = {entry.record['dimension']:,}", xlim=(0, entry.record["rounds"]))
        if lowest > 0:
            axes.set_yscale("log")
            low, high = min(last, lowest) / 1.1, min(3 * start, 1.2 * highest)
            axes.set_ylim(low, high)
            if high < 10 * low:
                axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
                axes.yaxis.set_major_formatter("{x:g}")
                axes.yaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.3)
    for axes in places[len(found) :]:
        axes.set_visible(False)
    for axes in places[max(0, len(found) - columns) : len(found)]:
        axes.set_xlabel("rounds: gradients in turn")
    for axes in places[: len(found) : columns]:
        axes.set_ylabel("loss")
    handles[REACHED] = handles.pop(REACHED)  # the last of the legend
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, frameon=False)
    return figure


def report(folder: Path, names: Sequence[str]) -> None:
    """Fill the page and draw the pictures, of the problems that have a file."""
    paths = {name: folder / f"{name}.json" for name in names}
    found = {name: outcome(json.loads(path.read_text())) for name, path in paths.items() if path.exists()}
    kinds = {
        kind: {name: entry for name, entry in found.items() if entry.deterministic is (kind == "deterministic")}
        for kind in ("deterministic", "stochastic")
    }
    deterministic, stochastic = (list(kind.values()) for kind in kinds.values())
    tables = {
        "goals": goal_lines(deterministic, stochastic),
        "advice-deterministic": advice_lines(kinds["deterministic"]),
        "advice-stochastic": advice_lines(kinds["stochastic"]),
        "means-deterministic": mean_table(deterministic),
        "means-stochastic": mean_table(stochastic),
        "winners": winner_table(found),
        "in-turn": count_table(found, IN_TURN, "rounds"),
        "by-n": count_table(found, BY_N, "rounds"),
        "at-once": count_table(found, AT_ONCE, "rounds"),
        "gradients": count_table(found, AT_ONCE, "gradients"),
        "held": held_table(found),
        "choices": choice_table(found),
        "problems": problem_table(found),
    }
    fill(folder / "README.md", tables)
    if folder.resolve() == ROOT / "results" / "tuned":
        advice = {name: text for name, text in tables.items() if name.startswith("advice-")}
        fill(ROOT / "docs" / "rivals.md", advice)
    draw_profiles(deterministic, stochastic).savefig(folder / "profiles.png", dpi=120)
    for kind, group in kinds.items():
        if group:
            draw_curves(group).savefig(folder / f"{kind}.png", dpi=110)


def problem_table(found: Mapping[str, Outcome]) -> str:
    """What was run."""
    rows = []
    for name, entry in found.items():
        r = entry.record
        options = ", ".join(f"{key} {value}" for key, value in r["options"].items())
        optimizers = sorted({run[0] for run in r["methods"][VANILLA]["runs"]})
        kind = "deterministic" if entry.deterministic else "stochastic"
        rows.append(
            [
                name,
                f"`{r['problem']}`" + (f", {options}" if options else ""),
                kind,
                f"{r['dimension']:,}",
                str(r["rounds"]),
                str(r["seeds"]),
                str(r["every"]),
                ", ".join(optimizers),
            ]
        )
    return markdown_table(["name", "problem", "gradients", "d", "R", "seeds", "seen every", "optimizers"], rows)
