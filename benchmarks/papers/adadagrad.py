"""AdAdaGrad and AdaGrad-Norm: closed forms, batches that grow, and what a user would do instead."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional

from optex import AccumulatingSource, OptEx
from optex.batching import (
    AdaptiveBatches,
    BatchSizeController,
    GradientStatistics,
    InnerProductTest,
    NormTest,
)
from optex.optimizers import AdaGradNorm
from optex.sources import PerSampleSource
from optex.studies.measures import rounds_to_level
from optex.studies.problems import make_problem
from optex.studies.problems.data import fashion_mnist
from papers import Check, grad_of

ROOM = "optimizers"

# ---------------------------------------------------------------------- f_i = ½‖x - x_i‖²

DIMENSION, BUDGET = 100, 400_000
RATES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


def proposal() -> tuple[str, bool]:
    """The norm test at distance 1 from the minimum, x_i normal."""
    generator, size, eta = torch.Generator().manual_seed(0), 6600, 0.1
    rows = torch.randn(size, DIMENSION, generator=generator, dtype=torch.float64)
    rows[:, 0] += 1
    found = NormTest(eta).proposal(GradientStatistics.of_gradients([rows]))
    expected = DIMENSION / (eta**2 * (1 + DIMENSION / size))
    return f"{found:.0f}, derived {expected:.0f}", abs(found / expected - 1) <= 0.1


@cache
def adaptive_bowl(rate: float, seed: int = 0) -> tuple[float, int]:
    """Squared distance and steps after the budget, from distance 10 and a batch of 8; η is ½."""
    generator = torch.Generator().manual_seed(seed)
    x = nn.Parameter(torch.ones(DIMENSION))
    optimizer = AdaGradNorm([x], lr=rate)
    controller = BatchSizeController(8, BUDGET, test=NormTest(0.5))
    used = steps = 0
    while BUDGET - used >= 2:
        size = min(controller.batch_size, BUDGET - used)
        rows = x.detach() - torch.randn(size, DIMENSION, generator=generator)
        x.grad = rows.mean(0)
        optimizer.step()
        controller.update(GradientStatistics.of_gradients([rows]))
        used, steps = used + size, steps + 1
    return float(x.detach().square().sum()), steps


@cache
def fixed_bowl() -> dict[float, float]:
    """Squared distance after 50,000 steps on batches of 8, all rates at once by the recursion."""
    generator, rates = np.random.default_rng(0), np.array(RATES)[:, None]
    x, total = np.ones((len(RATES), DIMENSION)), np.full((len(RATES), 1), 1e-2)
    for _ in range(BUDGET // 8):
        gradient = x - generator.standard_normal(DIMENSION) / math.sqrt(8)
        total += (gradient**2).sum(1, keepdims=True)
        x -= rates / np.sqrt(total) * gradient
    return dict(zip(RATES, (x**2).sum(1).tolist(), strict=True))


def same_rate() -> tuple[str, bool]:
    """At the rate that is the distance to the minimum."""
    (found, steps), fixed = adaptive_bowl(10.0), fixed_bowl()[10.0]
    share = steps / (BUDGET / 8)
    figure = f"{found:.2g} in {steps} steps, fixed {fixed:.2g} in {BUDGET // 8:,}: {found / fixed:.3f} times"
    return figure, found <= 0.1 * fixed and share <= 0.01


def own_rates() -> tuple[str, bool]:
    """Each at its best rate of the grid."""
    found = {rate: adaptive_bowl(rate) for rate in RATES}
    best = min(RATES, key=lambda rate: found[rate][0])
    fixed = min(RATES, key=lambda rate: fixed_bowl()[rate])
    error, steps = found[best]
    figure = (
        f"{error:.2g} at rate {best:g} in {steps} steps, fixed {fixed_bowl()[fixed]:.2g} at rate {fixed:g}; "
        f"the plain mean of all samples: {DIMENSION / BUDGET:.2g}"
    )
    return figure, error <= 0.1 * fixed_bowl()[fixed]


def recursion() -> tuple[str, bool]:
    """AdaGradNorm on a stretched bowl, in three parameters, against plain arithmetic on one list."""
    scales = torch.linspace(0.1, 3, 30, dtype=torch.float64)
    pieces = [nn.Parameter(torch.ones(n, dtype=torch.float64)) for n in (1, 9, 20)]
    optimizer = AdaGradNorm(pieces)
    x, total, worst = [1.0] * 30, 1e-2, 0.0
    for _ in range(1000):
        optimizer.zero_grad()
        (scales * torch.cat([p.reshape(-1) for p in pieces]).square()).sum().div(2).backward()
        optimizer.step()
        gradient = [a * b for a, b in zip(scales.tolist(), x, strict=True)]
        total += sum(g * g for g in gradient)
        x = [a - g / math.sqrt(total) for a, g in zip(x, gradient, strict=True)]
        there = torch.cat([p.detach() for p in pieces])
        worst = max(worst, float((there - torch.tensor(x, dtype=torch.float64)).abs().max()))
    return f"{worst:.1e} after 1,000 steps", worst <= 1e-12


# ---------------------------------------------------------------------- Fashion-MNIST

SMALL, LARGE, MICRO, EVERY = 8, 512, 8, 3000
GRID = (0.3, 1.0, 3.0)


@dataclass
class Trace:
    """A run: where it was evaluated, and how it stood there."""

    rate: float
    steps: list[int] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    size: list[int] = field(default_factory=list)

    def smooth(self) -> list[float]:
        """Means over three evaluations, from the third on."""
        return [sum(self.accuracy[i - 2 : i + 1]) / 3 for i in range(2, len(self.accuracy))]

    def reached(self, level: float) -> int | None:
        """The first evaluation at which the smoothed accuracy was that."""
        return next((i + 2 for i, value in enumerate(self.smooth()) if value >= level), None)


@cache
def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images, scaled and flat, and labels: to train on, and to test on."""
    tensors = []
    for split in ("train", "test"):
        images, labels = fashion_mnist(split)
        tensors += [(torch.from_numpy(images).float().flatten(1) / 255 - 0.286) / 0.353]
        tensors += [torch.from_numpy(labels).long()]
    return tuple(tensors)


