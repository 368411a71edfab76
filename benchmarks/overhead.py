"""What a round costs beyond its gradients.

    python benchmarks/overhead.py --dim 100000 --parallelism 5 --history 50 --threads 2

Runs OptEx with Adam in float32 on the sphere and prints, in milliseconds a round (median over the rounds with
a full history, and the slowest), all that is not spent evaluating gradients: predicting, stepping the base
optimizer, remembering. Beside it stands the time that reading the history N times takes on this machine, the
least any method that looks at the whole history for each proxy could need.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import optex

METHODS: dict[str, Callable[..., optex.OptEx]] = {
    "optex-paper": lambda base, n, t0: optex.OptEx.from_paper(base, n, t0, deterministic=True),
    "optex-paper, leave-one-out": lambda base, n, t0: optex.OptEx.from_paper(
        base, n, t0, lengthscale="leave-one-out", noise_variance="leave-one-out", deterministic=True
    ),
    "optex, stride=1": lambda base, n, t0: optex.OptEx(
        base, parallelism=n, stride=1, history_size=t0, deterministic=True
    ),
    "optex": lambda base, n, t0: optex.OptEx(base, parallelism=n, history_size=t0, deterministic=True),
}


def overhead_milliseconds(
    method: str, dimension: int, parallelism: int, history: int, rounds: int
) -> dict[str, float]:
    """Median and largest overhead of a round once the history is full, and the median of its steps."""
    torch.manual_seed(0)
    theta = torch.nn.Parameter(torch.rand(dimension) * 4 - 2)
    optimizer = METHODS[method](torch.optim.Adam([theta], lr=0.01), parallelism, history)
    warm_up = -(-history // parallelism)
    reports = itertools.islice(
        optimizer.rounds(itertools.repeat(None), lambda _: theta.square().mean().sqrt()), warm_up + rounds
    )
    full = list(reports)[warm_up:]
    times = [1e3 * report.overhead_seconds for report in full]
    steps = statistics.median(report.accepted for report in full)
    return {"median": statistics.median(times), "slowest": max(times), "steps": steps}


def methods(parallelism: int) -> list[str]:
    """Those that are not the base optimizer there."""
    return list(METHODS) if parallelism > 1 else ["optex"]


def read_milliseconds(dimension: int, parallelism: int, history: int, repeats: int) -> float:
    """Reading iterates and gradients of the history once for each of N proxies: two matrix-vector products."""
    rows, vector = torch.randn(2, history, dimension), torch.randn(dimension)
    weights, times = torch.randn(history), []
    for _ in range(repeats):
        started = time.perf_counter()
        for _ in range(parallelism):
            rows[0] @ vector
            weights @ rows[1]
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times)


def measure(sizes: list[tuple[int, int, int]], *, rounds: int, threads: int) -> dict[str, Any]:
    """Overheads for each (d, N, T0), and what they were measured with."""
    torch.set_num_threads(threads)
    return {
        "meta": {
            "rounds": rounds,
            "threads": threads,
            "dtype": "float32",
            "optimizer": "adam",
            "torch": torch.__version__,
            "machine": f"{platform.machine()}, {platform.system()}",
        },
        "sizes": [
            {
                "dimension": size[0],
                "parallelism": size[1],
                "history": size[2],
                "milliseconds": {
                    method: overhead_milliseconds(method, *size, rounds) for method in methods(size[1])
                },
                "read": read_milliseconds(*size, rounds),
            }
            for size in sizes
        ],
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=100_000)
    parser.add_argument("--parallelism", type=int, default=5)
    parser.add_argument("--history", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    size = (options.dim, options.parallelism, options.history)
    (result,) = measure([size], rounds=options.rounds, threads=options.threads)["sizes"]
    print(f"d = {size[0]}, N = {size[1]}, T0 = {size[2]}, Adam, float32, {options.threads} threads; ms a round")
    for method, times in result["milliseconds"].items():
        print(
            f"  {method:30s} median {times['median']:7.2f}   slowest {times['slowest']:7.2f}   "
            f"steps a round {times['steps']:g}"
        )
    print(f"  {'reading the history N times':30s} median {result['read']:7.2f}")


if __name__ == "__main__":
    main()
