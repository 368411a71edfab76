"""The study of acceleration: problems × base optimizers × N × methods × seeds, against vanilla.

    python benchmarks/acceleration.py run --seeds 5 --workers 2     about an hour on 2 cores
    python benchmarks/acceleration.py report                        tables and pictures from what was run

`run` appends one line of JSON a job (a case and a seed) to results/acceleration/runs.jsonl and skips the jobs
that are there; `report` reads it and writes the tables into results/acceleration/README.md, and beside it the
pictures and summary.json, which has what the page's sentences quote. One thread a worker.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from acceleration_summary import by_case, over_target, pooled, shared_runs, summary
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

import optex
from optex.round.acceptance import WithinTolerance
from optex.stepping.bases import base_optimizer
from optex.studies.baselines import METHODS, Setting, Trace
from optex.studies.baselines.with_optex import run_rounds
from optex.studies.measures import VANILLA, acceleration, geometric_mean, rounds_behind
from optex.studies.plots import METHOD_STYLES
from optex.studies.problems import Problem, make_problem
from optex.studies.records import read_lines, significant
from optex.studies.tables import fill, markdown_table

FOLDER = Path(__file__).parent.parent / "results" / "acceleration"
RUNS = FOLDER / "runs.jsonl"
KEYS = ("case", "seed", "N", "method")  # of records that agree in these the latest counts
ROUNDS = 60
PARALLELISM = (5, 8, 16, 32)
LEAST_REACH = 4  # of vanilla's rounds, against which a round is measured that evaluates one gradient
FUNCTIONS = ("sphere", "ackley", "rosenbrock", "quadratic")
NETWORKS = ("digits-mlp-32", "digits-mlp-512")


@dataclass(frozen=True)
class Case:
    """A problem with a base optimizer. ``lr`` is a number, or a multiple of the stability limit 2 / λ."""

    problem: str
    optimizer: str
    lr: float
    of_limit: bool = False

    @property
    def name(self) -> str:
        """For tables."""
        rate = {0.5: "half the limit", 1.0: "the limit", 0.25: "a quarter of the limit"}
        return f"{self.problem}, {self.optimizer} {rate[self.lr] if self.of_limit else f'{self.lr:g}'}"

    def start(self, seed: int) -> Problem:
        """The problem at a seed's start."""
        if self.problem in FUNCTIONS:
            return make_problem(self.problem, seed=seed, dim=1000)
        if self.problem in NETWORKS:
            return make_problem("digits-mlp", seed=seed, batch_size=int(self.problem.rpartition("-")[2]))
        return make_problem(self.problem, seed=seed)

    def rate(self) -> float:
        """The learning rate itself."""
        return self.lr * stability_limit(self.start(0)) if self.of_limit else self.lr

    def parallelisms(self) -> list[int]:
        """Networks take N = 4 where functions take 5."""
        return [4 if n == 5 and self.problem in NETWORKS else n for n in PARALLELISM]


def cases() -> list[Case]:
    """All of them, the suite of nine first."""
    sgd = [("sgd", 0.5, True), ("sgd", 1.0, True), ("momentum", 0.25, True)]
    listed = list(NINE)
    for problem in (*FUNCTIONS, "logistic-breast-cancer"):
        listed += [Case(problem, *rest) for rest in [("adam", 0.01), ("adam", 0.1), *sgd]]
    for problem in NETWORKS:
        rates = [("adam", 1e-3), ("adam", 0.01), ("adam", 0.1), ("sgd", 0.1), ("momentum", 0.05), *sgd[:2]]
        listed += [Case(problem, *rest) for rest in rates]
    return list(dict.fromkeys(listed))


NINE = (
    Case("quadratic", "adam", 0.1),
    Case("quadratic", "sgd", 1.0),
    Case("quadratic", "sgd", 0.5),
    Case("quadratic", "momentum", 0.3),
    Case("rosenbrock", "adam", 0.1),
    Case("rosenbrock", "adam", 0.01),
    Case("ackley", "adam", 0.01),
    Case("sphere", "adam", 0.1),
    Case("sphere", "adam", 0.01),
)


