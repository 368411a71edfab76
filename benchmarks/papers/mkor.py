"""MKOR and MKOR-H: factors against inverses, growth with the width, and the gain on two small networks."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from itertools import islice, repeat
from pathlib import Path
from typing import Any, Final

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from optex import NonFiniteError, OptEx
from optex.optimizers import MKOR
from optex.optimizers.mkor.factors import UPDATES
from optex.stepping import default_rate
from optex.studies.measures import Spread, acceleration
from optex.studies.problems.tabular import DigitsMLP
from papers import Check

sys.path.append(str(Path(__file__).parents[2]))

from tests.references.mkor import TARGETS, published_update

ROOM = "optimizers"

SEEDS: Final = 5
STEPS: Final = 300
BATCH: Final = 64
RATES: Final = (0.01, 0.03, 0.1, 0.3)  # of SGD and MKOR
ADAM_RATES: Final = (0.001, 0.003, 0.01, 0.03, 0.1)

Make = Callable[[nn.Module, float], Optimizer]


def with_momentum(model: nn.Module, lr: float) -> Optimizer:
    """The rival that MKOR has inside."""
    return SGD(model.parameters(), lr=lr, momentum=0.9)


def with_adam(model: nn.Module, lr: float) -> Optimizer:
    """What most would try first."""
    return Adam(model.parameters(), lr=lr)


def with_mkor(variant: str, interval: int = 10) -> Make:
    """MKOR around SGD with momentum 0.9."""
    return lambda model, lr: MKOR.with_sgd(model, lr, variant=variant, interval=interval)


METHODS: Final[dict[str, tuple[Make, tuple[float, ...]]]] = {
    "SGD, momentum 0.9": (with_momentum, RATES),
    "Adam": (with_adam, ADAM_RATES),
    "MKOR, released": (with_mkor("released"), RATES),
    "MKOR, exact": (with_mkor("exact"), RATES),
    "MKOR, released, every step": (with_mkor("released", 1), RATES),
}
RULER: Final = "SGD, momentum 0.9"


# ---------------------------------------------------------------------- factors


def inverses() -> tuple[str, bool]:
    """The largest error of 100 updates, relative to the target's largest entry."""
    worst = {}
    for variant, update in UPDATES.items():
        generator = torch.Generator().manual_seed(0)
        factor = torch.eye(64, dtype=torch.float64)
        errors = []
        for _ in range(100):
            vector = torch.randn(64, generator=generator, dtype=torch.float64)
            target = TARGETS[variant](factor, vector, 0.95)
            update(factor, vector, 0.95)
            errors.append(float((factor - target).abs().max() / target.abs().max()))
        worst[variant] = max(errors)
    return ", ".join(f"{name} {error:.1e}" for name, error in worst.items()), max(worst.values()) <= 1e-10


def published() -> tuple[str, bool]:
    """One vector again and again: the largest entry, and how far one update is from either inverse."""
    unit = torch.zeros(8, dtype=torch.float64)
    unit[0] = 1
    factor = torch.eye(8, dtype=torch.float64)
    once = published_update(factor, unit, 0.95)
    off = min(float((once - target(factor, unit, 0.95)).abs().max()) for target in TARGETS.values())
    count = 0
    while factor.max() < 1e10 and count < 1000:
        factor = published_update(factor, unit, 0.95)
        count += 1
    words = f"off by {off:.3f} after one update; an entry of 1e10 after {count} updates with one unit vector"
    return words, off > 1e-3 and count < 1000


def reset_never() -> tuple[str, bool]:
    """The largest eigenvalue that a released factor has over many updates with vectors of many lengths."""
    generator = torch.Generator().manual_seed(0)
    factor, largest = torch.eye(32, dtype=torch.float64), 0.0
    for i in range(1000):
        vector = torch.randn(32, generator=generator, dtype=torch.float64) * 10.0 ** (i % 7 - 3)
        UPDATES["released"](factor, vector, 0.95)
        largest = max(largest, float(torch.linalg.eigvalsh(factor)[-1]))
    return f"largest eigenvalue {largest:.6f} in 1,000 updates", largest <= 1 + 1e-12


def seconds_for(work: Callable[[], Any], repeats: int = 60) -> float:
    """The least of several repeats, in seconds."""
    found = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return min(found)


