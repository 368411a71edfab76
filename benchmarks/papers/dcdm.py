"""Deep conjugate directions: iterations and seconds on Poisson problems, against the solvers one would take."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Final

import numpy as np
import pyamg
import torch
from direction_network import layout, masked, train
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, cg, spilu, splu

from optex.solvers import DirectionNetwork, dcdm
from optex.studies.poisson import Poisson
from optex.studies.tables import markdown_table
from papers import Check

ROOM = "solvers"

_TOL: Final = 1e-4
_MOST: Final = 1000
_COLOURS: Final = ("#d55e00", "#000000", "#0072b2", "#009e73", "#cc79a7")  # Okabe and Ito
_STYLES: Final = ("-", ":", "--", "-.", (0, (5, 1, 1, 1)))
_UNSEEN: Final = range(1000, 1008)

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Trained:
    """A network, what it was trained on, and the seconds that took."""

    network: DirectionNetwork
    grid: tuple[int, ...]
    seconds: float


@lru_cache
def trained(name: str) -> Trained:
    """One of the three networks; all on the CPU with the threads that are set."""
    grid, layouts, settings = {
        "plain": ((16, 16), 1, {"steps": 600, "lr": 2e-3}),
        "2-D": ((32, 32), 8, {"steps": 600, "levels": 2, "lr": 2e-3}),
        "3-D": ((12, 12, 12), 8, {"steps": 400, "channels": 8, "lr": 2e-3, "batch": 8, "vectors": 300}),
    }[name]
    started = time.perf_counter()
    problems = [layout(grid, seed, most=0 if layouts == 1 else 3) for seed in range(layouts)]
    network, _ = train(problems, **settings)
    return Trained(network, grid, time.perf_counter() - started)


# ------------------------------------------------------------------ solvers


@dataclass(frozen=True)
class Solved:
    """Iterations to a residual of 1e-4, seconds before the first and in them, and all residual norms."""

    iterations: int
    setup: float
    seconds: float
    norms: list[float]


def _timed(solve: Callable[[], Any], repeats: int = 3) -> tuple[float, Any]:
    """The fastest of some runs; one alone where they are long."""
    found: list[float] = []
    answer = None
    while len(found) < repeats and sum(found) < 1.0:
        started = time.perf_counter()
        answer = solve()
        found.append(time.perf_counter() - started)
    return min(found), answer


def learned(network: DirectionNetwork, problem: Poisson, b: Array, *, memory: int = 2) -> Solved:
    """DCDM; its set-up is the training, which is counted apart."""
    A, direction = problem.matrix, masked(network, problem)
    norms = [1.0]
    dcdm(
        A,
        b,
        direction,
        memory=memory,
        maxiter=_MOST,
        callback=lambda intermediate_result: norms.append(intermediate_result.residual),
    )
    seconds, result = _timed(lambda: dcdm(A, b, direction, memory=memory, maxiter=_MOST))
    return Solved(result.nit if result.success else _MOST, 0.0, seconds, norms)


def _scipy_cg(A: Any, b: Array, setup: float, preconditioner: Any = None) -> Solved:
    norms = [1.0]
    cg(
        A,
        b,
        rtol=_TOL,
        M=preconditioner,
        maxiter=_MOST,
        callback=lambda x: norms.append(float(np.linalg.norm(b - A @ x) / np.linalg.norm(b))),
    )
    seconds, (_, failed) = _timed(lambda: cg(A, b, rtol=_TOL, M=preconditioner, maxiter=_MOST))
    return Solved(_MOST if failed else len(norms) - 1, setup, seconds, norms)


def conjugate_gradients(A: Any, b: Array) -> Solved:
    """SciPy's."""
    return _scipy_cg(A, b, 0.0)


