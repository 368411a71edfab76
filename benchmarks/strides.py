"""Beyond N: what strides gain, where they must do no harm, and the seconds they cost or save.

    python benchmarks/strides.py functions      ten deterministic runs, 5 seeds: 4 minutes on 2 cores
    python benchmarks/strides.py sampled        minibatches and a heat problem with sampled heaters: 6 minutes
    python benchmarks/strides.py seconds        on an idle machine: 8 minutes
    python benchmarks/strides.py report         the tables of results/strides/README.md

Each part writes results/strides/PART.json. Functions: rounds to the least loss of 150 rounds of vanilla, at any
point evaluated; acceleration is vanilla's rounds over the method's. Sampled: the whole objective after 15, 30
and 60 rounds, and in how many of the 60 the best so far is above vanilla's. Seconds: vanilla's and one-gradient
rounds of `optex` in turn in one process, one thread, to the same loss.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

import optex
from optex.stepping.bases import base_optimizer
from optex.studies.baselines import METHODS, Setting
from optex.studies.measures import geometric_mean, rounds_behind
from optex.studies.problems import Problem, make_problem
from optex.studies.records import significant
from optex.studies.tables import fill, markdown_table

FOLDER = Path(__file__).parent.parent / "results" / "strides"
LOGISTIC = "logistic-breast-cancer"
FUNCTIONS = (
    ("quadratic", "adam", 0.1),
    ("quadratic", "adam", 0.03),
    ("quadratic", "momentum", 0.3),
    ("rosenbrock", "adam", 0.1),
    ("rosenbrock", "adam", 0.01),
    ("rosenbrock", "momentum", 0.08),
    (LOGISTIC, "momentum", 0.34),
    (LOGISTIC, "adam", 0.1),
    ("ackley", "adam", 0.01),
    ("sphere", "adam", 0.01),
)
# N, stride, T0:
SETTINGS: tuple[tuple[int, float | Literal["auto"], int], ...] = (
    (1, "auto", 16),
    (4, 1, 16),
    (4, "auto", 16),
    (8, 1, 16),
    (8, "auto", 16),
    (1, "auto", 32),
    (4, "auto", 32),
    (8, "auto", 32),
)
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
HEAT = {"size": 40, "heaters": 16}
SAMPLED = (
    *(("digits-mlp", {"batch_size": size}, "adam", lr) for size in (32, 512) for lr in RATES),
    ("digits-mlp", {"batch_size": 32}, "momentum", 0.05),
    ("digits-mlp", {"batch_size": 32}, "sgd", 0.1),
    *(("heat", {**HEAT, "heaters_at_once": 1}, "adam", lr) for lr in (0.01, 0.05)),
    *(("heat", {**HEAT, "heaters_at_once": 4}, "adam", lr) for lr in (0.02, 0.05, 0.1)),
)
AT = (15, 30, 60)
ROUNDS = 150


# ------------------------------------------------------------------ deterministic functions


def _function(name: str, seed: int) -> Problem:
    return make_problem(name, seed=seed, **({} if name == LOGISTIC else {"dim": 1000}))


def function_job(job: tuple[str, str, float, int]) -> dict[str, Any]:
    """One function, base optimizer and seed with every setting."""
    name, optimizer, lr, seed = job
    _quiet()
    problem = _function(name, seed)
    base, losses = base_optimizer(optimizer, problem.parameters(), lr=lr), []
    for batch in itertools.islice(problem.batches(), ROUNDS):
        base.zero_grad()
        loss = problem(batch)
        loss.backward()
        losses.append(float(loss.detach()))
        base.step()
    level = min(losses)
    runs = []
    for parallelism, stride, size in SETTINGS:
        problem.reset()
        base = base_optimizer(optimizer, problem.parameters(), lr=lr)
        wrapper = optex.OptEx(base, parallelism=parallelism, stride=stride, history_size=size)
        reached, steps, number = None, 0, 0
        for number, report in enumerate(wrapper.rounds(problem.batches(), problem.source()), start=1):
            steps += report.accepted
            if float(report.losses.nan_to_num(nan=math.inf).min()) <= level:
                reached = number
            if reached or number == ROUNDS:
                break
        gained = (losses.index(level) + 1) / reached if reached else 0.1
        setting = {"N": parallelism, "stride": stride, "T0": size}
        runs.append({**setting, "acceleration": gained, "steps": steps / number})
    return {"problem": name, "optimizer": optimizer, "lr": lr, "seed": seed, "runs": runs}


# ------------------------------------------------------------------ sampled gradients


def sampled_job(job: tuple[str, dict[str, Any], str, float, int]) -> dict[str, Any]:
    """One sampled problem, base optimizer and seed: vanilla, and optex at N = 1 and 4."""
    name, options, optimizer, lr, seed = job
    _quiet()
    problem = make_problem(name, seed=seed, **options)

    def trace(method: str, parallelism: int) -> Any:
        problem.reset()
        setting = Setting(lambda ps: base_optimizer(optimizer, ps, lr=lr), parallelism, None, AT[-1])
        return METHODS[method].run(problem, setting)

    plain = trace("vanilla", 1).loss
    runs = []
    for parallelism in (1, 4):
        found = trace("optex", parallelism)
        runs.append(
            {
                "N": parallelism,
                "loss": [significant(found.loss[r], 5) for r in AT],
                "behind": rounds_behind(found.loss, plain),
                "steps": round(float(np.mean(found.accepted[1:])), 2),
            }
        )
    key = {"problem": name, "options": options, "optimizer": optimizer, "lr": lr, "seed": seed}
    return {**key, "vanilla": [significant(plain[r], 5) for r in AT], "runs": runs}


# ------------------------------------------------------------------ seconds


def seconds() -> list[dict[str, Any]]:
    """Vanilla and one-gradient rounds, alternating, to the same loss."""
    _quiet()
    heat: Callable[[], Problem] = lambda: make_problem("heat", seed=0, size=96)  # noqa: E731
    text: Callable[[], Problem] = lambda: make_problem("shakespeare", seed=0)  # noqa: E731
    timed = [
        {"task": "heat, 96 × 96, Adam 0.05, vanilla's loss after 150", **_to_loss(heat, 0.05, 150, 10)},
        {"task": "character transformer, Adam 1e-3, vanilla's loss after 400", **_to_loss(text, 1e-3, 400, 10)},
    ]
    return [*timed, *(_resting(d) for d in (5_000, 100_000))]


def _to_loss(make: Callable[[], Problem], lr: float, rounds: int, every: int) -> dict[str, Any]:
    """Seconds to vanilla's loss, which is looked at every so many rounds, outside the clock."""
    losses, spent = _plain_seconds(make(), lr, rounds)
    problem = make()
    wrapper = optex.OptEx(base_optimizer("adam", problem.parameters(), lr=lr), parallelism=1)
    clock, taken, number = 0.0, 0, 0
    iterator = wrapper.rounds(problem.batches(), problem.source())
    for number in range(1, rounds + 1):
        started = time.perf_counter()
        taken += next(iterator).accepted
        clock += time.perf_counter() - started
        if number % every == 0 and problem.evaluate() <= losses:
            break
    return {"vanilla": spent, "optex": clock, "rounds": number, "of": rounds, "steps": taken / number}