def growth() -> tuple[str, bool]:
    """How much longer an update takes at four times the width: 16 times by arithmetic; an inverse 64 times."""
    words, holds = [], True
    for variant, update in UPDATES.items():
        times = []
        for size in (512, 2048):
            factor, vector = torch.eye(size), torch.randn(size, generator=torch.Generator().manual_seed(0))
            update(factor, vector, 0.95)
            times.append(seconds_for(lambda factor=factor, vector=vector: update(factor, vector, 0.95)))  # noqa: B023
        words.append(f"{variant} {times[1] / times[0]:.1f}")
        holds = holds and times[1] <= 20 * times[0]
    matrices = [torch.eye(size) + 0.1 * torch.ones(size, size) for size in (512, 2048)]
    short, long = (seconds_for(lambda m=m: torch.linalg.inv(m), 3) for m in matrices)
    return f"{', '.join(words)} (torch.linalg.inv {long / short:.0f})", holds


def numbers_of(width: int) -> tuple[int, int]:
    """Numbers that MKOR keeps beyond SGD for a layer of that width, and the formula's."""
    model = nn.Linear(width, width)
    optimizer = MKOR.with_sgd(model)
    model(torch.ones(2, width)).square().mean().backward()
    optimizer.step()
    kept = sum(factor.numel() for pair in optimizer.factors.values() for factor in pair.values())
    return kept, width**2 + (width + 1) ** 2


def memory() -> tuple[str, bool]:
    """Numbers counted at three widths."""
    found = {width: numbers_of(width) for width in (256, 512, 1024)}
    words = ", ".join(f"d = {width}: {kept:,}" for width, (kept, _) in found.items())
    return words, all(kept == formula for kept, formula in found.values())


# ---------------------------------------------------------------------- the regression


def regression(seed: int, mean: float = 0.5) -> tuple[nn.Module, Tensor, Tensor]:
    """A 20-32-1 network with ReLU, and 1,024 rows of a random network of that shape with tanh, noise 0.1.

    Args:
        seed: of all.
        mean: of the inputs, which are uniform in an interval of length 1 about it; targets do not depend on it.

    Returns:
        Network, inputs [1024, 20], targets [1024, 1].
    """
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.rand(1024, 20, generator=generator)
    hidden = torch.tanh((inputs - 0.5) @ torch.randn(20, 32, generator=generator))
    inputs = inputs - 0.5 + mean
    targets = hidden @ torch.randn(32, 1, generator=generator) / math.sqrt(32)
    targets = targets + 0.1 * torch.randn(1024, 1, generator=generator)
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 1)), inputs, targets


