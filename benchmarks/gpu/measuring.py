"""Runs on the clock: every method of a workload, at one rate and at the best of a few."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from cuda_evaluators import GraphedEvaluator, StreamsEvaluator
from torch import nn
from workloads import Workload

import optex
from optex.errors import NonFiniteError
from optex.evaluators import Evaluator
from optex.studies.problems import Problem

EVALUATORS: dict[str, Callable[[nn.Module], Evaluator]] = {
    "sequential": lambda model: optex.SequentialEvaluator(),  # noqa: ARG005 (it needs no model)
    "vectorized": lambda model: optex.VectorizedEvaluator(model, randomness="different"),
    "graphs": GraphedEvaluator,
    "streams": StreamsEvaluator,
}
METHODS = {"optex-paper": optex.OptEx.from_paper, "optex": optex.OptEx}


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
Start = Callable[[float], tuple[Problem, Rounds]]


def vanilla_rounds(problem: Problem, lr: float) -> Rounds:
    """One step a round."""
    optimizer = torch.optim.Adam(problem.parameters(), lr=lr)
    for batch in problem.batches():
        optimizer.zero_grad()
        problem(batch).backward()
        optimizer.step()
        yield None


def optex_rounds(problem: Problem, lr: float, make: Callable[..., optex.OptEx], n: int, how: str) -> Rounds:
    """Rounds of N gradients."""
    base = torch.optim.Adam(problem.parameters(), lr=lr)
    options: dict[str, Any] = {"stride": "auto"} if make is optex.OptEx else {}
    optimizer = make(base, parallelism=n, evaluator=EVALUATORS[how](problem), **options)
    yield from optimizer.rounds(problem.batches(), problem.source())


def chunk_of(rounds: Rounds, problem: Problem, count: int, clock: Clock) -> list[optex.RoundReport | None]:
    """That many rounds on the clock, which stands still while a problem acts between them."""
    acts = type(problem).between_rounds is not Problem.between_rounds
    found = []
    clock.start()
    for report in itertools.islice(rounds, count):
        found.append(report)
        if acts:
            clock.stop()
            problem.between_rounds()
            clock.start()
    clock.stop()
    return found


def run(
    problem: Problem, rounds: Rounds, workload: Workload, device: str, goal: float | None
) -> dict[str, Any]:
    """Rounds up to the goal, or all of them."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    clock, losses, reports, utilisation = Clock(device), [problem.evaluate()], [], []
    taken = 0
    while taken < workload.steps and (goal is None or losses[-1] > goal) and math.isfinite(losses[-1]):
        try:
            chunk = chunk_of(rounds, problem, min(workload.every, workload.steps - taken), clock)
        except NonFiniteError:  # the rate is too large
            losses.append(math.nan)
            break
        taken += len(chunk)
        reports += [report for report in chunk if report is not None]
        losses.append(problem.evaluate())
        utilisation += utilisation_now(device)
    reached = goal is not None and losses[-1] <= goal
    return {
        "rounds": taken,
        "reached": reached,
        "seconds": round(clock.seconds, 4),
        "loss": round(losses[-1], 5) if math.isfinite(losses[-1]) else None,
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


def starts(workload: Workload, device: str, n: int, evaluators: Sequence[str]) -> dict[str, Start]:
    """The methods that evaluate N gradients a round, by name; each starts at a given rate.

    With one gradient a round a larger batch and Algorithm 1 are vanilla's steps, and are left out.
    """

    def larger_batch(lr: float) -> tuple[Problem, Rounds]:
        problem = workload.start(device, n)
        return problem, vanilla_rounds(problem, lr)

    def predicted(method: str, how: str) -> Start:
        def start(lr: float) -> tuple[Problem, Rounds]:
            problem = workload.start(device)
            return problem, optex_rounds(problem, lr, METHODS[method], n, how)

        return start

    found: dict[str, Start] = {f"data-parallel, N = {n}": larger_batch} if n > 1 else {}
    for how in evaluators:
        suffix = "" if how == "vectorized" else f", {how}"
        for method in METHODS if n > 1 else ("optex",):
            found[f"{method}, N = {n}{suffix}"] = predicted(method, how)
    return found


def measure(
    workload: Workload,
    device: str,
    parallelisms: Sequence[int],
    evaluators: Sequence[str],
    grid: Sequence[float],
) -> dict[str, Any]:
    """All methods; the target is the last loss of vanilla at the workload's rate."""

    def vanilla(lr: float) -> tuple[Problem, Rounds]:
        problem = workload.start(device)
        return problem, vanilla_rounds(problem, lr)

    problem, rounds = vanilla(workload.lr)
    list(itertools.islice(rounds, 5))  # warm up: kernels are chosen, memory taken
    first = run(*vanilla(workload.lr), workload, device, None) | {"lr": workload.lr}
    if first["loss"] is None:
        raise RuntimeError(f"vanilla diverges at its rate of {workload.lr}: there is no target")
    goal, results = first["loss"] + 5e-6, {"vanilla": first}  # it was rounded, and vanilla itself reaches it
    methods: dict[str, tuple[Start, int]] = {"vanilla": (vanilla, 1)}
    for n in parallelisms:
        methods |= {name: (start, n) for name, start in starts(workload, device, n, evaluators).items()}
    for name, (start, n) in methods.items():
        rates = {workload.lr, *(workload.lr * factor for factor in grid)}
        if name.startswith("data-parallel"):
            rates |= {workload.lr * math.sqrt(n), workload.lr * n}
        runs = [run(*start(lr), workload, device, goal) | {"lr": lr} for lr in sorted(rates)]
        if name != "vanilla":
            results[name] = next(r for r in runs if r["lr"] == workload.lr)
        results[f"{name}, tuned"] = min(runs, key=lambda r: (not r["reached"], r["seconds"]))
    return {"dimension": problem.dimension, "goal": goal, "data": workload.stands_in, "methods": results}
