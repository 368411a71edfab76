"""Penalty bilevel optimization (Kwon, Kwon, Wright, Nowak, ICLR 2024, arXiv 2309.01753).

On a quadratic with 5 outer and 8 inner variables everything is known in closed form. On the digits, x holds the
logarithms of ten classes' L2 weights; costs are gradients of the lower level, a Hessian-vector product two.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy.optimize import minimize
from torch import Tensor

import optex
from optex.minimizers.single_loop import SingleLoop
from optex.sources.descent import limited_memory_bfgs
from optex.sources.levels import Levels
from optex.studies.measures import rounds_to_level
from optex.studies.problems import DigitsRegularisation
from papers import Check, grad_of

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.references.penalty_bilevel import QuadraticBilevel

ROOM = "sources"
SIGMAS = (1e-1, 1e-2, 1e-3, 1e-4)
QUADRATIC = QuadraticBilevel()
START = np.linspace(-1.0, 2.0, QUADRATIC.outer)
PROTOTYPE_BIAS = (0.096, 0.0109, 0.00110, 0.00011)
PROTOTYPE_ENDS = (2.2e-2, 2.2e-3, 2.2e-4)
STEPS = 100  # of Adam, on the digits
RATE = 0.1


def words(values: Any) -> str:
    """Numbers in a row."""
    return ", ".join(f"{value:.2g}" for value in values)


def slope(sigmas: Any, values: Any) -> float:
    """Of the logarithms."""
    return float(np.polyfit(np.log(sigmas), np.log(values), 1)[0])


# ------------------------------------------------------------------ the quadratic


def quadratic_source(x: Tensor, sigma: float, **options: Any) -> optex.PenaltyHypergradient:
    """A deterministic source at x."""
    zeros = torch.zeros(QUADRATIC.inner, dtype=torch.float64)
    return optex.PenaltyHypergradient(
        QUADRATIC.upper, QUADRATIC.lower, x, zeros, sigma=sigma, deterministic=True, **options
    )


@cache
def biases() -> tuple[list[float], list[float]]:
    """Relative errors against the true hypergradient, and against the penalty's own gradient."""
    of_true, of_penalty = [], []
    for sigma in SIGMAS:
        x = torch.nn.Parameter(torch.from_numpy(START.copy()))
        quadratic_source(x, sigma, tolerance=1e-9).gradient(None)
        for errors, exact in (
            (of_true, QUADRATIC.hypergradient(START)),
            (of_penalty, QUADRATIC.penalty_gradient(START, sigma)),
        ):
            errors.append(float(np.linalg.norm(grad_of(x).numpy() - exact) / np.linalg.norm(exact)))
    return of_true, of_penalty


@cache
def double_loop(sigma: float, *, warm: bool = True) -> tuple[np.ndarray, list[int]]:
    """500 rounds of the paper's: T = 10 inner steps, γ = 1 / (L_g + σ L_f), α = ½ / L_ψ; x, lower gradients."""
    x = torch.nn.Parameter(torch.from_numpy(START.copy()))
    rate = QUADRATIC.inner_rate(sigma)
    source = quadratic_source(x, sigma, rate=rate, inner_steps=10, tolerance=None)
    alpha = 0.5 / np.linalg.eigvalsh(QUADRATIC.penalty_hessian(sigma))[-1]
    base, path, costs = torch.optim.SGD([x], lr=float(alpha)), [], []
    for _ in range(500):
        source.gradient(None)
        if warm:
            source.accept()
        base.step()
        path.append(x.detach().numpy().copy())
        costs.append(source.lower_gradients)
    return np.array(path), costs


def _bias_checked() -> tuple[str, bool]:
    errors = biases()[0]
    found = slope(SIGMAS, errors)
    near = all(1 / 3 < error / known < 3 for error, known in zip(errors, PROTOTYPE_BIAS, strict=True))
    return f"{words(errors)}; slope {found:.3f}", abs(found - 1) <= 0.1 and near


def _exactness_checked() -> tuple[str, bool]:
    worst = max(biases()[1])
    return f"{worst:.1e} at most", worst <= 1e-6


def _ends_checked() -> tuple[str, bool]:
    sigmas = SIGMAS[:3]
    norms = [float(np.linalg.norm(QUADRATIC.hypergradient(double_loop(sigma)[0][-1]))) for sigma in sigmas]
    near = all(1 / 3 < norm / known < 3 for norm, known in zip(norms, PROTOTYPE_ENDS, strict=True))
    found = slope(sigmas, norms)
    return f"{words(norms)}; slope {found:.3f}", abs(found - 1) <= 0.1 and near


