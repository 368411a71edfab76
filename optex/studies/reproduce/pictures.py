"""The picture of a figure, drawn from its record."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from matplotlib.figure import Figure as Picture
from numpy.typing import NDArray

from optex.studies.measures import VANILLA
from optex.studies.plots import METHOD_STYLES, Line, Panel, bootstrap_interval, plot_panels
from optex.studies.problems import PROBLEMS
from optex.studies.reproduce.record import Record, rounds_of
from optex.studies.reproduce.studies import FITTED, Figure, View

__all__ = ["draw"]

# It is Algorithm 1 as ``optex-paper`` is, so they share a colour.
_FITTED: Final = {**METHOD_STYLES["optex-paper"], "linestyle": (0, (3, 1, 1, 1))}
_OTHERS: Final = ("#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # of the palette of METHOD_STYLES
_ORDERED: Final = ("#fbb32e", "#ee6a4b", "#c03a76", "#7a1fa2", "#30128c")  # plasma, light to dark


def draw(figure: Figure, about: dict[str, Any], runs: list[Record]) -> Picture:
    """The figure's panels, row by row, with mean and band over the seeds.

    Args:
        figure: whose picture it is.
        about: the record's ``meta``.
        runs: the record's runs.
    """
    panels = [_panel(view, about["sections"][view.section], runs) for view in figure.views]
    parts = list(about["sections"].values())
    seeds = sorted({part["seeds"] for part in parts})
    counts = " to ".join(str(count) for count in sorted({seeds[0], seeds[-1]}))
    if panels[0].interval is not None:
        band = "mean and its 95 % interval"
    else:
        band = ("geometric " if panels[0].logarithmic else "") + "mean ± 1 sd"
    heading = f"{figure.title}: {parts[0]['optimizer']}, N = {parts[0]['parallelism']}"
    over = f"{counts} seed{'s' * (seeds != [1])}"
    return plot_panels(panels, figure.columns, f"{heading}, {over}" + f", {band}" * (seeds != [1]))


def _panel(view: View, part: dict[str, Any], runs: list[Record]) -> Panel:
    minimum = part["minimum"] if view.values == "loss" else None
    lines = []
    colours = iter(_OTHERS if view.family is None else _ORDERED)
    for label in view.labels:
        chosen = [run for run in runs if (run["section"], run["label"]) == (view.section, label)]
        x, values = _values(view, chosen)
        if label == VANILLA and view.last_round is not None:
            shown = x <= view.last_round
            x, values = x[shown], values[:, shown]
        own = label in METHOD_STYLES and (view.family is None or label == VANILLA)
        if own:
            style = METHOD_STYLES[label]
        else:
            style = _FITTED if label == FITTED else {"color": next(colours), "linewidth": 1.6}
        name = view.family if view.family is not None and label in ("optex", "optex-paper") else label
        lines.append(Line(name, x, values - (minimum or 0.0), style))
    timed = view.values == "loss" and view.against == "rounds" and part["level_round"] > part["rounds"]
    names = {
        "loss": "training loss",
        "test": PROBLEMS[part["problem"]].test_measure,
        "reward": "cumulative average reward",
    }
    names["steps"] = "steps kept so far"
    return Panel(
        title=view.title,
        lines=lines,
        x_label="rounds" if view.against == "rounds" else "gradients evaluated",
        y_label="loss − minimum" if minimum is not None else names[view.values],
        logarithmic=minimum is not None,
        interval=bootstrap_interval if view.values == "reward" else None,
        # Vanilla is drawn beyond the others where its last loss is the level that they are timed to.
        level=float(lines[0].values[:, -1].mean()) if timed else None,
        level_label="vanilla's last loss, to which all are timed",
    )


def _values(
    view: View, runs: list[Record]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:  # [n] and [seeds, n]
    if view.values == "test":
        marks = list(runs[0]["test"])
        errors = [[run["test"].get(key) for key in marks] for run in runs]  # None after a run stopped
        return np.array(marks, dtype=float), np.array(errors, dtype=float)
    if view.values == "steps":
        return np.array(rounds_of(runs[0]), dtype=float), np.array([run["steps"] for run in runs], dtype=float)
    sign = -1.0 if view.values == "reward" else 1.0
    losses = sign * np.array([run["loss"] for run in runs], dtype=float)
    if view.against == "gradients":
        # The seeds' counts differ a little: a round is drawn at their mean.
        return np.mean([run["gradients"] for run in runs], axis=0), losses
    return np.array(rounds_of(runs[0]), dtype=float), losses