def stability_limit(problem: Problem) -> float:
    """2 / |λ| for the Hessian's largest eigenvalue at the start, by 400 power iterations."""
    parameters = list(problem.parameters())
    batch = next(problem.batches())
    gradient = torch.cat(
        [g.reshape(-1) for g in torch.autograd.grad(problem(batch), parameters, create_graph=True)]
    )
    vector = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(0), dtype=gradient.dtype)
    for _ in range(400):
        vector = vector / vector.norm()
        product = torch.autograd.grad(gradient @ vector, parameters, retain_graph=True)
        vector = torch.cat([g.reshape(-1) for g in product])
    return float(2 / vector.norm())


# ------------------------------------------------------------------ methods

Make = Callable[..., optex.OptEx]


def within(base: torch.optim.Optimizer, parallelism: int, **options: Any) -> optex.OptEx:
    """``OptEx`` that takes no step without a gradient of its own: what N gradients at once are worth."""
    return optex.OptEx(base, parallelism=parallelism, stride=1, **options)


VARIANTS: dict[str, Make] = {
    "optex": within,
    "separable": lambda base, n: within(base, n, estimator=optex.SeparableEstimator(prior_mean="gls")),
    "curl-free": lambda base, n: within(base, n, estimator=optex.CurlFreeEstimator()),
    "tolerance fixed at 2": lambda base, n: within(base, n, acceptance=WithinTolerance(adaptive=False)),
    "leave-one-out separable": lambda base, n: within(
        base,
        n,
        estimator=optex.SeparableEstimator(
            lengthscale="leave-one-out", noise_variance="leave-one-out", prior_mean="gls"
        ),
    ),
    "lookahead 2": lambda base, n: within(base, n, acceptance=WithinTolerance(lookahead=2.0)),
    "history half as long": lambda base, n: within(base, n, history_size=8 if n <= 8 else 16),
    "strides": lambda base, n: optex.OptEx(base, parallelism=n),
}
MAIN = ("target", "hold-last", "picard", "optex-paper", "separable", "curl-free", "optex")
ABLATIONS = ("tolerance fixed at 2", "leave-one-out separable", "lookahead 2", "history half as long")


def methods_for(case: Case, parallelism: int) -> list[str]:
    """Everything at N = 4, 5 and 16; ablations on the nine and two networks; strides where they are studied."""
    if parallelism == 1:
        return ["strides"]
    chosen: list[str] = list(MAIN)
    if parallelism in (8, 32):
        chosen = [name for name in chosen if name not in ("separable", "curl-free")]
    elif case in NINE or (case.problem in NETWORKS and case.optimizer == "adam" and case.lr <= 0.01):
        chosen += ABLATIONS
    if parallelism in (4, 5) or (parallelism == 16 and case in NINE):
        chosen.append("strides")
    return chosen


def run_method(name: str, problem: Problem, setting: Setting) -> Trace:
    """A variant of this study, or one of the package's methods."""
    problem.reset()
    if name in VARIANTS:
        return run_rounds(
            problem, setting, VARIANTS[name](setting.base_optimizer(problem), setting.parallelism)
        )
    return METHODS[name].run(problem, setting)


def run_job(job: tuple[Case, int, Sequence[str] | None]) -> list[dict[str, Any]]:
    """All N and methods (or those named) of one case at one seed; one run of vanilla serves them all."""
    case, seed, only = job
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", RuntimeWarning)
    rate, problem = case.rate(), case.start(seed)

    def setting(parallelism: int, rounds: int) -> Setting:
        history = 16 if parallelism <= 8 else 32
        return Setting(
            lambda parameters: base_optimizer(case.optimizer, parameters, lr=rate), parallelism, history, rounds
        )

    vanilla = run_method(VANILLA, problem, setting(1, ROUNDS * max(case.parallelisms()))).loss
    records = [record(case, rate, seed, 1, VANILLA, vanilla[: ROUNDS + 1], vanilla, None)]
    for parallelism in (1, *case.parallelisms()):
        for name in methods_for(case, parallelism):
            if only is not None and name not in only:
                continue
            if name == "target":
                loss, trace = vanilla[: ROUNDS * parallelism + 1 : parallelism], None
            else:
                trace = run_method(name, problem, setting(parallelism, ROUNDS))
                loss = trace.loss
            records.append(record(case, rate, seed, parallelism, name, loss, vanilla, trace))
    return records