def incomplete(A: Any, b: Array) -> Solved:
    """SciPy's conjugate gradients with SuperLU's incomplete factors, at the drop tolerance that is fastest."""
    best = None
    columns = A.tocsc()
    for drop in (0.1, 0.03, 0.01):
        setup, factors = _timed(
            lambda drop=drop: spilu(
                columns,
                drop_tol=drop,
                permc_spec="MMD_AT_PLUS_A",
                diag_pivot_thresh=0.0,
                options={"SymmetricMode": True},
            )
        )
        found = _scipy_cg(A, b, setup, LinearOperator(A.shape, factors.solve))
        if found.iterations < _MOST and (
            best is None or found.setup + found.seconds < best.setup + best.seconds
        ):
            best = found
    assert best is not None
    return best


def multigrid(A: Any, b: Array) -> Solved:
    """PyAMG's conjugate gradients with the faster of its two usual hierarchies."""
    best = None
    rows = A.tocsr()
    rows.indices, rows.indptr = rows.indices.astype(np.int32), rows.indptr.astype(np.int32)
    for make in (pyamg.ruge_stuben_solver, pyamg.smoothed_aggregation_solver):
        setup, hierarchy = _timed(lambda make=make: make(rows))
        norms: list[float] = []
        hierarchy.solve(b, tol=_TOL, accel="cg", residuals=norms)
        seconds, _ = _timed(lambda hierarchy=hierarchy: hierarchy.solve(b, tol=_TOL, accel="cg"))
        relative = [float(norm / norms[0]) for norm in norms]
        found = Solved(len(norms) - 1, setup, seconds, relative)
        if best is None or found.setup + found.seconds < best.setup + best.seconds:
            best = found
    assert best is not None
    return best


def direct(A: Any, b: Array) -> Solved:
    """SciPy's sparse factorisation."""
    columns = A.tocsc()
    setup, factors = _timed(lambda: splu(columns, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0))
    seconds, x = _timed(lambda: factors.solve(b))
    return Solved(1, setup, seconds, [1.0, float(np.linalg.norm(b - A @ x) / np.linalg.norm(b))])


RIVALS: Final = {
    "CG (SciPy)": conjugate_gradients,
    "CG, incomplete factors (SciPy)": incomplete,
    "CG, algebraic multigrid (PyAMG)": multigrid,
    "sparse factors (SciPy)": direct,
}
FIELDS: Final = {"2-D": ((32, 32), (128, 128)), "3-D": ((12,) * 3, (24,) * 3)}


@lru_cache
def field(name: str, grid: tuple[int, ...]) -> dict[str, Solved]:
    """All solvers on one layout that was not trained on."""
    problem = layout(grid, 1003)
    b = problem.random_right_hand_side(1003)
    found = {"DCDM": learned(trained(name).network, problem, b)}
    A, inner = problem.definite(), b[problem.fluid]
    return found | {rival: solve(A, inner) for rival, solve in RIVALS.items()}


# ------------------------------------------------------------------ checks


def _identity() -> tuple[str, bool]:
    pairs = []
    for size in (16, 32, 64):
        problem = layout((size, size), 0, most=0)
        b = problem.random_right_hand_side(0)
        result = dcdm(problem.matrix, b, lambda r: r, maxiter=_MOST)
        counted: list[Array] = []
        cg(problem.matrix, b.ravel(), rtol=_TOL, callback=counted.append)
        pairs.append((result.nit, len(counted), float(np.abs(result.x.ravel() - counted[-1]).max())))
    own, scipys, apart = zip(*pairs, strict=True)
    figure = f"{', '.join(map(str, own))}; SciPy {', '.join(map(str, scipys))}; x apart by {max(apart):.0e}"
    return figure, own == scipys and max(apart) < 1e-6


def _inverse() -> tuple[str, bool]:
    counts = []
    for factor in (1.0, -1e-6, 1e6):
        problem = layout((32, 32), 0, most=0)
        factors = splu(problem.matrix.tocsc())
        b = problem.random_right_hand_side(0)
        result = dcdm(
            problem.matrix,
            b,
            lambda r, factors=factors, factor=factor: factor * factors.solve(r.ravel()).reshape(r.shape),
        )
        counts.append(result.nit)
    return f"{', '.join(map(str, counts))} iterations for c = 1, -1e-6, 1e6", counts == [1, 1, 1]


