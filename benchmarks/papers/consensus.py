"""Consensus-based optimization (Riedl, Klock, Geldhauser, Fornasier, arXiv 2306.09778).

The figure's settings are those of the authors' code: K = 250 steps of N = 200, α = 100, λ = 1, dt = 0.01 and
σ = 1.6, hopping with σ = 0.7, from (8, 8); Langevin and gradient descent take 10,000 steps of 0.001. The checks
against CBXpy run where the package ``cbx`` is installed, which nothing here depends on.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy.optimize import OptimizeResult, differential_evolution, dual_annealing
from torch import Tensor

import optex
from optex.studies.measures import rounds_to_level
from optex.studies.problems import Canyon
from optex.studies.problems.canyon import canyon
from papers import Check, grad_of

ROOM = "sources"
START = (8.0, 8.0)
RUNS = 20
STEPS = 250


def canyon_array(points: np.ndarray) -> np.ndarray:
    """The figure's landscape in NumPy."""
    return canyon(torch.from_numpy(points)).numpy()


def ripples(height: float) -> Callable[[np.ndarray], np.ndarray]:
    """Rastrigin's function with ripples of this height, 2.5 in the authors' code and 10 elsewhere."""
    return lambda x: (x**2 + height * (1 - np.cos(2 * np.pi * x))).sum(-1)


class Noting:
    """A callback that notes the consensus, and where the particles are."""

    def __init__(self) -> None:
        self.path: list[np.ndarray] = []
        self.particles: list[np.ndarray] = []

    def __call__(self, intermediate_result: OptimizeResult) -> None:
        self.path.append(intermediate_result.consensus)
        self.particles.append(intermediate_result.population)


# ------------------------------------------------------------------ the figure


@cache
def swarms() -> np.ndarray:  # [runs, steps, 2]
    """The consensus of the particles, step by step."""
    paths = []
    for seed in range(RUNS):
        noted = Noting()
        optex.cbo_minimize(canyon_array, START, vectorized=True, seed=seed, maxiter=STEPS, callback=noted)
        paths.append(noted.path)
    return np.array(paths)


@cache
def hops(sigma: float) -> np.ndarray:  # [runs, steps, 2]
    """Consensus hopping: SGD on the source at its hopping rate."""
    paths = []
    for seed in range(RUNS):
        torch.manual_seed(seed)
        x = torch.nn.Parameter(torch.tensor(START, dtype=torch.float64))
        source = optex.ConsensusSource(lambda points, _: canyon(points), [x], sigma=sigma, vectorized=True)
        base, path = torch.optim.SGD([x], lr=source.hopping_rate), []
        for _ in range(STEPS):
            source.gradient(None)
            base.step()
            path.append(x.detach().numpy().copy())
        paths.append(path)
    return np.array(paths)


@cache
def langevin(deviation: float, runs: int) -> np.ndarray:  # [runs, steps, 2]
    """Annealed Langevin dynamics of all runs at once; gradient descent without noise."""
    generator = torch.Generator().manual_seed(0)
    x = torch.tensor([START] * runs, dtype=torch.float64)
    path = []
    for k in range(1, 10_001):
        x.requires_grad_()
        (slope,) = torch.autograd.grad(canyon(x).sum(), x)
        noise = torch.randn(runs, 2, generator=generator, dtype=torch.float64)
        x = x.detach() - 0.001 * slope + deviation / math.log(k + 1) * math.sqrt(0.001) * noise
        path.append(x.numpy().copy())
    return np.array(path).swapaxes(0, 1)


def within(paths: np.ndarray, radius: float) -> float:
    """The share of runs that end so close to the origin."""
    return float((np.linalg.norm(paths[:, -1], axis=1) < radius).mean())


def _swarm_checked() -> tuple[str, bool]:
    rate = within(swarms(), 0.25)
    return f"{rate:.2f} of {RUNS} runs", rate >= 0.95


