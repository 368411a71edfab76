"""How far a gradient can be trusted: its change along the base optimizer's own path.

    python benchmarks/gradient_change.py

For digits-mlp prints, by base optimizer and batch size, the mean over 240 steps and 3 seeds of
‖g_i(θ_{i+k}) - g_i(θ_i)‖ / ‖g_i(θ_i)‖ for the minibatch of step i, k = 1, 4 and 15 steps later. Where it
nears 1 after a few steps, a gradient measured there says nothing about the one that is needed, and the
estimator alone decides how many steps a round can keep.
"""

from __future__ import annotations

import numpy as np
import torch

from optex.stepping.bases import base_optimizer
from optex.stepping.parameters import ParameterVector
from optex.studies.problems import make_problem
from optex.studies.tables import markdown_table

CASES = [("adam", 1e-3), ("adam", 1e-2), ("adam", 0.1), ("sgd", 0.1), ("momentum", 0.05)]
LATER = (1, 4, 15)


def changes(optimizer: str, lr: float, batch_size: int, seed: int, steps: int = 240) -> list[float]:
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


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    rows = []
    for optimizer, lr in CASES:
        for batch_size in (32, 512):
            means = np.mean([changes(optimizer, lr, batch_size, seed) for seed in range(3)], axis=0)
            rows.append([f"{optimizer} {lr:g}", str(batch_size), *(f"{value:.2f}" for value in means)])
    print(markdown_table(["base", "batch", *(f"{k} steps later" for k in LATER)], rows))


if __name__ == "__main__":
    main()
