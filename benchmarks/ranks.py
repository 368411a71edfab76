"""What a round costs on several ranks of this machine: bytes, messages, seconds.

    python benchmarks/ranks.py --json results/distributed/measured.json

For 1, 2 and 4 gloo ranks on localhost, OptEx with Adam in float32 minimises the distance to a point; a gradient
costs its arithmetic and a pause of --pause seconds, in which a rank does not hold a core. Measured are

- the bytes that each rank hands to collectives in a round, beside the formula, 2 d (N / ranks) (1 - 1 / ranks)
  numbers, and what the kernel counted on the loopback device meanwhile, from all programs;
- messages and seconds a round: of the fastest two in a row, because other work on the machine can only slow
  them down and every other round compares the estimators, and of the slowest rank;
- what a message, a byte and a round's arithmetic cost here, for ``cost_model.py``: a sum of 40 numbers, an
  all-to-all of d numbers, and rounds on one rank.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

import optex

HISTORY = 16
WARM_UP = 6  # rounds until the history is full


def rounds(dimension: int, parallelism: int, pause: float, count: int) -> dict[str, float]:
    """Of ``count`` rounds on this rank: seconds of the fastest two in a row, means of all else."""
    torch.manual_seed(0)
    theta = torch.nn.Parameter(torch.rand(dimension) * 4 - 2)
    evaluator = optex.DistributedEvaluator()
    optimizer = optex.OptEx(
        torch.optim.Adam([theta], lr=0.01),
        parallelism=parallelism,
        stride=1,  # as the model counts
        history_size=HISTORY,
        evaluator=evaluator,
        shard=True,
        deterministic=True,
    )

    def objective(_: Any) -> torch.Tensor:
        time.sleep(pause)
        return theta.square().mean().sqrt()

    running = optimizer.rounds(itertools.repeat(None), objective)
    for _ in range(WARM_UP):
        next(running)
    traffic = evaluator.traffic
    assert traffic is not None
    dist.barrier()
    before, loopback = vars(traffic).copy(), loopback_bytes()
    seconds, steps = [], 0
    for _ in range(count):
        started = time.perf_counter()
        steps += next(running).accepted
        seconds.append(time.perf_counter() - started)
    dist.barrier()
    sums = {name: (value - before[name]) / count for name, value in vars(traffic).items()}
    on_loopback = (loopback_bytes() - loopback) / count
    fastest = min((a + b) / 2 for a, b in itertools.pairwise(seconds))
    return {"seconds": fastest, "steps": steps / count, "loopback": on_loopback, **sums}


def loopback_bytes() -> int:
    """Bytes that went through the loopback device since the machine started; Linux only."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == "lo":
            return int(counts.split()[8])
    return 0


def message_seconds(repeats: int) -> float:
    """A sum of 40 numbers over all ranks, which is what most messages of a round are."""
    values, times = torch.zeros(40, dtype=torch.float64), []
    for _ in range(repeats):
        started = time.perf_counter()
        for _ in range(25):  # about as many as in a round; the slow ones count, too
            dist.all_reduce(values)
        times.append((time.perf_counter() - started) / 25)
    return min(times)


def exchange_seconds(dimension: int, repeats: int) -> float:
    """An all-to-all of d float32 numbers a rank."""
    ranks = dist.get_world_size()
    out = torch.zeros(dimension // ranks * ranks)
    into, times = torch.empty_like(out), []
    for _ in range(repeats):
        started = time.perf_counter()
        dist.all_to_all_single(into, out)
        times.append(time.perf_counter() - started)
    return min(times)


def work(rank: int, size: int, store: str, options: argparse.Namespace, folder: str) -> None:
    """What one rank does; its numbers go into a file."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(minutes=5)
    )
    runs = []
    for dimension in options.dimensions:
        for parallelism in options.parallelism:
            found = rounds(dimension, parallelism, options.pause, options.rounds)
            runs.append({"dimension": dimension, "parallelism": parallelism, **found})
    answer: dict[str, Any] = {"runs": runs}
    if size > 1:
        answer["message"] = message_seconds(20)
        answer["exchange"] = exchange_seconds(max(options.dimensions), 10)
    Path(folder, f"{rank}.json").write_text(json.dumps(answer))
    dist.barrier()
    dist.destroy_process_group()


def measure(size: int, options: argparse.Namespace) -> dict[str, Any]:
    """One job of ``size`` ranks; per run the slowest rank's seconds, and the largest count of bytes."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (size, str(Path(folder, "store")), options, folder)
        torch.multiprocessing.start_processes(work, arguments, nprocs=size, start_method="spawn")
        answers = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(size)]
    runs = []
    for of_ranks in zip(*(answer["runs"] for answer in answers), strict=True):
        run = {"ranks": size, **{name: max(found[name] for found in of_ranks) for name in of_ranks[0]}}
        row = 4 * run["dimension"]
        run["formula"] = 2 * row * -(-run["parallelism"] // size) * (size - 1) / size
        run["all ranks sent"] = sum(found["sent"] + found["small"] for found in of_ranks)
        runs.append(run)
    costs = {name: max(answer.get(name, 0.0) for answer in answers) for name in ("message", "exchange")}
    return {"ranks": size, **costs, "runs": runs}


def line(run: dict[str, Any]) -> str:
    """A run in words."""
    return (
        f"{run['ranks']} ranks, d = {run['dimension']:,}, N = {run['parallelism']}: "
        f"{1e3 * run['seconds']:.0f} ms, {run['steps']:.1f} steps a round; "
        f"sent {run['sent']:,.0f} bytes, by formula {run['formula']:,.0f}, and "
        f"{run['small']:,.0f} in {run['messages']:.1f} messages; "
        f"loopback {run['loopback']:,.0f} bytes of {run['all ranks sent']:,.0f}"
    )


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--dimensions", type=int, nargs="+", default=[1_000, 300_000, 1_000_000])
    parser.add_argument("--parallelism", type=int, nargs="+", default=[4, 8])
    parser.add_argument(
        "--pause", type=float, default=0.2, help="seconds a gradient waits (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    load = os.getloadavg()[0]
    jobs = []
    for size in options.ranks:
        jobs.append(measure(size, options))
        for run in jobs[-1]["runs"]:
            print(line(run), flush=True)
    meta = {
        "pause": options.pause,
        "history": HISTORY,
        "rounds": options.rounds,
        "cores": len(os.sched_getaffinity(0)),
        "load before": round(load, 1),
        "dtype": "float32",
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {platform.system()}",
    }
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"meta": meta, "jobs": jobs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
