"""Curves over rounds, mean and band over seeds, in panels; drawn without the user's matplotlib backend."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator
from numpy.typing import NDArray

from optex.studies.comparison import Run
from optex.studies.measures import VANILLA

__all__ = [
    "METHOD_MARKERS",
    "METHOD_STYLES",
    "Line",
    "Panel",
    "bootstrap_interval",
    "check_plot_path",
    "method_label",
    "method_style",
    "plot_comparison",
    "plot_panels",
    "write_plot",
]

# Okabe and Ito's palette, which colour-blind readers can tell apart, and line styles beside it. The two ends of
# the scale, vanilla and target, are black and grey; the L-BFGS methods are shades of one colour, and so are
# those of nowcasting.
METHOD_STYLES: Final[dict[str, dict[str, Any]]] = {
    "vanilla": {"color": "#000000", "linestyle": (0, (1, 1.2)), "linewidth": 1.8},
    "target": {"color": "#8a8a8a", "linestyle": (0, (6, 2)), "linewidth": 1.8},
    "data-parallel": {"color": "#56b4e9", "linestyle": "-", "linewidth": 1.4},
    "hold-last": {"color": "#cc79a7", "linestyle": "-", "linewidth": 1.4},
    "line-search": {"color": "#009e73", "linestyle": (0, (5, 1, 1, 1)), "linewidth": 1.4},
    "picard": {"color": "#e69f00", "linestyle": "-", "linewidth": 1.4},
    "lbfgs": {"color": "#b8a800", "linestyle": (0, (3, 1, 1, 1, 1, 1)), "linewidth": 1.4},
    "lbfgs-scipy": {"color": "#857a00", "linestyle": (0, (3, 1, 1, 1)), "linewidth": 1.4},
    "lbfgs-scipy-50": {"color": "#5c5400", "linestyle": (0, (1, 1)), "linewidth": 1.4},
    "nonlinear-cg": {"color": "#7a5195", "linestyle": (0, (4, 1)), "linewidth": 1.4},
    "nowcast": {"color": "#5fc9a8", "linestyle": "-", "linewidth": 1.4},
    "nowcast-dmd": {"color": "#00573f", "linestyle": "-", "linewidth": 1.4},
    "optex-paper": {"color": "#0072b2", "linestyle": "-", "linewidth": 1.8},
    "optex-alone": {"color": "#f2a25c", "linestyle": (0, (4, 1)), "linewidth": 2.0},
    "optex": {"color": "#d55e00", "linestyle": "-", "linewidth": 2.4},
}
# Each method's marks stand at other rounds, so that lines that coincide can be told apart.
METHOD_MARKERS: Final[dict[str, str]] = {
    "vanilla": "o",
    "target": "s",
    "data-parallel": "^",
    "hold-last": "v",
    "line-search": "D",
    "picard": "s",
    "lbfgs": "^",
    "lbfgs-scipy": "D",
    "lbfgs-scipy-50": "v",
    "nonlinear-cg": "o",
    "nowcast": "o",
    "nowcast-dmd": "^",
    "optex-paper": "D",
    "optex-alone": "v",
    "optex": "o",
}
_UNKNOWN_STYLE: Final[dict[str, Any]] = {"color": "#444444", "linestyle": "-", "linewidth": 1.4}
_MARKS: Final = 6  # on each line, about
_MARK: Final[dict[str, Any]] = {"markersize": 5.0, "markeredgecolor": "white", "markeredgewidth": 0.6}
_LEVEL: Final[dict[str, Any]] = {"color": "black", "linewidth": 0.7, "alpha": 0.6}
_COLUMNS: Final = 3
_ROW: Final = 6  # a legend of so many entries or more has two rows


Interval = Callable[[NDArray[np.float64]], tuple[NDArray[np.float64], NDArray[np.float64]]]


@dataclass(frozen=True)
class Line:
    """Runs over seeds, drawn as their mean and a band.

    Attributes:
        label: in the legend.
        x: [n].
        values: [seeds, n]; NaN after a run stopped, where the line ends with a cross.
        style: matplotlib's, as in ``METHOD_STYLES``.
    """

    label: str
    x: NDArray[np.float64]
    values: NDArray[np.float64]
    style: dict[str, Any]


@dataclass(frozen=True)
class Panel:
    """A panel of a picture.

    Attributes:
        title, x_label, y_label: text.
        lines: at least one.
        logarithmic: whether the axis is logarithmic, and mean and band are those of the values' logarithms; the
            values must then be positive.
        interval: ends of the band, each [n], from values [seeds, n]; None is one standard deviation.
        level: where a thin horizontal line is drawn, to read the others against; None for no such line.
        level_label: of that line in the legend.
    """

    title: str
    lines: Sequence[Line]
    x_label: str
    y_label: str
    logarithmic: bool
    interval: Interval | None = None
    level: float | None = None
    level_label: str = "level"


def method_style(method: str) -> dict[str, Any]:
    """matplotlib's style of a method's line; dark grey for a method that is not in ``METHOD_STYLES``."""
    return METHOD_STYLES.get(method, _UNKNOWN_STYLE)


def method_label(method: str, parallelism: int | None = None) -> str:
    """A method's label in a legend; those of vanilla and target say what they are.

    Args:
        method: its name.
        parallelism: N; None where it differs among panels.

    >>> method_label("target", 5), method_label("optex", 5)
    ('target: 5 steps a round, a gradient each', 'optex')
    >>> method_label("target")
    'target: N steps a round, a gradient each'
    """
    steps = "1 step" if parallelism == 1 else f"{parallelism or 'N'} steps"
    ends = {VANILLA: "vanilla: 1 step a round", "target": f"target: {steps} a round, a gradient each"}
    return ends.get(method, method)


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

    A line ends with a cross where the run of one seed stopped because something was not finite: beyond that,
    the mean would be one over fewer seeds.

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
        _draw_lines(panel, _comparison_panel(chosen, (minimum or {}).get(problem)))
    for panel in panels[len(problems) :]:
        panel.set_visible(False)
    _add_titles(figure, runs, legend_columns=2 if columns == 1 else 5)
    return figure


def _comparison_panel(runs: Sequence[Run], minimum: float | None) -> Panel:
    lines = []
    for method in dict.fromkeys(run.method for run in runs):
        group = [run for run in runs if run.method == method]
        rounds = group[0].rounds
        losses = np.array([run.trace.loss[: rounds + 1] for run in group])  # [seeds, rounds + 1]
        lines.append(Line(method, np.arange(rounds + 1.0), losses - (minimum or 0.0), method_style(method)))
    return Panel(
        title=runs[0].problem,
        lines=lines,
        x_label="rounds (sequential gradient evaluations)",
        y_label="loss" if minimum is None else f"loss − minimum ({minimum:.4g})",
        logarithmic=True,
    )


def _add_titles(figure: Figure, runs: Sequence[Run], legend_columns: int) -> None:
    first = next((run for run in runs if run.method == VANILLA), runs[0])
    present = dict.fromkeys(run.method for run in runs)
    handles = [
        _handle(method_label(method, first.parallelism), method_style(method), _marker(method, list(present)))
        for method in present
    ]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=min(len(handles), legend_columns),
        frameon=False,
        handlelength=3.2,
    )
    seeds = len({run.seed for run in runs})
    over = f"{seeds} seeds, geometric mean ± 1 sd" if seeds > 1 else "1 seed"
    figure.suptitle(f"{first.optimizer}, lr {first.lr:g}, N = {first.parallelism}, {over}", fontsize=12)


def _marker(label: str, labels: Sequence[str]) -> str:
    """A method's own marker; for another line, one by its place among the labels of the legend."""
    return METHOD_MARKERS.get(label, "oD^sv"[labels.index(label) % 5])


def _handle(label: str, style: dict[str, Any], marker: str) -> Line2D:
    return Line2D([], [], label=label, marker=marker, **_MARK, **style)


def bootstrap_interval(
    values: NDArray[np.float64],  # [seeds, n]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:  # [n], [n]
    """95 % bootstrap interval of the mean over seeds: percentiles of 2,000 resamples, the same for all columns.

    >>> import numpy as np
    >>> low, high = bootstrap_interval(np.array([[1.0], [2.0], [3.0]]))
    >>> bool(1 <= low[0] < 2 < high[0] <= 3)
    True
    """
    seeds = len(values)
    drawn = np.random.default_rng(0).multinomial(seeds, np.full(seeds, 1 / seeds), size=2_000)
    low, high = np.percentile(drawn @ values / seeds, [2.5, 97.5], axis=0)
    return low, high


def plot_panels(panels: Sequence[Panel], columns: int, heading: str) -> Figure:
    """A figure of panels, row by row.

    One legend stands below all panels if the first panel has every line, else one below each.

    Args:
        panels: at least one.
        columns: panels a row, at most.
        heading: above all.
    """
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.2 * min(columns, len(panels)), 3.4 * rows + 0.9), layout="constrained")
    FigureCanvasAgg(figure)
    places = figure.subplots(rows, min(columns, len(panels)), squeeze=False).ravel()
    first = [line.label for line in panels[0].lines]
    shared = all(line.label in first for panel in panels for line in panel.lines)
    for place, panel in zip(places, panels, strict=False):
        _draw_lines(place, panel, first if shared else None)
        if not shared:
            below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.17), "ncols": 2}
            place.legend(handles=_handles([panel], str), fontsize=7.5, frameon=False, handlelength=3.2, **below)
    for place in places[len(panels) :]:
        place.set_visible(False)
    if shared:
        handles = _handles(panels, method_label)
        figure.legend(
            handles=handles,
            loc="outside lower center",
            ncols=len(handles) if len(handles) < _ROW else math.ceil(len(handles) / 2),
            frameon=False,
            handlelength=3.2,
        )
    elif rows > 1:
        figure.set_size_inches(figure.get_figwidth(), figure.get_figheight() + 0.6 * rows)
    figure.suptitle(heading, fontsize=12)
    return figure


