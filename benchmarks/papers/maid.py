"""MAID (arXiv 2308.10098): the released quadratic problem, a denoiser of digits, and what OptEx adds."""

from __future__ import annotations

import itertools
from functools import lru_cache
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy.optimize import OptimizeResult
from torch import Tensor, nn

import optex
from optex.sources.inexact_bilevel import hypergradient, solve_lower
from optex.studies.measures import rounds_to_level
from optex.studies.problems import make_problem
from optex.studies.problems.denoise import denoising, digit_pairs
from papers import Check

ROOM = "sources"

STEPS = 2000
ACCURACIES = (1e-1, 1e-3, 1e-5)
RATES = (1e-6, 1e-1, 1e2)
IMAGES, HELD_OUT = 40, 200
COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7")

# ------------------------------------------------------------------ the released quadratic problem


class Quadratic:
    """h = ½ ‖A2 x + A3 θ - b2‖², g = ½ ‖A1 x - b1‖², n = 1000, m = 10, drawn as the released script does."""

    def __init__(self, n: int = 1000, m: int = 10, seed: int = 29) -> None:
        torch.manual_seed(seed)
        a1, a2, a3 = (torch.rand(n, m).double() for _ in range(3))
        x1, x2, theta = (torch.rand(m).double() for _ in range(3))
        y1, y2 = (torch.randn(n).double() for _ in range(2))
        self.measure, self.data, self.start = a1, a1 @ x1 + 0.01 * y1, x2
        known = a2 @ x2 + a3 @ theta + 0.01 * y2
        # ½ ‖A2 x + A3 θ - b2‖² but for what does not depend on x.
        self.hessian, self.cross, self.linear = a2.mT @ a2, a2.mT @ a3, a2.mT @ known
        self.slope = -torch.linalg.solve(self.hessian, self.cross)
        at_zero = self.measure @ torch.linalg.solve(self.hessian, self.linear)
        self.best = torch.linalg.lstsq(self.measure @ self.slope, self.data - at_zero).solution

    def lower(self, x: Tensor, theta: Tensor) -> Tensor:
        return x @ (self.hessian @ x) / 2 + x @ (self.cross @ theta - self.linear)

    def upper(self, x: Tensor) -> Tensor:
        return (self.measure @ x - self.data).square().sum() / 2

    def solution(self, theta: Tensor) -> Tensor:
        return torch.linalg.solve(self.hessian, self.linear - self.cross @ theta)

    def gap(self, theta: Tensor) -> float:
        """f above its least value, exactly."""
        return float(self.upper(self.solution(theta)) - self.upper(self.solution(self.best)))

    def gradient(self, theta: Tensor) -> Tensor:
        return self.slope.mT @ (self.measure.mT @ (self.measure @ self.solution(theta) - self.data))

    def levels(self) -> optex.SmoothBilevel:
        curvatures = torch.linalg.eigvalsh(self.hessian)
        return optex.SmoothBilevel(
            self.lower,
            self.upper,
            self.start,
            strong_convexity=float(curvatures[0]),
            lower_lipschitz=float(curvatures[-1]),
            upper_lipschitz=float(torch.linalg.matrix_norm(self.measure, 2)) ** 2,
            hessian_lipschitz=0.0,
            cross_lipschitz=0.0,
        )


@lru_cache
def quadratic() -> Quadratic:
    """The one problem of all checks."""
    return Quadratic()


@lru_cache
def run(accuracy: float = 0.1, beta: float = 0.1) -> tuple[OptimizeResult, list[float]]:
    """MAID from θ = 1, and the exact gap at its start and after every step."""
    problem, theta = quadratic(), torch.ones(10, dtype=torch.float64)
    gaps = [problem.gap(theta)]

    def watch(result: OptimizeResult) -> bool:
        gaps.append(problem.gap(result.x))
        return False

    settings: dict[str, Any] = {"epsilon": accuracy, "delta": accuracy, "beta": beta}
    result = optex.maid(problem.levels(), theta, maxiter=STEPS, callback=watch, **settings)
    return result, [*gaps, problem.gap(result.x)]


def runs() -> dict[str, tuple[OptimizeResult, list[float]]]:
    """All starts, by name."""
    found = {f"ε₀ = {accuracy:g}": run(accuracy) for accuracy in ACCURACIES}
    return found | {f"β₀ = {beta:g}": run(0.1, beta) for beta in RATES if beta != 0.1}


def check_bound() -> tuple[str, bool]:
    """Along a run, at accuracies of its own and at others."""
    problem, ratios = quadratic(), []
    levels = problem.levels()
    generator = torch.Generator().manual_seed(0)
    for accuracy in (1e-1, 1e-2, 1e-4, 1e-6):
        for _ in range(25):
            theta = 2 * torch.rand(10, generator=generator, dtype=torch.float64)
            solution = solve_lower(levels, [theta], levels.start, accuracy)
            found = hypergradient(levels, [theta], solution, accuracy, accuracy)
            ratios.append(float((found.gradient[0] - problem.gradient(theta)).norm()) / found.error_bound)
    ratio = torch.tensor(ratios)
    return f"at most {ratio.max():.2g} of the bound, median {ratio.median():.1g}, 100 points", max(ratios) <= 1


def spread(gaps: list[float]) -> float:
    """Largest over smallest, less 1."""
    return (max(gaps) - min(gaps)) / min(gaps)


def check_spread(kind: str) -> tuple[str, bool]:
    """Of the gaps after the last step."""
    found = [run(a) for a in ACCURACIES] if kind == "accuracy" else [run(0.1, b) for b in RATES]
    gaps = [curve[-1] for _, curve in found]
    words = ", ".join(f"{gap:.2f}" for gap in gaps)
    return f"{words}: {100 * spread(gaps):.1f} % after {STEPS} steps", spread(gaps) <= 0.02


def check_monotone() -> tuple[str, bool]:
    """f at the iterates, exactly."""
    rises = sum(after > before for _, gaps in runs().values() for before, after in itertools.pairwise(gaps))
    return f"{rises} rises in {len(runs())} runs of {STEPS} steps", rises == 0


def check_accuracy() -> tuple[str, bool]:
    """ε after the last step."""
    found = [result.epsilon for result, _ in runs().values()]
    words = ", ".join(f"{name}: {result.epsilon:.1e}" for name, (result, _) in runs().items())
    return words, 1.25e-5 <= min(found) <= max(found) <= 2.15e-5


# ------------------------------------------------------------------ the denoiser


def psnr(x: Tensor, clean: Tensor) -> float:
    """In decibels, mean over images; grey levels are 0 to 1."""
    return float((-10 * (x - clean).square().mean(1).log10()).mean())


@lru_cache
def held_out() -> tuple[Tensor, Tensor]:
    """Images that nothing is learned from, and the same with noise."""
    return digit_pairs(HELD_OUT, held_out=True)


def denoised(log_weights: Tensor) -> Tensor:
    """The held-out images."""
    clean, noisy = held_out()
    levels = denoising(clean, noisy)
    return solve_lower(levels, [log_weights], levels.start, 1e-4).x


def decibels(log_weights: Tensor) -> float:
    """PSNR of the held-out images."""
    return psnr(denoised(log_weights), held_out()[0])


Trace = list[tuple[int, float]]  # evaluations so far, training loss


@lru_cache
def learned() -> tuple[Tensor, int, Trace]:
    """By MAID: weights, gradients of h and products with its Hessian, and the loss along them."""
    start = torch.full((8,), -4.0, dtype=torch.float64)
    result = optex.maid(denoising(*digit_pairs(IMAGES)), start, maxiter=80)
    history = result.history
    counts = [int(a + b) for a, b in zip(history["lower_iterations"], history["products"], strict=True)]
    return result.x, result.nfev + result.nhev, list(zip(counts, history["loss"], strict=True))


def searched(candidates: Any, budget: int) -> tuple[Tensor, int, Trace]:
    """The best of as many candidates as the budget of lower iterations allows, within ε = 1e-3 each."""
    levels = denoising(*digit_pairs(IMAGES))
    best, least, spent, trace = torch.zeros(8), float("inf"), 0, []
    for candidate in candidates:
        solution = solve_lower(levels, [candidate], levels.start, 1e-3)
        spent += solution.iterations
        if spent > budget:
            break
        loss = float(levels.upper(solution.x))
        if loss < least:
            best, least = candidate, loss
        trace.append((spent, least))
    return best, len(trace), trace


def bisected(low: float, high: float) -> Any:
    """One weight for all filters: a grid of 9 logarithms of weights, then points between them, without end."""
    yield from (torch.full((8,), float(v), dtype=torch.float64) for v in torch.linspace(low, high, 9))
    for level in itertools.count():
        count = 8 * 2**level
        for k in range(count):
            yield torch.full((8,), low + (k + 0.5) * (high - low) / count, dtype=torch.float64)


@lru_cache
def rivals() -> dict[str, tuple[Tensor, int, Trace]]:
    """What a user would do instead, each with MAID's evaluations."""
    budget, generator = learned()[1], torch.Generator().manual_seed(0)
    draws = (-7 + 6 * torch.rand(8, generator=generator, dtype=torch.float64) for _ in itertools.count())
    found = {"grid": searched(bisected(-7, -1), budget), "random search": searched(draws, budget)}
    adams = {lr: adam(lr, budget) for lr in (0.03, 0.1, 0.3)}
    lr = min(adams, key=lambda lr: adams[lr][2][-1][1])
    return found | {f"Adam, lr {lr:g}": adams[lr]}


def adam(lr: float, budget: int) -> tuple[Tensor, int, Trace]:
    """Adam on hypergradients of ε = δ = 1e-3, warm starts between steps."""
    theta = nn.Parameter(torch.full((8,), -4.0, dtype=torch.float64))
    source = optex.InexactBilevelSource(denoising(*digit_pairs(IMAGES)), [theta])
    optimizer, spent, trace = torch.optim.Adam([theta], lr=lr), 0, []
    while True:
        loss, _ = source.gradient(None)
        spent += int(source.evaluations)
        trace.append((spent, float(loss)))
        if spent > budget:
            return theta.detach(), len(trace), trace
        source.accept()
        optimizer.step()


def check_denoiser(rival: str) -> tuple[str, bool]:
    """Decibels on images that were not learned from."""
    name, (theirs, tried, trace) = next((n, r) for n, r in rivals().items() if n.startswith(rival))
    ours, budget, mine = learned()
    found, other, noisy = decibels(ours), decibels(theirs), psnr(held_out()[1], held_out()[0])
    words = (
        f"{found:.2f} dB against {other:.2f} of {name} ({tried} tried, {budget} evaluations), "
        f"noisy {noisy:.2f}; training loss {mine[-1][1]:.4f} against {trace[-1][1]:.4f}"
    )
    return f"{words}: {'MAID' if found > other else name} wins", found > other


# ------------------------------------------------------------------ under OptEx

BASES = {"SGD, lr 5": (torch.optim.SGD, 5.0), "Adam, lr 0.1": (torch.optim.Adam, 0.1)}
ROUNDS = 30


@lru_cache
def rounds(base: str, seed: int, parallelism: int) -> list[float]:
    """The objective after every round; 1 is the base optimizer alone."""
    factory, lr = BASES[base]
    problem = make_problem("denoise", seed=seed, images=20)
    stride = 1 if parallelism == 1 else "auto"
    optimizer = optex.OptEx(factory(problem.parameters(), lr=lr), parallelism=parallelism, stride=stride)
    losses, count = [problem.evaluate()], ROUNDS if parallelism == 1 else ROUNDS // 2
    steps = itertools.islice(optimizer.rounds(itertools.repeat(None), problem.source()), count)
    return losses + [problem.evaluate() for _ in steps]


def check_optex(base: str) -> tuple[str, bool]:
    """Rounds to the base optimizer's last loss, over its rounds."""
    found = [rounds_to_level(rounds(base, s, 4), rounds(base, s, 1)[-1]) / ROUNDS for s in (0, 1)]
    return ", ".join(f"{ratio:.2f}" for ratio in found), max(found) <= 0.4


QUADRATIC = "quadratic, n = 1000, m = 10: "
CHECKS = [
    Check(
        QUADRATIC + "hypergradient's error", "within the bound, against the closed form (derived)", check_bound
    ),
    Check(QUADRATIC + "gap, ε₀ 1e-1, 1e-3, 1e-5", "spread ≤ 2 % (paper)", lambda: check_spread("accuracy")),
    Check(QUADRATIC + "gap, β₀ 1e-6, 0.1, 100", "spread ≤ 2 % (paper)", lambda: check_spread("rate")),
    Check(QUADRATIC + "f at the steps taken", "never rises (paper)", check_monotone),
    Check(QUADRATIC + "last ε", "1.3e-5 to 2.1e-5 from every start (released code)", check_accuracy),
    Check("denoiser, held-out PSNR", "above a grid's, one weight for all", lambda: check_denoiser("grid")),
    Check("denoiser, held-out PSNR", "above random search's", lambda: check_denoiser("random")),
    Check("denoiser, held-out PSNR", "above Adam's, best of 3 rates", lambda: check_denoiser("Adam")),
    *(
        Check(
            f"OptEx, N = 4, {base}",
            "rounds to the base's loss ≤ 0.4 of its",
            lambda base=base: check_optex(base),
        )
        for base in BASES
    ),
]


def curves() -> dict[str, Any]:
    """Gaps and accuracies of all starts, losses against evaluations, pictures, and rounds."""
    every = slice(None, None, 20)
    weights = {"MAID": learned()[0], "grid": rivals()["grid"][0]}
    clean, noisy = held_out()
    images = {"clean": clean, "noisy": noisy} | {name: denoised(w) for name, w in weights.items()}
    return {
        "quadratic": {
            name: {
                "evaluations": result.history["lower_iterations"][every],
                "gap": gaps[: len(result.history["loss"])][every],
                "epsilon": result.history["epsilon"][every],
            }
            for name, (result, gaps) in runs().items()
        },
        "denoiser": {"MAID": learned()[2]} | {name: trace for name, (_, _, trace) in rivals().items()},
        "images": {name: [[round(v, 3) for v in row] for row in x[:5].tolist()] for name, x in images.items()},
        "psnr": {name: psnr(x, clean) for name, x in images.items() if name != "clean"},
        "optex": {base: {str(n): rounds(base, 0, n) for n in (1, 4)} for base in BASES},
    }


def draw(found: dict[str, Any]) -> Figure:
    """Two panels of the quadratic problem, two of the denoiser, and its pictures."""
    figure = Figure(figsize=(13, 8.2), layout="constrained")
    FigureCanvasAgg(figure)
    (top,), (bottom,) = figure.subfigures(2, 1, height_ratios=(1, 1.15), squeeze=False)
    gap, accuracy, race = top.subplots(1, 3)
    for colour, (name, curve) in zip(COLOURS, found["quadratic"].items(), strict=True):
        gap.loglog([max(1, v) for v in curve["evaluations"]], curve["gap"], color=colour, label=name)
        accuracy.semilogy([20 * i for i in range(len(curve["epsilon"]))], curve["epsilon"], color=colour)
    gap.set(title="Quadratic problem", xlabel="gradients of the lower level", ylabel="gap of f")
    accuracy.set(title="Accuracy that MAID chooses", xlabel="step", ylabel="ε")
    for colour, (name, trace) in zip(COLOURS, found["denoiser"].items(), strict=False):
        race.plot(*zip(*trace, strict=True), color=colour, label=name)
    race.set(
        title="Denoiser of digits", xlabel="lower-level evaluations", ylabel="training loss", ylim=(0.89, 1.05)
    )
    left, right = bottom.subfigures(1, 2, width_ratios=(1, 1.1))
    under = left.subplots()
    for colour, (base, both) in zip(COLOURS[1:], found["optex"].items(), strict=False):
        for (n, losses), style in zip(both.items(), ("--", "-"), strict=True):
            under.plot(
                losses,
                color=colour,
                linestyle=style,
                label=f"{base}, {'alone' if n == '1' else 'OptEx, N = 4'}",
            )
    under.set(title="Denoiser, rounds", xlabel="round", ylabel="training loss")
    for axes in (gap, race, under):
        axes.legend(fontsize=8)
    for axes in (gap, accuracy, race, under):
        axes.grid(alpha=0.25)
    grid = right.subplots(len(found["images"]), 5)
    for row, (name, images) in zip(grid, found["images"].items(), strict=True):
        for axes, image in zip(row, images, strict=True):
            axes.imshow(torch.tensor(image).reshape(8, 8), cmap="gray", vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
        level = found["psnr"].get(name)
        row[0].set_ylabel(name if level is None else f"{name}\n{level:.2f} dB")
    right.suptitle("Held-out digits (mean PSNR of 200)")
    return figure
