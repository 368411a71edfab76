"""How often ``optex.minimize`` with no rate given reaches the gradient tolerance, and who else does.

    python benchmarks/minimize.py           what is not in the JSON yet, then the tables; all: half an hour
    python benchmarks/minimize.py report    the tables alone

The functions of Moré, Garbow and Hillstrom from their standard starts. *The twenty* are the first twenty of the
paper, in its order, chosen before any method was run; the rule for the rate was made on the other fifteen.
A run reaches the tolerance where no component of the gradient is larger than 1e-5 at a point that it found:
vanilla Adam, at each of eleven rates, within 1,000 gradients in turn and within 4,000; ``optex.minimize`` with
its defaults, 1,000 rounds of 4 gradients at once; SciPy's L-BFGS-B and BFGS, 1,000 iterations, with L-BFGS-B's
stop by the change of f switched off.

Writes results/minimize/minimize.json and the tables of results/minimize/README.md and results/README.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import torch

import optex
from optex.studies.problems.more_garbow_hillstrom import FUNCTIONS, TestFunction
from optex.studies.records import finite_or_null, this_machine
from optex.studies.tables import fill, markdown_table

ROOT = Path(__file__).parent.parent
PATH = ROOT / "results" / "minimize" / "minimize.json"
TOLERANCE = 1e-5
IN_TURN, AT_LENGTH = 1000, 4000
RATES = [float(f"{10 ** (exponent / 2):.3g}") for exponent in (-2, -1, 0, -3, 1, 2, -4, -5, -6, -7, -8)]
TWENTY = range(1, 21)

# ---------------------------------------------------------------------- the methods


def adam(function: TestFunction, rate: float) -> dict[str, Any]:
    """Vanilla Adam, a gradient after the other."""
    x = torch.tensor(function.start, dtype=torch.float64, requires_grad=True)
    base = torch.optim.Adam([x], lr=rate)
    lowest = np.inf
    for count in range(1, AT_LENGTH + 1):
        base.zero_grad()
        value = function(x)
        value.backward()
        lowest = min(lowest, float(value.detach()))
        if x.grad is not None and float(x.grad.abs().max()) <= TOLERANCE:
            return entry(function, float(value.detach()), reached=True, rounds=count, gradients=count)
        base.step()
    return entry(function, lowest, reached=False, rounds=AT_LENGTH, gradients=AT_LENGTH)


def ours(function: TestFunction) -> dict[str, Any]:
    """``optex.minimize`` as it comes."""
    result = optex.minimize(function, function.start)
    found = entry(function, result.fun, reached=result.status == 0, rounds=result.nit, gradients=result.nfev)
    return {**found, "steps": result.nstep, "lr": result.lr, "lr_final": result.lr_final}


def scipys(function: TestFunction, method: str, options: dict[str, Any]) -> dict[str, Any]:
    """One of SciPy's methods."""

    def value_and_gradient(x: np.ndarray) -> tuple[float, np.ndarray]:
        leaf = torch.tensor(x, requires_grad=True)
        value = function(leaf)
        (gradient,) = torch.autograd.grad(value, leaf)
        return float(value.detach()), gradient.numpy()

    options = {"gtol": TOLERANCE, "maxiter": 1000, **options}
    with warnings.catch_warnings():  # trial steps overflow, and SciPy takes shorter ones
        warnings.simplefilter("ignore", RuntimeWarning)
        found = scipy.optimize.minimize(
            value_and_gradient, function.start, jac=True, method=method, options=options
        )
    reached = bool(np.abs(found.jac).max() <= TOLERANCE)
    return entry(function, float(found.fun), reached=reached, rounds=int(found.nfev), gradients=int(found.nfev))


def entry(
    function: TestFunction, value: float, *, reached: bool, rounds: int, gradients: int
) -> dict[str, Any]:
    """What is kept of a run; ``minimum`` is whether it ended at one that is known, to 0.1 % or 1e-6."""
    near = any(abs(value - least) <= max(1e-6, 1e-3 * abs(least)) for least in function.minima)
    return {"reached": reached, "minimum": near, "fun": value, "rounds": rounds, "gradients": gradients}


METHODS: dict[str, Callable[[TestFunction], dict[str, Any]]] = {
    "BFGS": lambda function: scipys(function, "BFGS", {}),
    "L-BFGS-B": lambda function: scipys(function, "L-BFGS-B", {"ftol": 0.0, "maxfun": 10**6}),
    "optex": ours,
}
METHODS |= {f"Adam {rate:g}": lambda function, rate=rate: adam(function, rate) for rate in RATES}


def measure() -> None:
    """Run every method on every function that it has not been run on, and keep what came of it."""
    torch.set_num_threads(1)
    runs = json.loads(PATH.read_text())["runs"] if PATH.exists() else []
    done = {(run["number"], run["method"]) for run in runs}
    PATH.parent.mkdir(parents=True, exist_ok=True)
    for method, run in METHODS.items():
        for function in FUNCTIONS:
            if (function.number, method) in done:
                continue
            runs.append(
                {"number": function.number, "function": function.name, "method": method, **run(function)}
            )
            print({key: runs[-1][key] for key in ("number", "method", "reached", "rounds", "fun")}, flush=True)
            document = {"meta": describe(), "runs": runs}
            PATH.write_text(json.dumps(finite_or_null(document), indent=1) + "\n")


def describe() -> dict[str, Any]:
    """What the runs were made with."""
    return {
        "torch": torch.__version__,
        "scipy": scipy.__version__,
        "python": platform.python_version(),
        "machine": this_machine(),
        "gtol": TOLERANCE,
        "rates": RATES,
    }


# ---------------------------------------------------------------------- the pages


def report() -> None:
    """Fill the pages from what was measured.

    Raises:
        SystemExit: runs are missing.
    """
    runs = json.loads(PATH.read_text())["runs"]
    missing = len(METHODS) * len(FUNCTIONS) - len(runs)
    if missing:
        raise SystemExit(f"{PATH} lacks {missing} runs; python benchmarks/minimize.py makes them")
    summary = summary_table(runs)
    fill(PATH.with_name("README.md"), {"summary": summary, "functions": function_table(runs)})
    fill(ROOT / "results" / "README.md", {"minimize": summary})


def reached(runs: list[dict[str, Any]], method: str, most: int, *, twenty: bool) -> list[dict[str, Any]]:
    """Runs of a method that met the tolerance within so many rounds."""
    return [
        run
        for run in runs
        if run["method"] == method
        and run["reached"]
        and run["rounds"] <= most
        and (run["number"] in TWENTY) is twenty
    ]


def best_adam(runs: list[dict[str, Any]], most: int, *, twenty: bool) -> tuple[str, int]:
    """The single rates that reach the tolerance most often, and how often."""
    counts = {rate: len(reached(runs, f"Adam {rate:g}", most, twenty=twenty)) for rate in RATES}
    best = max(counts.values())
    return " or ".join(f"{rate:g}" for rate, count in sorted(counts.items()) if count == best), best


def summary_table(runs: list[dict[str, Any]]) -> str:
    """How many functions each method solves; a row for Adam at its best rate of each group of functions."""
    rest = len(FUNCTIONS) - len(TWENTY)
    head = ("method", "of the twenty", "of these at a known minimum", f"of the other {rest}")
    rows = []
    for method in ("optex", "L-BFGS-B", "BFGS"):
        first, last = (reached(runs, method, 10**9, twenty=twenty) for twenty in (True, False))
        name = "`optex.minimize`" if method == "optex" else f"SciPy's {method}"
        rows.append((name, str(len(first)), str(sum(run["minimum"] for run in first)), str(len(last))))
    for most in (IN_TURN, AT_LENGTH):
        (rates, best), (others, rest_best) = (best_adam(runs, most, twenty=twenty) for twenty in (True, False))
        found = [reached(runs, f"Adam {rate}", most, twenty=True) for rate in rates.split(" or ")]
        minima = max(sum(run["minimum"] for run in group) for group in found)
        name = f"Adam, {most:,} gradients, best single rate"
        rows.append((name, f"{best} (lr {rates})", str(minima), f"{rest_best} (lr {others})"))
    return markdown_table(head, rows) + "\n\n" + beside_quasi_newton(runs)


def beside_quasi_newton(runs: list[dict[str, Any]]) -> str:
    """Rounds and gradients against the evaluations of SciPy's methods, where both reach the tolerance."""
    mine = {run["number"]: run for run in runs if run["method"] == "optex" and run["reached"]}
    lines = []
    for method in ("L-BFGS-B", "BFGS"):
        theirs = [run for run in runs if run["method"] == method and run["reached"] and run["number"] in mine]
        rounds, gradients = (
            sum(mine[run["number"]][key] < run["gradients"] for run in theirs)
            for key in ("rounds", "gradients")
        )
        lines.append(
            f"Of the {len(theirs)} functions on which {method} and the default both get there, the default "
            f"needs fewer gradients in turn (rounds) on {rounds}, fewer in all on {gradients}."
        )
    return " ".join(lines)


def function_table(runs: list[dict[str, Any]]) -> str:
    """Rounds to the tolerance, function by function."""
    by_case = {(run["number"], run["method"]): run for run in runs}

    def cell(number: int, method: str) -> str:
        run = by_case[number, method]
        return f"{run['rounds']}{'' if run['minimum'] else '*'}" if run["reached"] else "–"

    rows = []
    for function in FUNCTIONS:
        adams = [by_case[function.number, f"Adam {rate:g}"] for rate in RATES]
        solved = [(run["rounds"], run["method"]) for run in adams if run["reached"]]
        name = min(solved, default=(0, ""))[1]
        mine = by_case[function.number, "optex"]
        rows.append(
            (
                f"{function.number} {function.name}",
                cell(function.number, "optex"),
                f"{mine['gradients']}",
                f"{mine['lr']:.3g}",
                cell(function.number, "L-BFGS-B"),
                cell(function.number, "BFGS"),
                f"{cell(function.number, name)} ({name.removeprefix('Adam ')})" if solved else "–",
            )
        )
    head = ("function", "optex", "its gradients", "its first lr", "L-BFGS-B", "BFGS")
    return markdown_table((*head, "Adam, its best rate here"), rows)


def main() -> None:
    """Measure and report, or report alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["all", "report"], default="all")
    if parser.parse_args().what == "all":
        measure()
    report()


if __name__ == "__main__":
    main()
