"""Would a history of the nearest pairs serve better than one of the newest?

    python benchmarks/nearest_history.py --seeds 2

Keeps, after every round, those T0 of all pairs held and new that are nearest to the round's start, in order of
age, and prints accelerations on the suite of nine (geometric mean / worst case) beside the history as it is.
One thread.
"""

from __future__ import annotations

import argparse
import warnings
from typing import Any

import numpy as np
import torch
from acceleration import NINE, ROUNDS, Case, run_method

import optex
from optex.stepping.bases import base_optimizer
from optex.studies.baselines import Setting
from optex.studies.baselines.with_optex import run_rounds
from optex.studies.measures import VANILLA, acceleration, geometric_mean
from optex.studies.tables import markdown_table


class NearestHistory(optex.OptEx):
    """OptEx whose history forgets the farthest pair, not the oldest."""

    def _remember(self, draft: Any, measured: Any) -> None:
        start, noisy = draft.proxies[0], self.history.noisy
        before = getattr(self, "_pairs", [])
        super()._remember(draft, measured)
        rows = [i for i, usable in enumerate(measured.usable) if usable]
        pairs = before + [(draft.proxies[i].clone(), measured.gradients[i].clone()) for i in rows]
        distances = [float((point - start).norm()) for point, _ in pairs]
        kept = sorted(range(len(pairs)), key=distances.__getitem__)[: self.history_size]
        self._pairs = [pairs[i] for i in sorted(kept)]
        self.history.clear()
        self.history.noisy = noisy
        points, gradients = zip(*self._pairs, strict=True)
        self.history.append(torch.stack(points), torch.stack(gradients))


def accelerations(kind: type[optex.OptEx], case: Case, parallelism: int, seeds: int) -> float:
    """Mean over seeds."""
    values = []
    for seed in range(seeds):
        problem, rate = case.start(seed), case.rate()

        def setting(n: int, rounds: int, case: Case = case, rate: float = rate) -> Setting:
            base = lambda parameters: base_optimizer(case.optimizer, parameters, lr=rate)  # noqa: E731
            return Setting(base, n, 16, rounds)

        vanilla = run_method(VANILLA, problem, setting(1, ROUNDS * parallelism)).loss
        problem.reset()
        shared = setting(parallelism, ROUNDS)
        trace = run_rounds(problem, shared, kind(shared.base_optimizer(problem), parallelism=parallelism))
        values.append(acceleration(trace.loss, vanilla, parallelism))
    return float(np.mean(values))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--parallelism", type=int, nargs="+", default=[5, 16])
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", RuntimeWarning)
    kinds = {"the newest": optex.OptEx, "the nearest": NearestHistory}
    rows = []
    for name, kind in kinds.items():
        cells = []
        for n in options.parallelism:
            values = [accelerations(kind, case, n, options.seeds) for case in NINE]
            cells.append(f"{geometric_mean(values):.2f} / {min(values):.2f}")
        rows.append([name, *cells])
    print(markdown_table(["history of", *(f"N = {n}" for n in options.parallelism)], rows))


if __name__ == "__main__":
    main()
