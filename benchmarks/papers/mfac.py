"""M-FAC (arXiv 2107.03356): precision, an ill-conditioned regression, pruning, and what OptEx makes of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from itertools import islice, product
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim import Optimizer

import optex
from optex.optimizers import MFAC
from optex.optimizers.mfac import gradient_rows, inverse_diagonal, inverse_product, obs_mask, obs_update
from optex.studies.measures import rounds_to_level
from optex.studies.problems import DigitsMLP, Problem, make_problem
from papers import Check

ROOM = "optimizers"

SEEDS = range(3)
Make = Callable[[Iterable[Tensor]], Optimizer]


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Numbers from a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def relative(found: Tensor, expected: Tensor) -> float:
    """Length of the error over that of what is expected."""
    return float((found.double() - expected).norm() / expected.norm())


def dense(rows: Tensor, damping: float) -> Tensor:
    """The Fisher matrix, written down."""
    rows = rows.double()
    return damping * torch.eye(rows.shape[1], dtype=torch.float64) + rows.mT @ rows / len(rows)


# ------------------------------------------------------------------ precision


def last_step(rows: Tensor, window_size: int, damping: float) -> Tensor:
    """The direction that the optimizer takes with the last of these gradients."""
    theta = nn.Parameter(torch.zeros(rows.shape[1], dtype=rows.dtype))
    optimizer = MFAC([theta], lr=1.0, window_size=window_size, damping=damping)
    for row in rows:
        with torch.no_grad():
            theta.zero_()
        theta.grad = row.clone()
        optimizer.step()
    return -theta.detach()


def check_float64() -> tuple[str, bool]:
    """A step against the dense inverse."""
    worst = 0.0
    for damping in (1e-3, 1e-1, 10.0):
        for size, dimension in ((8, 40), (32, 300), (64, 20)):
            rows = normal(size, dimension)
            expected = torch.linalg.solve(dense(rows, damping), rows[-1])
            worst = max(worst, relative(last_step(rows, size, damping), expected))
    return f"{worst:.1e}", worst <= 1e-9


def check_float32() -> tuple[str, bool]:
    """The push-through form and Woodbury's, both in float32."""
    # Gradients of some length: (1/m) GᵀG is then far above λ, as it is in training.
    rows = (3 * normal(64, 300)).float()
    expected = torch.linalg.solve(dense(rows, 1e-5), rows[-1].double())
    system = 64 * 1e-5 * torch.eye(64) + rows @ rows.mT
    woodbury = (rows[-1] - rows.mT @ torch.linalg.solve(system, rows @ rows[-1])) / 1e-5
    ours, naive = relative(last_step(rows, 64, 1e-5), expected), relative(woodbury, expected)
    return f"{ours:.1e}; Woodbury's formula {naive:.2g}", ours <= 1e-5


def check_ring() -> tuple[str, bool]:
    """Rows replaced one by one against a window that has only the last."""
    rows = normal(40, 10_000)
    replaced = last_step(rows, 16, 1e-3)
    rebuilt = last_step(rows[-16:], 16, 1e-3)
    error = relative(replaced, rebuilt)
    return f"{error:.1e}", error <= 1e-12


def check_static() -> tuple[str, bool]:
    """Diagonal and products against the dense inverse."""
    worst = 0.0
    for damping in (1e-3, 1e-1, 10.0):
        for size, dimension in ((8, 40), (32, 300), (64, 20)):
            rows, vector = normal(size, dimension), normal(dimension, seed=1)
            inverse = torch.linalg.inv(dense(rows, damping))
            worst = max(worst, relative(inverse_diagonal(rows, damping), inverse.diagonal()))
            worst = max(worst, relative(inverse_product(rows, vector, damping), inverse @ vector))
    return f"{worst:.1e}", worst <= 1e-9


# ------------------------------------------------------------------ ill-conditioned regression

METHODS: dict[str, tuple[Callable[..., Optimizer], dict[str, Any], tuple[float, ...]]] = {
    "M-FAC": (MFAC, {"window_size": 64}, (3e-4, 1e-3, 3e-3)),
    "SGD": (torch.optim.SGD, {}, (0.3, 1.0, 3.0, 10.0)),
    "momentum": (torch.optim.SGD, {"momentum": 0.9}, (0.03, 0.1, 0.3, 1.0, 3.0)),
    "Adam": (torch.optim.Adam, {}, (3e-3, 1e-2, 3e-2, 0.1, 0.3)),
}