def network() -> nn.Module:
    """25,450 parameters, always the same start."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 10))


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """On the 10,000 test images."""
    *_, images, labels = data()
    return float((model(images).argmax(1) == labels).float().mean())


class MicroBatched(AccumulatingSource):
    """A batch of indices as eight micro-batches, whose spread tells the noise."""

    def gradient(self, batch: list[int]) -> tuple[Tensor, Tensor | None]:
        images, labels, *_ = data()
        x, y = images[batch], labels[batch]
        count = min(MICRO, len(batch))
        return super().gradient(list(zip(x.tensor_split(count), y.tensor_split(count), strict=True)))


def parts(rate: float) -> tuple[nn.Module, AdaGradNorm, MicroBatched]:
    """Network, step rule and source of a run."""
    model = network()
    parameters = list(model.parameters())
    source = MicroBatched(lambda b: functional.cross_entropy(model(b[0]), b[1]), parameters)
    return model, AdaGradNorm(parameters, lr=rate), source


@cache
def train(
    rate: float, size: int, samples: int, level: float | None = None, *, adaptive: bool = False, most: int = 0
) -> Trace:
    """Until so many samples or steps are used up, or the level is reached."""
    images, labels, *_ = data()
    model, optimizer, source = parts(rate)
    parameters, trace, steps = list(model.parameters()), Trace(rate), 0
    batches = AdaptiveBatches(len(images), size, maximum=max(LARGE, size), test=NormTest(0.5))
    while batches.samples_drawn < samples and (not most or steps < most):
        for indices in batches:
            optimizer.zero_grad()
            if adaptive and batches.batch_size < LARGE:
                _, noise = source.gradient(indices)
                assert noise is not None  # a batch has more samples than one
                norm = float(torch.stack(torch._foreach_norm([grad_of(p) for p in parameters])).norm())
                dimension = sum(p.numel() for p in parameters)
                told = GradientStatistics.of_noise(float(noise), dimension, norm, len(indices))
                batches.update(told)
            else:
                source.objective((images[indices], labels[indices])).backward()
            optimizer.step()
            steps += 1
            if note(trace, steps, batches, model, level) or batches.samples_drawn >= samples:
                return trace
    return trace


def note(trace: Trace, steps: int, batches: AdaptiveBatches, model: nn.Module, level: float | None) -> bool:
    """Evaluate now and then; whether the level is reached."""
    last = trace.samples[-1] if trace.samples else -EVERY
    if batches.samples_drawn < last + max(EVERY, 2 * batches.batch_size):
        return False
    trace.steps.append(steps)
    trace.samples.append(batches.samples_drawn)
    trace.accuracy.append(accuracy(model))
    trace.size.append(batches.batch_size)
    return level is not None and trace.reached(level) is not None


@cache
def small() -> Trace:
    """The fixed small batch, one epoch, at its best rate."""
    runs = [train(rate, SMALL, 60_000) for rate in GRID]
    return max(runs, key=lambda run: sum(run.smooth()[-3:]))


@cache
def level() -> tuple[float, int]:
    """What the small batch ends at, and its first step that is as good."""
    run = small()
    found = sum(run.smooth()[-3:]) / 3
    place = run.reached(found)
    assert place is not None  # one of the three is no worse than their mean
    return found, run.steps[place]


@cache
def quickest(size: int, *, adaptive: bool) -> Trace | None:
    """Of the rates that reach the level within the small batch's steps, the one with the fewest."""
    wanted, most = level()
    best = None
    for rate in sorted(GRID, key=lambda rate: rate != 1):
        run = train(rate, size, 1_300_000, wanted, adaptive=adaptive, most=most)
        if run.reached(wanted) is not None and run.steps[-1] <= most:
            best, most = run, run.steps[-1]
    return best


