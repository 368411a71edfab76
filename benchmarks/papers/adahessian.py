"""AdaHessian (Yao et al., AAAI 2021): a quadratic's numbers, Hutchinson's, timm's run, OptEx, and rivals."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim import Optimizer

from optex.optimizers import AdaHessian, hutchinson_diagonal
from optex.sources import backpropagate
from optex.studies.comparison import Case, Comparison, run_case
from optex.studies.measures import best_so_far, rounds_to_level
from optex.studies.problems import make_problem
from optex.studies.tuning import Choice
from papers import Check

ROOM = "optimizers"
SEEDS = 3
RATES = {"adahessian": 0.1, "adam": 0.03, "sgd": 0.3, "momentum": 0.1}  # where the grids begin
GRADIENTS = 240  # that each rival may evaluate; a step of AdaHessian counts as two
ROUNDS = 40
DEFAULT = 0.15  # the published rate

# ---------------------------------------------------------------------- the diagonal quadratic


def diagonal_run(make: Callable[[list[Tensor]], Optimizer], start: Tensor, steps: int) -> Tensor:
    """θ over its start, [steps + 1, 50], on ½ Σ a_i θ_i² with a from 1 to 10⁴."""
    scales = torch.logspace(0, 4, 50, dtype=torch.float64)
    theta = nn.Parameter(start.clone())
    optimizer, rows = make([theta]), [torch.ones(50, dtype=torch.float64)]
    for _ in range(steps):
        optimizer.zero_grad()
        backpropagate((0.5 * scales * theta**2).sum(), create_graph=isinstance(optimizer, AdaHessian))
        optimizer.step()
        rows.append((theta.detach() / start).clone())
    return torch.stack(rows)


def relative_loss(rows: Tensor, start: Tensor) -> Tensor:
    """f over f at the start, [steps + 1]."""
    weights = torch.logspace(0, 4, 50, dtype=torch.float64) * start**2
    return (rows**2 @ weights) / weights.sum()


def starts() -> dict[str, Tensor]:
    """Ones, where all of Adam's coordinates see alike gradients but for their scale; and a random one."""
    generator = torch.Generator().manual_seed(1)
    return {
        "ones": torch.ones(50, dtype=torch.float64),
        "random": torch.randn(50, generator=generator, dtype=torch.float64),
    }


@cache
def quadratic_losses() -> dict[str, list[float]]:
    """Relative loss by step."""
    makers: dict[str, Callable[[list[Tensor]], Optimizer]] = {
        "AdaHessian, lr 0.15": lambda p: AdaHessian(p, lr=0.15),
        "Adam, lr 0.1": lambda p: torch.optim.Adam(p, lr=0.1),
    }
    return {
        f"{name}, from {label}": relative_loss(diagonal_run(make, start, 200), start).tolist()
        for name, make in makers.items()
        for label, start in starts().items()
    }


def steps_to(curve: list[float], level: float = 1e-8) -> int:
    """Number of the first step that ends at or below the level, the first step being number 0."""
    return int(rounds_to_level(curve, level)) - 1


def lasting(curve: list[float], level: float = 1e-8) -> int:
    """The step, counted alike, from which on the loss stays at or below the level."""
    return max(i for i, value in enumerate(curve) if value > level)


def quadratic_steps() -> tuple[str, bool]:
    """AdaHessian and Adam on the diagonal quadratic."""
    losses = quadratic_losses()
    found = {name: steps_to(curve) for name, curve in losses.items()}
    own, adam = found["AdaHessian, lr 0.15, from ones"], found["Adam, lr 0.1, from ones"]
    others = f"from a random start {found['AdaHessian, lr 0.15, from random']}"
    others += f" and {found['Adam, lr 0.1, from random']}"
    stays = ", ".join(f"{name} {lasting(curve)}" for name, curve in losses.items())
    return f"step {own}, Adam step {adam}; {others}. To stay below: {stays}", (own, adam) == (62, 81)


def trajectories() -> tuple[str, bool]:
    """How far coordinates of different curvature come apart."""
    start = starts()["random"]
    spread = {
        eps: float(
            (rows := diagonal_run(lambda p, e=eps: AdaHessian(p, lr=0.15, eps=e), start, 62))
            .sub(rows[:, :1])
            .abs()
            .max()
        )
        for eps in (1e-12, 1e-4)
    }
    return f"{spread[1e-12]:.1e} at ε = 1e-12; {spread[1e-4]:.1e} at the default 1e-4", spread[1e-12] <= 1e-9


# ---------------------------------------------------------------------- Hutchinson


@cache
def probed() -> tuple[Tensor, Tensor, Tensor]:
    """diag(H), the signed and the absolute mean over 20,000 probes; H = BBᵀ/50, d = 50."""
    torch.manual_seed(0)
    B = torch.randn(50, 50, dtype=torch.float64)
    H = B @ B.T / 50
    theta = torch.zeros(50, dtype=torch.float64, requires_grad=True)
    signed, absolute, count = torch.zeros(50).double(), torch.zeros(50).double(), 20_000
    (gradient,) = torch.autograd.grad(0.5 * theta @ H @ theta, theta, create_graph=True)
    (signed,) = hutchinson_diagonal([theta], [gradient], count)
    z = torch.randint(0, 2, (count, 50)).double() * 2 - 1
    absolute = (z * (z @ H)).abs().mean(0)
    return H.diagonal(), signed, absolute


def hutchinson() -> tuple[str, bool]:
    """The signed mean against the diagonal."""
    exact, signed, _ = probed()
    error = float((signed - exact).abs().max())
    return f"{error:.3f}", error <= 0.05


def conventions() -> tuple[str, bool]:
    """What the two averages tend to."""
    exact, signed, absolute = probed()
    ratios = float((signed / exact).mean()), float((absolute / exact).mean())
    return f"signed {ratios[0]:.3f}, absolute {ratios[1]:.3f}", abs(ratios[0] - 1) < 0.01 < ratios[1] - 1


# ---------------------------------------------------------------------- timm


def timms() -> tuple[Callable[..., Optimizer], str] | None:
    """timm's class, from its one file: the package itself wants torchvision."""
    found = importlib.util.find_spec("timm")
    if found is None or found.origin is None:
        return None
    path = Path(found.origin).parent / "optim" / "adahessian.py"
    spec = importlib.util.spec_from_file_location("timm_adahessian", path)
    if spec is None or spec.loader is None:
        return None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        return module.Adahessian, version("timm")
    except PackageNotFoundError:
        return module.Adahessian, "unknown"


def convolutional_run(make: Callable[[Any], Optimizer]) -> Tensor:  # [100, d]
    """100 steps of a small convolutional network, float64; the random generator is seeded as timm's is."""
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3)
    model = nn.Sequential(*layers).double()
    generator = torch.Generator().manual_seed(2)
    optimizer, rows = make(model.parameters()), []
    torch.manual_seed(2147483647)
    for _ in range(100):
        x = torch.randn(16, 1, 8, 8, generator=generator, dtype=torch.float64)
        y = torch.stack([x.mean((1, 2, 3)), x[:, 0, 0, 0].sin(), x[:, 0, 3, 3] * x[:, 0, 4, 4]], 1)
        optimizer.zero_grad()
        backpropagate((model(x) - y).square().mean(), create_graph=True)
        optimizer.step()
        rows.append(nn.utils.parameters_to_vector(model.parameters()).detach().clone())
    return torch.stack(rows)


def parity() -> tuple[str, bool]:
    """Lock-step with timm's class, where there is one."""
    found = timms()
    if found is None:
        return "not measured: timm is not installed (pip install --no-deps timm)", False
    theirs, name = found
    options: dict[str, Any] = {"lr": 0.03, "eps": 1e-4, "weight_decay": 0.01}
    worst = 0.0
    for power, kernels in ((1.0, True), (0.5, True), (1.0, False)):
        a = convolutional_run(
            lambda p, k=power, s=kernels: theirs(p, hessian_power=k, avg_conv_kernel=s, **options)
        )
        b = convolutional_run(
            lambda p, k=power, s=kernels: AdaHessian(
                p, hessian_power=k, block="kernels" if s else "none", **options
            )
        )
        worst = max(worst, float((a - b).abs().max() / a.abs().max()))
    return f"{worst:.1e} (timm {name})", worst <= 1e-10


# ---------------------------------------------------------------------- rivals


@cache
def run(problem: str, optimizer: str, lr: float, method: str, rounds: int, seed: int) -> tuple[float, ...]:
    """Loss by round, above the minimum where that is known; NaN after a run stopped."""
    comparison = Comparison(
        (problem,),
        methods=(method,),
        optimizer=optimizer,
        lr=lr,
        parallelism=1 if method == "vanilla" else 4,  # vanilla runs N times the rounds of others
        rounds=rounds,
        dim=100,
        stride="auto" if method == "optex-alone" else 1,
    )
    least = make_problem(problem, seed=0).minimum if problem == "logistic-breast-cancer" else 0.0
    return tuple(loss - (least or 0.0) for loss in run_case(comparison, Case(problem, method, seed)).trace.loss)


def lowest(problem: str, optimizer: str, lr: float, method: str, rounds: int) -> float:
    """The lowest loss of so many rounds; geometric mean over the seeds."""
    ends = [best_so_far(run(problem, optimizer, lr, method, rounds, seed))[-1] for seed in range(SEEDS)]
    return float(np.exp(np.mean(np.log(ends))))


@cache
def tuned(problem: str, optimizer: str, method: str, rounds: int) -> tuple[float, float]:
    """The best rate of a grid of half decades that goes on where its end is best (and the published one)."""
    start = Choice(optimizer, RATES[optimizer])

    def loss(steps: int) -> float:
        return lowest(problem, optimizer, start.beside(steps).rate, method, rounds)

    results = {steps: loss(steps) for steps in (-1, 0, 1)}
    while (best := min(results, key=lambda steps: results[steps])) in (min(results), max(results)):
        beyond = best + (1 if best == max(results) else -1)
        results[beyond] = loss(beyond)
    found = [(start.beside(best).rate, results[best])]
    if optimizer == "adahessian":
        found.append((DEFAULT, lowest(problem, optimizer, DEFAULT, method, rounds)))
    return min(found, key=lambda pair: pair[1])


def duel(problem: str) -> tuple[str, bool]:
    """Who gets lowest with so many gradients."""
    results = {}
    for optimizer in RATES:
        steps = GRADIENTS // 2 if optimizer == "adahessian" else GRADIENTS
        results[optimizer] = tuned(problem, optimizer, "vanilla", steps)
    words = ", ".join(f"{name} {loss:.3g} (lr {lr:g})" for name, (lr, loss) in results.items())
    winner = min(results, key=lambda name: results[name][1])
    as_many = lowest(problem, "adahessian", results["adahessian"][0], "vanilla", GRADIENTS)
    return f"{words}: {winner} wins. AdaHessian after as many steps: {as_many:.3g}", winner == "adahessian"


# ---------------------------------------------------------------------- OptEx


def losses(problem: str, lr: float, method: str) -> list[list[float]]:
    """Of AdaHessian's rounds, by seed."""
    return [list(run(problem, "adahessian", lr, method, ROUNDS, seed)) for seed in range(SEEDS)]


def acceleration(problem: str, method: str, lr: float, other_lr: float) -> tuple[str, bool]:
    """AdaHessian's rounds at ``lr`` to its lowest loss over the method's at ``other_lr``; 0: never there."""
    ratios = []
    for plain, ahead in zip(losses(problem, lr, "vanilla"), losses(problem, other_lr, method), strict=True):
        level = float(best_so_far(plain)[-1])
        ratio = rounds_to_level(plain, level) / rounds_to_level(ahead, level)
        ratios.append(0.0 if np.isnan(ratio) else ratio)
    return ", ".join(f"{ratio:.2f}" for ratio in ratios), min(ratios) > 1.2


def tuned_acceleration(problem: str, method: str) -> tuple[str, bool]:
    """Each at the rate that is best for it over these rounds."""
    rates = [tuned(problem, "adahessian", name, ROUNDS)[0] for name in ("vanilla", method)]
    words, holds = acceleration(problem, method, *rates)
    return f"{words} (lr {rates[0]:g} alone, {rates[1]:g} under OptEx)", holds


CHECKS = [
    Check(
        "diagonal quadratic, κ = 10⁴, d = 50, from ones: step that reaches 1e-8 of the first loss, from 0",
        "62 with lr 0.15; Adam with lr 0.1: 81",
        quadratic_steps,
    ),
    Check(
        "the same from a random start: largest difference of θ_i over its start between coordinates, 62 steps",
        "at most 1e-9 where ε is nothing beside the curvature (derived: all walk alike)",
        trajectories,
    ),
    Check(
        "Hutchinson, H = BBᵀ/50, d = 50, 20,000 probes: largest error of an entry",
        "at most 0.05",
        hutchinson,
    ),
    Check(
        "the same H: mean of z ⊙ Hz over H_ii, and of its magnitude",
        "1 signed; above 1 absolute (derived: a magnitude does not cancel)",
        conventions,
    ),
    Check(
        "timm's Adahessian beside it, 100 steps of a convolutional network in float64, k = 1 and ½, kernels "
        "averaged or not: largest relative difference",
        "at most 1e-10",
        parity,
    ),
    *(
        Check(
            f"OptEx, {kind}, on {problem}, both with lr {DEFAULT}: AdaHessian's rounds to its lowest loss of "
            f"{ROUNDS} over OptEx's, 3 seeds",
            "above 1.2 on each",
            lambda problem=problem, method=method: acceleration(problem, method, DEFAULT, DEFAULT),
        )
        for problem in ("digits-mlp", "rosenbrock")
        for method, kind in (("optex", "N = 4, stride 1"), ("optex-alone", "N = 1, strides"))
    ),
    *(
        Check(
            f"OptEx, N = 4, stride 1, on {problem}, each at its best rate: the same",
            "above 1.2 on each",
            lambda problem=problem: tuned_acceleration(problem, "optex"),
        )
        for problem in ("digits-mlp", "rosenbrock")
    ),
    *(
        Check(
            f"{problem}: lowest loss above the minimum of {GRADIENTS} gradients, a step of AdaHessian counted "
            "as two; each at its best rate, 3 seeds",
            "AdaHessian ahead of Adam and SGD (the paper's claim, on its own problems)",
            lambda problem=problem: duel(problem),
        )
        for problem in ("digits-mlp", "logistic-breast-cancer", "rosenbrock")
    ),
]

# ---------------------------------------------------------------------- picture


def curves() -> dict[str, Any]:
    """Relative loss by step; loss by gradients; loss by round."""
    rivals = {}
    for optimizer in RATES:
        cost = 2 if optimizer == "adahessian" else 1
        lr, _ = tuned("digits-mlp", optimizer, "vanilla", GRADIENTS // cost)
        found = [run("digits-mlp", optimizer, lr, "vanilla", GRADIENTS // cost, seed) for seed in range(SEEDS)]
        mean = np.exp(np.mean(np.log(np.array(found)), axis=0))
        rivals[f"{optimizer}, lr {lr:g}"] = {
            "gradients": [cost * i for i in range(len(mean))], "loss": mean.tolist()
        }  # fmt: skip
    return {
        "quadratic": quadratic_losses(),
        "rivals": rivals,
        "optex": {
            name: np.exp(np.mean(np.log(losses("digits-mlp", DEFAULT, method)), axis=0)).tolist()
            for name, method in (("AdaHessian alone", "vanilla"), ("OptEx of it, N = 4", "optex"))
        },
    }


COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
LINES = ("-", (0, (5, 1.5)), (0, (1, 1.2)), (0, (5, 1, 1, 1)))


def draw(curves: dict[str, Any]) -> Figure:
    """Three panels."""
    figure = Figure(figsize=(13.5, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    styles = zip((COLOURS[0], "#56b4e9", COLOURS[1], "#e69f00"), (4, 1.6, 1.6, 1.6), strict=True)
    for (name, values), (colour, width), line in zip(
        curves["quadratic"].items(), styles, ("-", (0, (2, 2))) * 2, strict=True
    ):  # the first two are one line
        left.semilogy(values, label=name, color=colour, linestyle=line, linewidth=width)
    left.set(title="Diagonal quadratic, κ = 10⁴", xlabel="step", ylabel="loss over the first", ylim=(1e-16, 30))
    for (name, values), colour, line in zip(curves["rivals"].items(), COLOURS, LINES, strict=True):
        middle.semilogy(values["gradients"], values["loss"], label=name, color=colour, linestyle=line)
    middle.set(
        title="digits-mlp, each at its best rate", ylabel="loss",
        xlabel="gradients (a step of AdaHessian counts as two)",
    )  # fmt: skip
    for (name, values), colour, line in zip(curves["optex"].items(), COLOURS, LINES, strict=False):
        right.semilogy(values, label=name, color=colour, linestyle=line)
    right.set(title=f"digits-mlp, lr {DEFAULT}", xlabel="round", ylabel="loss")
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure
