"""Learning to relax: the paper's sequences of systems, ω learned while they are solved, and rivals' seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any, Final, Literal

import numpy as np
import pyamg
import scipy.sparse
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.sparse.linalg import cg, spsolve

import optex
from optex.solvers import BanditTuner, optimal_omega, sor, ssor_pcg
from optex.studies.tables import markdown_table
from papers import Check

ROOM = "solvers"

TRIALS: Final = 2  # the paper has 40
LENGTH: Final = 5000
_EARLY: Final = slice(500, 1000)  # the second half of a sequence of 1,000, on which numbers are on record
_GRID: Final = np.linspace(1, 1.95, 20)
_CONTEXTS: Final = (-0.15, 0.65)
_BETA: Final = {"high": (0.5, 1.5), "low": (2.0, 6.0)}
_FIXED: Final = {"high": 1.8, "low": 1.6}  # the best fixed ω of each, as the paper has it
_SIDE: Final = 10
_TOL: Final = 1e-8
_STYLES: Final = {
    "Tsallis-INF": ("#0072b2", "--"),
    "fixed": ("#000000", ":"),
    "Tsallis-INF in 5 bins": ("#009e73", "-."),
    "ChebCB": ("#d55e00", "-"),
    "instance-optimal": ("#8a8a8a", (0, (6, 2))),
}

Vector = NDArray[np.float64]


def laplacian(side: int) -> Any:
    """Five-point Laplacian of a square grid [side², side²], without the 1/h²."""
    diagonals = [-np.ones(side - 1), 2 * np.ones(side), -np.ones(side - 1)]
    offsets: Any = [-1, 0, 1]  # SciPy annotates nothing, and its default is a number
    line = scipy.sparse.diags_array(diagonals, offsets=offsets)
    eye = scipy.sparse.eye_array(side)
    return scipy.sparse.csr_array(scipy.sparse.kron(line, eye) + scipy.sparse.kron(eye, line))


def right_side(random: np.random.Generator, size: int) -> Vector:
    """Gaussian, drawn again while its norm is above √n."""
    while np.linalg.norm(b := random.normal(size=size)) > size**0.5:
        pass
    return b


def instances(variance: str, seed: int, count: int) -> Iterator[tuple[float, Any, Vector]]:
    """c, A_0 + c I and b, one after the other."""
    random = np.random.default_rng([seed, variance == "high"])
    base, eye = laplacian(_SIDE), scipy.sparse.eye_array(_SIDE**2, format="csr")
    for _ in range(count):
        c = -0.15 + 0.6 * random.beta(*_BETA[variance])
        yield c, base + c * eye, right_side(random, _SIDE**2)


def best_omega(c: float) -> float:
    """ω* of A_0 + c I; β is 4 cos(π / 11) / (4 + c)."""
    beta = 4 * np.cos(np.pi / (_SIDE + 1)) / (4 + c)
    return float(2 / (1 + np.sqrt(1 - beta**2)))


def tuned(method: Literal["tsallis-inf", "chebcb"], seed: int) -> BanditTuner:
    """A tuner of ω with the paper's settings."""
    return BanditTuner(_GRID, method, contexts=_CONTEXTS, least=1, seed=seed)


class _Bins:
    """A Tsallis-INF for each fifth of the contexts."""

    def __init__(self, seed: int) -> None:
        self._tuners = [tuned("tsallis-inf", 10 * seed + i) for i in range(5)]
        self._now = self._tuners[0]

    def suggest(self, context: float) -> float:
        low, high = _CONTEXTS
        self._now = self._tuners[min(4, max(0, int(5 * (context - low) / (high - low))))]
        return self._now.suggest()

    def observe(self, cost: float) -> None:
        self._now.observe(cost)


@lru_cache
def study(variance: str) -> dict[str, NDArray[np.float64]]:
    """Iterations of every method, [trials, length]."""
    costs: dict[str, list[list[int]]] = {name: [[] for _ in range(TRIALS)] for name in _STYLES}
    for trial in range(TRIALS):
        learners: dict[str, Any] = {
            "Tsallis-INF": tuned("tsallis-inf", trial),
            "Tsallis-INF in 5 bins": _Bins(trial),
            "ChebCB": tuned("chebcb", trial),
        }
        for c, A, b in instances(variance, trial, LENGTH):
            chosen = {name: learner.suggest(c) for name, learner in learners.items()}
            chosen |= {"fixed": _FIXED[variance], "instance-optimal": best_omega(c)}
            # Where methods agree on ω, the system is solved once.
            counts = {omega: sor(A, b, omega, tol=_TOL).nit for omega in set(chosen.values())}
            for name, omega in chosen.items():
                costs[name][trial].append(counts[omega])
            for name, learner in learners.items():
                learner.observe(counts[chosen[name]])
    return {name: np.array(found, dtype=np.float64) for name, found in costs.items()}


@lru_cache
def fixed_costs(variance: str) -> dict[float, float]:
    """Mean iterations of fixed ω on instances 500 to 1,000 of the first trial."""
    some = list(instances(variance, 0, _EARLY.stop))[_EARLY]
    return {
        omega: float(np.mean([sor(A, b, omega, tol=_TOL).nit for _, A, b in some]))
        for omega in (1.0, 1.2, 1.4, 1.6, 1.8)
    }


# ------------------------------------------------------------------ checks


def _omega_star() -> tuple[str, bool]:
    found, expected = optimal_omega(laplacian(_SIDE)), 2 / (1 + np.sin(np.pi / 11))
    return f"{found:.5f}, {abs(found - expected):.0e} from it", bool(abs(found - expected) < 1e-10)


def _iterations() -> tuple[str, bool]:
    recorded = {1.0: 184, 1.2: 121, 1.4: 76, 1.6: 41, best_omega(0.0): 38, 1.8: 86, 1.95: 362}
    random, A = np.random.default_rng(0), laplacian(_SIDE)
    rights = [right_side(random, _SIDE**2) for _ in range(40)]
    means = {omega: float(np.mean([sor(A, b, omega).nit for b in rights])) for omega in recorded}
    figure = ", ".join(f"{mean:.0f}" for mean in means.values())
    return figure, all(abs(means[omega] / count - 1) < 0.05 for omega, count in recorded.items())


def _early(variance: str, recorded: tuple[int, int, int]) -> tuple[str, bool]:
    names = ("instance-optimal", "ChebCB", "Tsallis-INF")
    means = [float(study(variance)[name][:, _EARLY].mean()) for name in names]
    figure = ", ".join(f"{name} {mean:.1f}" for name, mean in zip(names, means, strict=True))
    holds = all(abs(mean / count - 1) < 0.25 for mean, count in zip(means, recorded, strict=True))
    return figure, holds


def _accepted(variance: str) -> tuple[str, bool]:
    own = float(study(variance)["ChebCB"][:, _EARLY].mean())
    optimum = float(study(variance)["instance-optimal"][:, _EARLY].mean())
    fixed = fixed_costs(variance)
    figure = f"{own / optimum:.2f} of the optimum; " + ", ".join(
        f"ω = {w:g}: {k:.0f}" for w, k in fixed.items()
    )
    return figure, own <= 1.3 * optimum and own < min(fixed.values())


def _whole(variance: str) -> tuple[str, bool]:
    means = {name: float(costs.mean()) for name, costs in study(variance).items()}
    figure = ", ".join(f"{name} {mean:.1f}" for name, mean in means.items())
    order = ["instance-optimal", "ChebCB", "Tsallis-INF in 5 bins", "Tsallis-INF"]
    ordered = [means[name] for name in order]
    return figure, ordered == sorted(ordered)


def _caps() -> tuple[str, bool]:
    """ChebCB where runs end at 150 iterations, told so, and told that they cost 10,000."""
    found = {}
    optimum = []
    for told in ("failed=True", "a cost of 10,000"):
        tuner, costs, optimum = tuned("chebcb", 0), [], []
        for c, A, b in instances("high", 0, 1000):
            result = sor(A, b, tuner.suggest(c), tol=_TOL, maxiter=150)
            if told == "failed=True":
                tuner.observe(result.nit, failed=not result.success)
            else:
                tuner.observe(result.nit if result.success else 10_000)
            costs.append(result.nit)
            optimum.append(sor(A, b, best_omega(c), tol=_TOL, maxiter=150).nit)
        found[told] = float(np.mean(costs[500:]))
    ratios = {told: mean / float(np.mean(optimum[500:])) for told, mean in found.items()}
    figure = ", ".join(f"{told}: {ratio:.2f} of the optimum" for told, ratio in ratios.items())
    return figure, ratios["failed=True"] <= 1.3


def _ssor() -> tuple[str, bool]:
    """Iterations of SSOR-PCG, ω learned, against plain CG's, on the low-variance sequence."""
    tuner, counts, plain = tuned("tsallis-inf", 0), [], []
    for _, A, b in instances("low", 0, 1000):
        result = ssor_pcg(A, b, tuner.suggest(), tol=_TOL)
        tuner.observe(result.nit)
        counts.append(result.nit)
        plain.append(_cg(A, b)[1])
    own, theirs = float(np.mean(counts[500:])), float(np.mean(plain[500:]))
    return f"{own:.1f} with ω learned (best: {tuner.best():.2f}), {theirs:.1f} without", own < theirs


def _cg(A: Any, b: Vector) -> tuple[Vector, int]:
    count = 0

    def told(_: Vector) -> None:
        nonlocal count
        count += 1

    return cg(A, b, rtol=_TOL, callback=told)[0], count


def _multigrid(A: Any, b: Vector) -> tuple[Vector, int]:
    residuals: list[float] = []
    with np.errstate(all="ignore"):
        x = pyamg.ruge_stuben_solver(A).solve(b, tol=_TOL, accel="cg", residuals=residuals)
    return np.asarray(x), len(residuals) - 1


def _compiled_sor(A: Any, b: Vector, omega: float) -> tuple[Vector, int]:
    """pyamg's sweeps, the residual looked at after every tenth."""
    x, goal = np.zeros(len(b)), _TOL * np.linalg.norm(b)
    for count in range(10, 10_001, 10):
        pyamg.relaxation.relaxation.sor(A, x, b, omega, iterations=10)
        if np.linalg.norm(b - A @ x) <= goal:
            return x, count
    return x, 10_000


@lru_cache
def seconds(side: int) -> dict[str, tuple[float, float, float]]:
    """Milliseconds and iterations a system, and the largest relative residual."""
    if side == _SIDE:
        learner = tuned("chebcb", 0)
        for c, A, b in instances("high", 1, 1000):
            learner.observe(sor(A, b, learner.suggest(c), tol=_TOL).nit)
        systems = [(c, A, b, learner.best(c)) for c, A, b in instances("high", 2, 200)]
        conjugate = 1.5
    else:
        random, base = np.random.default_rng(0), laplacian(side)
        omega, eye = optimal_omega(base), scipy.sparse.eye_array(side**2, format="csr")
        systems = [(c, base + c * eye, right_side(random, side**2), omega) for c in (0.0, 1e-4, 2e-4, 3e-4)]
        conjugate = 1.9
    methods: dict[str, Callable[..., tuple[Vector, int]]] = {
        "sor, ω learned" if side == _SIDE else "sor, ω*": lambda A, b, omega: _own(sor(A, b, omega, tol=_TOL)),
        f"ssor_pcg, ω = {conjugate}": lambda A, b, _: _own(ssor_pcg(A, b, conjugate, tol=_TOL)),
        "pyamg's sor, the same ω": _compiled_sor,
        "SciPy's cg": lambda A, b, _: _cg(A, b),
        "SciPy's spsolve": lambda A, b, _: (np.asarray(spsolve(A.tocsc(), b)), 1),
        "pyamg, Ruge-Stüben, cg": lambda A, b, _: _multigrid(A, b),
    }
    return {name: _timed(method, systems) for name, method in methods.items()}


def _own(result: Any) -> tuple[Vector, int]:
    return result.x, result.nit


def _timed(method: Callable[..., tuple[Vector, int]], systems: list[Any]) -> tuple[float, float, float]:
    # As a user would store them: rows with 32-bit indices, which pyamg asks for.
    posed = [(A, b, omega) for _, A, b, omega in systems]
    for A, *_ in posed:
        A.indices, A.indptr = A.indices.astype(np.int32), A.indptr.astype(np.int32)
    method(*posed[0])
    taken, counts, worst = [], [], 0.0
    for A, b, omega in posed:
        started = time.perf_counter()
        x, count = method(A, b, omega)
        taken.append(time.perf_counter() - started)
        counts.append(count)
        worst = max(worst, float(np.linalg.norm(b - A @ x) / np.linalg.norm(b)))
    return float(np.median(taken)) * 1e3, float(np.mean(counts)), worst


def _fastest(side: int) -> tuple[str, bool]:
    found = seconds(side)
    ours = min((name for name in found if name.startswith(("sor", "ssor"))), key=lambda name: found[name][0])
    rivals = [name for name in found if not name.startswith(("sor", "ssor"))]
    theirs = min(rivals, key=lambda name: found[name][0])
    figure = "; ".join(f"{name} {found[name][0]:.3g} ms" for name in (ours, theirs))
    return figure + f": {found[ours][0] / found[theirs][0]:.2g} of it", found[ours][0] <= found[theirs][0]


def _history_sizes() -> tuple[str, bool]:
    """Rounds that ``optex.minimize`` needs on each of a sequence of problems: T0 learned, and fixed."""
    sizes, problems, last = [1, 4, 16], 45, 10
    tuner = BanditTuner(sizes, least=1, seed=0)
    learned = []
    for problem in range(problems):
        learned.append(_rounds(problem, tuner.suggest()))
        tuner.observe(learned[-1])
    fixed = {
        size: float(np.mean([_rounds(problem, size) for problem in range(problems - last, problems)]))
        for size in sizes
    }
    own = float(np.mean(learned[-last:]))
    figure = f"{own:.1f} rounds; " + ", ".join(f"T0 = {size}: {mean:.1f}" for size, mean in fixed.items())
    return figure + f"; first ten: {np.mean(learned[:10]):.1f}", own <= 1.3 * min(fixed.values())


def _rounds(problem: int, size: int) -> int:
    random = torch.Generator().manual_seed(problem)
    rows = torch.randn(30, 6, generator=random, dtype=torch.float64)
    labels = (torch.randn(30, generator=random, dtype=torch.float64) > 0).double()

    def loss(x: torch.Tensor) -> torch.Tensor:
        data = torch.nn.functional.binary_cross_entropy_with_logits(rows @ x, labels)
        return data + 0.01 * x.square().sum()

    start = torch.ones(6, dtype=torch.float64)
    return optex.minimize(loss, start, lr=0.05, parallelism=2, history_size=size, gtol=1e-2, maxiter=40).nit


CHECKS = [
    Check("ω* of the 10 × 10 Laplacian", "1.56039 = 2 / (1 + sin(π / 11)) to 1e-10", _omega_star),
    Check(
        "mean iterations at c = 0, ω = 1, 1.2, 1.4, 1.6, ω*, 1.8, 1.95",
        "184, 121, 76, 41, 38, 86, 362 (prototype), within 5 %",
        _iterations,
    ),
    *[
        Check(
            f"{variance} variance, mean iterations of systems 500 to 1,000",
            f"optimum {recorded[0]}, ChebCB {recorded[1]}, Tsallis-INF {recorded[2]} (one prototype run), "
            "within 25 %",
            partial(_early, variance, recorded),
        )
        for variance, recorded in (("high", (56, 65, 166)), ("low", (41, 45, 62)))
    ],
    *[
        Check(
            f"{variance} variance, ChebCB on these systems",
            "at most 1.3 of the optimum, and below every fixed ω",
            partial(_accepted, variance),
        )
        for variance in ("high", "low")
    ],
    *[
        Check(
            f"{variance} variance, mean iterations of all {LENGTH:,}, {TRIALS} trials",
            "the paper's order: optimum, ChebCB, Tsallis-INF in bins, Tsallis-INF",
            partial(_whole, variance),
        )
        for variance in ("high", "low")
    ],
    Check("high variance, runs end at 150 iterations: ChebCB", "at most 1.3 of the optimum", _caps),
    Check("low variance, SSOR-PCG: mean iterations", "with ω learned, fewer than CG's without", _ssor),
    Check(
        "seconds a system, n = 100: the better of ours against the best rival",
        "no slower",
        partial(_fastest, _SIDE),
    ),
    Check("the same, n = 10,000", "no slower", partial(_fastest, 100)),
    Check(
        "OptEx's history size, learned over 45 problems: rounds on the last 10",
        "at most 1.3 of the best size's",
        _history_sizes,
    ),
]


# ------------------------------------------------------------------ page


def curves() -> dict[str, Any]:
    """Iterations so far after every 50th system, means over trials; and all seconds."""
    steps = list(range(49, LENGTH, 50))
    totals = {
        variance: {name: costs.mean(0).cumsum()[steps].tolist() for name, costs in study(variance).items()}
        for variance in _BETA
    }
    times = {str(side**2): {name: list(row) for name, row in seconds(side).items()} for side in (_SIDE, 100)}
    return {"systems": [step + 1 for step in steps], "totals": totals, "seconds": times}


def tables(record: dict[str, Any]) -> dict[str, str]:
    """The page's second table: seconds and iterations."""
    rows = [
        (size, name, f"{milliseconds:.3g}", f"{count:.0f}", f"{residual:.0e}")
        for size, found in record["curves"]["seconds"].items()
        for name, (milliseconds, count, residual) in found.items()
    ]
    return {"seconds": markdown_table(("n", "solver", "ms a system", "iterations", "largest residual"), rows)}


def draw(found: dict[str, Any]) -> Figure:
    """The paper's figure: systems left against iterations so far, for both variances."""
    figure = Figure(figsize=(9.6, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    left = [LENGTH, *(LENGTH - done for done in found["systems"])]
    for panel, (variance, totals) in zip(panels, found["totals"].items(), strict=True):
        for name, (colour, style) in _STYLES.items():
            label = f"ω = {_FIXED[variance]}" if name == "fixed" else name
            panel.plot([0, *totals[name]], left, color=colour, linestyle=style, label=label, linewidth=1.8)
        panel.set(
            title=f"{variance} variance", xlabel="SOR iterations so far", xlim=(0, None), ylim=(0, LENGTH)
        )
        panel.ticklabel_format(axis="x", style="sci", scilimits=(0, 0), useMathText=True)
        panel.grid(visible=True, linewidth=0.5, alpha=0.35)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, fontsize=8, loc="upper right")
    panels[0].set_ylabel("systems left to solve")
    return figure