def told(run: Trace | None) -> str:
    """A run in words."""
    if run is None:
        return "not reached"
    return f"{run.steps[-1]:,} steps, {run.samples[-1]:,} samples (rate {run.rate:g})"


def fashion() -> tuple[str, bool]:
    """Steps of the adaptive batches to the accuracy of the small ones."""
    (wanted, steps), run = level(), quickest(SMALL, adaptive=True)
    samples = small().samples[small().steps.index(steps)]
    figure = f"to {wanted:.3f}: {told(run)}; fixed {SMALL}: {steps:,} steps, {samples:,} samples "
    figure += f"(rate {small().rate:g})"
    return figure, run is not None and run.steps[-1] <= steps / 3


def rival() -> tuple[str, bool]:
    """What a user would do: a large batch from the start, with its own best rate."""
    run, large = quickest(SMALL, adaptive=True), quickest(LARGE, adaptive=False)
    better = run is not None and (large is None or run.steps[-1] <= large.steps[-1])
    return f"adaptive {told(run)}; fixed {LARGE}: {told(large)}", better


def flattened() -> tuple[str, bool]:
    """The inner-product test over the whole gradient, and summed up over the parameters as published."""
    images, labels, *_ = data()
    model = network()
    source = PerSampleSource(lambda b: functional.cross_entropy(model(b[0]), b[1]), model)
    _, found = source.measure((images[:256], labels[:256]))
    rows: list[list[Tensor]] = []
    for i in range(256):
        model.zero_grad()
        functional.cross_entropy(model(images[i : i + 1]), labels[i : i + 1]).backward()
        rows.append([grad_of(p).double().flatten() for p in model.parameters()])
    each = [torch.stack(column) for column in zip(*rows, strict=True)]
    loop = torch.cat(each, 1)
    whole = float((loop @ loop.mean(0)).var())
    apart = sum(float((part @ part.mean(0)).var()) for part in each)
    test, own = InnerProductTest(), found.inner_product_variance
    figure = (
        f"asks for {test.proposal(found):.0f}; parameter by parameter {apart / whole:.2f} times that; "
        f"off the loop by {abs(own / whole - 1):.0e}"
    )
    return figure, abs(own / whole - 1) <= 1e-4


# ---------------------------------------------------------------------- under OptEx

STEPS, PARALLELISM = 120, 4


def alone(name: str, rate: float, seed: int) -> float:
    """The loss on a problem's held batches after so many steps of the base optimizer."""
    problem = make_problem(name, seed=seed)
    base = AdaGradNorm(problem.parameters(), lr=rate)
    for _, batch in zip(range(STEPS), problem.batches(), strict=False):
        base.zero_grad()
        problem(batch).backward()
        base.step()
    return problem.evaluate()


def rounds_to(loss: float, name: str, rate: float, seed: int) -> int:
    """Rounds of OptEx to that loss; as many as the base alone takes steps at most."""
    problem = make_problem(name, seed=seed)
    base = AdaGradNorm(problem.parameters(), lr=rate)
    optimizer = OptEx(base, parallelism=PARALLELISM, deterministic=problem.deterministic)
    losses: list[float] = []
    for _ in itertools.islice(optimizer.rounds(problem.batches(), problem), STEPS):
        losses.append(problem.evaluate())
        if losses[-1] <= loss:
            break
    reached = rounds_to_level(losses, loss, range(1, len(losses) + 1))
    return STEPS if math.isnan(reached) else int(reached)


def accelerated(name: str, rate: float, seeds: int = 3) -> tuple[str, bool]:
    """Steps of the base alone, over the rounds that OptEx takes to the same loss."""
    rounds = [rounds_to(alone(name, rate, seed), name, rate, seed) for seed in range(seeds)]
    ratio = STEPS / float(np.median(rounds))
    over = f" (median of {seeds} seeds)" if seeds > 1 else ""
    return f"{np.median(rounds):.0f} rounds for {STEPS} steps: {ratio:.1f} times{over}", ratio > 1


