"""Make every number and picture that the README shows, and write its tables.

    python benchmarks/figures.py            about two minutes on 2 cores

Writes results/demo, results/functions and results/overhead (JSON and PNG), and puts the tables between the
`<!-- table:NAME -->` and `<!-- end -->` lines of README.md and results/README.md.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import overhead
import torch
from tables import fill

from optex.studies.comparison import Comparison, Row, describe, run_case, summarise, write_json
from optex.studies.plots import plot_comparison, write_plot

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
    lines = [f"| method | {' | '.join(problems)} |", f"|---|{'---|' * len(problems)}"]
    for method in dict.fromkeys(row.method for row in rows):
        cells = [
            f"{row.acceleration.mean:.2f} ± {row.acceleration.deviation:.2f}"
            for row in rows
            if row.method == method
        ]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def full_table(rows: list[Row]) -> str:
    """Every number of a comparison."""
    lines = [
        "| problem | method | final loss | acceleration | steps a round | gradients | seconds | overhead, ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        milliseconds = (
            f"{1e3 * row.overhead_seconds:.1f}" if row.overhead_seconds == row.overhead_seconds else "–"
        )
        lines.append(
            f"| {row.problem} | {row.method} | {row.final_loss.mean:.4g} ± {row.final_loss.deviation:.1g} "
            f"| {row.acceleration.mean:.2f} ± {row.acceleration.deviation:.2f} | {row.accepted:.2f} "
            f"| {row.gradients:.0f} | {row.seconds:.2f} | {milliseconds} |"
        )
    return "\n".join(lines)


def overhead_table(result: dict[str, Any]) -> str:
    """Milliseconds a round by method, for every size measured."""
    lines = ["| d | N | T0 | method | ms a round beyond the gradients |", "|---|---|---|---|---|"]
    for size in result["sizes"]:
        head = f"| {size['dimension']:,} | {size['parallelism']} | {size['history']} |"
        lines += [f"{head} {name} | {times['median']:.1f} |" for name, times in size["milliseconds"].items()]
        lines.append(f"{head} *reading the history N times* | {size['read']:.1f} |")
    return "\n".join(lines)


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
