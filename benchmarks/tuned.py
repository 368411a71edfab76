"""Tuned against tuned: every method with its own best optimizer and rate, in gradients to vanilla's best loss.

    python benchmarks/tuned.py run --workers 2            about three quarters of an hour on 2 cores
    python benchmarks/tuned.py run --problems heat --redo optex
    python benchmarks/tuned.py report                     tables and pictures from what was run

Vanilla is tuned first: what its best optimizer and rate reach after a quarter, half and all of its rounds are
the levels, seed by seed. Every other method then searches optimizers and rates of its own, from vanilla's best
ones up and down until both neighbours are worse, for the fewest rounds to each level on seed 0; the two best at
each level run on the other seeds. A run ends at the last level, or when it cannot be the best any more.

`run` writes results/tuned/PROBLEM.json after each method and goes on where it was stopped; `report` fills
results/tuned/README.md and draws the pictures beside it. One thread a worker.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tuned_report import report

from optex.stepping.bases import base_optimizer
from optex.studies.baselines import METHODS, Method, Setting
from optex.studies.baselines.data_parallel import data_parallel
from optex.studies.problems import Problem, make_problem
from optex.studies.records import finite_or_null, significant
from optex.studies.tuning import (
    FRACTIONS,
    Attempt,
    Choice,
    Cost,
    Limits,
    attempt,
    finalists,
    first_level_within,
    median,
    search,
    tuned,
)

FOLDER = Path(__file__).parent.parent / "results" / "tuned"
FINALISTS = 2
SLACK = 1.5
CURVE = 48  # points kept of a curve
SMOOTH = {"adam": 0.03, "momentum": 0.1, "sgd": 1.0}  # where the search for vanilla's rates begins
NETWORK = {"adam": 3e-3, "momentum": 0.1, "sgd": 0.3, "muon": 0.01}


@dataclass(frozen=True)
class Case:
    """A problem of the study.

    Attributes:
        problem, options: as for ``make_problem``.
        rounds: R, vanilla's.
        rates: optimizer -> a rate to begin with.
        seeds: starts.
        every: rounds from one evaluation of the objective to the next.
    """

    problem: str
    rounds: int
    options: Mapping[str, Any] = field(default_factory=dict)
    rates: Mapping[str, float] = field(default_factory=lambda: SMOOTH)
    seeds: int = 2
    every: int = 1

    def start(self, seed: int) -> Problem:
        """The problem at a seed's start."""
        return make_problem(self.problem, seed=seed, **self.options)


def _network(problem: str, rounds: int, **changes: Any) -> Case:
    rates = changes.pop("rates", NETWORK)
    return Case(problem, rounds, changes.pop("options", {}), rates, **changes)


_FUNCTION = {"dim": 1000}
_FASHION = {"held_size": 1000, "test_size": 1000}
_TEXT = {"layers": 1, "width": 32, "context": 32, "held_size": 64, "test_size": 64}
_RESNET = {"model": "resnet", "width": 4, "batch_size": 16, "held_size": 200, "test_size": 200}
CASES: dict[str, Case] = {
    "sphere": Case("sphere", 100, _FUNCTION, {"adam": 0.03, "momentum": 100.0, "sgd": 1000.0}),
    "ackley": Case("ackley", 100, _FUNCTION, {"adam": 0.03, "momentum": 3.0, "sgd": 10.0}),
    "rosenbrock": Case("rosenbrock", 120, _FUNCTION),
    "quadratic": Case("quadratic", 120, _FUNCTION),
    "logistic": Case("logistic-breast-cancer", 120),
    "heat": Case("heat", 80),
    "gp": Case("gp-hyperparameters", 60),
    "heat-sampled": Case("heat", 80, {"heaters": 16, "heaters_at_once": 4}),
    "bayesian-logistic": Case("bayesian-logistic", 120),
    "digits-32": _network("digits-mlp", 150),
    "digits-512": _network("digits-mlp", 120, options={"batch_size": 512}),
    "fashion-32": _network("fashion-mnist", 150, options={**_FASHION, "width": 32, "batch_size": 32}),
    "fashion-512": _network("fashion-mnist", 100, options={**_FASHION, "width": 32, "batch_size": 512}),
    "shakespeare": _network("shakespeare", 80, options=_TEXT),
    "cifar10": _network("cifar10", 32, options=_RESNET, rates={"adam": 3e-3, "momentum": 0.1}, every=2),
    "cartpole": _network("cartpole", 200, rates={"adam": 3e-3, "momentum": 0.03, "sgd": 0.1}),
}
DEAREST = ("cifar10", "shakespeare", "fashion-32", "fashion-512", "heat", "cartpole")