def _warmth_checked() -> tuple[str, bool]:
    sigma, minimiser = 1e-2, QUADRATIC.minimiser()
    ends = {
        warm: float(np.linalg.norm(double_loop(sigma, warm=warm)[0][-1] - minimiser)) for warm in (True, False)
    }
    return f"{ends[True]:.2g} from the minimiser warm, {ends[False]:.2g} cold", ends[True] < 0.1 * ends[False]


class _WithoutMomentum(SingleLoop):
    def _running(self, now: list[Tensor], batch: Any) -> list[Tensor]:
        return now


@cache
def single_loops() -> dict[str, float]:
    """‖∇ψ_σ‖ over the last tenth of 2,000 sampled steps, mean of 3 seeds; half as many with momentum."""
    sigma, found = 0.1, {}
    for name, kind in (("momentum", SingleLoop), ("without", _WithoutMomentum)):
        # As many gradients for both: momentum asks for each sample's at two points.
        steps = 1000 if kind is SingleLoop else 2000
        norms = []
        for seed in range(3):
            random = torch.Generator().manual_seed(seed)
            x = torch.nn.Parameter(torch.from_numpy(START.copy()))

            def upper(x: Tensor, y: Tensor, noise: list[Tensor]) -> Tensor:
                return QUADRATIC.upper(x, y, None) + noise[0] @ x + noise[1] @ y

            def lower(x: Tensor, y: Tensor, noise: list[Tensor]) -> Tensor:
                return QUADRATIC.lower(x, y, None) + noise[2] @ x + noise[3] @ y

            zeros = torch.zeros(QUADRATIC.inner, dtype=torch.float64)
            levels = Levels("check", upper, lower, x, zeros, sigma)
            loop = kind(levels, 0.05, QUADRATIC.inner_rate(sigma), sampled=True)
            for step in range(steps):
                sizes = (QUADRATIC.outer, QUADRATIC.inner) * 2
                loop.step([0.3 * torch.randn(n, generator=random, dtype=torch.float64) for n in sizes])
                if step >= 0.9 * steps:
                    norms.append(np.linalg.norm(QUADRATIC.penalty_gradient(x.detach().numpy(), sigma)))
        found[name] = float(np.mean(norms))
    return found


def _single_checked() -> tuple[str, bool]:
    found = single_loops()
    text = f"{found['momentum']:.3g} with momentum, {found['without']:.3g} without"
    return text, found["momentum"] < found["without"]


def _single_exact_checked() -> tuple[str, bool]:
    sigma, goal = 1e-2, 2e-3
    rate = QUADRATIC.inner_rate(sigma)
    costs = {}
    for lr in (0.3, 0.1, 0.03, 0.01, 0.003):
        x = torch.nn.Parameter(torch.from_numpy(START.copy()))
        zeros = torch.zeros(QUADRATIC.inner, dtype=torch.float64)
        levels = Levels("check", QUADRATIC.upper, QUADRATIC.lower, x, zeros, sigma)
        loop = SingleLoop(levels, lr, rate, sampled=False)
        while (
            loop.steps < 1000 and np.linalg.norm(QUADRATIC.penalty_gradient(x.detach().numpy(), sigma)) > goal
        ):
            loop.step(None)
        costs[lr] = 2 * loop.steps if loop.steps < 1000 else np.inf
    lr = min(costs, key=lambda key: costs[key])
    path, double_costs = double_loop(sigma)
    lengths = [float(np.linalg.norm(QUADRATIC.penalty_gradient(x, sigma))) for x in path]
    cost = rounds_to_level(lengths, goal, double_costs)
    return f"{costs[lr]:.0f} at its best α, {lr}; double loop {cost:.0f}", costs[lr] < cost


# ------------------------------------------------------------------ the digits


@cache
def digits() -> DigitsRegularisation:
    """One problem for all."""
    return DigitsRegularisation()


class Track:
    """Validation loss and error on the test digits against the cost."""

    def __init__(self) -> None:
        self.cost: list[int] = []
        self.loss: list[float] = []
        self.error: list[float] = []

    def note(self, cost: int) -> None:
        """At the problem's present weights."""
        self.cost.append(cost)
        self.loss.append(digits().evaluate())
        self.error.append(digits().test_error())

    def best(self) -> int:
        """Where the validation loss is least: that is what a user keeps."""
        return int(np.argmin(self.loss))

    def cost_to(self, level: float) -> float:
        """The first cost at which the loss is no higher; NaN where it never is."""
        return rounds_to_level(self.loss, level, self.cost)