def _handles(panels: Sequence[Panel], spelled: Callable[[str], str]) -> list[Line2D]:
    """Legend entries of the first panel's lines, and of the levels that any panel has."""
    labels = [line.label for line in panels[0].lines]
    handles = [
        _handle(spelled(line.label), line.style, _marker(line.label, labels)) for line in panels[0].lines
    ]
    levels = dict.fromkeys(panel.level_label for panel in panels if panel.level is not None)
    return handles + [Line2D([], [], label=label, **_LEVEL) for label in levels]


def _draw_lines(place: Axes, panel: Panel, legend: Sequence[str] | None = None) -> None:
    labels = legend or [line.label for line in panel.lines]
    start = max(float(line.values[:, 0].max()) for line in panel.lines)
    # Below the floor is rounding. Above the top are methods that diverge, and the others stay readable.
    floor, top = np.finfo(float).eps * abs(start), 1e3 * abs(start)
    for order, line in enumerate(panel.lines):
        values = np.log(np.clip(line.values, floor, 10 * top)) if panel.logarithmic else line.values
        stopped = np.flatnonzero(~np.isfinite(values).all(axis=0))
        length = int(stopped[0]) if len(stopped) else values.shape[1]
        values, x = values[:, :length], line.x[:length]
        back = np.exp if panel.logarithmic else np.asarray
        centre = values.mean(0)
        _draw_line(place, line, x, back(centre), order / len(panel.lines), _marker(line.label, labels))
        if len(values) > 1:
            spread = values.std(0, ddof=1)
            low, high = (centre - spread, centre + spread) if panel.interval is None else panel.interval(values)
            place.fill_between(x, back(low), back(high), color=line.style["color"], alpha=0.13, linewidth=0)
        if len(stopped):
            place.plot(x[-1], back(centre[-1]), marker="X", markersize=8, color=line.style["color"])
    if panel.level is not None:
        place.axhline(panel.level, **_LEVEL)
    place.set_title(panel.title, fontsize=11)
    place.set_xlabel(panel.x_label)
    place.set_ylabel(panel.y_label)
    if panel.logarithmic:
        place.set_yscale("log")
        _finish_logarithmic(place, top)
    _finish(place)


def _draw_line(
    place: Axes,
    line: Line,
    x: NDArray[np.float64],  # [n]
    y: NDArray[np.float64],  # [n]
    order: float,
    marker: str,
) -> None:
    """A line with its marks; the first stands at ``order``, in [0, 1), of the distance between two marks.

    Wide lines lie beneath narrow ones, which they would hide where they coincide.
    """
    apart = max(1, len(x) // _MARKS)
    depth = 2.5 - 0.1 * line.style.get("linewidth", 1.5)
    marks = {"marker": marker, "markevery": (int(order * apart), apart), **_MARK}
    place.plot(x, y, label=line.label, zorder=depth, **marks, **line.style)


def _finish_logarithmic(panel: Axes, top: float) -> None:
    low, high = panel.get_ylim()
    panel.set_ylim(top=min(high, top))
    if min(high, top) / low > 10:
        panel.yaxis.set_major_locator(LogLocator(numticks=8))
        panel.yaxis.set_minor_formatter(NullFormatter())
    else:  # less than a decade: 3, 3.5, 4 reads better than 3 × 10⁰
        panel.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_locator(NullLocator())


def _finish(panel: Axes) -> None:
    panel.set_xlim(left=0)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    panel.grid(visible=True, which="major", linewidth=0.5, alpha=0.35)
    panel.spines[["top", "right"]].set_visible(False)