# ------------------------------------------------------------------ configurations


@dataclass(frozen=True)
class Configuration:
    """A method at an N.

    Attributes:
        run: the method.
        parallelism: N.
        own: it has an optimizer of its own, and no rate to tune.
    """

    run: Method
    parallelism: int = 1
    own: bool = False


def configurations(deterministic: bool) -> dict[str, Configuration]:
    """All of them but vanilla, by name and N, those with one gradient at a time first."""
    found = {name: Configuration(METHODS[name].run) for name in ("nowcast", "nowcast-dmd", "optex")}
    if deterministic:
        for name in ("lbfgs", "lbfgs-scipy", "lbfgs-scipy-50", "nonlinear-cg"):
            found[name] = Configuration(METHODS[name].run, own=True)
    found = {f"{name} 1": entry for name, entry in found.items()}
    for n in (4, 8, 16):
        found[f"optex {n}"] = Configuration(METHODS["optex"].run, n)
    for name in ("target", "line-search", "hold-last", "picard", "nowcast", "nowcast-dmd", "optex-paper"):
        found[f"{name} 8"] = Configuration(METHODS[name].run, 8)
    found["data-parallel 8"] = Configuration(partial(data_parallel, factor=1.0), 8)  # the search tunes its rate
    return found


class MuonWithAdam(torch.optim.Optimizer):
    """Muon for the matrices inside a network, Adam for the rest, at one rate.

    Muon's steps are scaled to the root mean square of Adam's, so that one rate serves both.

    Source: Jordan et al., *Muon: an optimizer for hidden layers in neural networks*, 2024; the scale: Liu et
    al., *Muon is scalable for LLM training*, 2025.
    """

    def __init__(self, matrices: Iterable[torch.nn.Parameter], rest: Iterable[torch.nn.Parameter], lr: float):
        muon = torch.optim.Muon(list(matrices), lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        parts = [muon, torch.optim.Adam(list(rest), lr=lr)]
        super().__init__([group for part in parts for group in part.param_groups], {"lr": lr})

        # A function: what the parts hold is this optimizer's groups and state, and no more.
        def advance() -> None:
            for part, group in zip(parts, self.param_groups, strict=True):
                part.param_groups, part.state = [group], self.state
                part.step()

        self._advance = advance

    def step(self, closure: Any = None) -> Any:
        """One of Muon, one of Adam."""
        self._advance()


def optimizer_of(problem: Problem, choice: Choice) -> Callable[[Any], torch.optim.Optimizer]:
    """What makes the choice's optimizer for this problem."""
    if choice.optimizer != "muon":
        return lambda parameters: base_optimizer(choice.optimizer, parameters, lr=choice.rate)
    linear = [module.weight for module in problem.modules() if isinstance(module, torch.nn.Linear)]
    hidden = {id(weight) for weight in linear[:-1]}  # the last one makes the scores

    def build(parameters: Any) -> torch.optim.Optimizer:
        listed = list(parameters)
        return MuonWithAdam(
            [p for p in listed if id(p) in hidden], [p for p in listed if id(p) not in hidden], choice.rate
        )

    return build


# ------------------------------------------------------------------ a problem


class Study:
    """A case, with its starts and levels; makes runs and keeps their record.

    Attributes:
        levels: [seeds][levels], losses; empty until vanilla is tuned.
    """

    def __init__(self, name: str, case: Case, path: Path) -> None:
        self.name, self.case, self.path = name, case, path
        self.starts = [case.start(seed) for seed in range(case.seeds)]
        self.deterministic = self.starts[0].deterministic
        self.record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        self.levels: list[list[float]] = self.record.get("levels", [])

    def marks(self) -> list[int]:
        """Rounds after which what vanilla has reached is a level."""
        return [max(self.case.every, round(self.case.rounds * fraction)) for fraction in FRACTIONS]

    def attempt(self, entry: Configuration, choice: Choice, seed: int, limits: Limits) -> Attempt:
        """One run."""
        problem = self.starts[seed]
        method, copies = entry.run, 1
        if self.deterministic and isinstance(method, partial) and method.func is data_parallel:
            method, copies = METHODS["vanilla"].run, entry.parallelism  # N times the same gradient
        setting = Setting(optimizer_of(problem, choice), entry.parallelism, None, limits.rounds)
        return attempt(method, problem, setting, choice, limits, copies)

    def tune_vanilla(self) -> None:
        """Search by loss at each mark, and set the levels."""
        marks, entry = self.marks(), Configuration(METHODS["vanilla"].run)
        limits = Limits(self.case.rounds, every=self.case.every, held_at=frozenset(marks))
        runs: list[Attempt] = []

        def costs(choice: Choice) -> list[Cost]:
            runs.append(self.attempt(entry, choice, 0, limits))
            return [(runs[-1].best_by(mark),) for mark in marks]

        starts = [
            Choice(optimizer, rate).beside(steps)
            for optimizer, rate in self.case.rates.items()
            for steps in (0, 2, -2)
        ]
        best = finalists(search(costs, starts), FINALISTS)
        runs += [self.attempt(entry, c, seed, limits) for c in best for seed in range(1, self.case.seeds)]
        self.levels = [[] for _ in self.starts]
        for mark in marks:
            whole = [[run for run in runs if run.choice == choice] for choice in best]
            winner = min(whole, key=lambda group: median(run.best_by(mark) for run in group))
            for run in winner:
                self.levels[run.seed].append(rounded_up(run.best_by(mark)))
        self.keep("vanilla 1", [self._measured(run) for run in runs])

    def _measured(self, run: Attempt) -> Attempt:
        """Vanilla's run, with the levels that were made of it and its like."""
        rounds = [
            float(next((r for r, loss in run.curve if loss <= level), math.inf))
            for level in self.levels[run.seed]
        ]
        return Attempt(run.choice, run.seed, rounds, rounds, run.held, run.curve)

    def tune(self, name: str, entry: Configuration) -> None:
        """Search by rounds to each level."""
        runs: list[Attempt] = []
        # One gradient at a time, to be compared with vanilla closely: so a little beyond vanilla's rounds.
        cap = round(self.case.rounds * (SLACK if entry.parallelism == 1 else 1))
        fewest = [math.inf] * len(FRACTIONS)

        def limits(seed: int, rounds: float, first: float) -> Limits:
            patience = min(self.case.rounds // 2, first_level_within(first, cap))
            return Limits(int(min(cap, rounds)), self.levels[seed], patience, self.case.every)

        def costs(choice: Choice) -> list[Cost]:
            run = self.attempt(entry, choice, 0, limits(0, fewest[-1], fewest[0]))
            runs.append(run)
            fewest[:] = [min(pair) for pair in zip(fewest, run.rounds, strict=True)]
            return [(rounds, run.best) for rounds in run.rounds]

        best = list(search(costs, [Choice("own", 1.0)], most=1) if entry.own else self._searched(costs))
        runs += [
            self.attempt(entry, c, seed, limits(seed, math.inf, math.inf))
            for c in best
            for seed in range(1, self.case.seeds)
        ]
        self.keep(name, runs)

    def _searched(self, costs: Callable[[Choice], list[Cost]]) -> list[Choice]:
        """From each optimizer's best rate for vanilla, the best optimizer first; its finalists."""
        found: dict[str, tuple[float, float, Choice]] = {}
        for optimizer, rate, seed, rounds, _, best, _ in self.record["methods"]["vanilla 1"]["runs"]:
            if seed == 0:
                cost = (math.inf if rounds[-1] is None else rounds[-1], best, Choice(optimizer, rate))
                found[optimizer] = min(found.get(optimizer, cost), cost, key=lambda entry: entry[:2])
        starts = [entry[2] for entry in sorted(found.values(), key=lambda entry: entry[:2])]
        return finalists(search(costs, [c.beside(steps) for steps in (0, -1, 1) for c in starts]), FINALISTS)

    def keep(self, name: str, runs: list[Attempt]) -> None:
        """Write the record with this method's runs."""
        last = len(FRACTIONS) - 1
        best = tuned(runs, last, self.case.seeds).choice
        shown = [run for run in runs if run.seed == 0 and run.choice == best]
        shown = shown or [min((run for run in runs if run.seed == 0), key=lambda run: run.best)]
        stride = max(1, math.ceil(len(shown[0].curve) / CURVE))
        curve = shown[0].curve[::stride]
        curve += shown[0].curve[-1:] if curve[-1] != shown[0].curve[-1] else []
        self.record = {
            "problem": self.case.problem,
            "options": dict(self.case.options),
            "dimension": self.starts[0].dimension,
            "deterministic": self.deterministic,
            "rounds": self.case.rounds,
            "seeds": self.case.seeds,
            "every": self.case.every,
            "levels": self.levels,
            "methods": self.record.get("methods", {}),
            "meta": machine(),
        }
        self.record["methods"][name] = {
            "runs": [as_row(run) for run in runs],
            "shown": [shown[0].choice.optimizer, shown[0].choice.rate],
            "curve": [[r for r, _ in curve], [significant(loss, 4) for _, loss in curve]],
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".part")
        beside.write_text(
            json.dumps(finite_or_null(self.record), allow_nan=False, separators=(",", ":")) + "\n"
        )
        beside.replace(self.path)


def rounded_up(loss: float) -> float:
    """To eight digits, so that the run which reached it has."""
    return float(f"{loss + 1e-6 * abs(loss):.8g}")


def as_row(run: Attempt) -> list[Any]:
    """Optimizer, rate, seed, rounds and gradients to each level, lowest loss, held-out measure at each."""
    held = [significant(value, 4) for value in run.held]
    best = significant(run.best, 5)
    counts = [[int(v) if math.isfinite(v) else None for v in row] for row in (run.rounds, run.gradients)]
    return [run.choice.optimizer, run.choice.rate, run.seed, *counts, best, held]


def machine() -> dict[str, Any]:
    """Versions."""
    return {"optex": version("optex"), "torch": torch.__version__, "python": platform.python_version()}


def run_case(job: tuple[str, int | None, tuple[str, ...], Path]) -> tuple[str, float]:
    """All methods of a case that are not there yet; the case's name and the seconds of its processor."""
    name, rounds, redo, folder = job
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    started = time.process_time()
    case = CASES[name] if rounds is None else Case(**{**vars(CASES[name]), "rounds": rounds})
    study = Study(name, case, folder / f"{name}.json")
    if "vanilla 1" not in study.record.get("methods", {}):
        study.tune_vanilla()
    for key, entry in configurations(study.deterministic).items():
        if key not in study.record["methods"] or key.rpartition(" ")[0] in redo or key in redo:
            before = time.process_time()
            study.tune(key, entry)
            print(f"  {name}, {key}: {time.process_time() - before:.0f} s", flush=True)
    return name, time.process_time() - started


def run(names: Iterable[str], workers: int, rounds: int | None, redo: tuple[str, ...], folder: Path) -> None:
    """Run the cases, the dearest first so that both workers end together."""
    ordered = dict.fromkeys((*DEAREST, *CASES))
    jobs = [(name, rounds, redo, folder) for name in ordered if name in names]
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(workers, len(jobs))) as pool:
        for name, seconds in pool.imap_unordered(run_case, jobs, chunksize=1):
            print(f"{name}: {seconds:.0f} s", flush=True)


def main() -> None:
    """Run or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "report"])
    parser.add_argument("--problems", default=",".join(CASES), help="comma-separated, of " + ", ".join(CASES))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, help="vanilla's, instead of each problem's own, for a trial")
    parser.add_argument("--redo", default="", help="methods to run anew, comma-separated: optex, or optex 8")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of the JSON files, page and pictures")
    options = parser.parse_args()
    names = options.problems.split(",")
    if unknown := [name for name in names if name not in CASES]:
        parser.error(f"--problems: {', '.join(unknown)}: not of {', '.join(CASES)}")
    os.environ["OMP_NUM_THREADS"] = "1"
    if options.what == "run":
        redo = tuple(name for name in options.redo.split(",") if name)
        run(names, options.workers, options.rounds, redo, options.folder)
    else:
        report(options.folder, list(CASES))


if __name__ == "__main__":
    main()