def record(
    case: Case,
    rate: float,
    seed: int,
    parallelism: int,
    method: str,
    loss: Sequence[float],
    vanilla: Sequence[float],
    trace: Trace | None,
) -> dict[str, Any]:
    """What is kept of a run."""
    return {
        "case": case.name,
        "lr": significant(rate, 4),
        "seed": seed,
        "N": parallelism,
        "method": method,
        "acceleration": round(acceleration(loss, vanilla, max(parallelism, LEAST_REACH)), 3),
        "behind": rounds_behind(loss, vanilla),
        "diverged": bool(not math.isfinite(loss[-1]) or loss[-1] > 2 * loss[0]),
        "loss": [significant(value, 5) for value in loss[::10]],
        "accepted": None if trace is None else round(float(np.mean(trace.accepted[1:])), 2),
        "gradients": None if trace is None else trace.gradients[-1],
        "overhead_ms": None if trace is None else round(1e3 * trace.overhead_seconds, 3),
    }


def run(seeds: int, workers: int, redo: Sequence[str] | None, prefix: str) -> None:
    """Run the jobs that are not there yet, or the named methods in all of them again, seed by seed."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    done = set() if redo else {(r["case"], r["seed"]) for r in read_lines(RUNS, KEYS)}
    chosen = [case for case in cases() if case.name.startswith(prefix)]
    jobs = [(case, seed, redo) for seed in range(seeds) for case in chosen if (case.name, seed) not in done]
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers) as pool, RUNS.open("a") as file:
        for number, records in enumerate(pool.imap_unordered(run_job, jobs), start=1):
            file.write(json.dumps(records) + "\n")
            file.flush()
            print(f"{number}/{len(jobs)}  {records[0]['case']}, seed {records[0]['seed']}", flush=True)


# ------------------------------------------------------------------ report


def summary_table(records: list[dict[str, Any]], names: list[str], methods: Sequence[str]) -> str:
    """Geometric mean / worst over the cases, by method and N; capped at N in brackets."""
    sizes = sorted({entry["N"] for entry in records if entry["case"] in names and entry["N"] > 1})
    rows = []
    for method in methods:
        cells = []
        for n in sizes:
            found = pooled(records, names, method, n)
            cells.append("{mean:.2f} ({capped:.2f}) / {worst:.2f}".format(**found) if found else "–")
        rows.append([method, *cells])
    return markdown_table(["method", *(f"N = {n}" for n in sizes)], rows)


def case_table(records: list[dict[str, Any]], sizes: Sequence[int], methods: Sequence[str]) -> str:
    """Acceleration of every case; in brackets the rounds behind vanilla, summed over the seeds."""
    rows = []
    for case in cases():
        mine = [r for r in records if r["case"] == case.name and r["N"] in sizes]
        if not mine:
            continue
        means, cells = by_case(mine), []
        for method in methods:
            behind = sum(r["behind"] for r in mine if r["method"] == method)
            value = means.get((case.name, method), math.nan)
            cells.append(f"{value:.2f}" + (f" ({behind})" if behind else ""))
        rows.append([case.name, f"{mine[0]['lr']:g}", *cells])
    return markdown_table(["case", "lr", *methods], rows)


def network_table(records: list[dict[str, Any]]) -> str:
    """Loss over target's at every tenth round, N = 4, mean over seeds."""
    rows = []
    for case in cases():
        if case.problem not in NETWORKS:
            continue
        ratios = over_target(records, case.name)
        if ratios:
            cells = [f"{100 * value:+.1f} %" for value in ratios]
            rows.append([case.name, *cells])
    return markdown_table(["case", "round 10", "20", "30", "40", "50", "60"], rows)


def safety_table(records: list[dict[str, Any]]) -> str:
    """Runs that diverge where vanilla does not, and rounds behind vanilla, by method and N."""
    kept = shared_runs(records)
    sizes, rows = (4, 5, 8, 16, 32), []
    for method in ("target", "hold-last", "picard", "optex-paper", "optex"):
        cells = []
        for n in sizes:
            mine = [r for r in kept if r["N"] == n and r["method"] == method]
            behind = sum(r["behind"] for r in mine)
            where = sum(r["behind"] > 0 for r in mine)
            diverged = sum(r["diverged"] for r in mine)
            cells.append(f"{diverged} of {len(mine)}; {where} runs, {behind} rounds")
        rows.append([method, *cells])
    return markdown_table(["method", *(f"N = {n}" for n in sizes)], rows)


def stride_table(records: list[dict[str, Any]]) -> str:
    """Strides: acceleration and steps a round by case; in brackets rounds behind vanilla, over the seeds."""
    mine = [r for r in records if r["method"] == "strides"]
    rows, gains = [], {}
    for case in cases():
        cells = []
        for sizes in ((1,), (4, 5), (16,)):
            group = [r for r in mine if r["case"] == case.name and r["N"] in sizes]
            if not group:
                cells.append("–")
                continue
            gained, behind = np.mean([r["acceleration"] for r in group]), sum(r["behind"] for r in group)
            gains.setdefault(sizes, []).append(gained)
            steps = np.mean([r["accepted"] for r in group])
            lost = sum(r["diverged"] for r in group)
            notes = [
                f"{steps:.1f}",
                *([f"{behind} behind"] if behind else []),
                *([f"{lost} lost"] if lost else []),
            ]
            cells.append(f"{gained:.2f} ({'; '.join(notes)})")
        rows.append([case.name, *cells])
    totals = [f"**{geometric_mean(values):.2f} / {min(values):.2f}**" for values in gains.values()]
    rows.append(["**geometric mean / worst**", *totals])
    return markdown_table(["case", "N = 1", "N = 4 or 5", "N = 16"], rows)


