"""Policy gradients on Gymnasium's CartPole, Acrobot and Pendulum: return against environment steps, 10 seeds.

    python benchmarks/policy_returns.py                        # tune, run, write, draw; about 10 minutes
    python benchmarks/policy_returns.py --only CartPole-v1     # one task; the others' record stays
    python benchmarks/policy_returns.py --report               # run nothing; picture and page from the JSON

Every method gets the same steps of the environment, products with the Hessian counted; its rate is the best of
three, on a seed of its own, by the return in the last fifth of the steps. Rates, curves and intervals are in
``results/policy/returns.json``, the picture beside it, the table in ``docs/family/policy.md``.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import optex
from optex.sources.policy import policy_for
from optex.studies.plots import bootstrap_interval, write_plot
from optex.studies.records import finite_or_null
from optex.studies.tables import fill, markdown_table

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "results" / "policy", ROOT / "docs" / "family" / "policy.md"
SEEDS, TUNING_SEED, POINTS = range(10), 100, 25


@dataclass(frozen=True)
class Task:
    """What is run, and with which rates tried.

    Attributes:
        steps: of the environment, for each method.
        trajectories: a gradient; about 1000 steps of an untrained policy, as published, but CartPole's.
        rates: of vanilla policy gradient, without normalisation; HARPG's, which fall, are three times those.
    """

    steps: int
    trajectories: int
    rates: tuple[float, float, float]


TASKS = {
    "CartPole-v1": Task(25_000, 10, (1e-3, 3e-3, 1e-2)),
    "Pendulum-v1": Task(25_000, 5, (1e-5, 3e-5, 1e-4)),
    "Acrobot-v1": Task(12_000, 2, (3e-4, 1e-3, 3e-3)),
}
NORMALIZED, ADAM = (0.1, 0.3, 1.0), (3e-3, 1e-2, 3e-2)
STYLES = {
    "vanilla PG, SGD": ("#000000", ":"),
    "REINFORCE, baseline, Adam": ("#e69f00", "--"),
    "N-PG-IGT": ("#0072b2", "-"),
    "HARPG": ("#cc79a7", "-."),
    "N-HARPG": ("#009e73", (0, (5, 1, 1, 1))),
}


def settings(name: str, task: Task) -> tuple[dict[str, Any], tuple[float, ...]]:
    """Arguments of ``optex.policy_gradient``, and the rates to choose from."""
    return {
        "vanilla PG, SGD": ({"method": "pg"}, task.rates),
        "REINFORCE, baseline, Adam": ({"method": "reinforce", "optimizer": "adam"}, ADAM),
        "N-PG-IGT": ({"method": "n-pg-igt", "baseline": True}, NORMALIZED),
        "HARPG": ({"method": "harpg", "baseline": True}, tuple(3 * rate for rate in task.rates)),
        "N-HARPG": ({"method": "n-harpg", "baseline": True}, NORMALIZED),
    }[name]


def curve(task_name: str, name: str, lr: float, seed: int) -> list[float]:
    """Mean returns between ``POINTS`` marks of the environment's steps; the last stays where a run ended."""
    task = TASKS[task_name]
    arguments, _ = settings(name, task)
    torch.manual_seed(seed)
    environment = optex.GymnasiumEnvironment(task_name)
    policy = policy_for(environment, **({} if environment.discrete else {"deviation": 0.5}))
    result = optex.policy_gradient(
        policy,
        environment,
        steps=10**9,
        environment_steps=task.steps,
        trajectories=task.trajectories,
        lr=lr,
        seed=seed,
        **arguments,
    )
    places = np.minimum(np.array(result.env_steps) * POINTS // (task.steps + 1), POINTS - 1)
    found, last = [], result.returns[0]
    for place in range(POINTS):
        here = [value for value, where in zip(result.returns, places, strict=True) if where == place]
        last = float(np.mean(here)) if here else last
        found.append(last)
    return found


def final(values: Sequence[float]) -> float:
    """Over the last fifth of the steps."""
    return float(np.mean(values[-POINTS // 5 :]))


def measured(task_name: str) -> dict[str, Any]:
    """Rates and curves of all methods."""
    started, methods = time.perf_counter(), {}
    for name in STYLES:
        _, rates = settings(name, TASKS[task_name])
        tried = {lr: final(curve(task_name, name, lr, TUNING_SEED)) for lr in rates}
        lr = max(tried, key=lambda rate: tried[rate])
        curves = [curve(task_name, name, lr, seed) for seed in SEEDS]
        methods[name] = {"lr": lr, "tried": list(tried.items()), "curves": curves}
        print(f"{task_name}  {name}: lr {lr:g}, {np.mean([final(c) for c in curves]):.1f}", flush=True)
    task = TASKS[task_name]
    return {
        "steps": task.steps,
        "trajectories": task.trajectories,
        "seconds": round(time.perf_counter() - started),
        "methods": methods,
    }


def spread(curves: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """Mean of the final returns, and its interval."""
    ends = np.array([[final(one)] for one in curves])
    low, high = bootstrap_interval(ends)
    return float(ends.mean()), float(low[0]), float(high[0])


def table(record: dict[str, Any]) -> str:
    """A row a method, a column a task; the best in bold."""
    rows = []
    best = {
        task: max(found["methods"], key=lambda name: spread(found["methods"][name]["curves"])[0])
        for task, found in record.items()
    }
    for name in STYLES:
        cells = []
        for task, found in record.items():
            mean, low, high = spread(found["methods"][name]["curves"])
            text = f"{mean:.0f} [{low:.0f}, {high:.0f}], rate {found['methods'][name]['lr']:g}"
            cells.append(f"**{text}**" if best[task] == name else text)
        rows.append((name, *cells))
    return markdown_table(("method", *record), rows)


def draw(record: dict[str, Any]) -> Figure:
    """A panel a task: means over seeds, and 95 % intervals of them."""
    figure = Figure(figsize=(4.6 * len(record), 3.9), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (task, found) in zip(
        figure.subplots(1, len(record), squeeze=False)[0], record.items(), strict=True
    ):
        x = (np.arange(POINTS) + 1) * found["steps"] / POINTS / 1000
        for name, (colour, line) in STYLES.items():
            values = np.array(found["methods"][name]["curves"])
            low, high = bootstrap_interval(values)
            axes.plot(x, values.mean(0), color=colour, linestyle=line, label=name)
            axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.set_title(f"{task}, {found['trajectories']} trajectories a gradient", fontsize=10)
        axes.set_xlabel("thousand environment steps")
        axes.grid(alpha=0.3)
    first = figure.axes[0]
    first.set_ylabel("return: mean and 95 % interval, 10 seeds")
    first.legend(fontsize=8)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the tasks one after the other; write after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(TASKS))
    parser.add_argument("--report", action="store_true", help="run nothing")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / "returns.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    for task in TASKS if not options.report else ():
        if options.only in (None, task):
            record[task] = measured(task)
            record = {name: record[name] for name in TASKS if name in record}
            path.write_text(json.dumps(finite_or_null(record), indent=1, allow_nan=False) + "\n")
    for task, found in record.items():
        ends = {name: spread(entry["curves"]) for name, entry in found["methods"].items()}
        winner = max(ends, key=lambda name: ends[name][0] if not math.isnan(ends[name][0]) else -math.inf)
        beaten = sum(high < ends[winner][1] for name, (_, _, high) in ends.items() if name != winner)
        print(f"{task}: {winner} ends highest, its interval above those of {beaten} of {len(ends) - 1} others")
    write_plot(RESULTS / "returns.png", draw(record))
    if PAGE.exists():
        fill(PAGE, {"returns": table(record)})


if __name__ == "__main__":
    main()
