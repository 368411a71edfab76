"""Sparsity-constrained optimal transport (Liu, Puigcerver, Blondel, ICLR 2023, arXiv 2209.15466).

100 points in the plane are transported to 20, uniform masses, squared distances over the largest. In the
pictures 64 colours of one photograph are matched with 64 of another.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import ot
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from scipy.optimize import OptimizeResult, minimize

import optex
from optex.studies.measures import rounds_to_level
from optex.studies.problems import SparseTransport
from optex.studies.problems.transport import sample_colours
from papers import Check, grad_of

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.references import transport as slow

ROOM = "solvers"
BINDING = (5, 6, 7, 10, 15)  # of k, at gamma = 20 and mostly at 1
FREE = (25, 50, 100)
Form = Literal["semi-dual", "dual"]
FORMS: tuple[Form, ...] = ("semi-dual", "dual")
COLOURS, PARTNERS, WEIGHT = 64, 4, 20.0
Problem = tuple[np.ndarray, np.ndarray, np.ndarray]


@cache
def points(m: int = 100, n: int = 20) -> Problem:
    """The problem of all but the pictures."""
    return slow.problem(m, n, uniform=True)


@cache
def solved(k: int, gamma: float = 1.0, form: Form = "semi-dual") -> OptimizeResult:
    """With the defaults."""
    return optex.sparse_ot(*points(), gamma, k, form=form)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """POT prints a shape at every evaluation of the semi-dual."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def of_pot(problem: Problem, gamma: float, k: int | None, tolerance: float = 1e-9) -> Any:
    """POT's semi-dual: its plan, and its record."""
    kind: dict[str, Any] = (
        {"reg_type": "l2"} if k is None else {"reg_type": "sparsity_constrained", "max_nz": k}
    )
    with quiet():
        return ot.smooth.smooth_ot_semi_dual(
            *problem, gamma, stopThr=tolerance, numItermax=5000, log=True, **kind
        )


# ------------------------------------------------------------------ the plan


def _quadratic_checked() -> tuple[str, bool]:
    exact = slow.quadratic(*points(), 1.0)
    pot = of_pot(points(), 1.0, None, 1e-15)[0]
    off = max(np.abs(solved(k, 1.0, form).x - exact).sum() for k in FREE for form in FORMS)
    beside = np.abs(pot - exact).sum()
    return f"{off:.1e} from Dykstra's projections in L1 (POT's quadratic plan {beside:.1e})", bool(off < 1e-4)


def _feasible_checked() -> tuple[str, bool]:
    rows = max(solved(k, 1.0, form).row_error for k in FREE for form in FORMS)
    gap = max(abs(solved(k, 1.0, form).gap) for k in FREE for form in FORMS)
    return f"rows {rows:.1e}, gap {gap:.1e}", bool(rows < 1e-6 and gap < 1e-6)


def _nonzeros_checked() -> tuple[str, bool]:
    kept = [
        bool((solved(k, gamma, form).nonzeros <= k).all())
        for k in (*BINDING, *FREE)
        for gamma in (1.0, 20.0)
        for form in FORMS
    ]
    return f"{sum(kept)} of {len(kept)} plans", all(kept)


def _columns_checked() -> tuple[str, bool]:
    worst = {
        form: max(solved(k, gamma, form).column_error for k in (*BINDING, *FREE) for gamma in (1.0, 20.0))
        for form in FORMS
    }
    return f"{worst['semi-dual']:.1e}; the dual's {worst['dual']:.1e}", bool(worst["semi-dual"] < 1e-12)


def _falling_checked() -> tuple[str, bool]:
    values = [solved(k).value for k in (*BINDING, *FREE)]
    return (
        f"{values[0]:.6f} at k = 5 to {values[-1]:.6f} at k = 100",
        all(bool(after <= before + 1e-12) for before, after in itertools.pairwise(values)),
    )


def _values_checked() -> tuple[str, bool]:
    differences = {k: solved(k).value + of_pot(points(), 1.0, k)[1]["res"].fun for k in (*BINDING, 25)}
    worst = max(differences, key=lambda k: abs(differences[k]))
    return f"{differences[worst]:+.1e} at k = {worst}, the most", bool(abs(differences[worst]) < 1e-5)


def _higher_checked() -> tuple[str, bool]:
    gains = [solved(k).value + of_pot(points(), 1.0, k)[1]["res"].fun for k in (*BINDING, 25)]
    return f"higher by {min(gains):.1e} to {max(gains):.1e}", bool(min(gains) > -1e-12)


def _emd_checked() -> tuple[str, bool]:
    a, b, C = points()
    least = float((ot.emd(a, b, C) * C).sum())
    found = solved(5, 20.0)
    pot = float((of_pot(points(), 20.0, 5)[0] * C).sum())
    share = found.cost / least
    return f"{share:.4f} of it (rows off by {found.row_error:.2g}; POT {pot / least:.4f})", bool(
        abs(share - 1) < 0.01
    )


def _rows_checked() -> tuple[str, bool]:
    found = solved(7)
    pot = np.abs(of_pot(points(), 1.0, 7)[0].sum(1) - points()[0]).sum()
    told = np.isclose(found.row_error, np.abs(found.x.sum(1) - points()[0]).sum())
    words = (
        f"{found.row_error:.2f}, status {found.status}, told by row_error and message; POT {pot:.2f}, not told"
    )
    return words, bool(abs(found.row_error - 0.2) < 0.1 and found.status == 2 and told)


def _corners_checked() -> tuple[str, bool]:
    a, b, C = points()
    third = np.append(b[:-1] / b[:-1].sum(), 0.0)
    words, fine = [], []
    try:
        with quiet():
            ot.smooth.smooth_ot_dual(a, b, C, 1.0, reg_type="sparsity_constrained", max_nz=100)
        words.append("max_nz = m answers")
    except (IndexError, ValueError) as error:
        words.append(f"max_nz = m: {type(error).__name__}")
    with np.errstate(all="ignore"):
        lost = not np.isfinite(of_pot((a, third, C), 1.0, 25)[0]).all()
    words.append("b_j = 0: NaN" if lost else "b_j = 0 answers")
    fine.append(optex.sparse_ot(a, b, C, 1.0, 100, form="dual").success)
    fine.append(optex.sparse_ot(a, third, C, 1.0, 25).success)
    try:
        optex.sparse_ot(a, b, C, 1.0, 4)
        fine.append(False)
    except ValueError:
        fine.append(True)
    return f"ours {sum(fine)} of 3; POT " + ", ".join(words), all(bool(one) for one in fine)


# ------------------------------------------------------------------ the loss


def slope_error(k: int, gamma: float, step: float) -> float:
    """Relative error of ⟨T, D⟩ against central differences of the value, along random D; the worst of five."""
    a, b, C = points()
    random, worst = np.random.default_rng(3), 0.0
    plan = solved(k, gamma).x
    for _ in range(5):
        direction = random.standard_normal(C.shape)
        ends = [optex.sparse_ot(a, b, C + side * step * direction, gamma, k).value for side in (1, -1)]
        slope = (ends[0] - ends[1]) / (2 * step)
        worst = max(worst, abs((plan * direction).sum() - slope) / np.abs(plan * direction).sum())
    return worst


def _envelope_checked() -> tuple[str, bool]:
    # T is piecewise linear in C: a difference that crosses fewer kinks is nearer, until rounding takes over.
    errors = [slope_error(25, 1.0, step) for step in (1e-5, 1e-6, 1e-7)]
    return ", ".join(f"{error:.1e}" for error in errors) + " of Σ abs(T D), steps 1e-5 to 1e-7", bool(
        errors[-1] < 1e-6
    )


def _kink_checked() -> tuple[str, bool]:
    error = slope_error(7, 1.0, 1e-4)
    return f"{error:.1e} of Σ abs(T D)", bool(error < 1e-2)


# ------------------------------------------------------------------ seconds


def seconds(work: Callable[[], Any]) -> float:
    """The best of five."""
    found = []
    for _ in range(5):
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return min(found)


@cache
def timed(m: int, n: int, k: int, gamma: float) -> dict[str, float]:
    """Seconds, at the looser of the two accuracies where they differ."""
    problem = points(m, n)
    a = problem[0]

    def rows(plan: np.ndarray) -> float:
        return float(np.abs(plan.sum(1) - a).sum())

    ours, theirs = optex.sparse_ot(*problem, gamma, k), of_pot(problem, gamma, k, 1e-15)[0]
    return {
        "sparse_ot": seconds(lambda: optex.sparse_ot(*problem, gamma, k)),
        "rows of it": float(ours.row_error),
        "POT": seconds(lambda: of_pot(problem, gamma, k, 1e-15)),
        "rows of POT": rows(theirs),
        "POT 1e-9": seconds(lambda: of_pot(problem, gamma, k, 1e-9)),
        "rows of POT 1e-9": rows(of_pot(problem, gamma, k, 1e-9)[0]),
        "emd": seconds(lambda: ot.emd(*problem)),
    }


def told_seconds(found: dict[str, float]) -> str:
    """Who takes how long."""
    return (
        f"sparse_ot {1e3 * found['sparse_ot']:.0f} ms (rows off by {found['rows of it']:.0e}); POT at 1e-15 "
        f"{1e3 * found['POT']:.0f} ms ({found['rows of POT']:.0e}), at its 1e-9 "
        f"{1e3 * found['POT 1e-9']:.0f} ms ({found['rows of POT 1e-9']:.0e}); exact "
        f"transport, ot.emd, {1e3 * found['emd']:.1f} ms"
    )


def _seconds_checked(m: int, n: int, k: int) -> tuple[str, bool]:
    found = timed(m, n, k, 1.0)
    return told_seconds(found), found["sparse_ot"] <= found["POT"]


# ------------------------------------------------------------------ under OptEx


@cache
def under_optex(name: str, rate: float, steps: int) -> dict[str, list[float]]:
    """Losses above the least after every step of a base optimizer, and after every round with N = 4."""
    problem = SparseTransport()
    least = problem.minimum
    assert least is not None

    def base() -> torch.optim.Optimizer:
        return getattr(torch.optim, name)(problem.parameters(), lr=rate)

    source, optimizer = problem.source(), base()
    alone = [problem.evaluate() - least]
    for _ in range(steps):
        source.gradient(None)
        optimizer.step()
        alone.append(problem.evaluate() - least)
    problem.reset()
    rounds = [problem.evaluate() - least]
    work = optex.OptEx(base(), parallelism=4).rounds(itertools.repeat(None), problem.source())
    for _ in itertools.islice(work, steps):
        rounds.append(problem.evaluate() - least)
        if rounds[-1] <= alone[-1]:
            break
    return {name: alone, "OptEx, N = 4": rounds}


@cache
def lbfgs() -> list[float]:
    """The best loss above the least after every evaluation of SciPy's L-BFGS-B."""
    problem = SparseTransport()
    least, source, losses = problem.minimum, problem.source(), []
    assert least is not None

    def function(alpha: np.ndarray) -> tuple[float, np.ndarray]:
        with torch.no_grad():
            problem.alpha.copy_(torch.from_numpy(alpha))
        loss, _ = source.gradient(None)
        losses.append(float(loss) - least)
        return float(loss), grad_of(problem.alpha).numpy().copy()

    start = problem.alpha.detach().numpy().copy()
    minimize(function, start, jac=True, method="L-BFGS-B", options={"ftol": 0, "gtol": 1e-10})
    return np.minimum.accumulate(losses).tolist()


def _optex_checked(name: str, rate: float, steps: int, share: float) -> tuple[str, bool]:
    found = under_optex(name, rate, steps)
    level = found[name][-1]
    rounds = rounds_to_level(found["OptEx, N = 4"], level)
    quasi = rounds_to_level(lbfgs(), level)
    told = "not reached in as many rounds:" if np.isnan(rounds) else f"{rounds:.0f} rounds"
    return (
        f"{told} to {level:.1e} above the least (L-BFGS-B: {quasi:.0f} evaluations)",
        bool(rounds <= share * steps),
    )


# ------------------------------------------------------------------ two photographs


@cache
def palettes() -> Problem:
    """Uniform masses, and squared distances of colours over the largest."""
    x, y = (sample_colours(COLOURS, which).numpy() for which in (0, 1))
    C = ((x[:, None] - y) ** 2).sum(-1)
    u = np.full(COLOURS, 1 / COLOURS)
    return u, u, C / C.max()


@cache
def matched() -> dict[str, dict[str, Any]]:
    """Plans, what each costs over the least, and what spread of colours is left where partners are averaged."""
    a, b, C = palettes()
    x = sample_colours(COLOURS, 0).numpy()
    least = ot.emd(a, b, C)
    plans = {
        f"k = {PARTNERS}": optex.sparse_ot(a, b, C, WEIGHT, PARTNERS).x,
        "quadratic": optex.sparse_ot(a, b, C, WEIGHT, COLOURS).x,
        "Sinkhorn, 0.05": ot.sinkhorn(a, b, C, 0.05, numItermax=5000),
        "Sinkhorn, 0.005": ot.sinkhorn(a, b, C, 0.005, numItermax=5000),
        "exact": least,
    }
    found = {}
    for name, plan in plans.items():
        colours = (plan.T @ x) / plan.sum(0)[:, None]
        found[name] = {
            "plan": plan,
            "cost": float((plan * C).sum() / (least * C).sum()),
            "partners": float((plan > 1e-9).sum(0).mean()),
            "spread": float(np.trace(np.cov(colours.T)) / np.trace(np.cov(x.T))),
            "rows": float(np.abs(plan.sum(1) - a).sum()),
        }
    return found


def _colours_checked() -> tuple[str, bool]:
    found = matched()
    words = "; ".join(
        f"{name}: {one['spread']:.2f} ({one['partners']:.1f} partners, cost {one['cost']:.3f}, "
        f"rows off by {one['rows']:.0e})"
        for name, one in found.items()
    )
    return words, found[f"k = {PARTNERS}"]["spread"] > max(
        found[name]["spread"] for name in ("quadratic", "Sinkhorn, 0.05", "Sinkhorn, 0.005")
    )


CHECKS = [
    Check(
        "k = 25, 50, 100, γ = 1: plan against quadratic transport",
        "within 1e-4 (prototype)",
        _quadratic_checked,
    ),
    Check("the same: rows, gap", "both below 1e-6 (prototype)", _feasible_checked),
    Check("nonzeros a column, γ = 1 and 20, both forms", "at most k", _nonzeros_checked),
    Check("semi-dual: ‖Tᵀ1 - b‖₁, any k", "below 1e-12 (derived)", _columns_checked),
    Check("value along k = 5 to 100, γ = 1", "does not rise (paper)", _falling_checked),
    Check("value against POT's semi-dual, γ = 1, k = 5 to 25", "within 1e-5 (prototype)", _values_checked),
    Check("the same, as maximisers", "never lower than POT's", _higher_checked),
    Check("k = 5, γ = 20: ⟨T, C⟩ against exact transport", "within 1 % (prototype)", _emd_checked),
    Check("k = 7, γ = 1 binds: ‖T1 - a‖₁", "told; about 0.2 (prototype)", _rows_checked),
    Check("k = m, b_j = 0, k n < m", "answers, answers, ValueError", _corners_checked),
    Check("∂/∂C = T against finite differences, k = 25", "within 1e-6", _envelope_checked),
    Check("the same where k = 7 binds", "within 1e-2", _kink_checked),
    Check(
        "100 × 20, k = 25, γ = 1: seconds",
        "no more than POT's, made to end as late as it can",
        lambda: _seconds_checked(100, 20, 25),
    ),
    Check("400 × 200, k = 25, γ = 1: seconds", "as above", lambda: _seconds_checked(400, 200, 25)),
    Check("100 × 20, k = 7 binds: seconds", "as above", lambda: _seconds_checked(100, 20, 7)),
    Check(
        "colours of two photographs: spread left by averaging partners",
        f"k = {PARTNERS}, γ = {WEIGHT:g} keeps more than quadratic and entropic plans",
        _colours_checked,
    ),
    Check(
        "OptEx, N = 4, gradient descent, rate 0.1: rounds to its loss after 100 steps",
        "at most 40",
        lambda: _optex_checked("SGD", 0.1, 100, 0.4),
    ),
    Check(
        "OptEx, N = 4, Adam, rate 0.01: rounds to its loss after 100 steps",
        "at most 40",
        lambda: _optex_checked("Adam", 0.01, 100, 0.4),
    ),
    Check(
        "the same, rate 0.03, the best of 0.003, 0.01, 0.03",
        "at most 40",
        lambda: _optex_checked("Adam", 0.03, 100, 0.4),
    ),
]


# ------------------------------------------------------------------ the picture


def curves() -> dict[str, Any]:
    """What is drawn."""
    along = [2, 3, 4, 6, 8, 12, 16, 24, 32, 64]
    found = [optex.sparse_ot(*palettes(), WEIGHT, k) for k in along]
    plan = matched()[f"k = {PARTNERS}"]["plan"]
    entries = [(int(i), int(j), float(plan[i, j])) for i, j in zip(*np.nonzero(plan), strict=True)]
    return {
        "k": along,
        "value": [float(one.value) for one in found],
        "rows": [float(one.row_error) for one in found],
        "plan": entries,
        "optex": {
            "gradient descent 0.1": under_optex("SGD", 0.1, 100),
            "Adam 0.01": under_optex("Adam", 0.01, 100),
        },
        "lbfgs": lbfgs(),
    }


