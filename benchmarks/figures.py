"""Make the README's comparisons and pictures, and write their tables. (benchmarks/overhead.py has its costs.)

    python benchmarks/figures.py                 some minutes on 2 cores
    python benchmarks/figures.py demo            one of demo and functions, and the tables
    python benchmarks/figures.py report          tables and pictures alone, from the JSON that is there

Writes results/demo and results/functions (JSON and PNG), and puts the tables between the
`<!-- table:NAME -->` and `<!-- end -->` lines of README.md and results/README.md.
"""

from __future__ import annotations

import argparse
import json
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch

from optex.studies.comparison import Comparison, Run, describe, run_case, write_json
from optex.studies.plots import plot_comparison, write_plot
from optex.studies.tables import fill, markdown_table

ROOT = Path(__file__).parent.parent
COMPARISONS = {
    "demo": Comparison(  # `make demo` runs the first three of its seeds
        ("ackley", "rosenbrock", "logistic-breast-cancer"),
        ("vanilla", "target", "optex-paper", "optex-alone", "optex"),
        lr=0.01,
    ),
    "functions": Comparison(
        ("sphere", "ackley", "rosenbrock"),
        (
            "vanilla",
            "target",
            "lbfgs",
            "data-parallel",
            "hold-last",
            "line-search",
            "picard",
            "optex-paper",
            "optex-alone",
            "optex",
        ),
        lr=0.01,
    ),
}
UNRECORDED = {"overhead_seconds": None, "stopped": None}  # by earlier versions; no picture shows them
NAMES = {"optex-alone": "optex, N = 1"}  # as the tables have them


def run(names: Sequence[str]) -> None:
    """Run what is named and keep its JSON."""
    for name, comparison in COMPARISONS.items():
        if name in names:
            compare(name, comparison)


def compare(name: str, comparison: Comparison) -> None:
    """Run a comparison, one thread as its problems are small, and keep its JSON."""
    torch.set_num_threads(1)
    runs = [run_case(comparison, case) for case in comparison.cases()]
    write_json(document_path(name), describe(comparison), runs)


def document_path(name: str) -> Path:
    """Where the JSON of a run stands, with its picture beside it."""
    return ROOT / "results" / name / f"{name}.json"


def report() -> None:
    """Write the tables and draw the pictures from the JSON."""
    documents = {name: json.loads(document_path(name).read_text()) for name in COMPARISONS}
    for name, document in documents.items():
        rounds = document["meta"]["options"]["rounds"]
        runs = [Run.of_record(UNRECORDED | record, rounds) for record in document["runs"]]
        figure = plot_comparison(runs, document["meta"]["minimum"])
        write_plot(document_path(name).with_suffix(".png"), figure)
    demo, functions = (documents[name]["meta"] for name in COMPARISONS)
    for page in (ROOT / "README.md", ROOT / "docs" / "rivals.md"):
        fill(page, {"functions": acceleration_table(functions)})
    tables = {"demo": full_table(demo), "functions": full_table(functions)}
    fill(ROOT / "results" / "README.md", tables)
    draw_round()


def draw_round() -> None:
    """The picture of one round, from the program of the tour that draws it."""
    with plt.rc_context({"backend": "agg"}):
        drawn = runpy.run_path(str(ROOT / "docs" / "gallery" / "plot_2_a_round.py"))
    write_plot(ROOT / "results" / "demo" / "round.png", drawn["figure"])
    plt.close(drawn["figure"])


def acceleration_table(meta: dict[str, Any]) -> str:
    """Methods down, problems across: acceleration, mean ± standard deviation over the seeds."""
    rows = meta["summary"]
    lines = [
        [
            _named(method),
            *(_spread(row["acceleration"], ".2f", ".2f") for row in rows if row["method"] == method),
        ]
        for method in dict.fromkeys(row["method"] for row in rows)
    ]
    return markdown_table(["method", *dict.fromkeys(row["problem"] for row in rows)], lines)


def full_table(meta: dict[str, Any]) -> str:
    """The settings and every number of a comparison."""
    chosen = meta["options"]
    history = "each method's own T0" if meta["history_size"] is None else f"T0 = {meta['history_size']}"
    settings = (
        f"{chosen['optimizer'].capitalize()}, lr {chosen['lr']:g}, N = {chosen['parallelism']}, {history}, "
        f"{chosen['rounds']} rounds, {chosen['seeds']} seeds; dimension: "
        + ", ".join(f"{problem} {dimension:,}" for problem, dimension in meta["dimension"].items())
    )
    head = ("problem", "method", "final loss", "acceleration", "steps a round", "gradients", "seconds")
    lines = [
        (
            row["problem"],
            _named(row["method"]),
            _spread(row["final_loss"], ".4g", ".1g"),
            _spread(row["acceleration"], ".2f", ".2f"),
            f"{row['accepted']:.2f}",
            f"{row['gradients']:.0f}",
            f"{row['seconds']:.2f}",
            "–" if row["overhead_seconds"] is None else f"{1e3 * row['overhead_seconds']:.1f}",
        )
        for row in meta["summary"]
    ]
    return f"{settings}.\n\n{markdown_table((*head, 'overhead, ms'), lines)}"


def _named(method: str) -> str:
    return NAMES.get(method, method)


def _spread(spread: dict[str, float], form: str, deviation_form: str) -> str:
    return f"{spread['mean']:{form}} ± {spread['deviation']:{deviation_form}}"


def main() -> None:
    """Run everything, one thing, or nothing, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    everything = tuple(COMPARISONS)
    parser.add_argument("what", nargs="?", choices=["run", *everything, "report"], default="run")
    what = parser.parse_args().what
    if what != "report":
        run(everything if what == "run" else [what])
    report()


if __name__ == "__main__":
    main()