@lru_cache
def regression(kind: str, seed: int) -> tuple[Tensor, Tensor, float]:
    """2000 cases of 50 features of scales 1 to 0.01, labels by a logistic teacher, and the least loss.

    ``plain``: the teacher's weights are normal, so that small features hardly matter. ``weighted``: they are
    0.3 times normal over the feature's scale, so that all matter alike. ``rotated``: that, and the features are
    mixed by an orthogonal matrix, so that no axis is that of a scale.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    scales = torch.logspace(0, -2, 50, dtype=torch.float64)
    inputs, teacher = draw(2000, 50) * scales, draw(50)
    if kind != "plain":
        teacher = 0.3 * teacher / scales
    chance = torch.sigmoid(inputs @ teacher)
    if kind == "rotated":
        inputs = inputs @ torch.linalg.qr(draw(50, 50))[0]
    labels = (torch.rand(2000, generator=generator, dtype=torch.float64) < chance).double()
    return inputs, labels, least_loss(inputs, labels)


def least_loss(inputs: Tensor, labels: Tensor) -> float:
    """By Newton's method."""
    weights = torch.zeros(50, dtype=torch.float64)

    def loss(at: Tensor) -> float:
        return float(binary_cross_entropy_with_logits(inputs @ at, labels))

    for _ in range(50):
        chance = torch.sigmoid(inputs @ weights)
        hessian = (inputs * (chance * (1 - chance))[:, None]).mT @ inputs / len(labels)
        step, length = torch.linalg.solve(hessian, inputs.mT @ (chance - labels) / len(labels)), 1.0
        while length > 1e-9 and loss(weights - length * step) > loss(weights):
            length /= 2
        weights = weights - length * step
    return loss(weights)


def regression_run(make: Make, kind: str, seed: int) -> list[float]:
    """Excess of the loss over all cases, every 50 of 1000 steps with batches of 64."""
    inputs, labels, least = regression(kind, seed)
    generator = torch.Generator().manual_seed(1000 + seed)
    weights = nn.Parameter(torch.zeros(50, dtype=torch.float64))
    optimizer, found = make([weights]), []
    for step in range(1001):
        if step % 50 == 0:
            found.append(float(binary_cross_entropy_with_logits(inputs @ weights.detach(), labels)) - least)
        picked = torch.randint(len(labels), (64,), generator=generator)
        optimizer.zero_grad()
        binary_cross_entropy_with_logits(inputs[picked] @ weights, labels[picked]).backward()
        optimizer.step()
    return found


@lru_cache
def regressions(kind: str) -> dict[str, tuple[float, list[float]]]:
    """Of every method the rate that ends lowest in the mean over seeds, and the mean curve at it."""
    best = {}
    for name, (factory, settings, rates) in METHODS.items():
        curves = {}
        for lr in rates:
            make: Make = partial(factory, lr=lr, **settings)
            runs = [regression_run(make, kind, seed) for seed in SEEDS]
            curves[lr] = torch.tensor(runs, dtype=torch.float64).mean(0).tolist()
        lr = min(curves, key=lambda lr: curves[lr][-1])
        best[name] = (lr, curves[lr])
    return best


def told(kind: str) -> str:
    """Every method's last loss and rate, in words."""
    return ", ".join(f"{name} {curve[-1]:.4f} (lr {lr:g})" for name, (lr, curve) in regressions(kind).items())


def below(kind: str, *rivals: str) -> bool:
    """Whether M-FAC ends below all of these."""
    found = regressions(kind)
    return all(found["M-FAC"][1][-1] < found[rival][1][-1] for rival in rivals)


# ------------------------------------------------------------------ pruning

SPARSITIES = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
RULES = ("magnitude", "magnitude, updated", "M-FAC mask alone", "M-FAC, released sum", "M-FAC")


def trained(seed: int) -> Problem:
    """The digits network after 300 steps of Adam."""
    problem = make_problem("digits-mlp", seed=seed)
    problem.reset()
    optimizer = torch.optim.Adam(problem.parameters(), lr=3e-3)
    for batch in islice(problem.batches(), 300):
        optimizer.zero_grad()
        problem(batch).backward()
        optimizer.step()
    return problem


def pruned(rule: str, weights: Tensor, rows: Tensor, sparsity: float) -> Tensor:
    """The weights that a rule leaves."""
    by_magnitude = torch.ones(len(weights), dtype=torch.bool)
    by_magnitude[weights.abs().argsort()[: round(sparsity * len(weights))]] = False
    keep = by_magnitude if rule.startswith("magnitude") else obs_mask(weights, rows, sparsity)
    if rule in ("magnitude", "M-FAC mask alone"):
        return weights * keep
    return obs_update(weights, rows, keep, together=rule != "M-FAC, released sum")


@lru_cache
def accuracies() -> dict[str, list[float]]:
    """Percent of the held-out digits, mean over seeds: weight matrices pruned in one shot, biases not."""
    found = {rule: [0.0] * len(SPARSITIES) for rule in RULES} | {"dense": [0.0]}
    for seed in SEEDS:
        problem = trained(seed)
        matrices = [p for p in problem.parameters() if p.ndim == 2]
        weights = parameters_to_vector(matrices).detach().clone()
        rows = gradient_rows(matrices, problem, islice(problem.batches(), 256))
        found["dense"][0] += accuracy(problem) / len(SEEDS)
        for rule in RULES:
            for place, sparsity in enumerate(SPARSITIES):
                vector_to_parameters(pruned(rule, weights, rows, sparsity), matrices)
                found[rule][place] += accuracy(problem) / len(SEEDS)
        vector_to_parameters(weights, matrices)
    return found


def accuracy(problem: Problem) -> float:
    """Percent of the held-out digits that it gets right."""
    assert isinstance(problem, DigitsMLP)
    return 100 * (1 - problem.test_error())


def check_pruning(rule: str, rival: str, sparsities: tuple[float, ...]) -> tuple[str, bool]:
    """One rule against another, at every one of these sparsities."""
    found, words, holds = accuracies(), [], True
    for sparsity in sparsities:
        place = SPARSITIES.index(sparsity)
        ours, theirs = found[rule][place], found[rival][place]
        words.append(f"{ours:.1f} against {theirs:.1f} at {sparsity:.0%}")
        holds = holds and ours > theirs
    return f"{', '.join(words)}; dense {found['dense'][0]:.1f}", holds


# ------------------------------------------------------------------ a network, alone and under OptEx

ROUNDS = 40
SHARES = (1.0, 0.3, 0.1)  # of the tuned rate
DAMPINGS = (1e-5, 1e-3, 1e-1, 1.0)
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)


def plain(make: Make, seed: int, *, watched: bool = True) -> list[float]:
    """Loss over all digits, before and after every step with a batch of 32, or after the last alone."""
    problem = make_problem("digits-mlp", seed=seed)
    problem.reset()
    optimizer, found = make(problem.parameters()), [problem.evaluate()]
    for batch in islice(problem.batches(), ROUNDS):
        optimizer.zero_grad()
        problem(batch).backward()
        optimizer.step()
        if watched:
            found.append(problem.evaluate())
    return found if watched else [problem.evaluate()]


def wrapped(make: Make, seed: int) -> list[float]:
    """The same under OptEx with N = 4, before and after every round."""
    problem = make_problem("digits-mlp", seed=seed)
    problem.reset()
    optimizer, found = (
        optex.OptEx(make(problem.parameters()), parallelism=4, model=problem),
        [problem.evaluate()],
    )
    rounds = islice(optimizer.rounds(problem.batches(), problem), ROUNDS)
    found.extend(problem.evaluate() for _ in rounds)
    return found


def final(make: Make) -> float:
    """Mean loss after the last step."""
    last = [plain(make, seed, watched=False)[-1] for seed in SEEDS]
    return sum(last) / len(last) if all(map(math.isfinite, last)) else math.inf


@lru_cache
def searched() -> dict[str, list[tuple[float, dict[str, float]]]]:
    """Of every method all settings that were tried, with the mean loss after 40 steps."""
    grids = {
        "M-FAC": [
            {"damping": damping, "lr": lr, "momentum": momentum}
            for damping, lr, momentum in product(DAMPINGS, RATES, (0.0, 0.9))
        ],
        "momentum": [{"lr": lr, "momentum": 0.9} for lr in RATES],
        "Adam": [{"lr": lr} for lr in RATES],
    }
    return {
        name: [(final(partial(FACTORIES[name], **settings)), settings) for settings in grid]
        for name, grid in grids.items()
    }


FACTORIES: dict[str, Callable[..., Optimizer]] = {
    "M-FAC": partial(MFAC, window_size=64),
    "momentum": torch.optim.SGD,
    "Adam": torch.optim.Adam,
}


def best(name: str, **fixed: float) -> tuple[float, dict[str, float]]:
    """The lowest loss of those settings that have these values, and the setting."""
    choices = [found for found in searched()[name] if fixed.items() <= found[1].items()]
    return min(choices, key=lambda found: found[0])


def in_words(settings: dict[str, float]) -> str:
    """A setting as the table has it."""
    return ", ".join(f"{'λ' if name == 'damping' else name} {value:g}" for name, value in settings.items())


def check_rivals() -> tuple[str, bool]:
    """M-FAC against what one would take instead."""
    found = {name: best(name) for name in FACTORIES}
    words = "; ".join(f"{name} {loss:.3f} ({in_words(settings)})" for name, (loss, settings) in found.items())
    return words, all(found["M-FAC"][0] < found[rival][0] for rival in ("Adam", "momentum"))


class FrozenAlone(MFAC):
    """Drafts with F⁻¹ of the frozen window alone, without the drafted gradient in it."""

    def _direction(self, row: Tensor, memory: dict[str, Tensor]) -> Tensor:
        filled = min(int(memory["step"]), len(memory["window"]))
        if not self._frozen or not filled:
            return super()._direction(row, memory)
        damping = self.param_groups[0]["damping"]
        return inverse_product(memory["window"][:filled], row, damping).to(row.dtype)


@lru_cache
def under_optex(share: float) -> list[list[float]]:
    """Losses under OptEx of the tuned setting at this share of its rate, each seed's."""
    settings = best("M-FAC")[1]
    make = partial(FACTORIES["M-FAC"], **settings | {"lr": share * settings["lr"]})
    return [wrapped(make, seed) for seed in SEEDS]


@lru_cache
def alone() -> list[list[float]]:
    """Losses of the tuned setting alone, each seed's."""
    make = partial(FACTORIES["M-FAC"], **best("M-FAC")[1])
    return [plain(make, seed) for seed in SEEDS]


def gain(runs: list[list[float]], rulers: list[list[float]]) -> float:
    """Rounds of the base optimizer over rounds to its loss, mean over seeds; 0 where it is not reached."""
    gains = [
        0.0 if math.isnan(reached := rounds_to_level(run, ruler[-1])) else ROUNDS / reached
        for run, ruler in zip(runs, rulers, strict=True)
    ]
    return sum(gains) / len(gains)


def own_share() -> float:
    """The share of the tuned rate that OptEx does best with."""
    return max(SHARES, key=lambda share: gain(under_optex(share), alone()))


def check_optex(share: float | None) -> tuple[str, bool]:
    """What OptEx gains on the tuned optimizer, at this share of its rate or the best one."""
    picked = own_share() if share is None else share
    found, settings = gain(under_optex(picked), alone()), best("M-FAC")[1]
    return f"{found:.1f} ({in_words(settings | {'lr': picked * settings['lr']})})", found > 1


@lru_cache
def drafted() -> tuple[float, float, dict[str, float]]:
    """Gains of the two rules of drafting where λ is small; the setting is tuned for M-FAC alone."""
    settings = best("M-FAC", damping=1e-3, momentum=0.0)[1]
    rulers = [plain(partial(FACTORIES["M-FAC"], **settings), seed) for seed in SEEDS]
    ours, other = (
        gain([wrapped(partial(kind, window_size=64, **settings), seed) for seed in SEEDS], rulers)
        for kind in (MFAC, FrozenAlone)
    )
    return ours, other, settings


def check_drafting() -> tuple[str, bool]:
    """The two rules of drafting."""
    ours, other, settings = drafted()
    return f"{ours:.1f} against {other:.1f} ({in_words(settings)})", ours > other


REGRESSION = "logistic regression, 50 features of scales 1 to 0.01, 1000 batches of 64, m = 64"
CHECKS: list[Check] = [
    Check("a step against the dense inverse, float64, λ from 1e-3", "at most 1e-9 (derived)", check_float64),
    Check("a step in float32 at λ = 1e-5, against float64", "at most 1e-5 (derived)", check_float32),
    Check("a ring of replaced rows against a window built anew", "at most 1e-12 (derived)", check_ring),
    Check("diagonal and products of the static inverse, float64, λ from 1e-3", "at most 1e-9", check_static),
    Check(
        f"{REGRESSION}: excess loss",
        "M-FAC below tuned SGD, with momentum or without (recorded: 0.0077 against 0.0161)",
        lambda: (told("plain"), below("plain", "SGD", "momentum")),
    ),
    Check(
        "the same where all features matter alike",
        "M-FAC below tuned SGD, with momentum or without",
        lambda: (told("weighted"), below("weighted", "SGD", "momentum")),
    ),
    Check(
        "what one would take instead: tuned Adam on that",
        "M-FAC below Adam",
        lambda: (told("weighted"), below("weighted", "Adam")),
    ),
    Check(
        "the same with features mixed by a rotation",
        "M-FAC below Adam, SGD and momentum, all tuned",
        lambda: (told("rotated"), below("rotated", "Adam", "SGD", "momentum")),
    ),
    Check(
        "pruning the digits network in one shot: test accuracy in percent",
        "M-FAC above magnitude pruning",
        lambda: check_pruning("M-FAC", "magnitude", (0.5, 0.7, 0.8, 0.9)),
    ),
    Check(
        "the same at the end",
        "M-FAC above magnitude pruning",
        lambda: check_pruning("M-FAC", "magnitude", (0.95,)),
    ),
    Check(
        "one update for all dropped weights against the released sum of single ones",
        "above it (derived: it is the least of the quadratic)",
        lambda: check_pruning("M-FAC", "M-FAC, released sum", (0.7, 0.8, 0.9)),
    ),
    Check(
        "the mask alone, without the update",
        "above magnitude pruning",
        lambda: check_pruning("M-FAC mask alone", "magnitude", (0.7, 0.8, 0.9)),
    ),
    Check(
        "digits network, 40 batches of 32: training loss, all tuned",
        "M-FAC below Adam and momentum",
        check_rivals,
    ),
    Check(
        "OptEx, N = 4, on that at the same rate: 40 rounds alone over rounds to that loss",
        "more than 1",
        lambda: check_optex(1.0),
    ),
    Check(
        "the same with a rate of OptEx's own, of 1, 0.3 and 0.1 times that",
        "more than 1",
        lambda: check_optex(None),
    ),
    Check(
        "drafts at a small λ: the gradient in its row against the frozen window alone, accelerations",
        "more",
        check_drafting,
    ),
]


# ------------------------------------------------------------------ the picture


def curves() -> dict[str, Any]:
    """What the picture shows."""
    shown = {"alone": alone(), "same rate": under_optex(1.0), "own rate": under_optex(own_share())}
    runs = {name: torch.tensor(losses).mean(0).tolist() for name, losses in shown.items()}
    return {
        "regression": {name: curve for name, (_, curve) in regressions("rotated").items()},
        "sparsities": list(SPARSITIES),
        "accuracies": accuracies(),
        "rounds": runs,
    }


STYLES: dict[str, dict[str, Any]] = {
    "M-FAC": {"color": "#d55e00", "linewidth": 2.2},
    "SGD": {"color": "#8a8a8a", "linestyle": (0, (1, 1.2))},
    "momentum": {"color": "#000000", "linestyle": (0, (6, 2))},
    "Adam": {"color": "#0072b2", "linestyle": (0, (5, 1, 1, 1))},
    "magnitude": {"color": "#000000", "linestyle": (0, (6, 2))},
    "magnitude, updated": {"color": "#56b4e9", "linestyle": (0, (3, 1, 1, 1))},
    "M-FAC mask alone": {"color": "#009e73", "linestyle": (0, (1, 1.2))},
    "M-FAC, released sum": {"color": "#cc79a7", "linestyle": (0, (5, 1, 1, 1))},
    "alone": {"color": "#000000", "linestyle": (0, (6, 2)), "label": "M-FAC alone, tuned"},
    "same rate": {"color": "#56b4e9", "linestyle": (0, (3, 1, 1, 1)), "label": "OptEx, N = 4, same rate"},
    "own rate": {"color": "#d55e00", "linewidth": 2.2, "label": "OptEx, N = 4, rate of its own"},
}


def draw(curves: dict[str, Any]) -> Figure:
    """Regression, pruning, and rounds of a network."""
    figure = Figure(figsize=(13.5, 4.3), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    for name, curve in curves["regression"].items():
        line(left, name, range(0, 50 * len(curve), 50), curve)
    left.set(yscale="log", xlabel="step", ylabel="excess loss", title="rotated regression, tuned")
    for rule in RULES:
        line(middle, rule, [100 * s for s in curves["sparsities"]], curves["accuracies"][rule])
    middle.axhline(curves["accuracies"]["dense"][0], color="#8a8a8a", linewidth=0.8, label="dense")
    middle.set(
        xlabel="weights dropped, %", ylabel="test accuracy, %", title="digits network, pruned in one shot"
    )
    for name, losses in curves["rounds"].items():
        line(right, name, range(len(losses)), losses)
    right.set(yscale="log", xlabel="round", ylabel="training loss", title="digits network, batches of 32")
    for axes in (left, middle, right):
        axes.legend(frameon=False, fontsize=8)
        axes.grid(alpha=0.25)
    return figure


def line(axes: Axes, name: str, places: Iterable[float], values: list[float]) -> None:
    """One line in its own style."""
    axes.plot(list(places), values, **({"label": name, "linewidth": 1.6} | STYLES[name]))