def _recoloured(plan: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # three pictures
    """Both photographs, and the flower with every colour moved as its nearest target's is."""
    from sklearn.datasets import load_sample_image

    china, flower = (
        np.asarray(load_sample_image(f"{name}.jpg"))[::3, ::3] / 255 for name in ("china", "flower")
    )
    x, y = (sample_colours(COLOURS, which).numpy() for which in (0, 1))
    moved = (plan.T @ x) / plan.sum(0)[:, None] - y
    flat = flower.reshape(-1, 3)
    distances = ((flat[:, None] - y) ** 2).sum(-1)  # [pixels, targets]
    shares = np.exp(-(distances - distances.min(1, keepdims=True)) / 0.005)
    shares /= shares.sum(1, keepdims=True)
    return china, flower, (flat + shares @ moved).clip(0, 1).reshape(flower.shape)


def _draw_plan(panel: Axes, entries: list[tuple[int, int, float]]) -> None:
    x, y = (sample_colours(COLOURS, which).numpy() for which in (0, 1))
    orders = [np.argsort(np.argsort(colours @ np.array([0.299, 0.587, 0.114]))) for colours in (x, y)]
    segments = [np.array([[orders[0][i], 1.0], [orders[1][j], 0.0]]) for i, j, _ in entries]
    widths = [2.2 * COLOURS * mass for _, _, mass in entries]
    panel.add_collection(LineCollection(segments, colors=[x[i] for i, _, _ in entries], linewidths=widths))
    panel.scatter(orders[0], np.full(COLOURS, 1.0), c=x, s=26, marker="s", edgecolors="#444444", linewidths=0.3)
    panel.scatter(orders[1], np.zeros(COLOURS), c=y, s=26, marker="s", edgecolors="#444444", linewidths=0.3)
    panel.set_yticks([0, 1], ["flower", "china"])
    panel.set_xticks([])
    panel.set_xlabel("64 colours of each, from dark to light")
    panel.set_title(f"the plan, at most {PARTNERS} partners", fontsize=11)


def draw(curves: dict[str, Any]) -> Figure:
    """The photographs; the plan; value and rows along k; OptEx."""
    figure = Figure(figsize=(12.6, 6.6), layout="constrained")
    FigureCanvasAgg(figure)
    (above,), (below,) = figure.subfigures(2, 1, height_ratios=(1, 1.15), squeeze=False)
    plan = np.zeros((COLOURS, COLOURS))
    for i, j, mass in curves["plan"]:
        plan[i, j] = mass
    titles = ("china", "flower", "flower in the colours of china")
    for panel, picture, title in zip(above.subplots(1, 3), _recoloured(plan), titles, strict=True):
        panel.imshow(picture)
        panel.set_axis_off()
        panel.set_title(title, fontsize=11)
    left, middle, right = below.subplots(1, 3)
    _draw_plan(left, curves["plan"])
    middle.semilogx(curves["k"], curves["value"], color="#0072b2", marker="o", label="value of the dual")
    middle.set_xlabel("k")
    middle.set_xticks([2, 4, 8, 16, 32, 64], ["2", "4", "8", "16", "32", "64"])
    middle.minorticks_off()
    middle.set_ylabel("value of the dual", color="#0072b2")
    twin = middle.twinx()
    twin.plot(curves["k"], curves["rows"], color="#d55e00", marker="s", linestyle="--")
    twin.set_ylabel("‖T1 - a‖₁", color="#d55e00")
    twin.set_ylim(bottom=0)
    middle.set_title(f"colours, γ = {WEIGHT:g}", fontsize=11)
    for (base, found), colour in zip(curves["optex"].items(), ("#0072b2", "#d55e00"), strict=True):
        for (name, loss), style in zip(found.items(), (":", "-"), strict=True):
            label = f"{base}" + ", OptEx N = 4" * name.startswith("OptEx")
            right.semilogy(loss, color=colour, linestyle=style, linewidth=1.8, label=label)
    quasi = [loss for loss in curves["lbfgs"] if loss > 1e-9]
    right.semilogy(quasi, color="#000000", linestyle="--", linewidth=1.4, label="L-BFGS-B, evaluations")
    right.set_ylim(1e-6, 1)
    right.set_xlabel("rounds (gradients in turn)")
    right.set_ylabel("loss above the least")
    right.set_title("semi-dual, 100 × 20 colours, γ = 1", fontsize=11)
    right.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.45, -0.2), ncols=2)
    for panel in (left, middle, right):
        panel.spines[["top", "right"]].set_visible(False)
    for panel in (middle, right):
        panel.grid(visible=True, which="major", linewidth=0.5, alpha=0.35)
    return figure