def _plain(seeds: range = range(20)) -> tuple[str, bool]:
    found = trained("plain")
    problem = layout(found.grid, 0, most=0)
    ours, theirs = [], []
    for seed in seeds:
        b = problem.random_right_hand_side(seed)
        ours.append(dcdm(problem.matrix, b, masked(found.network, problem)).nit)
        theirs.append(dcdm(problem.matrix, b, lambda r: r).nit)
    figure = f"{_span(ours)} iterations, CG {_span(theirs)}; trained in {found.seconds:.0f} s"
    return figure, max(ours) <= 10 and 3 * max(ours) <= min(theirs)


def _span(counts: list[int]) -> str:
    return f"{min(counts)} to {max(counts)}"


def _memory() -> tuple[str, bool]:
    found = trained("2-D")
    means = {}
    for memory in (0, 1, 2, 5):
        counts = []
        for seed in _UNSEEN:
            problem = layout(found.grid, seed)
            b = problem.random_right_hand_side(seed)
            counts.append(dcdm(problem.matrix, b, masked(found.network, problem), memory=memory).nit)
        means[memory] = float(np.mean(counts))
    figure = "; ".join(f"{memory}: {mean:.1f}" for memory, mean in means.items())
    return figure, means[2] < means[0]


def _unseen(name: str, grid: tuple[int, ...]) -> tuple[str, bool]:
    network = trained(name).network
    ours, theirs, trusting, fallbacks = [], [], [], 0
    for seed in _UNSEEN:
        problem = layout(grid, seed)
        b = problem.random_right_hand_side(seed)
        result = dcdm(problem.matrix, b, masked(network, problem), maxiter=_MOST)
        ours.append(result.nit)
        fallbacks += result.fallbacks
        theirs.append(dcdm(problem.matrix, b, lambda r: r, maxiter=_MOST).nit)
        if result.fallbacks:
            trusting.append(dcdm(problem.matrix, b, masked(network, problem), maxiter=_MOST, patience=None).nit)
    figure = f"{_span(ours)} iterations, CG {_span(theirs)}"
    if fallbacks:
        figure += f"; {fallbacks} iterations by fallback, {_span(trusting)} iterations without it"
    return figure, all(3 * one <= two for one, two in zip(ours, theirs, strict=True))


def _untrained() -> tuple[str, bool]:
    torch.manual_seed(0)
    network = DirectionNetwork(2).eval()
    problem = layout((32, 32), 0, most=0)
    b = problem.random_right_hand_side(0)
    safe, trusting, plain = (
        dcdm(problem.matrix, b, direction, patience=patience, maxiter=300)
        for direction, patience in (
            (masked(network, problem), 10),
            (masked(network, problem), None),
            (lambda r: r, None),
        )
    )
    figure = (
        f"{safe.nit} iterations, of them {safe.directions} by the network; trusting it "
        f"{trusting.nit if trusting.success else 'not there after 300'}; CG {plain.nit}"
    )
    return figure, safe.success and safe.nit <= plain.nit + 20


def _seconds(name: str, grid: tuple[int, ...]) -> tuple[str, bool]:
    runs = field(name, grid)
    total = {key: run.setup + run.seconds for key, run in runs.items()}
    best = min((key for key in total if key != "DCDM"), key=lambda key: total[key])
    plain = total["CG (SciPy)"]
    figure = (
        f"DCDM {1e3 * total['DCDM']:.1f} ms; fastest: {best} {1e3 * total[best]:.1f} ms; "
        f"CG {1e3 * plain:.1f} ms: DCDM takes {total['DCDM'] / total[best]:.1f} and "
        f"{total['DCDM'] / plain:.1f} times as long"
    )
    return figure, total["DCDM"] <= total[best]


def _words(grid: tuple[int, ...]) -> str:
    return " × ".join(map(str, grid))


CHECKS = [
    Check(
        "the residual as direction, 2-D, N = 16, 32, 64",
        "SciPy's conjugate gradients, iteration for iteration (recorded for another b: 33, 67, 129)",
        _identity,
    ),
    Check("c A⁻¹ r as direction", "1 iteration", _inverse),
    Check(
        "2-D, N = 16, no obstacles, 20 right-hand sides, tol 1e-4",
        "at most 10, and a third of CG's (recorded: 4 to 5, CG 32 to 35)",
        _plain,
    ),
    *[
        Check(
            f"{name}, trained on {_words(FIELDS[name][0])}, 8 layouts; 8 others on {_words(grid)}",
            "at most a third of CG's iterations",
            partial(_unseen, name, grid),
        )
        for name in FIELDS
        for grid in FIELDS[name]
    ],
    Check("mean iterations with memory 0, 1, 2, 5; 2-D, 32 × 32", "fewer with 2 than with 0", _memory),
    Check("a network that was not trained, 2-D, 32 × 32", "at most 20 iterations more than CG", _untrained),
    *[
        Check(
            f"seconds on one thread, {_words(grid)}, set-ups of rivals counted, training not",
            "no slower than the fastest rival",
            partial(_seconds, name, grid),
        )
        for name in FIELDS
        for grid in FIELDS[name]
    ],
]


# ------------------------------------------------------------------ page


def curves() -> dict[str, Any]:
    """Residuals iteration by iteration, and all solvers' iterations and seconds."""
    fields = {
        f"{name}, {_words(grid)}": {
            key: {"iterations": run.iterations, "setup": run.setup, "seconds": run.seconds, "norms": run.norms}
            for key, run in field(name, grid).items()
        }
        for name in FIELDS
        for grid in FIELDS[name]
    }
    return {"fields": fields, "training": {name: trained(name).seconds for name in ("plain", "2-D", "3-D")}}


def tables(record: dict[str, Any]) -> dict[str, str]:
    """The page's second table, and its sentence on training."""
    rows = [
        (problem, name, str(run["iterations"]), f"{1e3 * run['setup']:.1f}", f"{1e3 * run['seconds']:.1f}")
        for problem, found in record["curves"]["fields"].items()
        for name, run in found.items()
    ]
    took = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in record["curves"]["training"].items())
    header = ("problem", "solver", "iterations", "set-up, ms", "solve, ms")
    return {"rivals": markdown_table(header, rows), "training": f"Training took, on one thread: {took}."}


def draw(found: dict[str, Any]) -> Figure:
    """Residuals on one grid of either dimension, and seconds against unknowns."""
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3)
    names = ["DCDM", *RIVALS]
    for panel, problem in zip(axes, ("2-D, 32 × 32", "3-D, 12 × 12 × 12"), strict=False):
        for name, colour, style in zip(names, _COLOURS, _STYLES, strict=True):
            if name == "sparse factors (SciPy)":
                continue
            panel.semilogy(found["fields"][problem][name]["norms"], color=colour, linestyle=style)
        panel.axhline(_TOL, color="#8a8a8a", linewidth=0.8)
        panel.set(title=f"{problem}, unseen obstacles", xlabel="iteration", ylabel="‖b - Ax‖ / ‖b‖")
    markers = {"2-D": "o", "3-D": "s"}
    for kind, marker in markers.items():
        grids = {key: run for key, run in found["fields"].items() if key.startswith(kind)}
        cells = [int(np.prod([int(size) for size in key.partition(", ")[2].split(" × ")])) for key in grids]
        for name, colour, style in zip(names, _COLOURS, _STYLES, strict=True):
            taken = [1e3 * (run[name]["setup"] + run[name]["seconds"]) for run in grids.values()]
            label = name if kind == "2-D" else None
            axes[2].loglog(
                cells, taken, color=colour, linestyle=style, marker=marker, markersize=4, label=label
            )
    axes[2].set(title="one solve (○ 2-D, □ 3-D)", xlabel="cells", ylabel="ms, set-up counted")
    figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    return figure
