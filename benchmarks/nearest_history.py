"""Would a history of the nearest pairs serve better than one of the newest?

    python benchmarks/nearest_history.py             # some minutes
    python benchmarks/nearest_history.py --report    # run nothing; the table from the JSON

Keeps, after every round, those T0 of all pairs held and new that are nearest to the round's start, in order of
age, and measures accelerations on the suite of nine beside the history as it is, without strides and with
them. Writes results/acceleration/nearest_history.json and the table in results/acceleration/README.md. One
thread.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from acceleration import FOLDER, NINE, ROUNDS, Case, run_method

import optex
from optex.estimators.arrivals import Arrivals
from optex.round import Predictor
from optex.stepping.bases import base_optimizer
from optex.studies.baselines import Setting
from optex.studies.baselines.with_optex import run_rounds
from optex.studies.measures import VANILLA, acceleration, geometric_mean
from optex.studies.records import significant, write_whole
from optex.studies.tables import fill, markdown_table

PATH = FOLDER / "nearest_history.json"
STRIDES: dict[str, dict[str, Any]] = {"stride 1": {"stride": 1}, "default stride": {}}


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


def with_nearest(base: torch.optim.Optimizer, parallelism: int, **options: Any) -> optex.OptEx:
    """OptEx with such a history; all cases here are deterministic."""
    optimizer = optex.OptEx(base, parallelism=parallelism, **options)
    plain = optimizer.history
    nearest = NearestHistory(plain.size, plain.space, dtype=plain.gradients.dtype)
    optimizer._rounds.predictor = Predictor(optimizer.estimator, nearest)  # a study's own surgery
    return optimizer


def with_newest(base: torch.optim.Optimizer, parallelism: int, **options: Any) -> optex.OptEx:
    """OptEx as it is."""
    return optex.OptEx(base, parallelism=parallelism, **options)


HISTORIES: dict[str, Callable[..., optex.OptEx]] = {"the newest": with_newest, "the nearest": with_nearest}


def accelerations(case: Case, parallelism: int, seed: int) -> dict[tuple[str, str], float]:
    """By history and stride, against one run of vanilla."""
    problem, rate = case.start(seed), case.rate()

    def setting(n: int, rounds: int) -> Setting:
        return Setting(lambda parameters: base_optimizer(case.optimizer, parameters, lr=rate), n, 16, rounds)

    vanilla = run_method(VANILLA, problem, setting(1, ROUNDS * parallelism)).loss
    shared, found = setting(parallelism, ROUNDS), {}
    for history, make in HISTORIES.items():
        for stride, options in STRIDES.items():
            problem.reset()
            optimizer = make(shared.base_optimizer(problem), parallelism, **options)
            trace = run_rounds(problem, shared, optimizer)
            found[history, stride] = acceleration(trace.loss, vanilla, parallelism)
    return found


def measured(seeds: int, parallelisms: Sequence[int]) -> dict[str, Any]:
    """The record: the mean over the seeds in every case, and both figures over the nine."""
    pooled: dict[str, Any] = {}
    for n in parallelisms:
        runs = {case.name: [accelerations(case, n, seed) for seed in range(seeds)] for case in NINE}
        for history in HISTORIES:
            for stride in STRIDES:
                means = {
                    name: float(np.mean([one[history, stride] for one in found]))
                    for name, found in runs.items()
                }
                pooled.setdefault(history, {}).setdefault(stride, {})[f"N = {n}"] = {
                    "mean": significant(geometric_mean(list(means.values())), 4),
                    "worst": significant(min(means.values()), 4),
                    "cases": {name: significant(value, 4) for name, value in means.items()},
                }
    return {"seeds": seeds, "rounds": ROUNDS, "torch": torch.__version__, "histories": pooled}


def table(record: dict[str, Any]) -> str:
    """A row for each history and stride, a column for each N."""
    rows = [
        [f"{history}, {stride}", *(f"{cell['mean']:.2f} / {cell['worst']:.2f}" for cell in cells.values())]
        for history, strides in record["histories"].items()
        for stride, cells in strides.items()
    ]
    sizes = list(record["histories"]["the newest"]["stride 1"])
    return markdown_table(["history of", *sizes], rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--parallelism", type=int, nargs="+", default=[5, 16])
    parser.add_argument("--report", action="store_true", help="run nothing, fill the page")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if not options.report:
        warnings.simplefilter("ignore", RuntimeWarning)
        record = measured(options.seeds, options.parallelism)
        write_whole(PATH, json.dumps(record, indent=1, allow_nan=False) + "\n")
    fill(FOLDER / "README.md", {"nearest-history": table(json.loads(PATH.read_text(encoding="utf-8")))})


if __name__ == "__main__":
    main()