@cache
def regression_run(method: str, lr: float, seed: int, mean: float = 0.5) -> tuple[float, ...]:
    """The mean squared error over all rows, every tenth step."""
    model, inputs, targets = regression(seed, mean)
    optimizer = METHODS[method][0](model, lr)
    generator = torch.Generator().manual_seed(1000 + seed)
    errors = []
    for step in range(STEPS + 1):
        if step % 10 == 0:
            with torch.no_grad():
                errors.append(float((model(inputs) - targets).square().mean()))
            if not math.isfinite(errors[-1]):
                return (*errors, *repeat(math.inf, STEPS // 10 + 1 - len(errors)))
        rows = torch.randint(1024, (BATCH,), generator=generator)
        optimizer.zero_grad()
        loss = (model(inputs[rows]) - targets[rows]).square().mean()
        loss.backward()
        try:
            optimizer.step()
        except NonFiniteError:
            return (*errors, *repeat(math.inf, STEPS // 10 + 1 - len(errors)))
    return tuple(errors)


@cache
def best(method: str, seed: int, mean: float = 0.5) -> tuple[float, float]:
    """The lowest final error of a method on a seed, and its rate."""
    return min((regression_run(method, lr, seed, mean)[-1], lr) for lr in METHODS[method][1])


def compared(method: str, mean: float = 0.5) -> float:
    """Final error over SGD's, each at its best rate on each seed; the median over the seeds."""
    return statistics.median(best(method, seed, mean)[0] / best(RULER, seed, mean)[0] for seed in range(SEEDS))


def descent(variant: str, mean: float = 0.5) -> Callable[[], tuple[str, bool]]:
    """The check of a variant: its final error over SGD's."""

    def run() -> tuple[str, bool]:
        ratio = compared(f"MKOR, {variant}", mean)
        return f"{ratio:.2f}", ratio <= 0.85

    return run


def rivals() -> tuple[str, bool]:
    """Whether MKOR's default beats Adam as well."""
    ratios = {method: compared(method) for method in METHODS}
    words = ", ".join(f"{method} {ratio:.2f}" for method, ratio in sorted(ratios.items(), key=lambda x: x[1]))
    return words, ratios["MKOR, released"] < ratios["Adam"]


# ---------------------------------------------------------------------- digits, MKOR-H, OptEx

DIGIT_STEPS: Final = 450  # ten passes


@cache
def digits_run(method: str, lr: float) -> float:
    """The loss over all training digits after ten passes in batches of 32."""
    problem = DigitsMLP(0)
    optimizer = METHODS[method][0](problem, lr)
    for batch in islice(problem.batches(), DIGIT_STEPS):
        optimizer.zero_grad()
        loss = problem(batch)
        if not math.isfinite(loss.item()):
            return math.inf
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float(problem((problem.inputs, problem.labels)))


def digits() -> tuple[str, bool]:
    """Training loss of the digits network, each at its best rate."""
    losses = {name: min(digits_run(name, lr) for lr in RATES) for name in list(METHODS)[:4] if name != "Adam"}
    losses["Adam"] = min(digits_run("Adam", lr) for lr in ADAM_RATES)
    ordered = sorted(losses.items(), key=lambda item: item[1])
    words = ", ".join(f"{name} {loss:.2g}" for name, loss in ordered)
    return words, losses["MKOR, released"] < min(losses[RULER], losses["Adam"])


def hybrid_run(seed: int, *, hybrid: bool) -> tuple[float, int | None]:
    """The regression's final error after 1,500 steps, and the step at which MKOR-H switched."""
    model, inputs, targets = regression(seed)
    optimizer = MKOR.with_sgd(model, best("MKOR, released", seed)[1], hybrid=hybrid)
    generator = torch.Generator().manual_seed(1000 + seed)
    when = None
    for step in range(1500):
        rows = torch.randint(1024, (BATCH,), generator=generator)

        def closure(rows: Tensor = rows) -> Tensor:
            optimizer.zero_grad()
            loss = (model(inputs[rows]) - targets[rows]).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
        when = step + 1 if when is None and optimizer.switched else when
    with torch.no_grad():
        return float((model(inputs) - targets).square().mean()), when


def switching() -> tuple[str, bool]:
    """When MKOR-H switches, and what that costs: final errors over those without a switch, three seeds."""
    found = [hybrid_run(seed, hybrid=True) for seed in range(3)]
    ratios = [error / hybrid_run(seed, hybrid=False)[0] for seed, (error, _) in enumerate(found)]
    steps, ratio = [when for _, when in found], statistics.median(ratios)
    words = f"switched after {', '.join(map(str, steps))} of 1,500 steps; error {ratio:.2f} of that without"
    return words, None not in steps and ratio <= 1.05


@cache
def accelerated(problem: str, seed: int, rounds: int = 30) -> tuple[list[float], list[float]]:
    """Losses of the plain loop, four times as long, and of OptEx's rounds at N = 4."""
    runs: list[list[float]] = []
    for wrapped in (False, True):
        model, batches, objective, whole, lr = _problem(problem, seed)
        base = MKOR.with_sgd(model, lr)
        losses = [whole()]
        if wrapped:
            optimizer = OptEx(base, parallelism=4, deterministic=problem == "regression", model=model)
            losses += [whole() for _ in islice(optimizer.rounds(batches, objective), rounds)]
        else:
            for batch in islice(batches, 4 * rounds):
                base.zero_grad()
                objective(batch).backward()
                base.step()
                losses.append(whole())
        runs.append(losses)
    return runs[0], runs[1]


def _problem(name: str, seed: int) -> tuple[nn.Module, Iterator[Any], Callable, Callable[[], float], float]:
    """Module, batches, objective of a batch, loss over all, rate."""
    if name == "digits":
        problem = DigitsMLP(seed)
        all_of_it = problem.inputs, problem.labels
        return (
            problem,
            iter(problem.batches()),
            problem,
            lambda: _value(problem(all_of_it)),
            default_rate("mkor"),
        )
    model, inputs, targets = regression(seed)

    def objective(_: Any) -> Tensor:
        return (model(inputs) - targets).square().mean()

    return model, repeat(None), objective, lambda: _value(objective(None)), best("MKOR, released", seed)[1]


def _value(loss: Tensor) -> float:
    return float(loss.detach())


def gained(problem: str) -> Callable[[], tuple[str, bool]]:
    """The check of a problem: its acceleration, as ``optex.studies.measures`` has it, over three seeds."""

    def run() -> tuple[str, bool]:
        found = []
        for seed in range(3):
            plain, rounds = accelerated(problem, seed)
            found.append(acceleration(rounds, plain, 4))
        spread = Spread.over(found)
        return f"{spread.mean:.2f} ± {spread.deviation:.2f}", spread.mean > 1

    return run


ASKED: Final = "at most 0.85, median of 5 seeds"

CHECKS: list[Check] = [
    Check("each update against torch.linalg.inv of its target, float64, d = 64", "at most 1e-10", inverses),
    Check("the published equation", "no inverse, and diverges", published),
    Check("released factors", "at most the identity: a reset above 2 never comes", reset_never),
    Check("time of an update, d from 512 to 2,048", "at most 20 times", growth),
    Check("numbers kept for a layer of width d", "d² + (d + 1)², counted", memory),
    Check("released, regression: final error / SGD's", ASKED, descent("released")),
    Check("exact, regression: final error / SGD's", ASKED, descent("exact")),
    Check("released, regression with inputs of mean 0", ASKED, descent("released", 0.0)),
    Check("exact, regression with inputs of mean 0", ASKED, descent("exact", 0.0)),
    Check("all methods, regression: final error / SGD's", "MKOR's default below Adam", rivals),
    Check("digits network, batches of 32, loss after ten passes", "MKOR's default below SGD and Adam", digits),
    Check("MKOR-H, regression, 3 seeds", "switches, and loses at most 5 % (median)", switching),
    Check("under OptEx, N = 4: digits, batches of 32, default rate", "acceleration above 1", gained("digits")),
    Check(
        "under OptEx, N = 4: regression, whole batch, best rate", "acceleration above 1", gained("regression")
    ),
]


def curves() -> dict[str, Any]:
    """Medians of errors against steps, each at its best rate; losses against rounds, without and with OptEx."""
    lines = {}
    for method in list(METHODS)[:4]:
        runs = [regression_run(method, best(method, seed)[1], seed) for seed in range(SEEDS)]
        lines[method] = [statistics.median(errors) for errors in zip(*runs, strict=True)]
    plain, rounds = accelerated("digits", 0)
    return {
        "steps": list(range(0, STEPS + 1, 10)),
        "errors": lines,
        "rounds": {"MKOR": plain[: len(rounds)], "OptEx, N = 4": rounds},
    }


COLOURS: Final = {
    "SGD, momentum 0.9": ("#000000", ":"),
    "Adam": ("#e69f00", "--"),
    "MKOR, released": ("#0072b2", "-"),
    "MKOR, exact": ("#009e73", "-."),
    "MKOR": ("#0072b2", "--"),
    "OptEx, N = 4": ("#d55e00", "-"),
}


def draw(curves: dict[str, Any]) -> Figure:
    """Two panels: methods against steps, OptEx against rounds."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for name, errors in curves["errors"].items():
        colour, style = COLOURS[name]
        left.plot(curves["steps"], errors, color=colour, linestyle=style, label=name)
    left.set_xlabel("steps, batches of 64")
    left.set_ylabel("mean squared error, all rows")
    left.set_title("20-32-1 regression, each at its best rate", fontsize=10)
    for name, losses in curves["rounds"].items():
        colour, style = COLOURS[name]
        right.plot(range(len(losses)), losses, color=colour, linestyle=style, label=name)
    right.set_xlabel("rounds, batches of 32")
    right.set_ylabel("loss over all digits")
    right.set_title("digits network: MKOR alone and under OptEx", fontsize=10)
    for panel in (left, right):
        panel.set_yscale("log")
        panel.grid(alpha=0.25)
        panel.legend(fontsize=8)
    return figure
