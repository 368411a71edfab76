"""What the history costs in memory, and what a smaller history costs in accuracy.

    python benchmarks/memory.py --problem shakespeare --seeds 3

Trains at N = 4 with Adam 1e-3 for 60 rounds and prints, for each way to keep the history, its bytes (of all
tensors held, and by the formula in the docstring of ``OptEx``) in units of the model's own, the loss after 20,
40 and 60 rounds, the steps kept a round and the mean relative error of the predicted gradients. One thread.
Writes results/memory.json and the table in results/README.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import optex
from optex.studies.problems import Problem, make_problem
from optex.studies.tables import fill, markdown_table

FOLDER = Path(__file__).parent.parent / "results"
ROUNDS = (20, 40, 60)

VARIANTS: dict[str, Callable[[Problem], dict[str, Any]]] = {
    "float32, T0 = 16 (default)": lambda _: {},
    "bfloat16": lambda _: {"history_dtype": torch.bfloat16},
    "T0 = 8": lambda _: {"history_size": 8},
    "T0 = 8, bfloat16": lambda _: {"history_size": 8, "history_dtype": torch.bfloat16},
    "none (hold the last gradient)": lambda _: {"estimator": optex.HoldLast(), "history_size": 1},
}


def tensor_bytes(history: optex.GradientHistory) -> int:
    """Of everything the history holds that grows with d."""
    held = [value for value in vars(history).values() if isinstance(value, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in held if t.ndim < 2 or t.shape[1] > history.size)


def formula_bytes(history: optex.GradientHistory, word: int) -> int:
    """(2 T0 + 1) d."""
    d, t0 = history.dimension, history.size
    return 2 * t0 * d * history.gradients.element_size() + d * word


def train(problem: Problem, options: dict[str, Any]) -> dict[str, Any]:
    """One run."""
    base = torch.optim.Adam(problem.parameters(), lr=1e-3)
    optimizer = optex.OptEx(base, parallelism=4, **options)
    losses, reports = {}, []
    rounds = optimizer.rounds(problem.batches(), problem.source())
    for number, report in enumerate(itertools.islice(rounds, ROUNDS[-1]), start=1):
        reports.append(report)
        if number in ROUNDS:
            losses[number] = problem.evaluate()
    errors = [float(r.relative_errors.mean()) for r in reports if len(r.relative_errors)]
    model = sum(p.numel() * p.element_size() for p in problem.parameters())
    word = next(problem.parameters()).element_size()
    return {
        "bytes": tensor_bytes(optimizer.history) / model,
        "formula": formula_bytes(optimizer.history, word) / model,
        "loss": [losses[number] for number in ROUNDS],
        "accepted": statistics.mean(r.accepted for r in reports),
        "error": statistics.mean(errors),
    }


def plain(problem: Problem, steps: int) -> list[float]:
    """Adam alone: the loss after ``steps`` steps for each of the rounds that are shown."""
    base, losses = torch.optim.Adam(problem.parameters(), lr=1e-3), []
    for number, batch in enumerate(itertools.islice(problem.batches(), steps * ROUNDS[-1]), start=1):
        base.zero_grad()
        problem(batch).backward()
        base.step()
        if number in [steps * r for r in ROUNDS]:
            losses.append(problem.evaluate())
    return losses


def table(references: dict[str, list[list[float]]], results: dict[str, list[dict[str, Any]]]) -> str:
    """A row for each way to keep the history, below vanilla and target; means over the seeds."""
    head = ("history", "bytes, models", "by formula", "loss at 20", "40", "60", "steps a round")
    rows = [(name, "0", "0", *_means(runs), "–", "–") for name, runs in references.items()]
    for name, runs in results.items():
        rows.append(
            (
                name,
                f"{runs[0]['bytes']:.1f}",
                f"{runs[0]['formula']:.1f}",
                *_means([run["loss"] for run in runs]),
                f"{statistics.mean(run['accepted'] for run in runs):.2f}",
                f"{statistics.mean(run['error'] for run in runs):.2f}",
            )
        )
    return markdown_table((*head, "prediction error"), rows)


def _means(losses: list[list[float]]) -> list[str]:
    return [f"{statistics.mean(values):.3f}" for values in zip(*losses, strict=True)]


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problem", default="shakespeare")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in VARIANTS}
    references: dict[str, list[list[float]]] = {"vanilla": [], "target": []}
    for seed in range(options.seeds):
        for name, steps in (("vanilla", 1), ("target", 4)):
            references[name].append(plain(make_problem(options.problem, seed=seed), steps))
        for name, choose in VARIANTS.items():
            problem = make_problem(options.problem, seed=seed)
            results[name].append(train(problem, choose(problem)))
            print(seed, name, results[name][-1], flush=True)
    document = {"problem": options.problem, "seeds": options.seeds, "references": references, "runs": results}
    (FOLDER / "memory.json").write_text(json.dumps(document, indent=1) + "\n")
    fill(FOLDER / "README.md", {"memory": table(references, results)})


if __name__ == "__main__":
    main()