def _plain_seconds(problem: Problem, lr: float, rounds: int) -> tuple[float, float]:
    base = base_optimizer("adam", problem.parameters(), lr=lr)
    started = time.perf_counter()
    for batch in itertools.islice(problem.batches(), rounds):
        base.zero_grad()
        source = problem.source()
        source.gradient(batch)
        base.step()
    return problem.evaluate(), time.perf_counter() - started


def _resting(d: int) -> dict[str, Any]:
    """Gradients that are all noise and take 10 ms: what a round adds where there is nothing to gain."""
    theta = torch.nn.Parameter(torch.zeros(d))
    generator = torch.Generator().manual_seed(0)

    def objective(_: Any) -> torch.Tensor:
        time.sleep(0.01)
        return torch.randn(d, generator=generator) @ theta

    def run(step: Callable[[], Any], count: int) -> float:
        started = time.perf_counter()
        for _ in range(count):
            step()
        return (time.perf_counter() - started) / count

    base = torch.optim.Adam([theta], lr=1e-3)

    def plain() -> None:
        base.zero_grad()
        objective(None).backward()
        base.step()

    vanilla = run(plain, 200)
    theta.data.zero_()
    wrapper = optex.OptEx(torch.optim.Adam([theta], lr=1e-3), parallelism=1)
    rounds = wrapper.rounds(itertools.repeat(None), objective)
    first = run(lambda: next(rounds), 200)
    later = run(lambda: next(rounds), 1000)
    resting = f"nothing to gain, gradient of 10 ms, d = {d:,}"
    return {
        "task": resting,
        "vanilla": vanilla,
        "optex": later,
        "first": first,
        "steps": wrapper.steps_taken / 1200,
    }


