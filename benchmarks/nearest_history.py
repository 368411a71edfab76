"""Would a history of the nearest pairs serve better than one of the newest?

    python benchmarks/nearest_history.py --seeds 2

Keeps, after every round, those T0 of all pairs held and new that are nearest to the round's start, in order of
age, and prints accelerations on the suite of nine (geometric mean / worst case) beside the history as it is.
One thread.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from acceleration import NINE, ROUNDS, Case, run_method

import optex
from optex.estimators.arrivals import Arrivals
from optex.round import Predictor
from optex.stepping.bases import base_optimizer
from optex.studies.baselines import Setting
from optex.studies.baselines.with_optex import run_rounds
from optex.studies.measures import VANILLA, acceleration, geometric_mean
from optex.studies.tables import markdown_table


class NearestHistory(optex.GradientHistory):
    """A history that forgets the pair farthest from the round's start, not the oldest."""

    def append(
        self,
        points: torch.Tensor,  # [n, d]
        gradients: torch.Tensor,  # [n, d]
        noise_variance: Sequence[float] | None = None,
        arrivals: Arrivals | None = None,
    ) -> None:
        # The products that come with the pairs are not used: other rows are kept than those they are of.
        start = points[0]
        pairs = [*getattr(self, "pairs", []), *zip(points.clone(), gradients.clone(), strict=True)]
        distances = [float((point - start).norm()) for point, _ in pairs]
        kept = sorted(range(len(pairs)), key=distances.__getitem__)[: self.size]
        self.pairs = [pairs[i] for i in sorted(kept)]
        self.clear()
        points, gradients = (torch.stack(list(rows)) for rows in zip(*self.pairs, strict=True))
        super().append(points, gradients)


def with_nearest(base: torch.optim.Optimizer, parallelism: int) -> optex.OptEx:
    """OptEx with such a history; all cases here are deterministic."""
    optimizer = optex.OptEx(base, parallelism=parallelism)
    plain = optimizer.history
    nearest = NearestHistory(plain.size, plain.space, dtype=plain.gradients.dtype)
    optimizer._rounds.predictor = Predictor(optimizer.estimator, nearest)  # a study's own surgery
    return optimizer


def with_newest(base: torch.optim.Optimizer, parallelism: int) -> optex.OptEx:
    """OptEx as it is."""
    return optex.OptEx(base, parallelism=parallelism)


def accelerations(make: Callable[..., optex.OptEx], case: Case, parallelism: int, seeds: int) -> float:
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
        trace = run_rounds(problem, shared, make(shared.base_optimizer(problem), parallelism))
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
    kinds = {"the newest": with_newest, "the nearest": with_nearest}
    rows = []
    for name, make in kinds.items():
        cells = []
        for n in options.parallelism:
            values = [accelerations(make, case, n, options.seeds) for case in NINE]
            cells.append(f"{geometric_mean(values):.2f} / {min(values):.2f}")
        rows.append([name, *cells])
    print(markdown_table(["history of", *(f"N = {n}" for n in options.parallelism)], rows))


if __name__ == "__main__":
    main()