def with_rounds() -> tuple[str, bool]:
    """The adaptive batches in ``OptEx.rounds``, to the level, beside the plain loop at the same rate."""
    wanted, most = level()
    alone = quickest(SMALL, adaptive=True)
    if alone is None:
        return "the plain loop does not reach the level", False
    images, *_ = data()
    model, base, source = parts(alone.rate)
    optimizer, trace = OptEx(base, parallelism=PARALLELISM), Trace(alone.rate)
    batches = AdaptiveBatches(len(images), SMALL, maximum=LARGE, test=NormTest(0.5))

    def forever() -> Any:
        while batches.samples_drawn < 1_300_000:
            yield from batches

    rounds = 0
    for report in optimizer.rounds(forever(), source):
        batches.update(report)
        rounds += 1
        if note(trace, rounds, batches, model, wanted) or rounds >= most:
            break
    reached = trace.reached(wanted) is not None
    figure = (
        f"{rounds:,} rounds ({'' if reached else 'not '}reached), {batches.batches_drawn:,} gradients, "
        f"{batches.samples_drawn:,} samples, last batch {batches.batch_size}; plain loop {told(alone)}"
    )
    return figure, reached and rounds < alone.steps[-1]


CHECKS = [
    Check("norm test's proposal, `½‖x - x_i‖²`, d = 100, b = 6,600", "`d/(η²(1 + d/b))` ± 10 %", proposal),
    Check(
        "error after 400,000 samples: norm test 0.5 from b = 8, against 8 throughout, both at rate 10",
        "at most 0.1 times, in at most 1 % of the steps",
        same_rate,
    ),
    Check("the same, each at its best rate of 0.1, 0.3, ..., 30", "at most 0.1 times", own_rates),
    Check("`AdaGradNorm` against its recursion, three parameters, float64", "1e-12", recursion),
    Check("inner-product test on a network of four parameters", "the loop's over all parameters", flattened),
    Check("Fashion-MNIST: steps to the test accuracy of batches of 8", "at most a third", fashion),
    Check("the same, against batches of 512 from the start", "no more steps (what a user would do)", rival),
    Check(
        "OptEx, N = 4, `AdaGradNorm` 1.0 on `logistic-breast-cancer`",
        "fewer rounds than alone",
        lambda: accelerated("logistic-breast-cancer", 1.0, seeds=1),
    ),
    Check(
        "OptEx, N = 4, `AdaGradNorm` 1.0 on `digits-mlp`, batches of 32",
        "fewer rounds than alone",
        lambda: accelerated("digits-mlp", 1.0),
    ),
    Check(
        "`AdaptiveBatches` in `OptEx.rounds`, N = 4, Fashion-MNIST",
        "fewer rounds than steps alone",
        with_rounds,
    ),
]


def curves() -> dict[str, Any]:
    """The three runs on Fashion-MNIST at their best rates."""
    runs = {
        f"fixed {SMALL}": small(),
        "adaptive": quickest(SMALL, adaptive=True),
        f"fixed {LARGE}": quickest(LARGE, adaptive=False),
    }
    lines = {name: vars(run) for name, run in runs.items() if run is not None}
    return {"level": level()[0], "runs": lines}


_STYLES = {
    f"fixed {SMALL}": {"color": "#000000", "linestyle": (0, (1, 1.2))},
    "adaptive": {"color": "#d55e00", "linestyle": "-"},
    f"fixed {LARGE}": {"color": "#0072b2", "linestyle": (0, (5, 2))},
}


def draw(curves: dict[str, Any]) -> Figure:
    """Accuracy against steps and against samples, and the sizes of the batches."""
    figure = Figure(figsize=(10.5, 3.9), layout="constrained")
    FigureCanvasAgg(figure)
    by_steps, by_samples, sizes = figure.subplots(1, 3)
    for name, run in curves["runs"].items():
        style = {"label": f"{name}, rate {run['rate']:g}", "linewidth": 1.6, **_STYLES[name]}
        by_steps.plot(run["steps"], run["accuracy"], **style)
        by_samples.plot(run["samples"], run["accuracy"], **style)
        sizes.plot(run["steps"], run["size"], **style)
    for axes in (by_steps, by_samples):
        axes.axhline(curves["level"], color="#8a8a8a", linewidth=0.8, label="accuracy to reach")
        axes.set_ylim(0.6, None)
        axes.set_ylabel("test accuracy, Fashion-MNIST")
    by_steps.set_xlabel("steps")
    by_samples.set_xlabel("samples")
    sizes.set_xlabel("steps")
    sizes.set_ylabel("samples in a batch")
    sizes.set_yscale("log")
    for axes in (by_steps, by_samples, sizes):
        axes.set_xscale("log")
        axes.grid(visible=True, alpha=0.25)
    by_steps.set_xlim(3, None)
    by_samples.set_xlim(300, None)
    handles, labels = by_steps.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure
