"""What the theory says, beside what runs do: calibration, information gain, acceleration against N.

    python benchmarks/theory.py                run all (1 to 4 minutes), write, draw, fill the page
    python benchmarks/theory.py --report       run nothing; pictures and tables from the committed JSON

Three problems with SGD, the optimizer of the paper's theorem. Calibration: N = 4; every gradient that a round
evaluates, predicted from the history before it; with minibatches the error is that from the gradient of the
whole training set. Acceleration: `optex.studies.measures.acceleration` at N = 1, 4, 16. Writes
results/theory/theory.json, calibration.png and acceleration.png there, and the tables of docs/theory.md.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.utils import vector_to_parameters

import optex
from optex.stepping.bases import base_optimizer
from optex.studies.baselines import METHODS, Setting
from optex.studies.baselines.with_optex import run_rounds
from optex.studies.measures import Spread, acceleration
from optex.studies.plots import write_plot
from optex.studies.problems import Problem, make_problem
from optex.studies.records import finite_or_null, null_to_nan, significant
from optex.studies.tables import fill, markdown_table
from optex.theory import Calibration, information_gain

ROOT = Path(__file__).parents[1]
FOLDER, PAGE = ROOT / "results" / "theory", ROOT / "docs" / "theory.md"
PARALLELISM = (1, 4, 16)
AT_ONCE = 4  # N of the calibration
ROUNDS, SEEDS = 30, 3
BEYOND = 4  # times N · rounds that vanilla is run where strides may go past N steps a round


@dataclass(frozen=True)
class Case:
    """A problem with SGD's rate."""

    problem: str
    lr: float
    options: tuple[tuple[str, int], ...]
    label: str

    def start(self, seed: int) -> Problem:
        """The problem at a seed's start."""
        return make_problem(self.problem, seed=seed, **dict(self.options))


CASES = (
    Case("quadratic", 0.5, (("dim", 1000),), "quadratic"),
    Case("rosenbrock", 0.05, (("dim", 1000),), "rosenbrock"),
    Case("digits-mlp", 0.1, (("batch_size", 32),), "digits-mlp, batch 32"),
)
# As the default committee has it for noise as large as the signal; without any, minibatches make it diverge.
NOISY = optex.CurlFreeEstimator(noise_variance=1.0, prior_mean="gls")
# Made of a base optimizer, N, and whether gradients are sampled.
ESTIMATORS: dict[str, Callable[[torch.optim.Optimizer, int, bool], optex.OptEx]] = {
    "separable": lambda base, n, _: optex.OptEx.from_paper(base, n),
    "curl-free": lambda base, n, noisy: optex.OptEx(
        base, parallelism=n, stride=1, estimator=NOISY if noisy else optex.CurlFreeEstimator()
    ),
}
RUNS = {**ESTIMATORS, "default": lambda base, n, _: optex.OptEx(base, parallelism=n)}
LABELS = {
    "separable": "separable, Algorithm 1 (the paper)",
    "curl-free": "curl-free, replayed, stride 1",
    "default": "OptEx's default (strides)",
}
COLOURS = {"separable": "#0072b2", "curl-free": "#d55e00", "default": "#009e73"}
MARKERS = {"separable": "o", "curl-free": "^", "default": "s"}


# ------------------------------------------------------------------ calibration, information


def true_gradient(problem: Problem) -> Callable[[Tensor], Tensor] | None:
    """Of the whole training set, on a copy of the problem; None where gradients carry no noise anyway."""
    if problem.deterministic:
        return None

    def gradient(point: Tensor) -> Tensor:  # [d] -> [d]
        parameters = list(problem.parameters())
        vector_to_parameters(point, parameters)
        with torch.enable_grad():
            loss = problem((problem.inputs, problem.labels))
        return torch.cat([part.reshape(-1) for part in torch.autograd.grad(loss, parameters)])

    return gradient


def calibrate(case: Case, estimator: str, seed: int) -> dict[str, Any]:
    """Pairs of predicted standard deviation and error of one run."""
    problem = case.start(seed)
    base, noisy = base_optimizer("sgd", problem.parameters(), lr=case.lr), not problem.deterministic
    optimizer, calibration = ESTIMATORS[estimator](base, AT_ONCE, noisy), Calibration()
    rounds = optimizer.rounds(problem.batches(), problem.source())
    for report in calibration.watch(optimizer, rounds, true_gradient(case.start(seed))):
        if report.number == ROUNDS - 1:
            break
    return {
        "problem": case.problem,
        "estimator": estimator,
        "seed": seed,
        **asdict(calibration.summary()),
        "predicted": [significant(value, 4) for value in calibration.predicted],
        "actual": [significant(value, 4) for value in calibration.actual],
    }


def gain(case: Case, seed: int) -> dict[str, Any]:
    """Information gain of SGD's own points, one a step, with the paper's kernel and noise."""
    problem, points = case.start(seed), []
    base = base_optimizer("sgd", problem.parameters(), lr=case.lr)
    source, batches = problem.source(), problem.batches()
    for _ in range(ROUNDS * AT_ONCE):
        points.append(torch.cat([p.detach().reshape(-1) for p in problem.parameters()]).to(torch.float64))
        base.zero_grad()
        source.gradient(next(batches))
        base.step()
    found = information_gain(torch.stack(points))
    return {
        "problem": case.problem,
        "seed": seed,
        "points": len(points),
        "total": float(found.total[-1]),
        "largest": 0.5 * len(points) * math.log1p(1 / found.noise_variance),
        "variance": float(found.variances.mean()),
        "bound": float(found.variance_bound[-1]),
    }


# ------------------------------------------------------------------ acceleration


def accelerate(case: Case, seed: int) -> list[dict[str, Any]]:
    """Accelerations of all kinds of runs at every N, against one run of vanilla."""
    problem = case.start(seed)
    base = partial(base_optimizer, "sgd", lr=case.lr)
    steps = BEYOND * max(PARALLELISM) * ROUNDS
    vanilla = METHODS["vanilla"].run(problem, Setting(base, 1, None, steps)).loss
    found = []
    for parallelism in PARALLELISM:
        setting = Setting(base, parallelism, None, ROUNDS)
        for kind, make in RUNS.items():
            problem.reset()
            run = make(setting.base_optimizer(problem), parallelism, not problem.deterministic)
            trace = run_rounds(problem, setting, run)
            reach = parallelism * (BEYOND if kind == "default" else 1)
            found.append(
                {
                    "problem": case.problem,
                    "seed": seed,
                    "N": parallelism,
                    "kind": kind,
                    "acceleration": acceleration(trace.loss, vanilla, reach),
                    "steps": float(np.mean(trace.accepted[1:])),
                    "stopped": trace.stopped is not None,
                }
            )
    return found


def measure() -> dict[str, Any]:
    """All of it."""
    started = time.perf_counter()
    calibrations, gains, runs = [], [], []
    for case in CASES:
        for seed in range(SEEDS):
            calibrations += [calibrate(case, estimator, seed) for estimator in ESTIMATORS]
            gains.append(gain(case, seed))
            runs += accelerate(case, seed)
            print(f"{case.problem}, seed {seed}: {time.perf_counter() - started:.0f} s", flush=True)
    meta = {"torch": torch.__version__, "optex": optex.__version__, "rounds": ROUNDS, "seeds": SEEDS}
    return {"meta": meta, "calibration": calibrations, "gain": gains, "acceleration": runs}


# ------------------------------------------------------------------ pictures


def figure_of(columns: int) -> tuple[Figure, Any]:
    """A row of panels."""
    figure = Figure(figsize=(4.3 * columns, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def draw_calibration(records: list[dict[str, Any]]) -> Figure:
    """Predicted standard deviation against true error, both per component, in logarithms."""
    figure, panels = figure_of(len(CASES))
    for panel, case in zip(panels, CASES, strict=True):
        ends = []
        for estimator in ESTIMATORS:
            group = [r for r in records if (r["problem"], r["estimator"]) == (case.problem, estimator)]
            predicted = np.concatenate([r["predicted"] for r in group])
            actual = np.concatenate([r["actual"] for r in group])
            style = {"s": 11, "alpha": 0.55, "linewidths": 0, "color": COLOURS[estimator]}
            panel.scatter(predicted, actual, marker=MARKERS[estimator], label=estimator, **style)
            ends += [predicted.min(), predicted.max(), actual.min(), actual.max()]
        line = np.array([min(ends) / 1.5, max(ends) * 1.5])
        panel.plot(line, line, color="black", linewidth=1, label="error as predicted")
        panel.plot(line, 2 * line, color="black", linewidth=0.8, linestyle=(0, (4, 3)), label="twice")
        panel.set(xscale="log", yscale="log", xlim=line, ylim=line, title=case.label)
        panel.set_xlabel("predicted standard deviation of a component")
        panel.grid(visible=True, linewidth=0.5, alpha=0.35)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("true error, root mean square of components")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def draw_acceleration(records: list[dict[str, Any]]) -> Figure:
    """Mean over the seeds and their range, beside N and its root."""
    figure, panels = figure_of(len(CASES))
    numbers = np.array(PARALLELISM)
    for panel, case in zip(panels, CASES, strict=True):
        panel.plot(numbers, numbers, color="#8a8a8a", linestyle=(0, (6, 2)), label="N")
        panel.plot(numbers, np.sqrt(numbers), color="black", linestyle=(0, (1, 1.2)), label="√N")
        for kind in RUNS:
            values = np.array([accelerations(records, case.problem, kind, n) for n in PARALLELISM])
            middle = values.mean(1)
            spread = np.abs(np.array([values.min(1), values.max(1)]) - middle)
            style = {"color": COLOURS[kind], "marker": MARKERS[kind], "linewidth": 1.6, "capsize": 3}
            panel.errorbar(numbers, middle, spread, label=LABELS[kind], **style)
        panel.set(xscale="log", yscale="log", title=case.label, xlabel="N, gradients at once")
        panel.set_xticks(numbers, [str(n) for n in numbers])
        panel.minorticks_off()
        panel.set_yticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
        panel.set_ylim(0.85, 80)
        panel.grid(visible=True, linewidth=0.5, alpha=0.35)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("acceleration in rounds")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    return figure


# ------------------------------------------------------------------ tables


def accelerations(records: list[dict[str, Any]], problem: str, kind: str, parallelism: int) -> list[float]:
    """Over the seeds."""
    key = (problem, kind, parallelism)
    return null_to_nan(r["acceleration"] for r in records if (r["problem"], r["kind"], r["N"]) == key)


def calibration_table(records: list[dict[str, Any]]) -> str:
    """A row a problem and estimator, means over the seeds; of ratio and spread geometric ones."""
    rows = []
    for case in CASES:
        for estimator in ESTIMATORS:
            group = [r for r in records if (r["problem"], r["estimator"]) == (case.problem, estimator)]

            def mean(name: str, group: list[dict[str, Any]] = group) -> float:
                return float(np.mean([r[name] for r in group]))

            ratio, spread = (float(np.exp(np.mean(np.log([r[k] for r in group])))) for k in ("ratio", "spread"))
            rows.append(
                [
                    case.label,
                    estimator,
                    str(sum(r["count"] for r in group)),
                    f"{mean('relative_error'):.2g}",
                    f"{ratio:.2f}",
                    f"{spread:.2f}",
                    f"{mean('correlation'):.2f}",
                    f"{mean('coverage_one'):.1%}",
                    f"{mean('coverage_two'):.1%}",
                    f"{np.mean([x <= 2 * y for r in group for x, y in pairs(r)]):.1%}",
                    f"{mean('bounded'):.1%}",
                ]
            )
    head = ["problem", "estimator", "gradients", "relative error", "error / predicted", "its spread"]
    head += ["rank correlation", "within 1 sd", "within 2 sd", "error below twice", "below the 95 % bound"]
    return markdown_table(head, rows)


def pairs(record: dict[str, Any]) -> Iterator[tuple[float, float]]:
    """True errors and predicted deviations of a run."""
    return zip(record["actual"], record["predicted"], strict=True)


def gain_table(records: list[dict[str, Any]]) -> str:
    """A row a problem, means over the seeds."""
    rows = []
    for case in CASES:
        group = [r for r in records if r["problem"] == case.problem]
        total, largest, variance, bound = (
            float(np.mean([r[name] for r in group])) for name in ("total", "largest", "variance", "bound")
        )
        cells = [f"{total:.0f}", f"{total / largest:.2f}", f"{variance:.2g}", f"{bound:.2g}"]
        rows.append([case.label, str(group[0]["points"]), *cells])
    head = ["problem", "points n", "gain γ, nats", "of the largest possible", "mean variance", "its bound"]
    return markdown_table(head, rows)


def acceleration_table(records: list[dict[str, Any]]) -> str:
    """A row a problem and kind of run, a column an N."""
    rows = []
    for case in CASES:
        for kind in RUNS:
            spreads = [Spread.over(accelerations(records, case.problem, kind, n)) for n in PARALLELISM]
            rows.append([case.label, LABELS[kind], *(f"{s.mean:.2f} ± {s.deviation:.2f}" for s in spreads)])
    roots = [f"**{math.sqrt(n):g} / {n}**" for n in PARALLELISM]
    rows.append(["**√N / N**", "", *roots])
    return markdown_table(["problem", "run", *(f"N = {n}" for n in PARALLELISM)], rows)


def report() -> None:
    """Pictures and tables, from the committed record."""
    record = json.loads((FOLDER / "theory.json").read_text())
    write_plot(FOLDER / "calibration.png", draw_calibration(record["calibration"]))
    write_plot(FOLDER / "acceleration.png", draw_acceleration(record["acceleration"]))
    tables = {
        "calibration": calibration_table(record["calibration"]),
        "gain": gain_table(record["gain"]),
        "acceleration": acceleration_table(record["acceleration"]),
    }
    fill(PAGE, tables)


def main() -> None:
    """Measure, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="run nothing; pictures and tables from the JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", optex.JitterWarning)  # of models that are judged by how they predict
    if not options.report:
        FOLDER.mkdir(parents=True, exist_ok=True)
        (FOLDER / "theory.json").write_text(json.dumps(finite_or_null(measure()), allow_nan=False) + "\n")
    report()


if __name__ == "__main__":
    main()
