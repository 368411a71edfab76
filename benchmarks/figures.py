"""Make every number and picture that the README shows, and write its tables.

    python benchmarks/figures.py            about two minutes on 2 cores

Writes results/demo, results/functions and results/overhead (JSON and PNG), and puts the tables between the
`<!-- table:NAME -->` and `<!-- end -->` lines of README.md and results/README.md.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import overhead
import torch

from optex.studies.comparison import Comparison, Row, describe, run_case, summarise, write_json
from optex.studies.plots import plot_comparison, write_plot
from optex.studies.tables import fill, markdown_table

ROOT = Path(__file__).parent.parent
THREADS = 2
COMPARISONS = {
    "demo": Comparison(("ackley", "rosenbrock", "logistic-breast-cancer"), lr=0.01),
    "functions": Comparison(
        ("sphere", "ackley", "rosenbrock"),
        ("vanilla", "target", "data-parallel", "hold-last", "line-search", "picard", "optex-paper", "optex"),
        lr=0.01,
    ),
}


def compare(name: str, comparison: Comparison) -> list[Row]:
    """Run a comparison, one thread as its problems are small, and keep its JSON and picture."""
    torch.set_num_threads(1)
    runs = [run_case(comparison, case) for case in comparison.cases()]
    meta = describe(comparison)
    folder = ROOT / "results" / name
    write_json(folder / f"{name}.json", meta, runs)
    write_plot(folder / f"{name}.png", plot_comparison(runs, meta["minimum"]))
    return summarise(runs)


def acceleration_table(rows: list[Row]) -> str:
    """Methods down, problems across: acceleration, mean ± standard deviation over the seeds."""
    problems = list(dict.fromkeys(row.problem for row in rows))
    lines = []
    for method in dict.fromkeys(row.method for row in rows):
        cells = [
            f"{row.summary.acceleration.mean:.2f} ± {row.summary.acceleration.deviation:.2f}"
            for row in rows
            if row.method == method
        ]
        lines.append([method, *cells])
    return markdown_table(["method", *problems], lines)


def full_table(rows: list[Row]) -> str:
    """Every number of a comparison."""
    head = ("problem", "method", "final loss", "acceleration", "steps a round", "gradients", "seconds")
    lines = [
        (
            row.problem,
            row.method,
            f"{row.summary.final_loss.mean:.4g} ± {row.summary.final_loss.deviation:.1g}",
            f"{row.summary.acceleration.mean:.2f} ± {row.summary.acceleration.deviation:.2f}",
            f"{row.summary.accepted:.2f}",
            f"{row.summary.gradients:.0f}",
            f"{row.summary.seconds:.2f}",
            "–" if math.isnan(row.overhead_seconds) else f"{1e3 * row.overhead_seconds:.1f}",
        )
        for row in rows
    ]
    return markdown_table((*head, "overhead, ms"), lines)


def overhead_table(result: dict[str, Any]) -> str:
    """Milliseconds a round by method, for every size measured."""
    lines = []
    for size in result["sizes"]:
        first = (f"{size['dimension']:,}", str(size["parallelism"]), str(size["history"]))
        lines += [(*first, name, f"{times['median']:.1f}") for name, times in size["milliseconds"].items()]
        lines.append((*first, "*reading the history N times*", f"{size['read']:.1f}"))
    return markdown_table(("d", "N", "T0", "method", "ms a round beyond the gradients"), lines)


def main() -> None:
    """Run everything."""
    rows = {name: compare(name, comparison) for name, comparison in COMPARISONS.items()}
    cost = overhead.measure([(100_000, 5, 20), (100_000, 5, 50)], rounds=40, threads=THREADS)
    folder = ROOT / "results" / "overhead"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "overhead.json").write_text(json.dumps(cost, indent=1) + "\n")
    fill(
        ROOT / "README.md",
        {"functions": acceleration_table(rows["functions"]), "overhead": overhead_table(cost)},
    )
    fill(
        ROOT / "results" / "README.md",
        {
            "demo": full_table(rows["demo"]),
            "functions": full_table(rows["functions"]),
            "overhead": overhead_table(cost),
        },
    )


if __name__ == "__main__":
    main()