def penalty_source(sigma: float = 1e-3, **options: Any) -> optex.PenaltyHypergradient:
    """The problem's own, at another σ."""
    problem = digits()
    start = torch.zeros(10, 21, dtype=torch.float64)
    return optex.PenaltyHypergradient(
        problem.upper, problem.lower, problem.log_weights, start, sigma=sigma, deterministic=True, **options
    )


def adam(gradient: Callable[[], int]) -> Track:
    """Steps of Adam along what ``gradient`` leaves; it answers the cost so far."""
    problem, track = digits(), Track()
    problem.reset()
    base = torch.optim.Adam([problem.log_weights], lr=RATE)
    track.note(0)
    for _ in range(STEPS):
        cost = gradient()
        base.step()
        track.note(cost)
    return track


@cache
def penalty(sigma: float = 1e-3) -> Track:
    """Warm starts at every step."""
    source = penalty_source(sigma)

    def gradient() -> int:
        source.gradient(None)
        source.accept()
        return source.lower_gradients

    return adam(gradient)


class Implicit:
    """The hypergradient by the implicit function theorem: L-BFGS for y*, conjugate gradients for the rest."""

    def __init__(self, tolerance: float = 1e-4) -> None:
        self.tolerance, self.cost = tolerance, 0
        self.y = torch.zeros(210, dtype=torch.float64)
        self.v = torch.zeros(210, dtype=torch.float64)
        problem = digits()
        start = torch.zeros(10, 21, dtype=torch.float64)
        self.levels = Levels("implicit", problem.upper, problem.lower, problem.log_weights, start, 1.0)

    def __call__(self) -> int:
        problem, x = digits(), digits().log_weights.detach()
        _, pull = self.levels.slope([x], self.y, None, 1.0, 0.0)
        goal = self.tolerance * float(pull.norm())
        found = limited_memory_bfgs(lambda v: self.levels.slope([x], v, None, 0.0, 1.0), self.y, goal, 500)
        self.y = found.point
        self.cost += found.calls + 1
        _, pull = self.levels.slope([x], self.y, None, 1.0, 0.0)
        outer, inner = x.clone().requires_grad_(), self.y.clone().requires_grad_()
        value = problem.lower(outer, inner.view(10, 21))
        (of_y,) = torch.autograd.grad(value, inner, create_graph=True)
        self._solve(of_y, inner, pull)
        (cross,) = torch.autograd.grad(of_y, outer, self.v)
        problem.log_weights.grad = -cross
        return self.cost

    def _solve(self, of_y: Tensor, inner: Tensor, pull: Tensor) -> None:
        """H v = ∇_y f, from the last v."""

        def product(v: Tensor) -> Tensor:
            self.cost += 2
            return torch.autograd.grad(of_y, inner, v, retain_graph=True)[0]

        residual = pull - product(self.v)
        direction = residual.clone()
        for _ in range(500):
            square = residual @ residual
            if square.sqrt() <= self.tolerance * pull.norm():
                return
            image = product(direction)
            length = square / (direction @ image)
            self.v = self.v + length * direction
            residual = residual - length * image
            direction = residual + (residual @ residual) / square * direction


@cache
def implicit() -> Track:
    """Adam, with exact hypergradients."""
    return adam(Implicit())


def outer_lbfgs(ask: Callable[[], tuple[int, float]]) -> Track:
    """SciPy's L-BFGS-B along what ``ask`` leaves; it answers the cost so far, and the loss."""
    problem, track = digits(), Track()
    problem.reset()
    track.note(0)

    def function(x: np.ndarray) -> tuple[float, np.ndarray]:
        with torch.no_grad():
            problem.log_weights.copy_(torch.from_numpy(x))
        cost, loss = ask()
        track.note(cost)
        return loss, grad_of(problem.log_weights).numpy().copy()

    start = problem.log_weights.detach().numpy().copy()
    minimize(function, start, jac=True, method="L-BFGS-B", options={"maxfun": STEPS})
    return track


@cache
def implicit_lbfgs() -> Track:
    """What a user with second derivatives takes."""
    problem, ask = digits(), Implicit(1e-6)

    def answer() -> tuple[int, float]:
        cost = ask()
        return cost, float(problem.upper(problem.log_weights.detach(), ask.y.view(10, 21)))

    return outer_lbfgs(answer)


@cache
def penalty_lbfgs() -> Track:
    """The same, on the penalty and its gradient."""
    source = penalty_source(tolerance=1e-6)

    def answer() -> tuple[int, float]:
        loss, _ = source.gradient(None)
        source.accept()
        return source.lower_gradients, float(loss)

    return outer_lbfgs(answer)


@cache
def grid() -> Track:
    """One weight for all classes: as many lower solves as the penalty's, from large to small, warm."""
    problem, track = digits(), Track()
    ask = Implicit()
    for weight in np.linspace(0.0, -10.0, 2 * STEPS):
        with torch.no_grad():
            problem.log_weights.fill_(float(weight))
        x = problem.log_weights.detach()
        found = limited_memory_bfgs(lambda v, x=x: ask.levels.slope([x], v, None, 0.0, 1.0), ask.y, 1e-5, 500)
        ask.y = found.point
        ask.cost += found.calls
        track.note(ask.cost)
    return track


@cache
def under_optex(seed: int) -> dict[str, list[float]]:
    """Adam alone and under OptEx, N = 4: the exact validation loss after every round."""
    losses = {}
    for name, rounds in (("Adam", 30), ("OptEx, N = 4", 8)):
        problem = DigitsRegularisation(seed)
        source = problem.source()
        base = torch.optim.Adam(problem.parameters(), lr=0.03)
        loss = [problem.evaluate()]
        if name == "Adam":
            for _ in range(rounds):
                source.gradient(None)
                source.accept()
                base.step()
                loss.append(problem.evaluate())
        else:
            work = optex.OptEx(base, parallelism=4).rounds(itertools.repeat(None), source)
            for _ in itertools.islice(work, rounds):
                source.accept()
                loss.append(problem.evaluate())
        losses[name] = loss
    return losses


def _optex_checked() -> tuple[str, bool]:
    shares = []
    for seed in range(2):
        losses = under_optex(seed)
        shares.append(rounds_to_level(losses["OptEx, N = 4"], losses["Adam"][-1]) / 30)
    return f"{words(shares)} of 30 rounds (2 starts)", bool(max(shares) <= 0.4)


def described(track: Track) -> str:
    """What is kept of a run."""
    best = track.best()
    return f"{track.loss[best]:.4f} (test error {track.error[best]:.3f})"


def _grid_checked() -> tuple[str, bool]:
    found, rival = penalty(), grid()
    return (
        f"{described(found)} per class; {described(rival)} with one weight, {rival.cost[-1]} gradients of the "
        f"lower level against {found.cost[-1]}",
        min(found.loss) < min(rival.loss),
    )


def _accuracy_checked() -> tuple[str, bool]:
    found, rival = penalty(), grid()
    errors = found.error[found.best()], rival.error[rival.best()]
    return f"{errors[0]:.3f} per class, {errors[1]:.3f} with one weight", errors[0] <= errors[1]


def _implicit_checked() -> tuple[str, bool]:
    tracks = {
        "penalty, Adam": penalty(),
        "implicit, Adam": implicit(),
        "penalty, L-BFGS-B": penalty_lbfgs(),
        "implicit, L-BFGS-B": implicit_lbfgs(),
    }
    level = max(min(track.loss) for track in tracks.values()) + 0.002
    costs = {name: track.cost_to(level) for name, track in tracks.items()}
    ends = "; ".join(f"{name} {described(track)}, {costs[name]:.0f}" for name, track in tracks.items())
    return ends, bool(
        costs["penalty, Adam"] <= costs["implicit, Adam"]
        and costs["penalty, L-BFGS-B"] <= costs["implicit, L-BFGS-B"]
    )


def _sigmas_checked() -> tuple[str, bool]:
    ends = {sigma: penalty(sigma).loss[-1] for sigma in (1e-1, 1e-3)}
    best = implicit().loss[-1]
    text = ", ".join(f"{loss:.4f} at {sigma:g}" for sigma, loss in ends.items())
    return f"{text}; exact {best:.4f}", ends[1e-3] - best < 0.002


