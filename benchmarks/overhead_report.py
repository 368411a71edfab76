"""The tables and the picture of results/overhead/overhead.json."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator

from optex.studies.plots import METHOD_STYLES, write_plot
from optex.studies.tables import fill, markdown_table

__all__ = ["FOLDER", "derived", "exponent", "report"]

ROOT: Final = Path(__file__).parent.parent
FOLDER: Final = ROOT / "results" / "overhead"
STYLES: Final = {
    "optex-paper": METHOD_STYLES["optex-paper"],
    "separable": {"color": "#56b4e9", "linestyle": "-", "linewidth": 1.4},
    "curl-free": {"color": "#e69f00", "linestyle": "-", "linewidth": 1.4},
    "hold-last": METHOD_STYLES["hold-last"],
    "default": METHOD_STYLES["optex"],
}
AXES: Final = {"dimension": "d", "history": "T0", "parallelism": "N"}
SHOWN: Final = (100, 10_000, 100_000, 1_000_000, 10_000_000)  # dimensions in README.md
FROM: Final = {"dimension": 100_000, "history": 8, "parallelism": 4}  # where a growth is measured from
LONG: Final = 10_000  # shorter rows are not what was counted: they are multiplied in float64

Points = list[dict[str, Any]]


def report(folder: Path = FOLDER, root: Path = ROOT) -> None:
    """Fill the tables of the three pages and draw the picture, from the JSON alone."""
    document = json.loads((folder / "overhead.json").read_text())
    points, base = document["points"], document["base"]
    fill(
        folder / "README.md",
        {
            "setup": _setup(document),
            **{axis: axis_table(points, base, axis) for axis in AXES},
            "others": others_table(points, base),
            "traffic": traffic_table(points, base),
            "growth": growth_table(points, base),
            "memory": memory_table(points, base),
        },
    )
    fill(root / "docs" / "cost.md", {"counted": counted_table(points, base)})
    fill(root / "README.md", {"overhead": front_table(points, base)})
    write_plot(folder / "growth.png", plot(points, base))


def along(points: Points, base: dict[str, Any], axis: str, method: str | None = None) -> Points:
    """Those that differ from the base along one axis alone, in its order."""
    found = [p for p in points if all(p[key] == value for key, value in base.items() if key != axis)]
    chosen = [p for p in found if method in (None, p["method"])]
    return sorted(chosen, key=lambda point: point[axis])


def derived(point: dict[str, Any]) -> dict[str, float]:
    """What follows of a measurement: the time of reading the counted bytes, and how many times that it took."""
    if point["bytes"] is None or math.isnan(point["bytes"]):  # None in JSON
        return {"reading": math.nan, "ratio": math.nan}
    reading = 1e3 * point["bytes"] / point["read_bandwidth"]
    return {"reading": reading, "ratio": point["median"] / reading}


def base_steps(point: dict[str, Any]) -> float:
    """Milliseconds that the base optimizer's steps of a round take by themselves, drafted and taken again."""
    steps = point["drafted"]
    drafted = steps - 1 if point["parallelism"] > 1 else 0
    return point["base_step"] * (drafted + (1 if point["method"] == "optex-paper" else steps))


def exponent(places: Sequence[float], values: Sequence[float]) -> float:
    """The slope of log value against log place, by least squares; NaN with fewer than two places.

    >>> round(exponent([1, 10, 100], [3, 30, 300]), 6)
    1.0
    """
    if len(places) < 2:
        return math.nan
    x, y = [[math.log(v) for v in row] for row in (places, values)]
    a, b = sum(x) / len(x), sum(y) / len(y)
    return sum((u - a) * (v - b) for u, v in zip(x, y, strict=True)) / sum((u - a) ** 2 for u in x)


def _setup(document: dict[str, Any]) -> str:
    meta, base = document["meta"], document["base"]
    return (
        f"Base: {base['optimizer'].capitalize()}, d = {base['dimension']:,}, N = {base['parallelism']}, T0 = "
        f"{base['history']}, stride {base['stride']}; {meta['dtype']}, {meta['threads']} thread(s), torch "
        f"{meta['torch']}, {meta['machine']}, load {meta['load'][0]} before and {meta['load'][1]} after."
    )


def _methods(points: Points) -> list[str]:
    return list(dict.fromkeys(p["method"] for p in points))


def _grid(
    points: Points, axis: str, cell: Callable[[dict[str, Any]], str]
) -> tuple[list[str], list[list[str]]]:
    methods = _methods(points)
    lines = []
    for value in dict.fromkeys(p[axis] for p in points):
        cells = {p["method"]: cell(p) for p in points if p[axis] == value}
        lines.append([f"{value:,}", *(cells.get(method, "–") for method in methods)])
    return [AXES[axis], *methods], lines


def _time(milliseconds: float) -> str:
    return f"{milliseconds:.2f}" if milliseconds < 10 else f"{milliseconds:,.{int(milliseconds < 1000)}f}"


def _megabytes(number: float | None) -> str:
    if number is None:
        return "–"
    return f"{number / 1e6:,.0f}" if number >= 1e8 else f"{number / 1e6:.3g}"


def axis_table(points: Points, base: dict[str, Any], axis: str) -> str:
    """Milliseconds a round, median and least, method by method."""
    head, lines = _grid(
        along(points, base, axis), axis, lambda p: f"{_time(p['median'])} ({_time(p['minimum'])})"
    )
    return markdown_table(head, lines)


def front_table(points: Points, base: dict[str, Any]) -> str:
    """Medians by dimension, and how slow a gradient has to be for the default to pay."""
    chosen = [p for p in along(points, base, "dimension") if p["dimension"] in SHOWN]
    head, lines = _grid(chosen, "dimension", lambda p: _time(p["median"]))
    needed = [p["median"] / (p["accepted"] - 1) for p in chosen if p["method"] == "default"]
    return markdown_table(
        [*head, "default pays from gradients of"],
        [[*line, f"{_time(value)} ms"] for line, value in zip(lines, needed, strict=True)],
    )


def others_table(points: Points, base: dict[str, Any]) -> str:
    """The other base optimizers, and strides in N's place."""
    chosen = along(points, base, "optimizer")
    chosen += [p for p in points if p["stride"] != base["stride"]]
    lines = [
        (
            p["method"],
            p["optimizer"],
            str(p["parallelism"]),
            str(p["stride"]),
            _time(p["median"]),
            _time(p["minimum"]),
            f"{p['accepted']:g}",
            _megabytes(p["bytes"]),
        )
        for p in chosen
    ]
    head = ("method", "base", "N", "stride", "ms a round, median", "least", "steps kept", "MB counted")
    return markdown_table(head, lines)


def traffic_table(points: Points, base: dict[str, Any]) -> str:
    """Bytes counted against time measured."""
    lines = []
    for p in along(points, base, "dimension"):
        if p["dimension"] < LONG:
            continue
        known = derived(p)
        lines.append(
            (
                f"{p['dimension']:,}",
                p["method"],
                f"{p['accepted']:g}",
                _megabytes(p["bytes"]),
                _megabytes(p["least_bytes"]),
                f"{p['read_bandwidth'] / 1e9:.1f}",
                f"{p['copy_bandwidth'] / 1e9:.1f}",
                _time(known["reading"]),
                _time(base_steps(p)),
                _time(p["median"]),
                f"{known['ratio']:.1f}",
            )
        )
    head = ("d", "method", "steps kept", "MB counted", "MB at least", "reading, GB/s", "copying, GB/s")
    head = (*head, "ms to read the bytes", "ms of base steps alone", "ms measured", "measured / read")
    return markdown_table(head, lines)


def growth_table(points: Points, base: dict[str, Any]) -> str:
    """Exponents of time and of bytes along each axis."""
    lines = []
    for axis, name in AXES.items():
        found = along(points, base, axis)
        for method in _methods(found):
            chosen = [p for p in found if p["method"] == method and p[axis] >= FROM[axis]]
            places = [p[axis] for p in chosen]
            if len(places) < 2:
                continue
            powers = [exponent(places, [p[key] for p in chosen]) for key in ("median", "bytes")]
            lines.append((name, f"{places[0]:,} to {places[-1]:,}", method, *(f"{v:.2f}" for v in powers)))
    return markdown_table(("along", "from", "method", "exponent of time", "of bytes counted"), lines)


def memory_table(points: Points, base: dict[str, Any]) -> str:
    """Peaks beyond the plain loop's, in vectors of length d, where vectors are long enough to be seen."""
    lines = []
    for p in along(points, base, "dimension"):
        if p["dimension"] < 1_000_000:
            continue
        row = 4 * p["dimension"]
        lines.append(
            (
                f"{p['dimension']:,}",
                p["method"],
                f"{p['peak_bytes'] / 1e6:,.0f}",
                f"{p['peak_bytes'] / row:.1f}",
                f"{p['memory_bytes'] / row:.0f}",
            )
        )
    return markdown_table(("d", "method", "MB at the peak", "in vectors", "by the formula"), lines)


def counted_table(points: Points, base: dict[str, Any]) -> str:
    """The formulas at the base, in rows."""
    lines = []
    for p in along(points, base, "dimension"):
        if p["dimension"] == base["dimension"]:
            row = 4 * p["dimension"]
            lines.append(
                (p["method"], f"{p['bytes'] / row:.0f}", f"{p['calls']:.0f}", f"{p['least_bytes'] / row:.0f}")
            )
    return markdown_table(("method", "rows a round", "torch calls", "rows at least"), lines)


def plot(points: Points, base: dict[str, Any]) -> Figure:
    """Time against each axis, and the time of reading the counted bytes."""
    figure = Figure(figsize=(12.6, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    places = figure.subplots(1, len(AXES))
    for place, (axis, name) in zip(places, AXES.items(), strict=True):
        for method in _methods(points):
            chosen = [p for p in along(points, base, axis, method) if p["bytes"] is not None]
            x = [p[axis] for p in chosen]
            style = STYLES[method]
            place.plot(x, [p["median"] for p in chosen], marker="o", markersize=3.5, label=method, **style)
            seen = [p for p in chosen if p["dimension"] >= LONG]
            reading = [derived(p)["reading"] for p in seen]
            dotted = {"color": style["color"], "linestyle": (0, (1, 1.5)), "linewidth": 1.0}
            place.plot([p[axis] for p in seen], reading, **dotted)
        place.set_xscale("log")
        place.set_yscale("log")
        if axis != "dimension":
            values = sorted({p[axis] for p in along(points, base, axis) if p["bytes"] is not None})
            place.set_xticks(values, [str(value) for value in values])
            place.minorticks_off()
            place.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            place.yaxis.set_minor_locator(NullLocator())
            place.yaxis.set_major_formatter("{x:g}")
        place.set_xlabel(name)
        place.grid(visible=True, which="major", linewidth=0.5, alpha=0.35)
        place.spines[["top", "right"]].set_visible(False)
    places[0].set_ylabel("ms a round beyond its gradients")
    handles, labels = places[0].get_legend_handles_labels()
    handles.append(Line2D([], [], color="#444444", linestyle=(0, (1, 1.5)), linewidth=1.0))
    labels.append("reading the bytes counted, at the speed this machine reads the history")
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure
