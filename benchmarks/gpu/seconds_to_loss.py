"""Seconds to a target loss: vanilla, data-parallel with a tuned rate, Algorithm 1 and optex on one device.

    python benchmarks/gpu/seconds_to_loss.py --device cuda --json results/gpu/cuda.json
    python benchmarks/gpu/seconds_to_loss.py --device cpu --threads 2 --parallelism 4 16 \
        --workloads digits-mlp,deep-mlp,shakespeare --json results/gpu/cpu.json

The device evaluates the N gradients of a round in one vmap, so a round costs more than a gradient: it pays
where one gradient does not fill the device. The target is the loss that vanilla has after all its steps; a
method is stopped there, or after as many rounds as vanilla has steps. Data-parallel takes N times the batch, so
as many gradients in all, and the best of the rates lr, √N lr and N lr. The clock runs for the rounds alone:
losses are evaluated between them, every few rounds, and the device is waited for. Prints ratios to vanilla, the
most memory allocated, the device's utilisation (where nvidia-ml-py tells), and

    cost of a round   seconds of its N gradients, in units of one vanilla step
    break-even        how slow one gradient must be for the method to pay, if N at once take the time of one

Methods of a workload run in turn, in one process. ``--report`` runs nothing, and puts the tables of the JSON
into results/README.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.func import replace_all_batch_norm_modules_

import optex
from optex.studies.problems import Problem, make_problem
from optex.studies.tables import fill, markdown_table


@dataclass(frozen=True)
class Workload:
    """A problem, its options, the rate of Adam, and vanilla's steps."""

    problem: str
    options: dict[str, Any]
    batch_size: int
    lr: float
    steps: int
    every: int  # rounds between evaluations

    def start(self, device: str, factor: int = 1) -> Problem:
        """The problem on the device, its batches ``factor`` times as large."""
        problem = make_problem(self.problem, seed=0, batch_size=self.batch_size * factor, **self.options)
        # Running statistics cannot be shared by points evaluated at once; all methods do without them.
        replace_all_batch_norm_modules_(problem)
        return problem.to(device)


WORKLOADS = {
    "digits-mlp": Workload("digits-mlp", {}, 32, 1e-3, 400, 5),
    "deep-mlp": Workload("fashion-mnist", {"width": 32, "depth": 12}, 64, 1e-3, 400, 5),
    "fashion-mlp": Workload("fashion-mnist", {}, 64, 1e-3, 400, 5),
    "resnet-20": Workload("cifar10", {"model": "resnet", "depth": 20}, 64, 1e-3, 800, 10),
    "shakespeare": Workload("shakespeare", {}, 16, 1e-3, 240, 5),
    "transformer-10m": Workload(
        "shakespeare", {"layers": 6, "heads": 6, "width": 384, "context": 256}, 64, 1e-3, 800, 10
    ),
}