CHECKS = [
    Check(
        "bias of the hypergradient, σ = 0.1, 0.01, 0.001, 0.0001",
        "0.096, 0.0109, 0.00110, 0.00011 on a prototype's quadratic, within a factor 3; slope 1 ± 0.1",
        _bias_checked,
    ),
    Check("error against ∇ψ_σ in closed form", "at most 1e-6, at all four σ", _exactness_checked),
    Check(
        "‖∇F‖ where the double loop ends, σ = 0.1, 0.01, 0.001",
        "0.022, 0.0022, 0.00022 (prototype), within a factor 3; slope 1 ± 0.1",
        _ends_checked,
    ),
    Check(
        "ten inner steps from a warm start against ten from 0",
        "the error is less than a tenth after 500 rounds",
        _warmth_checked,
    ),
    Check(
        "single loop, exact: gradients of the lower level to ‖∇ψ_σ‖ = 0.002",
        "fewer than the double loop's, with T = 10 and α = ½ / L_ψ",
        _single_exact_checked,
    ),
    Check(
        "single loop, sampled: ‖∇ψ_σ‖ in the end, σ = 0.1",
        "momentum's is lower, at as many gradients",
        _single_checked,
    ),
    Check(
        "digits: validation loss per class, against a grid of one weight",
        "lower, with as many lower solves (200)",
        _grid_checked,
    ),
    Check("digits: test error of the two", "no higher per class", _accuracy_checked),
    Check(
        "digits: gradients of the lower level to within 0.002 of where all get",
        "no more than implicit differentiation's, with the same optimizer",
        _implicit_checked,
    ),
    Check(
        "digits: validation loss after 100 steps, by σ",
        "at σ = 0.001, the least weight, within 0.002 of exact hypergradients'",
        _sigmas_checked,
    ),
    Check("OptEx, N = 4, digits: share of Adam's rounds to its loss", "at most 0.4", _optex_checked),
]


# ------------------------------------------------------------------ the picture


def curves() -> dict[str, Any]:
    """What is drawn."""
    tracks = {
        "penalty, Adam": penalty(),
        "implicit, Adam": implicit(),
        "penalty, L-BFGS-B": penalty_lbfgs(),
        "implicit, L-BFGS-B": implicit_lbfgs(),
        "one weight, grid": grid(),
    }
    return {
        "sigmas": list(SIGMAS),
        "bias": biases()[0],
        "digits": {name: {"cost": track.cost, "loss": track.loss} for name, track in tracks.items()},
        "optex": under_optex(0),
    }


def draw(curves: dict[str, Any]) -> Figure:
    """Bias along σ; the digits along cost; OptEx."""
    figure = Figure(figsize=(12.6, 3.9), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    left.loglog(curves["sigmas"], curves["bias"], color="#0072b2", marker="o", label="measured")
    line = [curves["bias"][0] * sigma / curves["sigmas"][0] for sigma in curves["sigmas"]]
    left.loglog(curves["sigmas"], line, color="#000000", linestyle=":", label="slope 1")
    left.set_xlabel("σ")
    left.set_ylabel("relative error of the hypergradient")
    left.set_title("bias, quadratic", fontsize=11)
    colours = ("#d55e00", "#0072b2", "#d55e00", "#0072b2", "#8a8a8a")
    styles = ("-", "-", "--", "--", ":")
    for (name, track), colour, style in zip(curves["digits"].items(), colours, styles, strict=True):
        best = np.minimum.accumulate(track["loss"])
        middle.plot(track["cost"], best, color=colour, linestyle=style, linewidth=1.8, label=name)
    middle.set_xlabel("gradients of the lower level")
    middle.set_ylabel("best validation loss so far")
    middle.set_xscale("symlog", linthresh=100)
    middle.set_title("L2 weights of ten classes of digits", fontsize=11)
    for (name, loss), colour, style in zip(
        curves["optex"].items(), ("#000000", "#d55e00"), (":", "-"), strict=True
    ):
        right.plot(range(len(loss)), loss, color=colour, linestyle=style, linewidth=1.8, label=name)
    right.axhline(curves["optex"]["Adam"][-1], color="#000000", linewidth=0.6, alpha=0.6, label="Adam's last")
    right.set_xlabel("rounds (sequential hypergradients)")
    right.set_ylabel("validation loss")
    right.set_title("under OptEx, Adam 0.03", fontsize=11)
    for panel in (left, middle, right):
        panel.grid(visible=True, which="major", linewidth=0.5, alpha=0.35)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(fontsize=8, frameon=False)
    return figure