def _hops_checked() -> tuple[str, bool]:
    rate = within(hops(0.7), 0.5)
    return f"{rate:.2f} of {RUNS} runs", rate >= 0.9


def _stuck_checked() -> tuple[str, bool]:
    descent, short = within(langevin(0.0, 1), 0.5), within(hops(0.4), 0.5)
    ends = langevin(0.0, 1)[0, -1]
    figure = f"{descent:.2f} and {short:.2f}; gradient descent ends at ({ends[0]:.2f}, {ends[1]:.2f})"
    return figure, descent == short == 0


def _langevin_checked() -> tuple[str, bool]:
    near, wide = (within(langevin(10.0, 50), radius) for radius in (0.25, 0.5))
    return f"{near:.2f} of 50 runs; within 0.5 {wide:.2f}", 0.02 <= near <= 0.2


# ------------------------------------------------------------------ the link to the gradient

DIAGONAL = torch.linspace(0.5, 1.5, 5, dtype=torch.float64)


def bowl(alpha: float, sigma: float, samples: int, **options: Any) -> tuple[Tensor, optex.ConsensusSource]:
    """½ Σ λ_i x_i² at a point in five dimensions."""
    x = torch.nn.Parameter(torch.tensor([3.0, -2.0, 2.5, -3.0, 2.0], dtype=torch.float64))
    source = optex.ConsensusSource(
        lambda points, _: 0.5 * (DIAGONAL * points**2).sum(1),
        [x],
        alpha=alpha,
        sigma=sigma,
        samples=samples,
        vectorized=True,
        **options,
    )
    return x, source


def _link_checked() -> tuple[str, bool]:
    x, source = bowl(1.0, 0.1, 400_000)
    torch.manual_seed(0)
    source.gradient(None)
    slope = DIAGONAL * x.detach()
    cosine = float(torch.nn.functional.cosine_similarity(grad_of(x), slope, dim=0))
    error = float((grad_of(x) - slope).norm() / slope.norm())
    figure = (
        f"cosine {cosine:.5f}, relative error {error:.4f}, effective size {source.effective_sample_size:,.0f}"
    )
    return figure, cosine >= 0.999 and error <= 0.02


def _proximal_checked() -> tuple[str, bool]:
    errors = []
    for alpha, sigma in ((1.0, 0.5), (0.5, 1.0), (1.0, 0.8)):
        x, source = bowl(alpha, sigma, 400_000)
        torch.manual_seed(0)
        source.gradient(None)
        exact = DIAGONAL * x.detach() / (1 + source.hopping_rate * DIAGONAL)
        errors.append(float((grad_of(x) - exact).norm() / exact.norm()))
    return "relative errors " + ", ".join(f"{error:.4f}" for error in errors), max(errors) <= 0.02


def noise_ratios() -> list[tuple[float, float]]:
    """(effective size, told over true variance), over 300 answers a setting, where it is told in most."""
    rows = []
    for alpha, sigma, samples in itertools.product((0.3, 1.0), (0.2, 0.4), (100, 400)):
        x, source = bowl(alpha, sigma, samples)
        torch.manual_seed(0)
        told, sizes, answers = [], [], []
        for _ in range(300):
            _, variance = source.gradient(None)
            if variance is not None:
                told.append(float(variance))
                answers.append(grad_of(x).clone())
                sizes.append(source.effective_sample_size)
        if len(told) >= 150:
            rows.append(
                (float(np.mean(sizes)), float(np.mean(told)) / float(torch.stack(answers).var(0).mean()))
            )
    return rows


def _noise_checked() -> tuple[str, bool]:
    rows = sorted(noise_ratios())
    figure = ", ".join(f"{ratio:.2f} (n = {size:.0f})" for size, ratio in rows)
    return figure, all(0.5 <= ratio <= 1.5 for _, ratio in rows)


# ------------------------------------------------------------------ twenty dimensions


@cache
def twenty(height: float, alpha: float, sigma: float, runs: int = 8) -> float:
    """The share of runs whose consensus ends within 0.25 of the origin in every component."""
    hits = 0
    for seed in range(runs):
        start = np.random.default_rng(seed).uniform(-3, 3, (200, 20))
        result = optex.cbo_minimize(
            ripples(height),
            start,
            vectorized=True,
            noise="anisotropic",
            alpha=alpha,
            sigma=sigma,
            maxiter=600,
            seed=seed,
        )
        hits += bool(np.abs(result.consensus).max() < 0.25)
    return hits / runs


def _twenty_checked() -> tuple[str, bool]:
    rate = twenty(2.5, 1e15, 5.1)
    return f"{rate:.2f} of 8 runs", rate >= 0.7


def _twenty_steep_checked() -> tuple[str, bool]:
    rate = twenty(10.0, 1e15, 5.1)
    return f"{rate:.2f} of 8 runs", rate >= 0.7


# ------------------------------------------------------------------ the other implementation


def _cbx_checked() -> tuple[str, bool]:
    """The same noise through CBXpy, each step from the same particles, and left to run."""
    from cbx.dynamics import CBO  # pyright: ignore[reportMissingImports]  (not a requirement)

    apart = {"a step": 0.0, "left to run": 0.0}
    for noise, sigma in (("isotropic", 0.5), ("anisotropic", 5.1)):
        start, noted = np.random.default_rng(0).uniform(-3, 3, (50, 4)), Noting()
        constants = {"noise": noise, "alpha": 30.0, "sigma": sigma, "dt": 0.01}
        optex.cbo_minimize(
            ripples(2.5), start, vectorized=True, seed=5, maxiter=200, callback=noted, **constants
        )
        for name in apart:
            generator = torch.Generator().manual_seed(5)

            def draw(size: tuple[int, ...], generator: torch.Generator = generator) -> np.ndarray:
                return torch.randn(size, generator=generator, dtype=torch.float64).numpy()

            other = CBO(
                ripples(2.5),
                x=start[None],
                f_dim="3D",
                check_f_dims=False,
                sampler=draw,
                verbosity=0,
                **constants,
            )
            for particles in noted.particles:
                difference = np.abs(other.x[0] - particles) / np.maximum(np.abs(particles), 1)
                apart[name] = max(apart[name], float(difference.max()))
                if name == "a step":
                    other.x = particles[None].copy()
                other.step()
    figure = "; ".join(f"{name} {value:.1e}" for name, value in apart.items())
    return figure, apart["a step"] <= 1e-12


# ------------------------------------------------------------------ OptEx, and what else there is


@cache
def descents(method: str, lr: float) -> list[list[float]]:  # runs of [rounds + 1] losses
    """E along runs of Adam on the canyon's source: alone, or under OptEx with N = 4."""
    runs = []
    for seed in range(5):
        problem = Canyon(seed)
        torch.manual_seed(seed)
        base, source = torch.optim.Adam(problem.parameters(), lr=lr), problem.source()
        losses = [problem.evaluate()]
        if method == "adam":
            for _ in range(120):
                source.gradient(None)
                base.step()
                losses.append(problem.evaluate())
        else:
            optimizer = optex.OptEx(base, parallelism=4)
            rounds = itertools.islice(optimizer.rounds(itertools.repeat(None), source), 120)
            losses.extend(problem.evaluate() for _ in rounds)
        runs.append(losses)
    return runs


def fraction(lr: float, rounds: int) -> list[float]:
    """OptEx's rounds over Adam's to the level that Adam has after so many rounds."""
    found = []
    for alone, wrapped in zip(descents("adam", lr), descents("optex", lr), strict=True):
        level = min(alone[: rounds + 1])
        found.append(rounds_to_level(wrapped, level) / rounds_to_level(alone, level))
    return found


def _optex_checked() -> tuple[str, bool]:
    found = fraction(0.1, 100)
    text = ", ".join("not reached" if math.isnan(value) else f"{value:.2f}" for value in found)
    finite = [2.0 if math.isnan(value) else value for value in found]
    return f"median {np.median(finite):.2f} ({text})", float(np.median(finite)) <= 0.7


class Watched:
    """A function of one point or of many that notes when the best point so far was close enough."""

    def __init__(self, function: Callable[[np.ndarray], np.ndarray]) -> None:
        self.function = function
        self.count, self.best, self.reached = 0, math.inf, math.inf

    def __call__(self, x: np.ndarray) -> Any:
        points = np.atleast_2d(x)
        values = self.function(points)
        least = int(np.argmin(values))
        self.count += len(points)
        if values[least] < self.best:
            self.best = float(values[least])
            if np.abs(points[least]).max() < 0.25:
                self.reached = min(self.reached, self.count)
        return values if x.ndim == 2 else float(values[0])

    def stop(self, *_: Any, **__: Any) -> bool:
        """As a callback: nothing further is to be learned."""
        return self.reached < math.inf


RIVALS = ("consensus", "differential evolution", "dual annealing")


def rivals(function: str) -> dict[str, list[float]]:
    """Of three runs each: after how many evaluations the best point so far was within 0.25 of the minimum."""
    dimension, budget = (2, 50_000) if function == "canyon" else (20, 100_000)
    target = canyon_array if function == "canyon" else ripples(2.5)
    bounds = [(-2.0, 8.5)] * 2 if function == "canyon" else [(-3.0, 3.0)] * 20
    found: dict[str, list[float]] = {name: [] for name in RIVALS}
    for seed in range(3):
        uniform = np.random.default_rng(seed).uniform(-3, 3, (200, 20))
        watched = [Watched(target) for _ in RIVALS]
        start, options = START, {}
        if function != "canyon":
            start, options = uniform, {"noise": "anisotropic", "alpha": 1e15, "sigma": 5.1}
        steps = budget // 200
        # The older name of ``rng``, and another generator: the numbers on record are this one's.
        seeded: dict[str, Any] = {"seed": seed}
        optex.cbo_minimize(
            watched[0], start, vectorized=True, seed=seed, maxiter=steps, callback=watched[0].stop, **options
        )
        population = 15 * dimension
        differential_evolution(
            lambda x, watched=watched: watched[1](x.T),
            bounds,
            popsize=15,
            maxiter=budget // population - 1,
            tol=0,
            polish=False,
            vectorized=True,
            updating="deferred",
            callback=watched[1].stop,
            **seeded,
        )
        first = np.array(START) if function == "canyon" else uniform[0]
        dual_annealing(
            watched[2], bounds, x0=first, maxfun=budget, maxiter=10**9, callback=watched[2].stop, **seeded
        )
        for name, one in zip(RIVALS, watched, strict=True):
            found[name].append(one.reached)
    return found


def _rivals_checked(function: str) -> tuple[str, bool]:
    found, words = rivals(function), []
    for name, counts in found.items():
        middle = float(np.median(counts))
        words.append(
            f"{name} {np.isfinite(counts).mean():.2f} ({f'{middle:,.0f}' if middle < math.inf else '-'})"
        )
    best = min(found, key=lambda name: (-np.isfinite(found[name]).sum(), np.median(found[name])))
    return f"{'; '.join(words)}; {best} wins", best == "consensus"


CHECKS = [
    Check("CBO on the canyon: consensus within 0.25 of the minimum", "≥ 0.95 (recorded: 1.00)", _swarm_checked),
    Check("Consensus hopping, σ = 0.7: within 0.5", "≥ 0.9", _hops_checked),
    Check("Gradient descent, and hopping with σ = 0.4: within 0.5", "0 and 0", _stuck_checked),
    Check("Annealed Langevin dynamics: within 0.25", "about 0.1", _langevin_checked),
    Check("(x - c) / τ against ∇E, quadratic, τ = α σ² = 0.01", "cosine ≥ 0.999, error ≤ 0.02", _link_checked),
    Check(
        "(x - c) / τ against (I + τA)⁻¹ ∇E, τ from 0.25 to 0.64", "error ≤ 0.02 (derived)", _proximal_checked
    ),
    Check("Told noise variance over the true one, where it is told", "0.5 to 1.5", _noise_checked),
    Check(
        "Rastrigin, d = 20, anisotropic, σ = 5.1, ripples 2.5, α = 10¹⁵: within 0.25", "≥ 0.7", _twenty_checked
    ),
    Check("The same with Rastrigin's usual ripples of 10", "≥ 0.7", _twenty_steep_checked),
    *(
        [Check("CBXpy 1.0, same noise: relative difference, 200 steps", "a step ≤ 1e-12", _cbx_checked)]
        if importlib.util.find_spec("cbx")
        else []
    ),
    Check(
        "OptEx, N = 4, Adam 0.1 on the canyon: rounds over Adam's to its loss at 100", "≤ 0.7", _optex_checked
    ),
    Check(
        "Canyon, 50,000 evaluations: share of 3 runs that come within 0.25 (median evaluations)",
        "CBO wins",
        lambda: _rivals_checked("canyon"),
    ),
    Check(
        "Rastrigin, d = 20, ripples 2.5, 100,000 evaluations: the same",
        "CBO wins",
        lambda: _rivals_checked("rastrigin"),
    ),
]


# ------------------------------------------------------------------ the picture


def curves() -> dict[str, Any]:
    """Paths of five runs of each method, and of OptEx's losses."""

    def few(paths: np.ndarray, step: int) -> list[Any]:
        return np.round(paths[:5, ::step], 4).tolist()

    return {
        "consensus": few(swarms(), 5),
        "hopping": few(hops(0.7), 5),
        "descent": few(langevin(0.0, 1), 100),
        "langevin": few(langevin(10.0, 50), 100),
        "adam": np.round(np.median(descents("adam", 0.1), axis=0), 5).tolist(),
        "optex": np.round(np.median(descents("optex", 0.1), axis=0), 5).tolist(),
    }


def draw(found: dict[str, Any]) -> Figure:
    """The figure of the paper, and OptEx beside it."""
    figure = Figure(figsize=(11.5, 7.2), layout="constrained")
    FigureCanvasAgg(figure)
    places = figure.subplots(2, 3).ravel()
    axis = np.linspace(-2.2, 9.2, 220)
    grid = np.stack(np.meshgrid(axis, axis), -1)
    titles = {
        "consensus": ("consensus of CBO, σ = 1.6", "#0072B2"),
        "hopping": ("consensus hopping, σ = 0.7", "#009E73"),
        "descent": ("gradient descent", "#D55E00"),
        "langevin": ("annealed Langevin dynamics", "#CC79A7"),
    }
    for place, (name, (title, colour)) in zip(places, titles.items(), strict=False):
        place.contourf(axis, axis, canyon_array(grid), 24, cmap="Greys", alpha=0.5)
        for number, path in enumerate(found[name]):
            points = np.array([START, *path])
            label = "runs" if number == 0 else None
            place.plot(points[:, 0], points[:, 1], color=colour, linewidth=0.9, marker=".", markersize=3,
                       label=label)  # fmt: skip
        place.plot(*START, "o", color="black", markersize=5, label="start")
        place.plot(0, 0, "*", color="#E69F00", markersize=13, markeredgecolor="black", label="minimum")
        place.set(title=title, xlabel="X", ylabel="Y", xlim=(-2.2, 9.2), ylim=(-2.2, 9.2))
        place.legend(fontsize=8, loc="lower right")
    last = places[4]
    for name, label, colour in (("adam", "Adam", "#56B4E9"), ("optex", "OptEx, N = 4", "#0072B2")):
        last.plot(np.maximum(found[name], 1e-3), label=label, color=colour)
    last.set(title="Adam 0.1 on the consensus source", xlabel="rounds", ylabel="E, median of 5 seeds")
    last.set_yscale("log")
    last.legend(fontsize=8)
    places[5].set_visible(False)
    return figure