def draw_profiles(records: list[dict[str, Any]]) -> Figure:
    """Dolan and Moré's performance profiles: the share of runs within a factor τ of the best method's pace."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    sizes = ((4, 5), (8,), (16,), (32,))
    for axes, group in zip(figure.subplots(1, len(sizes), sharey=True), sizes, strict=True):
        runs: dict[tuple[str, int], dict[str, float]] = {}
        for r in records:
            if r["N"] in group and r["method"] in ("hold-last", "picard", "optex-paper", "optex"):
                runs.setdefault((r["case"], r["seed"]), {})[r["method"]] = max(r["acceleration"], 1e-3)
        factors = np.logspace(0, 1.5, 200)
        for method in ("hold-last", "picard", "optex-paper", "optex"):
            ratios = np.array([max(run.values()) / run[method] for run in runs.values() if method in run])
            share = [(ratios <= factor).mean() for factor in factors]
            axes.plot(factors, share, label=method, **METHOD_STYLES[method])
        axes.set(
            xscale="log",
            title="N = " + " and ".join(map(str, group)),
            xlabel="factor τ behind the best",
            ylim=(0, 1.02),
        )
        axes.set_xticks([1, 2, 5, 10, 30], ["1", "2", "5", "10", "30"])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("share of runs")
    figure.axes[0].legend(loc="lower right", fontsize=8)
    return figure


def draw_acceleration(records: list[dict[str, Any]]) -> Figure:
    """Acceleration against N, one thin line a case, the geometric mean thick."""
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    methods = ("hold-last", "picard", "optex-paper", "optex")
    for axes, method in zip(figure.subplots(1, len(methods), sharey=True), methods, strict=True):
        colour = METHOD_STYLES[method]["color"]
        lines: dict[str, dict[int, float]] = {}
        for n in (4, 5, 8, 16, 32):
            for (case, name), value in by_case([r for r in records if r["N"] == n]).items():
                if name == method:
                    lines.setdefault(case, {})[n] = max(value, 0.05)
        for line in lines.values():
            axes.plot(list(line), list(line.values()), color=colour, alpha=0.25, linewidth=0.9)
        for first in (5, 4):
            group = [line for line in lines.values() if first in line]
            sizes = (first, 8, 16, 32)
            mean = [geometric_mean([line[n] for line in group]) for n in sizes]
            label = "functions and regression" if first == 5 else "networks"
            axes.plot(
                sizes, mean, color=colour, linewidth=2.8, linestyle="-" if first == 5 else "--", label=label
            )
        axes.plot([4, 32], [4, 32], color="#8a8a8a", linestyle=":", linewidth=1.6)
        axes.axhline(1, color="#000000", linewidth=0.8)
        axes.set(xscale="log", yscale="log", title=method, xlabel="N", ylim=(0.045, 70))
        axes.set_xticks([4, 8, 16, 32], ["4", "8", "16", "32"])
        axes.set_yticks([0.1, 1, 4, 16, 64], ["0.1", "1", "4", "16", "64"])
        axes.minorticks_off()
    figure.axes[0].set_ylabel("acceleration")
    dark = {"color": "#444444", "linewidth": 2.8}
    handles = [
        Line2D([], [], label="functions and regression, geometric mean", **dark),
        Line2D([], [], label="networks, geometric mean", linestyle="--", **dark),
        Line2D([], [], label="one case", color="#444444", alpha=0.5, linewidth=0.9),
        Line2D([], [], label="target: N steps a round", color="#8a8a8a", linestyle=":", linewidth=1.6),
        Line2D([], [], label="vanilla: 1", color="#000000", linewidth=0.8),
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, handlelength=3
    )
    return figure


def report() -> None:
    """Tables into the README, pictures beside it."""
    records = read_lines(RUNS, KEYS)
    nine = [case.name for case in NINE]
    ablated = ("optex", "curl-free", "separable", *ABLATIONS)
    nets = [c.name for c in cases() if c.problem in NETWORKS and c.optimizer == "adam" and c.lr <= 0.01]
    tables = {
        "nine": summary_table(records, nine, MAIN),
        "ablations": summary_table(records, nine, ablated),
        "network-ablations": summary_table(records, nets, ablated),
        "safety": safety_table(records),
        "networks": network_table(records),
        "few": case_table(records, (4, 5), MAIN),
        "sixteen": case_table(records, (16,), MAIN),
        "many": case_table(records, (32,), ("target", "hold-last", "picard", "optex-paper", "optex")),
        "strides": stride_table(records),
        "stride-seeds": str(len({r["seed"] for r in records if r["method"] == "strides"})),
        "seeds": str(len({r["seed"] for r in records})),
    }
    fill(FOLDER / "README.md", tables)
    networks = [case.name for case in cases() if case.problem in NETWORKS]
    quoted = summary(
        records, {"nine": nine, "networks": nets}, networks, tuple(dict.fromkeys((*MAIN, *ablated)))
    )
    (FOLDER / "summary.json").write_text(json.dumps(quoted, indent=1) + "\n")
    draw_profiles(records).savefig(FOLDER / "profiles.png", dpi=130)
    draw_acceleration(records).savefig(FOLDER / "acceleration.png", dpi=130)


def main() -> None:
    """Run or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "report"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--redo", help="methods to run anew, comma-separated, after a change to them alone")
    parser.add_argument("--cases", default="", help="only the cases whose name starts with this")
    options = parser.parse_args()
    if options.what == "run":
        run(options.seeds, options.workers, options.redo and options.redo.split(","), options.cases)
    else:
        report()


if __name__ == "__main__":
    main()