# ------------------------------------------------------------------ parts and report


def _quiet() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", RuntimeWarning)


def _parallel(job: Callable[[Any], Any], jobs: list[Any], workers: int) -> list[Any]:
    found = []
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for result in pool.imap(job, jobs):
            found.append(result)
            print(f"{len(found)}/{len(jobs)}", flush=True)
    return found


def _write(part: str, runs: Iterable[dict[str, Any]]) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    meta = {"torch": torch.__version__, "cpus": multiprocessing.cpu_count(), "threads": 1}
    text = json.dumps({"meta": meta, "runs": list(runs)}, allow_nan=False)
    (FOLDER / f"{part}.json").write_text(text + "\n")


def _load(part: str) -> list[dict[str, Any]]:
    return json.loads((FOLDER / f"{part}.json").read_text())["runs"]


def functions_table() -> str:
    """A row a run, a column a setting: mean acceleration over the seeds (steps a round)."""
    records = _load("functions")
    rows, gains = [], {setting: [] for setting in SETTINGS}
    for name, optimizer, lr in FUNCTIONS:
        group = [r for r in records if (r["problem"], r["optimizer"], r["lr"]) == (name, optimizer, lr)]
        cells = []
        for i, setting in enumerate(SETTINGS):
            gained = float(np.mean([r["runs"][i]["acceleration"] for r in group]))
            gains[setting].append(gained)
            cells.append(f"{gained:.1f} ({np.mean([r['runs'][i]['steps'] for r in group]):.1f})")
        rows.append([f"{name}, {optimizer} {lr:g}", *cells])
    totals = [f"{geometric_mean(g):.2f} / {min(g):.2f}" for g in gains.values()]
    rows.append(["**geometric mean / worst**", *(f"**{cell}**" for cell in totals)])
    return markdown_table(["run", *(f"N = {n}, stride {s}, T0 = {size}" for n, s, size in SETTINGS)], rows)


def sampled_table() -> str:
    """A row a run: losses of vanilla and of optex at N = 1 and 4, and the rounds behind."""
    records, rows = _load("sampled"), []
    for name, options, optimizer, lr in SAMPLED:
        key = (name, options, optimizer, lr)
        group = [r for r in records if (r["problem"], r["options"], r["optimizer"], r["lr"]) == key]
        kind = (
            f"batch {options['batch_size']}"
            if name != "heat"
            else f"{options['heaters_at_once']} of 16 heaters"
        )
        cells = [" ".join(f"{v:.3f}" for v in np.mean([r["vanilla"] for r in group], axis=0))]
        for i in range(2):
            runs = [r["runs"][i] for r in group]
            losses = " ".join(f"{v:.3f}" for v in np.mean([r["loss"] for r in runs], axis=0))
            behind, rounds = sum(r["behind"] for r in runs), AT[-1] * len(runs)
            cells.append(f"{losses} ({np.mean([r['steps'] for r in runs]):.1f}; {behind} of {rounds})")
        rows.append([f"{name}, {kind}, {optimizer} {lr:g}", *cells])
    return markdown_table(["run", "vanilla", "optex, N = 1", "optex, N = 4"], rows)


def seconds_table() -> str:
    """A row a task."""
    rows = []
    for r in _load("seconds"):
        rounds = f"{r['rounds']} of {r['of']}" if "rounds" in r else "–"
        ratio = f"{r['optex'] / r['vanilla']:.2f}"
        unit = (lambda s: f"{s:.1f} s") if "rounds" in r else (lambda s: f"{1e3 * s:.2f} ms a round")
        rows.append([r["task"], unit(r["vanilla"]), unit(r["optex"]), ratio, rounds, f"{r['steps']:.1f}"])
    return markdown_table(["task", "vanilla", "optex, N = 1", "ratio", "rounds", "steps a gradient"], rows)


def main() -> None:
    """Run a part, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["functions", "sampled", "seconds", "report"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    seeds = range(options.seeds)
    if options.part == "functions":
        _write(
            "functions", _parallel(function_job, [(*f, s) for f in FUNCTIONS for s in seeds], options.workers)
        )
    elif options.part == "sampled":
        _write("sampled", _parallel(sampled_job, [(*c, s) for c in SAMPLED for s in seeds], options.workers))
    elif options.part == "seconds":
        _write("seconds", seconds())
    else:
        tables = {"functions": functions_table(), "sampled": sampled_table(), "seconds": seconds_table()}
        fill(FOLDER / "README.md", tables)


if __name__ == "__main__":
    main()
