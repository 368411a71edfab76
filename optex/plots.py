"""Loss against rounds, one panel a problem; drawn without touching the user's matplotlib backend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator
from numpy.typing import NDArray

from optex.comparison import Run

__all__ = ["METHOD_STYLES", "check_plot_path", "plot_comparison", "write_plot"]

# Okabe and Ito's palette, which colour-blind readers can tell apart; line styles say it once more. The two
# ends of the scale, vanilla and target, are black and grey.
METHOD_STYLES: Final[dict[str, dict[str, Any]]] = {
    "vanilla": {"color": "#000000", "linestyle": (0, (1, 1.2)), "linewidth": 1.8},
    "target": {"color": "#8a8a8a", "linestyle": (0, (6, 2)), "linewidth": 1.8},
    "data-parallel": {"color": "#56b4e9", "linestyle": "-", "linewidth": 1.4},
    "hold-last": {"color": "#cc79a7", "linestyle": "-", "linewidth": 1.4},
    "line-search": {"color": "#009e73", "linestyle": (0, (5, 1, 1, 1)), "linewidth": 1.4},
    "picard": {"color": "#e69f00", "linestyle": "-", "linewidth": 1.4},
    "lbfgs": {"color": "#b8a800", "linestyle": (0, (3, 1, 1, 1, 1, 1)), "linewidth": 1.4},
    "optex-paper": {"color": "#0072b2", "linestyle": "-", "linewidth": 1.8},
    "optex": {"color": "#d55e00", "linestyle": "-", "linewidth": 2.4},
}
_UNKNOWN_STYLE: Final[dict[str, Any]] = {"color": "#444444", "linestyle": "-", "linewidth": 1.4}
_COLUMNS: Final = 3


def check_plot_path(path: Path) -> None:
    """Refuse a file name whose format cannot be drawn.

    Raises:
        ValueError: the suffix is none of matplotlib's.
    """
    known = sorted(FigureCanvasAgg.get_supported_filetypes())
    if path.suffix.lstrip(".").lower() not in known:
        raise ValueError(f"plot: {path.name!r} must end in one of {', '.join('.' + name for name in known)}")


def write_plot(path: Path, figure: Figure) -> None:
    """Save the figure in the format of the file's suffix; missing folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def plot_comparison(runs: Sequence[Run], minimum: dict[str, float | None] | None = None) -> Figure:
    """Geometric mean over seeds, and a band of one standard deviation of the logarithm.

    A line ends with a cross where a seed of it stopped because something was not finite: going on with the
    seeds that are left would show a mean of other runs.

    Args:
        runs: as from ``run_case``; vanilla is drawn as far as the others go.
        minimum: of the problems for which it is known; those panels show loss - minimum.
    """
    problems = list(dict.fromkeys(run.problem for run in runs))
    columns = min(_COLUMNS, len(problems))
    rows = math.ceil(len(problems) / columns)
    figure = Figure(figsize=(max(4.2 * columns, 5.2), 3.3 * rows + 0.9), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel, problem in zip(panels, problems, strict=False):
        chosen = [run for run in runs if run.problem == problem]
        _draw_panel(panel, chosen, (minimum or {}).get(problem))
    for panel in panels[len(problems) :]:
        panel.set_visible(False)
    _add_titles(figure, runs, legend_columns=3 if columns == 1 else 5)
    return figure


def _draw_panel(panel: Axes, runs: Sequence[Run], minimum: float | None) -> None:
    start = max(run.trace.loss[0] for run in runs) - (minimum or 0.0)
    # Rounding ends the way down. A diverging method leaves through the top, and the others stay readable.
    floor, top = np.finfo(float).eps * abs(start), 1e3 * abs(start)
    for method in dict.fromkeys(run.method for run in runs):
        group = [run for run in runs if run.method == method]
        rounds = group[0].rounds
        losses = np.array([run.trace.loss[: rounds + 1] for run in group])  # [seeds, rounds + 1]
        _draw_method(panel, method, np.clip(losses - (minimum or 0.0), floor, 10 * top))
    panel.set_yscale("log")
    panel.set_title(runs[0].problem, fontsize=11)
    panel.set_xlabel("rounds (sequential gradient evaluations)")
    panel.set_ylabel("loss" if minimum is None else _gap_label(minimum))
    panel.set_xlim(left=0)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    low, high = panel.get_ylim()
    panel.set_ylim(top=min(high, top))
    if min(high, top) / low > 10:
        panel.yaxis.set_major_locator(LogLocator(numticks=8))
        panel.yaxis.set_minor_formatter(NullFormatter())
    else:  # less than a decade: 3, 3.5, 4 reads better than 3 × 10⁰
        panel.yaxis.set_major_locator(MaxNLocator(5))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_locator(NullLocator())
    panel.grid(visible=True, which="major", linewidth=0.5, alpha=0.35)
    panel.spines[["top", "right"]].set_visible(False)


def _gap_label(minimum: float) -> str:
    return f"loss − minimum ({minimum:.4g})"


def _draw_method(
    panel: Axes,
    method: str,
    gaps: NDArray[np.float64],  # [seeds, rounds + 1]
) -> None:
    style = METHOD_STYLES.get(method, _UNKNOWN_STYLE)
    stopped = np.flatnonzero(~np.isfinite(gaps).all(axis=0))
    length = int(stopped[0]) if len(stopped) else gaps.shape[1]
    logarithms = np.log(gaps[:, :length])
    centre = logarithms.mean(0)
    rounds = np.arange(length)
    panel.plot(rounds, np.exp(centre), label=method, **style)
    if len(gaps) > 1:
        spread = logarithms.std(0, ddof=1)
        panel.fill_between(
            rounds,
            np.exp(centre - spread),
            np.exp(centre + spread),
            color=style["color"],
            alpha=0.13,
            linewidth=0,
        )
    if len(stopped):
        panel.plot(rounds[-1], np.exp(centre[-1]), marker="X", markersize=8, color=style["color"])


def _add_titles(figure: Figure, runs: Sequence[Run], legend_columns: int) -> None:
    present = dict.fromkeys(run.method for run in runs)
    handles = [Line2D([], [], label=method, **METHOD_STYLES.get(method, _UNKNOWN_STYLE)) for method in present]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=min(len(handles), legend_columns),
        frameon=False,
        handlelength=3.2,
    )
    first = next((run for run in runs if run.method == "vanilla"), runs[0])
    seeds = len({run.seed for run in runs})
    over = f"{seeds} seeds, geometric mean ± 1 sd" if seeds > 1 else "1 seed"
    figure.suptitle(f"{first.optimizer}, lr {first.lr:g}, N = {first.parallelism}, {over}", fontsize=12)
