"""How far a gradient can be trusted: its change along the base optimizer's own path.

    python benchmarks/gradient_change.py             # about a minute
    python benchmarks/gradient_change.py --report    # run nothing; the table from the JSON

For digits-mlp measures, by base optimizer and batch size, ‖g_i(θ_{i+k}) - g_i(θ_i)‖ / ‖g_i(θ_i)‖ for the
minibatch of step i, k = 1, 4 and 15 steps later, as the mean over 240 steps and 3 seeds. Where it nears 1 after
a few steps, a gradient measured there says nothing about the one that is needed, and the estimator alone
decides how many steps a round can keep. Writes results/acceleration/gradient_change.json and the table in
results/acceleration/README.md. One thread.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from optex.stepping.bases import base_optimizer
from optex.stepping.parameters import ParameterVector
from optex.studies.problems import make_problem
from optex.studies.records import significant, write_whole
from optex.studies.tables import fill, markdown_table

FOLDER = Path(__file__).resolve().parents[1] / "results" / "acceleration"
PATH = FOLDER / "gradient_change.json"
CASES = [("adam", 1e-3), ("adam", 1e-2), ("adam", 0.1), ("sgd", 0.1), ("momentum", 0.05)]
BATCH_SIZES, LATER, STEPS, SEEDS = (32, 512), (1, 4, 15), 240, 3


def changes(optimizer: str, lr: float, batch_size: int, seed: int, steps: int = STEPS) -> list[float]:
    """Mean relative change of a step's gradient, for each k of LATER."""
    problem = make_problem("digits-mlp", seed=seed, batch_size=batch_size)
    vector, base = ParameterVector(problem.parameters()), base_optimizer(optimizer, problem.parameters(), lr=lr)
    held: list[tuple[object, torch.Tensor]] = []
    found: dict[int, list[float]] = {k: [] for k in LATER}

    def gradient(batch: object) -> torch.Tensor:
        base.zero_grad()
        problem(batch).backward()
        return vector.read_gradients()[0]

    for batch, _ in zip(problem.batches(), range(steps), strict=False):
        for k in LATER:
            if len(held) >= k:
                old_batch, old = held[-k]
                found[k].append(float((gradient(old_batch) - old).norm() / old.norm()))
        held.append((batch, gradient(batch)))
        base.step()
    return [float(np.mean(found[k])) for k in LATER]


def measured() -> dict[str, Any]:
    """The record: every case's changes, for each seed and their mean."""
    found: dict[str, Any] = {}
    for optimizer, lr in CASES:
        for batch_size in BATCH_SIZES:
            seeds = [changes(optimizer, lr, batch_size, seed) for seed in range(SEEDS)]
            found[f"{optimizer} {lr:g}, batches of {batch_size}"] = {
                "seeds": [[significant(value, 4) for value in one] for one in seeds],
                "mean": [significant(float(value), 4) for value in np.mean(seeds, axis=0)],
            }
    settings = {"problem": "digits-mlp", "steps": STEPS, "seeds": SEEDS, "later": LATER}
    return settings | {"torch": torch.__version__, "changes": found}


def table(record: dict[str, Any]) -> str:
    """A row for each base optimizer and batch size."""
    rows = [[name, *(f"{value:.2f}" for value in entry["mean"])] for name, entry in record["changes"].items()]
    later = [f"{k} step{'s' if k > 1 else ''} later" for k in record["later"]]
    return markdown_table(["base optimizer, minibatches", *later], rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="run nothing, fill the page")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if not options.report:
        write_whole(PATH, json.dumps(measured(), indent=1, allow_nan=False) + "\n")
    fill(FOLDER / "README.md", {"gradient-change": table(json.loads(PATH.read_text(encoding="utf-8")))})


if __name__ == "__main__":
    main()
