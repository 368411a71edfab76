"""Accelerated gradients (Parimi et al., arXiv 2509.18346): proved rates, the heavy ball's circle, dynamics."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import nn
from torch.optim import Optimizer

from optex import OptEx
from optex.optimizers import NAG, HeavyBall, TripleMomentum
from optex.studies.measures import best_so_far, rounds_to_level
from optex.studies.problems import LogisticBreastCancer, Problem, Quadratic
from papers import Check

ROOM = "optimizers"
RULES: dict[str, Callable[..., Any]] = {"NAG": NAG, "TMM": TripleMomentum, "HB": HeavyBall}
STYLES: dict[str, dict[str, Any]] = {  # Okabe and Ito's colours
    "GD": {"color": "#000000", "linestyle": (0, (1, 1.2))},
    "NAG": {"color": "#0072b2", "linestyle": "-"},
    "TMM": {"color": "#d55e00", "linestyle": (0, (6, 2))},
    "HB": {"color": "#009e73", "linestyle": (0, (3, 1, 1, 1))},
}
LEVEL = 1e-8
PARALLELISM = 4

Gradient = Callable[[NDArray[np.float64]], NDArray[np.float64]]

# ---------------------------------------------------------------------- runs on functions in closed form


def walk(
    make: Callable[[list[nn.Parameter]], Optimizer],
    start: NDArray[np.float64],  # [d]
    gradient: Gradient,
    steps: int,
) -> NDArray[np.float64]:  # [steps + 1, d]
    """The output points of a run."""
    theta = nn.Parameter(torch.tensor(start, dtype=torch.float64))
    optimizer, points = make([theta]), [np.array(start, dtype=float)]
    for _ in range(steps):
        theta.grad = torch.tensor(gradient(theta.detach().numpy()))
        optimizer.step()
        if isinstance(optimizer, (NAG, TripleMomentum, HeavyBall)):
            optimizer.eval()
            points.append(theta.detach().numpy().copy())
            optimizer.train()
        else:
            points.append(theta.detach().numpy().copy())
    return np.array(points)


def makers(L: float, mu: float) -> dict[str, Callable[[list[nn.Parameter]], Optimizer]]:
    """The family and gradient descent, each with the constants that it is proved with."""
    descent = 2 / (L + mu)  # the best constant rate on quadratic functions
    made: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
        "GD": lambda p: torch.optim.SGD(p, lr=descent),
    }
    return made | {name: (lambda p, rule=rule: rule(p, L=L, mu=mu)) for name, rule in RULES.items()}


EIGENVALUES = np.logspace(0, 3, 50)


@cache
def quadratic_runs() -> dict[str, NDArray[np.float64]]:
    """Output points on ½ Σ λ_i x_i², λ from 1 to 1000, from ones."""
    steps = {"GD": 9000, "NAG": 700, "TMM": 700, "HB": 700}
    return {
        name: walk(make, np.ones(50), lambda y: EIGENVALUES * y, steps[name])
        for name, make in makers(1000.0, 1.0).items()
    }


def distances(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """To the minimum, over the start's."""
    lengths = np.linalg.norm(points, axis=1)
    return lengths / lengths[0]


def bound_ratio(
    name: str, points: NDArray[np.float64], losses: NDArray[np.float64], L: float, mu: float
) -> float:
    """The largest loss over the proved bound along a run, past its start."""
    n, distance, rho = np.arange(len(losses)), float((points[0] ** 2).sum()), 1 - math.sqrt(mu / L)
    if name == "TMM":
        bounds = rho ** (2 * n) * L**2 / (2 * mu) * distance
    else:
        bounds = rho**n * (losses[0] + mu / 2 * distance)
    return float((losses / bounds)[1:].max())


def triple_momentum_bound() -> tuple[str, bool]:
    """The published example mu = 0.1, L = 1, n = 4, and the worst loss of many functions of that class."""
    rho, kappa = 1 - math.sqrt(0.1), 10.0
    bound = rho**8 * kappa / 2
    worst = 0.0
    for seed in range(200):
        generator = np.random.default_rng(seed)
        eigenvalues = np.append(generator.uniform(0.1, 1.0, 4), [0.1, 1.0])
        start = generator.standard_normal(6)
        start /= np.linalg.norm(start)
        points = walk(makers(1.0, 0.1)["TMM"], start, lambda y, e=eigenvalues: e * y, 4)
        worst = max(worst, 0.5 * float((eigenvalues * points[-1] ** 2).sum()))
    figure = f"bound {bound:.6f}; worst of 200 quadratic functions {worst:.4f}"
    return figure, abs(bound - 0.238925) < 5e-6 and worst <= bound


def quadratic_steps() -> tuple[str, bool]:
    """Steps to 1e-8 of the start's distance."""
    found = {name: rounds_to_level(distances(points), LEVEL) for name, points in quadratic_runs().items()}
    figure = ", ".join(f"{name} {steps:.0f}" for name, steps in found.items())
    return figure, found["NAG"] <= 700 and found["TMM"] <= 700 and found["GD"] / found["TMM"] >= 10


def quadratic_bounds() -> tuple[str, bool]:
    """Loss over proved bound, the largest along the runs on the quadratic and on the circling function."""
    ratios: dict[str, float] = {}
    for name in ("NAG", "TMM"):
        points = quadratic_runs()[name]
        losses = 0.5 * (points**2 @ EIGENVALUES)
        circle = circling_runs()[name]
        ratios[name] = max(
            bound_ratio(name, points, losses, 1000.0, 1.0),
            bound_ratio(name, circle[:60], circling_loss(circle[:60]), 25.0, 1.0),
        )
    return ", ".join(f"{name} {ratio:.3f}" for name, ratio in ratios.items()), max(ratios.values()) <= 1


# ---------------------------------------------------------------------- where the heavy ball circles


def circling_gradient(y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of a function with mu = 1, L = 25 and its minimum at 0."""
    return np.where(y < 1, 25 * y, np.where(y < 2, y + 24, 25 * y - 24))


def circling_loss(
    y: NDArray[np.float64],  # [n, 1]
) -> NDArray[np.float64]:  # [n]
    """Its values."""
    y = y[:, 0]
    middle = 12.5 + 0.5 * (y**2 - 1) + 24 * (y - 1)
    return np.where(y < 1, 12.5 * y**2, np.where(y < 2, middle, 38 + 12.5 * (y**2 - 4) - 24 * (y - 2)))


@cache
def circling_runs() -> dict[str, NDArray[np.float64]]:
    """Output points from 3.3, [301, 1] each."""
    return {
        name: walk(make, np.array([3.3]), circling_gradient, 300) for name, make in makers(25.0, 1.0).items()
    }


def circle() -> tuple[str, bool]:
    """Where the three are after 300 steps."""
    runs = circling_runs()
    points = runs["HB"][-3:, 0]
    ends = {name: abs(float(runs[name][-1, 0])) for name in ("NAG", "TMM")}
    expected = [-1.802449, 0.646531, 2.115918]
    figure = f"HB {{{', '.join(f'{x:.6f}' for x in points)}}}; |x|: " + ", ".join(
        f"{name} {end:.0e}" for name, end in ends.items()
    )
    return figure, bool(np.allclose(sorted(points), expected, atol=1e-6)) and max(ends.values()) < 1e-6


def energy(
    points: NDArray[np.float64], losses: NDArray[np.float64], L: float, mu: float
) -> NDArray[np.float64]:
    """f(x_k) - f* + mu/2 ‖z_k - x*‖², z_k = x_{k-1} + √(L / mu) (x_k - x_{k-1}); [n]."""
    before = np.concatenate([points[:1], points[:-1]])
    off = before + math.sqrt(L / mu) * (points - before)
    return losses + mu / 2 * (off**2).sum(1)


def energy_falls() -> tuple[str, bool]:
    """The factor by which a step changes the energy, the worst along a run."""
    worst = 0.0
    points = quadratic_runs()["NAG"][:400]
    for run, losses, L in (
        (points, 0.5 * (points**2 @ EIGENVALUES), 1000.0),
        (circling_runs()["NAG"][:30], circling_loss(circling_runs()["NAG"][:30]), 25.0),
    ):
        values = energy(run, losses, L, 1.0)
        values = values[values > 0]  # on the circling function it arrives to the bit
        worst = max(worst, float((values[1:] / values[:-1]).max() / (1 - math.sqrt(1 / L))))
    heavy = circling_runs()["HB"]
    values = energy(heavy, circling_loss(heavy), 25.0, 1.0)
    back = float(values[-1] / values[-4])
    figure = f"NAG at most {worst:.3f} of 1 - √(mu/L); HB on its circle {back:.3f} in three steps"
    return figure, worst <= 1 + 1e-9


# ---------------------------------------------------------------------- a problem with data


def logistic() -> LogisticBreastCancer:
    """The problem, from its first start."""
    return LogisticBreastCancer(seed=0)


def smoothness(problem: LogisticBreastCancer) -> float:
    """L of the logistic loss: the largest eigenvalue of its Hessian's bound XᵀX / 4n, and the penalty."""
    design = torch.cat([problem.inputs, torch.ones_like(problem.inputs[:, :1])], 1)
    return float(torch.linalg.eigvalsh(design.T @ design / (4 * len(design)))[-1]) + problem.l2


def gaps_alone(problem: Problem, base: Optimizer, steps: int) -> list[float]:
    """Loss above the minimum at the query points."""
    assert problem.minimum is not None
    gaps = [problem.evaluate() - problem.minimum]
    for _ in range(steps):
        base.zero_grad()
        problem(None).backward()
        base.step()
        gaps.append(problem.evaluate() - problem.minimum)
    return gaps


def gaps_under_optex(problem: Problem, base: Optimizer, rounds: int) -> list[float]:
    """The same, by rounds of N gradients at once."""
    assert problem.minimum is not None
    optimizer = OptEx(base, parallelism=PARALLELISM, model=problem, deterministic=True)
    gaps = [problem.evaluate() - problem.minimum]
    reports = optimizer.rounds(itertools.repeat(None), problem.source())
    return gaps + [problem.evaluate() - problem.minimum for _ in itertools.islice(reports, rounds)]


def gains(
    make_problem: Callable[[], Problem], known: dict[str, float], steps: int
) -> dict[str, tuple[float, list[float], list[float]]]:
    """Of each rule: its steps alone to its loss after ``steps``, over OptEx's rounds to that."""
    found = {}
    for name, rule in RULES.items():
        alone = gaps_alone(problem := make_problem(), rule(problem.parameters(), **known), steps)
        ours = gaps_under_optex(problem := make_problem(), rule(problem.parameters(), **known), steps)
        level = float(best_so_far(alone)[-1])
        found[name] = rounds_to_level(alone, level) / rounds_to_level(ours, level), alone, ours
    return found


@cache
def logistic_gains() -> dict[str, tuple[float, list[float], list[float]]]:
    """With L and mu known."""
    problem = logistic()
    return gains(logistic, {"L": smoothness(problem), "mu": problem.l2}, 200)


def said(found: dict[str, tuple[float, list[float], list[float]]]) -> str:
    """Accelerations in words."""
    return ", ".join(
        f"{name} {'not reached' if math.isnan(gain) else f'{gain:.1f}'}" for name, (gain, _, _) in found.items()
    )


def optex_on_logistic() -> tuple[str, bool]:
    """Acceleration at N = 4 with known and with estimated constants."""
    known, estimated = logistic_gains(), gains(logistic, {}, 200)
    figure = f"{said(known)}; with estimated constants {said(estimated)}"
    return figure, all(found["NAG"][0] > 1 for found in (known, estimated))


def optex_on_quadratic() -> tuple[str, bool]:
    """The same on a quadratic function of 1,000 dimensions, where every step needs a direction of its own."""
    found = gains(lambda: Quadratic(dim=1000, seed=0), {"L": 1.0, "mu": 1e-3}, 200)
    return said(found), found["NAG"][0] > 1


def gradients_to(make: Callable[[Problem], Optimizer], most: int, level: float = 1e-6) -> float:
    """Gradients until the loss is that close above the minimum."""
    return rounds_to_level(gaps_alone(problem := logistic(), make(problem), most), level)


def lbfgs_gradients(level: float = 1e-6) -> float:
    """Evaluations of torch's L-BFGS with strong-Wolfe line search."""
    problem, gaps = logistic(), []
    optimizer = torch.optim.LBFGS(
        problem.parameters(), max_iter=200, tolerance_grad=0, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = problem(None)
        loss.backward()
        gaps.append(float(loss.detach()) - problem.minimum)
        return loss

    optimizer.step(closure)
    return rounds_to_level(gaps, level)


@cache
def rivals() -> dict[str, float]:
    """Gradients to 1e-6 above the minimum of the logistic loss."""
    L, mu = smoothness(logistic()), logistic().l2
    rates = (0.2, 0.5, 1.0, 2.0, 3.0, 5.0, 8.0, 12.0)
    tuned = {
        (momentum, lr): gradients_to(
            lambda p, m=momentum, lr=lr: torch.optim.SGD(p.parameters(), lr=lr, momentum=m, nesterov=m > 0), 500
        )
        for momentum in (0.0, 0.5, 0.8, 0.9, 0.95, 0.98)
        for lr in rates
    }
    reached = {setting: steps for setting, steps in tuned.items() if not math.isnan(steps)}
    best = min(reached, key=lambda setting: reached[setting])
    own = {lr: gradients_to(lambda p, lr=lr: NAG(p.parameters(), lr=lr), 500) for lr in rates}
    rate = min(own, key=lambda lr: own[lr] if not math.isnan(own[lr]) else math.inf)
    return {
        "NAG with L and mu": gradients_to(lambda p: NAG(p.parameters(), L=L, mu=mu), 1000),
        "NAG with neither": gradients_to(lambda p: NAG(p.parameters()), 1000),
        f"NAG, rate {rate:g}, best of {len(rates)}, mu estimated": own[rate],
        "NAG, convex rule": gradients_to(lambda p: NAG(p.parameters(), L=L, rule="convex"), 1000),
        "TMM with L and mu": gradients_to(lambda p: TripleMomentum(p.parameters(), L=L, mu=mu), 1000),
        "HB with L and mu": gradients_to(lambda p: HeavyBall(p.parameters(), L=L, mu=mu), 1000),
        f"SGD, Nesterov momentum {best[0]:g}, rate {best[1]:g}, best of {len(tuned)}": reached[best],
        "L-BFGS": lbfgs_gradients(),
    }


def against_rivals() -> tuple[str, bool]:
    """Who takes the fewest gradients, with the constants of the proof."""
    found = rivals()
    winner = min(found, key=lambda name: found[name])
    figure = ", ".join(f"{name}: {steps:.0f}" for name, steps in found.items())
    return f"{figure}; **{winner} wins**", found["NAG with L and mu"] <= _least("SGD")


def tuned_rivals() -> tuple[str, bool]:
    """The same, each with its rate tried out."""
    own, sgd, lbfgs = _least("NAG, rate"), _least("SGD"), _least("L-BFGS")
    return f"NAG {own:.0f} after 8 trials, SGD {sgd:.0f} after 48, L-BFGS {lbfgs:.0f} after none", own <= sgd


def _least(beginning: str) -> float:
    return min(steps for name, steps in rivals().items() if name.startswith(beginning))


def estimates_on_quadratic() -> tuple[str, bool]:
    """Steps with estimated constants on the quadratic, beside those with known ones."""
    known = {name: rounds_to_level(distances(quadratic_runs()[name]), LEVEL) for name in RULES}
    unknown = {
        name: rounds_to_level(distances(walk(rule, np.ones(50), lambda y: EIGENVALUES * y, 3000)), LEVEL)
        for name, rule in RULES.items()
    }
    figure = ", ".join(f"{name} {unknown[name]:.0f} (known {known[name]:.0f})" for name in RULES)
    return figure, all(unknown[name] <= 2 * known[name] for name in RULES)


CHECKS = [
    Check(
        "TMM's bound on f(x_4) - f*, mu = 0.1, L = 1, ‖x_0 - x*‖ = 1",
        "0.238925, not exceeded",
        triple_momentum_bound,
    ),
    Check(
        "quadratic, eigenvalues 1 to 1000, d = 50: steps to 1e-8 of the first distance",
        "NAG, TMM at most 700, GD / TMM at least 10 (noted: GD 8466, NAG 614, TMM 620, HB 364)",
        quadratic_steps,
    ),
    Check(
        "largest loss over its proved bound, there and on the circling function", "at most 1", quadratic_bounds
    ),
    Check(
        "circling function from 3.3, after 300 steps",
        "HB {2.115918, 0.646531, -1.802449}; NAG, TMM below 1e-6",
        circle,
    ),
    Check("the energy's factor a step", "NAG: at most 1 - √(mu/L)", energy_falls),
    Check("the same quadratic, L and mu estimated", "at most twice the steps", estimates_on_quadratic),
    Check("OptEx, N = 4, logistic regression, 200 steps: acceleration", "NAG above 1", optex_on_logistic),
    Check("OptEx, N = 4, quadratic, d = 1000, 200 steps: acceleration", "NAG above 1", optex_on_quadratic),
    Check(
        "logistic regression: gradients to 1e-6 above the minimum",
        "NAG no more than torch's Nesterov momentum tuned over a grid",
        against_rivals,
    ),
    Check(
        "the same, NAG with a tuned rate and estimated mu",
        "no more than torch's Nesterov momentum, rate and momentum tuned",
        tuned_rivals,
    ),
]

# ---------------------------------------------------------------------- the picture


def contraction(make: Callable[[list[nn.Parameter]], Optimizer], curvature: NDArray[np.float64]) -> list[float]:
    """Factor a step by which a mode of each curvature shrinks in the end: its step is a 2 × 2 matrix."""
    columns = []
    for point, velocity in ((1.0, 0.0), (0.0, 1.0)):
        theta = nn.Parameter(torch.full((len(curvature),), point, dtype=torch.float64))
        optimizer = make([theta])
        buffer = torch.full_like(theta.detach(), velocity)
        if not isinstance(optimizer, torch.optim.SGD):
            optimizer.state[theta]["momentum_buffer"] = buffer
        theta.grad = torch.tensor(curvature) * theta.detach()
        optimizer.step()
        columns.append(np.stack([theta.detach().numpy(), buffer.numpy()]))
    matrices = np.stack(columns, 1).transpose(2, 0, 1)  # [n, 2, 2]
    if isinstance(optimizer, torch.optim.SGD):
        return np.abs(matrices[:, 0, 0]).tolist()
    return np.abs(np.linalg.eigvals(matrices)).max(1).tolist()


def curves() -> dict[str, Any]:
    """Distances on the quadratic, contraction by curvature, and the circling function's orbits and energies."""
    curvature = np.logspace(0, 3, 200)
    return {
        "distance": {name: distances(points)[:701].tolist() for name, points in quadratic_runs().items()},
        "curvature": (curvature / 1000).tolist(),
        "contraction": {name: contraction(make, curvature) for name, make in makers(1000.0, 1.0).items()},
        "orbit": {name: run[:61, 0].tolist() for name, run in circling_runs().items() if name != "GD"},
        "energy": {
            name: energy(run, circling_loss(run), 25.0, 1.0)[:61].tolist()
            for name, run in circling_runs().items()
            if name != "GD"
        },
    }


def draw(record: dict[str, Any]) -> Figure:
    """Four panels."""
    figure = Figure(figsize=(10.5, 8.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes: list[Axes] = list(figure.subplots(2, 2).ravel())
    for name, values in record["distance"].items():
        axes[0].plot(values, label=name, linewidth=1.8, **STYLES[name])
    for name, values in record["contraction"].items():
        axes[1].plot(record["curvature"], values, label=name, linewidth=1.8, **STYLES[name])
    for name, values in record["orbit"].items():
        x = np.array(values)
        axes[2].plot(
            x[1:], np.diff(x), label=name, marker="o", markersize=3, linewidth=1.0, alpha=0.85, **STYLES[name]
        )
    for name, values in record["energy"].items():
        axes[3].plot(values, label=name, linewidth=1.8, **STYLES[name])
    start = record["energy"]["NAG"][0]
    axes[3].plot([start * 0.8**k for k in range(61)], label="(1 − √(μ/L))ᵏ", color="#8a8a8a", linewidth=1.2)
    ends = np.array([-8.5, 4.0])  # where x_{k-1} + √(L/μ) (x_k - x_{k-1}) = x* = 0
    axes[2].plot(ends, -ends / 4, label="manifold z = x*", color="#8a8a8a", linewidth=1.2)
    _label(axes[0], "quadratic, κ = 1000", "step", "‖x − x*‖ / ‖x₀ − x*‖", log="y")
    axes[0].set_ylim(1e-9, 30)
    _label(axes[1], "a mode's factor a step, κ = 1000", "curvature λ / L", "spectral radius", log="x")
    axes[1].set_ylim(0.9, 1.002)
    _label(axes[2], "the lifted state on the circling function", "x", "velocity (last change of x)", log="")
    _label(axes[3], "energy: height + distance² off the manifold", "step", "energy", log="y")
    axes[3].set_ylim(1e-9, 1e4)
    figure.suptitle("Accelerated methods as dynamical systems", fontsize=12)
    return figure


def _label(place: Axes, title: str, x: str, y: str, log: str) -> None:
    place.set_title(title, fontsize=11)
    place.set_xlabel(x)
    place.set_ylabel(y)
    if "x" in log:
        place.set_xscale("log")
    if "y" in log:
        place.set_yscale("log")
    place.grid(visible=True, linewidth=0.5, alpha=0.35)
    place.spines[["top", "right"]].set_visible(False)
    place.legend(fontsize=8.5, frameon=False)
