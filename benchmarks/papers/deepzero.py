"""DeepZero: coordinate-wise gradients from losses (Chen et al., ICLR 2024, arXiv 2310.02025).

Estimates are judged on two moons (2-16-16-2, d = 354). The larger run is Fashion-MNIST, pooled to 7 × 7 pixels,
by a 49-16-10 network (d = 970) with the authors' SGD (0.1, momentum 0.9, decay 5e-4, cosine) and masks (a tenth
of the weights, drawn anew every 5 epochs): 10 epochs of 40 steps of 64 images, the same for all methods.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy.optimize import minimize
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional

import optex
from optex.sources.deepzero.grasp import _change_along_gradient
from optex.studies.measures import rounds_to_level
from optex.studies.problems import TwoMoons
from optex.studies.problems.data import Split, fashion_mnist
from papers import Check, losses_by_round

ROOM = "sources"


def flat(parameters: Iterable[Tensor]) -> Tensor:
    """All gradients in a row."""
    return torch.cat([p.grad.double().flatten() for p in parameters if p.grad is not None])


def exact(problem: nn.Module, batch: Any) -> Tensor:
    """The gradient by backpropagation."""
    problem.zero_grad()
    problem(batch).backward()
    return flat(list(problem.parameters()))


def cosine(left: Tensor, right: Tensor) -> float:
    """Of the angle between two rows."""
    return float(left @ right / left.norm() / right.norm())


# ------------------------------------------------------------------ the estimates, on two moons


@cache
def estimates() -> dict[str, list[tuple[float, float]]]:
    """Cosine and relative error of the estimates, at the start and where SGD is after 100 steps."""
    found: dict[str, list[tuple[float, float]]] = {"coordinates": [], "central": [], "random": []}
    for steps in (0, 100):
        problem = TwoMoons()
        parameters, base = list(problem.parameters()), torch.optim.SGD(problem.parameters(), 0.1, 0.9)
        for _ in range(steps):
            exact(problem, None)
            base.step()
        truth = exact(problem, None)
        torch.manual_seed(0)
        for name, source in (
            ("coordinates", problem.source()),
            ("central", optex.CoordinateSource(problem, parameters, vectorized=True, central=True)),
            ("random", optex.SPSASource(problem, parameters, 5e-3, len(truth), vectorized=True, chunk=64)),
        ):
            source.gradient(None)
            estimate = flat(parameters)
            found[name].append((cosine(estimate, truth), float((estimate - truth).norm() / truth.norm())))
    return found


def _near(place: int) -> tuple[str, bool]:
    (along, away), central = estimates()["coordinates"][place], estimates()["central"][place]
    figure = f"{along:.6f} and {away:.4f}; central differences {central[0]:.6f} and {central[1]:.4f}"
    return figure, along >= 0.999 and away <= 0.01


def _random_far() -> tuple[str, bool]:
    found = [c for c, _ in estimates()["random"]]
    return ", ".join(f"{c:.3f}" for c in found), all(0.5 <= c <= 0.9 for c in found)


def _reused() -> tuple[str, bool]:
    answers, counts = [], []
    for reuse in (False, True):
        problem, count = TwoMoons().double(), itertools.count()
        for block in problem.objective.blocks:
            block.register_forward_hook(lambda *_, count=count: (next(count), None)[1])
        source = optex.CoordinateSource(problem.objective, problem.parameters(), reuse=reuse)
        source.gradient(None)
        answers.append(flat(list(problem.parameters())))
        counts.append(next(count))
    away = float((answers[0] - answers[1]).abs().max())
    return f"{away:.0e} apart; {counts[1]} block evaluations, {counts[0]} without", away <= 1e-12 and (
        counts[1] < counts[0]
    )


def moons_run(method: str, seed: int, steps: int = 80, rate: float = 0.1) -> tuple[list[float], float]:
    """Losses of SGD with momentum, and the accuracy held out in the end."""
    problem = TwoMoons(seed)
    parameters, losses = list(problem.parameters()), []
    torch.manual_seed(seed)
    half = problem.dimension // 2
    sources = {
        "backpropagation": optex.ObjectiveSource(problem, deterministic=True),
        "coordinates": problem.source(),
        "random": optex.SPSASource(problem, parameters, 5e-3, half, vectorized=True, chunk=64),
    }
    base = torch.optim.SGD(parameters, rate, 0.9)
    for _ in range(steps):
        base.zero_grad()
        losses.append(float(sources[method].gradient(None)[0]))
        base.step()
    return [*losses, problem.evaluate()], 1 - problem.test_error()


@cache
def accuracies() -> dict[str, list[float]]:
    """Accuracies on two moons, three starts."""
    methods = ("backpropagation", "coordinates", "random")
    return {name: [moons_run(name, seed)[1] for seed in range(3)] for name in methods}


def shown(values: list[float]) -> str:
    """Numbers in words."""
    return ", ".join(f"{value:.3f}" for value in values)


def _as_good_as_backpropagation() -> tuple[str, bool]:
    found = accuracies()
    apart = [abs(a - b) for a, b in zip(found["coordinates"], found["backpropagation"], strict=True)]
    figure = f"{shown(found['coordinates'])}; backpropagation {shown(found['backpropagation'])}"
    return figure, max(apart) <= 0.01


def _better_than_random() -> tuple[str, bool]:
    found = accuracies()
    figure = f"{shown(found['coordinates'])}; random directions {shown(found['random'])}"
    return figure, all(a > b for a, b in zip(found["coordinates"], found["random"], strict=True))


# ------------------------------------------------------------------ Fashion-MNIST

EPOCHS, STEPS, BATCH = 10, 40, 64
SPARSITY = 0.9


@cache
def images() -> dict[Split, tuple[Tensor, Tensor]]:
    """Pooled to 7 × 7, scaled; 2,560 to train on, 10,000 to test."""
    found = {}
    counts: dict[Split, int] = {"train": STEPS * BATCH, "test": 10_000}
    for split, count in counts.items():
        pixels, labels = fashion_mnist(split)
        pooled = functional.avg_pool2d(torch.from_numpy(pixels[:count]).float() / 255, 4).flatten(1)
        found[split] = ((pooled - 0.286) / 0.3, torch.from_numpy(labels[:count]).long())
    return found


def cross_entropy(scores: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The loss of a batch."""
    return functional.cross_entropy(scores, batch[1])


def clothes(seed: int) -> optex.BlockLoss:
    """The network with its loss, in two blocks."""
    torch.manual_seed(seed)
    hidden = nn.Sequential(nn.Linear(49, 16), nn.Tanh())
    return optex.BlockLoss([hidden, nn.Linear(16, 10)], cross_entropy)


def batches(seed: int) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
    """Every step's epoch and batch."""
    inputs, labels = images()["train"]
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(EPOCHS):
        for rows in torch.randperm(len(labels), generator=generator).split(BATCH):
            yield epoch, (inputs[rows], labels[rows])


def scored_batch() -> tuple[Tensor, Tensor]:
    """25 images of each class, as the authors score with."""
    inputs, labels = images()["train"]
    rows = torch.cat([(labels == c).nonzero().flatten()[:25] for c in range(10)])
    return inputs[rows], labels[rows]


def ratios(seed: int) -> list[float]:
    """ZO-GraSP's at the start: 192 random directions."""
    model = clothes(seed)
    parameters = list(model.parameters())
    torch.manual_seed(seed)
    source = optex.SPSASource(model, parameters, 5e-3, 192)
    return optex.zo_grasp_ratios(source, parameters, scored_batch(), SPARSITY)


QUERIES = 61


@torch.no_grad()
def accuracy(model: optex.BlockLoss) -> float:
    """On the 10,000 test images."""
    inputs, labels = images()["test"]
    return float((model.blocks(inputs).argmax(1) == labels).double().mean())


@cache
def trained(method: str, seed: int = 0, rate: float = 0.1) -> tuple[list[float], float]:
    """Accuracies after each epoch, and the evaluations of a gradient."""
    model, found = clothes(seed), []
    parameters = list(model.parameters())
    mask: optex.DynamicMask | None = None
    if method in ("masked", "static", "uniform"):
        shares = SHARE if method == "uniform" else ratios(seed)
        mask = optex.DynamicMask(parameters, shares, every=EPOCHS if method == "static" else 5)
    sources: dict[str, Callable[[], optex.GradientSource]] = {
        "backpropagation": lambda: optex.ObjectiveSource(model),
        "random": lambda: optex.SPSASource(model, parameters, 5e-3, QUERIES, vectorized=True),
    }
    make = sources.get(method, lambda: optex.CoordinateSource(model, parameters, mask=mask, vectorized=True))
    source = make()
    base = torch.optim.SGD(parameters, rate, 0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(base, EPOCHS * STEPS)
    torch.manual_seed(seed)
    for number, (epoch, batch) in enumerate(batches(seed)):
        if number % STEPS == 0:
            found.append(accuracy(model))
        if mask is not None:
            mask.epoch = epoch
        base.zero_grad()
        source.gradient(batch)
        base.step()
        schedule.step()
    return [*found, accuracy(model)], source.evaluations


SHARE = 1 - SPARSITY
RATES = (0.01, 0.03)


@cache
def random_rate() -> float:
    """The best of a few for random directions, by its own result: in its favour."""
    return max(RATES, key=lambda rate: trained("random", 0, rate)[0][-1])


def _dense() -> tuple[str, bool]:
    ours, evaluations = trained("dense")
    theirs, _ = trained("backpropagation")
    figure = f"{ours[-1]:.3f}, backpropagation {theirs[-1]:.3f}; {evaluations:.0f} evaluations a step"
    return figure, abs(ours[-1] - theirs[-1]) <= 0.01


def _masked() -> tuple[str, bool]:
    ours = [trained("masked", seed)[0][-1] for seed in range(2)]
    theirs = [trained("backpropagation", seed)[0][-1] for seed in range(2)]
    evaluations = trained("masked")[1]
    figure = f"{shown(ours)}, backpropagation {shown(theirs)}; {evaluations:.0f} evaluations a step"
    return figure, all(a >= b - 0.02 for a, b in zip(ours, theirs, strict=True))


def _redrawn() -> tuple[str, bool]:
    ours, still, uniform = (
        [trained(method, seed)[0][-1] for seed in range(2)] for method in ("masked", "static", "uniform")
    )
    figure = f"{shown(ours)}; one mask throughout {shown(still)}; a tenth of each layer {shown(uniform)}"
    return figure, all(a > b and a > c for a, b, c in zip(ours, still, uniform, strict=True))


def _against_random() -> tuple[str, bool]:
    rate = random_rate()
    ours, evaluations = trained("masked")
    theirs, others = trained("random", 0, rate)
    figure = (
        f"{ours[-1]:.3f} ({evaluations:.0f} evaluations), random directions {theirs[-1]:.3f} "
        f"({others:.0f}, lr {rate:g})"
    )
    return figure, ours[-1] > theirs[-1]


class OwnDraws(optex.GradientSource):
    """Another draw of directions at every call, as the authors' two estimates have."""

    def __init__(self, source: optex.GradientSource) -> None:
        self.source, self._calls = source, itertools.count(100)

    def gradient(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        torch.manual_seed(next(self._calls))
        return self.source.gradient(batch)


@cache
def scored() -> dict[str, tuple[float, float]]:
    """The hidden layer's ratio, and the rank correlation of |S| with exact scores."""
    model = clothes(0)
    parameters, batch = list(model.parameters()), scored_batch()
    layers = [place for place, p in enumerate(parameters) if p.ndim > 1]

    def scores(source: optex.GradientSource, mu: float) -> np.ndarray:
        torch.manual_seed(0)
        with torch.no_grad():
            change = _change_along_gradient(source, parameters, batch, mu)
        return torch.cat([(parameters[i].detach() * change[i]).abs().flatten() for i in layers]).numpy()

    random = optex.SPSASource(model, parameters, 5e-3, 192)
    sources = {
        "backpropagation": optex.ObjectiveSource(model),
        "coordinates": optex.CoordinateSource(model, parameters, vectorized=True),
        "192 directions, shared": random,
        "192 directions, each their own": OwnDraws(random),
    }
    truth, found = scores(sources["backpropagation"], 5e-3), {}
    for name, source in sources.items():
        torch.manual_seed(0)
        share = optex.zo_grasp_ratios(source, parameters, batch, SPARSITY)[0]
        found[name] = (share, float(np.asarray(spearmanr(scores(source, 5e-3), truth))[0]))
    return found


def _ratios() -> tuple[str, bool]:
    found = scored()
    figure = "; ".join(f"{name} {share:.3f} ({rank:.2f})" for name, (share, rank) in found.items())
    return figure, abs(found["192 directions, shared"][0] - found["backpropagation"][0]) <= 0.05


# ------------------------------------------------------------------ under OptEx

ROUNDS = 30
MOON_RATES = (0.2, 0.4, 0.8, 1.6)


def under_optex(rate: float, seed: int) -> list[float]:
    """The same SGD under OptEx at N = 4."""
    problem = TwoMoons(seed)
    optimizer = optex.OptEx(torch.optim.SGD(problem.parameters(), rate, 0.9), parallelism=4)
    return losses_by_round(optimizer, problem, ROUNDS)


def quasi_newton(seed: int) -> list[float]:
    """SciPy's L-BFGS-B with its own differences; the best loss after each gradient's worth of evaluations."""
    problem, seen, count = TwoMoons(seed).double(), [problem_loss(seed)], itertools.count()
    parameters = list(problem.parameters())

    def fun(x: np.ndarray) -> float:
        with torch.no_grad():
            nn.utils.vector_to_parameters(torch.from_numpy(x), parameters)
        value = problem.evaluate()
        if next(count) % (len(x) + 1) == 0:
            seen.append(min(value, seen[-1]))
        return value

    start = nn.utils.parameters_to_vector(parameters).detach().numpy()
    minimize(fun, start, method="L-BFGS-B", options={"maxfun": ROUNDS * (len(start) + 1)})
    return seen[: ROUNDS + 1]


def problem_loss(seed: int) -> float:
    """At the start."""
    return TwoMoons(seed).evaluate()


@cache
def rounds() -> dict[str, Any]:
    """Losses of two starts, each method at the best of its rates on a third."""

    def best(run: Callable[[float], list[float]]) -> float:
        return min(MOON_RATES, key=lambda rate: min(run(rate)[-5:]))

    plain = best(lambda rate: moons_run("coordinates", 2, ROUNDS, rate)[0])
    ours = best(lambda rate: under_optex(rate, 2))
    seeds = range(2)
    return {
        "rates": (plain, ours),
        "sgd": [moons_run("coordinates", seed, ROUNDS, plain)[0] for seed in seeds],
        "optex": [under_optex(ours, seed) for seed in seeds],
        "optex at sgd's rate": [under_optex(plain, seed) for seed in seeds],
        "l-bfgs-b": [quasi_newton(seed) for seed in seeds],
    }


def taken(method: str) -> list[float]:
    """Rounds to the loss that SGD ends with."""
    found = rounds()
    return [rounds_to_level(found[method][i], plain[-1]) for i, plain in enumerate(found["sgd"])]


def _under_optex() -> tuple[str, bool]:
    shares, alike = ([r / ROUNDS for r in taken(name)] for name in ("optex", "optex at sgd's rate"))
    plain, ours = rounds()["rates"]
    figure = (
        f"{', '.join(f'{s:.2f}' for s in shares)} of SGD's rounds, at lr {ours:g} and SGD's {plain:g}; "
        f"both at {plain:g}: {', '.join(f'{s:.2f}' for s in alike)}"
    )
    return figure, all(share <= 0.4 for share in shares)


def _instead() -> tuple[str, bool]:
    ours, others = taken("optex"), taken("l-bfgs-b")
    figure = (
        f"OptEx {', '.join(f'{r:.0f}' for r in ours)} rounds of 4 gradients, L-BFGS-B "
        f"{', '.join('more' if math.isnan(r) else f'{r:.0f}' for r in others)} gradients"
    )
    return figure, all(math.isnan(b) or a < b for a, b in zip(ours, others, strict=True))


CHECKS = [
    Check(
        "coordinates at the start: cosine, relative error",
        "≥ 0.999 and ≤ 0.01 (prototype)",
        lambda: _near(0),
    ),
    Check(
        "the same after 100 steps of SGD, where the gradient is small", "≥ 0.999 and ≤ 0.01", lambda: _near(1)
    ),
    Check("random directions, q = d = 354: cosine", "0.5 to 0.9 (prototype); 0.71 derived", _random_far),
    Check(
        "two moons: accuracy against backpropagation's",
        "within 0.01, three starts",
        _as_good_as_backpropagation,
    ),
    Check(
        "two moons: accuracy against 177 random directions, as many evaluations",
        "coordinates are better, three starts (paper)",
        _better_than_random,
    ),
    Check("features reused", "equal to 1e-12, fewer block evaluations", _reused),
    Check(
        "ratio of the hidden layer by score (rank correlation with exact scores)",
        "192 shared directions: within 0.05 of exact",
        _ratios,
    ),
    Check("Fashion-MNIST, all coordinates: test accuracy", "within 0.01 of backpropagation's", _dense),
    Check(
        "Fashion-MNIST, a tenth of the weights: test accuracy",
        "at most 0.02 below backpropagation's, two starts",
        _masked,
    ),
    Check("the same, masks redrawn, ZO-GraSP's ratios", "better than either without, two starts", _redrawn),
    Check("the same, against random directions", "better at as many evaluations", _against_random),
    Check("OptEx, N = 4, two moons", "at most 0.4 of SGD's rounds to SGD's loss", _under_optex),
    Check("L-BFGS-B by SciPy's differences in its place", "OptEx takes fewer rounds", _instead),
]


def curves() -> dict[str, Any]:
    """Cosines by directions, accuracies by epoch, losses by round."""
    return {
        "cosines": [[n, *directions(n)] for n in (1, 4, 16, 64, 256, 1024)],
        "coordinates": estimates()["coordinates"][0][0],
        "fashion": {
            "backpropagation": trained("backpropagation")[0],
            "coordinates, all": trained("dense")[0],
            "coordinates, a tenth": trained("masked")[0],
            "random directions": trained("random", 0, random_rate())[0],
        },
        "moons": {name: rounds()[name][0] for name in ("sgd", "optex", "l-bfgs-b")},
    }


def directions(count: int) -> tuple[float, float]:
    """Cosine of so many random directions, measured and derived."""
    problem = TwoMoons()
    parameters, truth = list(problem.parameters()), exact(problem, None)
    torch.manual_seed(1)
    optex.SPSASource(problem, parameters, 5e-3, count, vectorized=True, chunk=64).gradient(None)
    return cosine(flat(parameters), truth), 1 / math.sqrt(1 + (len(truth) + 1) / count)


BLUE, ORANGE, GREEN, YELLOW = "#0072B2", "#D55E00", "#009E73", "#E69F00"


def draw(found: dict[str, Any]) -> Figure:
    """The estimates, Fashion-MNIST, under OptEx."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    FigureCanvasAgg(figure)
    estimate, fashion, moons = figure.subplots(1, 3)
    counts, measured, derived = zip(*found["cosines"], strict=True)
    estimate.semilogx(counts, derived, color="black", label="1/√(1 + (d + 1)/q)")
    estimate.semilogx(counts, measured, "o", color=ORANGE, label="q random directions")
    estimate.axhline(found["coordinates"], color=BLUE, label="354 coordinates")
    estimate.set(title="two moons, d = 354", xlabel="directions q", ylabel="cosine with the gradient")
    for (name, values), colour in zip(found["fashion"].items(), (ORANGE, BLUE, GREEN, YELLOW), strict=True):
        dashed = "--" if name == "coordinates, all" else "-"
        fashion.plot(values, color=colour, label=name, linestyle=dashed)
    fashion.set(title="Fashion-MNIST, 49-16-10", xlabel="epochs of 40 steps", ylabel="test accuracy")
    names = {"sgd": "SGD on coordinates", "optex": "OptEx over it, N = 4", "l-bfgs-b": "L-BFGS-B, differences"}
    for (name, values), colour in zip(found["moons"].items(), (ORANGE, BLUE, GREEN), strict=True):
        moons.semilogy(values, color=colour, label=names[name])
    moons.set(title="two moons under OptEx", xlabel="rounds (L-BFGS-B: gradients)", ylabel="loss")
    for place in (estimate, fashion, moons):
        place.legend(frameon=False)
        place.grid(alpha=0.3)
    return figure