@dataclass
class Clock:
    """Seconds on the device between ``start`` and ``stop``, added up."""

    device: str
    seconds: float = 0.0
    _since: float = 0.0

    def start(self) -> None:
        """Go on counting."""
        self._wait()
        self._since = time.perf_counter()

    def stop(self) -> None:
        """Stop counting, when the device is done."""
        self._wait()
        self.seconds += time.perf_counter() - self._since

    def _wait(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()


Rounds = Iterator["optex.RoundReport | None"]


def vanilla_rounds(problem: Problem, lr: float) -> Rounds:
    """One step a round."""
    optimizer = torch.optim.Adam(problem.parameters(), lr=lr)
    for batch in problem.batches():
        optimizer.zero_grad()
        problem(batch).backward()
        optimizer.step()
        yield None


def optex_rounds(problem: Problem, lr: float, make: Callable[..., optex.OptEx], n: int) -> Rounds:
    """Rounds of N vectorized gradients."""
    base = torch.optim.Adam(problem.parameters(), lr=lr)
    optimizer = make(base, parallelism=n, evaluator=optex.VectorizedEvaluator(problem, randomness="different"))
    yield from optimizer.rounds(problem.batches(), problem.source())


def run(
    problem: Problem, rounds: Rounds, workload: Workload, device: str, goal: float | None
) -> dict[str, Any]:
    """Rounds up to the goal, or all of them."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    clock, losses, reports, utilisation = Clock(device), [problem.evaluate()], [], []
    taken = 0
    while taken < workload.steps and (goal is None or losses[-1] > goal) and math.isfinite(losses[-1]):
        clock.start()
        chunk = list(itertools.islice(rounds, workload.every))
        clock.stop()
        taken += len(chunk)
        reports += [report for report in chunk if report is not None]
        losses.append(problem.evaluate())
        utilisation += utilisation_now(device)
    reached = goal is not None and losses[-1] <= goal
    return {
        "rounds": taken,
        "reached": reached,
        "seconds": round(clock.seconds, 4),
        "loss": round(losses[-1], 5),
        "ms_a_round": round(1e3 * clock.seconds / max(taken, 1), 3),
        "gradient_ms": median_milliseconds(r.gradient_seconds for r in reports),
        "overhead_ms": median_milliseconds(r.overhead_seconds for r in reports),
        "accepted": round(statistics.mean(r.accepted for r in reports), 2) if reports else 1,
        "megabytes": torch.cuda.max_memory_allocated() // 2**20 if device.startswith("cuda") else None,
        "utilisation": round(statistics.mean(utilisation), 1) if utilisation else None,
    }


def median_milliseconds(seconds: Iterable[float]) -> float | None:
    """None where there are none."""
    known = list(seconds)
    return round(1e3 * statistics.median(known), 3) if known else None


def utilisation_now(device: str) -> list[int]:
    """Percent of time the device was busy lately, where that can be known."""
    if not device.startswith("cuda"):
        return []
    try:
        return [torch.cuda.utilization()]
    except (ModuleNotFoundError, RuntimeError):
        return []


def measure(name: str, device: str, parallelisms: list[int]) -> dict[str, Any]:
    """All methods of a workload; the target is vanilla's last loss."""
    workload = WORKLOADS[name]
    results: dict[str, Any] = {}
    problem = workload.start(device)
    list(itertools.islice(vanilla_rounds(problem, workload.lr), 5))  # warm up: kernels are chosen, memory taken
    problem.reset()
    results["vanilla"] = run(problem, vanilla_rounds(problem, workload.lr), workload, device, None)
    goal = results["vanilla"]["loss"]
    for n in parallelisms:
        tuned = []
        for factor in (1.0, math.sqrt(n), float(n)):
            problem, lr = workload.start(device, n), workload.lr * factor
            tuned.append(run(problem, vanilla_rounds(problem, lr), workload, device, goal) | {"lr": lr})
        results[f"data-parallel, N = {n}"] = min(tuned, key=lambda r: (not r["reached"], r["seconds"]))
        for method, make in (("optex-paper", optex.OptEx.from_paper), ("optex", optex.OptEx)):
            problem = workload.start(device)
            rounds = optex_rounds(problem, workload.lr, make, n)
            results[f"{method}, N = {n}"] = run(problem, rounds, workload, device, goal)
    return {"dimension": problem.dimension, "goal": goal, "methods": results}


def table(name: str, result: dict[str, Any]) -> str:
    """As Markdown, with ratios to vanilla."""
    vanilla = result["methods"]["vanilla"]
    head = ("method", "rounds", "of vanilla's", "seconds", "of vanilla's", "ms a round", "cost of a round")
    rows = []
    for method, r in result["methods"].items():
        rounds, seconds = r["rounds"] / vanilla["rounds"], r["seconds"] / vanilla["seconds"]
        cost = None if r["gradient_ms"] is None else r["gradient_ms"] / vanilla["ms_a_round"]
        pays = cost is not None and rounds < 1 and r["reached"]
        rows.append(
            (
                method,
                f"{r['rounds']}" + " (not reached)" * (not r["reached"] and method != "vanilla"),
                f"{rounds:.2f}",
                f"{r['seconds']:.2f}",
                f"{seconds:.2f}",
                f"{r['ms_a_round']:.2f}",
                _cell(cost, ".2f"),
                _cell(r["overhead_ms"], ".2f"),
                _cell(r["overhead_ms"] / (1 / rounds - 1) if pays else None, ".2f"),
                f"{r['accepted']:.1f}",
                _cell(r["megabytes"], ""),
                _cell(r["utilisation"], ""),
            )
        )
    heading = f"**{name}**: d = {result['dimension']:,}, loss to reach {result['goal']:.4f}"
    head += ("overhead ms", "break-even ms", "accepted", "MB", "busy %")
    shown = [i for i in range(len(head)) if any(row[i] != "–" for row in rows)]  # a CPU tells no MB and busy %
    cells = [[row[i] for i in shown] for row in rows]
    return f"{heading}\n\n{markdown_table([head[i] for i in shown], cells)}"


def report(documents: Path, page: Path) -> None:
    """The tables of one device's JSON, put where the page has a place named for it."""
    workloads = json.loads(documents.read_text())["workloads"]
    tables = [table(name, result) for name, result in workloads.items()]
    fill(page, {f"seconds-{documents.stem}": "\n\n".join(tables)})


def _cell(value: float | None, form: str) -> str:
    return "–" if value is None else f"{value:{form}}"


def main() -> None:
    """Measure, print, and write what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--workloads", default="digits-mlp,fashion-mlp,resnet-20,transformer-10m")
    parser.add_argument("--parallelism", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--report", action="store_true", help="only fill results/README.md from the JSON")
    options = parser.parse_args()
    if options.report:
        if options.json is None:
            parser.error("--report needs --json")
        report(options.json, Path(__file__).parents[2] / "results" / "README.md")
        return
    torch.set_num_threads(options.threads)
    cuda = options.device.startswith("cuda")
    document: dict[str, Any] = {
        "meta": {
            "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
            "threads": options.threads,
            "torch": torch.__version__,
            "optex": optex.__version__,
            "optimizer": "adam",
            "seed": 0,
        },
        "workloads": {},
    }
    for name in options.workloads.split(","):
        document["workloads"][name] = measure(name, options.device, options.parallelism)
        print(table(name, document["workloads"][name]) + "\n", flush=True)
        if options.json is not None:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
