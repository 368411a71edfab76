"""N-PG-IGT and (N-)HARPG (Fatkhullin, Barakat, Kireeva, He, ICML 2023, arXiv 2302.01734).

All on the linear system s' = 0.9 s + 0.5 a + 0.1 n with costs s² + a², 20 steps, actions ~ N(k s + c, 0.25):
its return, and the best one, are known exactly. Gymnasium's tasks: ``benchmarks/policy_returns.py``.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

import optex
from optex.optimizers import NIGT
from optex.studies.measures import rounds_to_level
from optex.studies.problems.lq_policy import LinearQuadraticPolicy
from papers import Check

ROOM = "sources"
SYSTEM = optex.LinearQuadratic()
DEVIATION, DISCOUNT = 0.5, 0.99
BATCH, BUDGET = 10, 4000  # trajectories a gradient, and in all
ROUNDS = 60  # of vanilla policy gradient, against OptEx
COLOURS = {
    "N-PG-IGT": "#0072b2",
    "N-PG-IGT, baseline": "#56b4e9",
    "vanilla PG": "#000000",
    "REINFORCE, baseline, Adam": "#e69f00",
    "HARPG, baseline": "#cc79a7",
    "N-HARPG, baseline": "#009e73",
}
RIGHT = {"SGD": "#000000", "N-PG-IGT": "#0072b2"}
RIVALS: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "N-PG-IGT, baseline": ({"method": "n-pg-igt", "baseline": True}, (0.1, 0.2, 0.4)),
    "vanilla PG": ({"method": "pg"}, (3e-4, 1e-3, 3e-3)),
    "REINFORCE, baseline, Adam": ({"method": "reinforce", "optimizer": "adam"}, (3e-3, 1e-2, 3e-2)),
    "HARPG, baseline": ({"method": "harpg", "baseline": True}, (3e-3, 1e-2, 3e-2)),
    "N-HARPG, baseline": ({"method": "n-harpg", "baseline": True}, (0.05, 0.2, 0.8)),
}


def linear(gain: float = 0.0, offset: float = 0.0) -> optex.GaussianPolicy:
    """k and c."""
    policy = optex.GaussianPolicy(1, 1, hidden=(), deviation=DEVIATION, dtype=torch.float64)
    with torch.no_grad():
        for p, value in zip(policy.parameters(), (gain, offset), strict=True):
            p.fill_(value)
    return policy


@torch.no_grad()
def exact(policy: torch.nn.Module) -> float:
    """The mean discounted return."""
    gain, offset = policy.parameters()
    return float(SYSTEM.expected_return(gain, offset, DEVIATION, DISCOUNT))


@cache
def best() -> float:
    """The highest there is."""
    return -LinearQuadraticPolicy().minimum


# ------------------------------------------------------------------ products with the Hessian

VECTOR = (torch.ones(1, 1).double(), torch.full((1,), -0.5).double())
CHUNK, CHUNKS = 50_000, 40


def flat(tensors: Any) -> Tensor:
    """As one vector."""
    return torch.cat([t.detach().flatten() for t in tensors])


def differences(policy: torch.nn.Module, step: float = 1e-4) -> Tensor:
    """Central differences of the exact gradient along the vector."""
    sides = []
    for sign in (1, -1):
        points = [
            (p.detach() + sign * step * v).requires_grad_()
            for p, v in zip(policy.parameters(), VECTOR, strict=True)
        ]
        value = -SYSTEM.expected_return(points[0], points[1], DEVIATION, DISCOUNT)
        sides.append(flat(torch.autograd.grad(value, points)))
    return (sides[0] - sides[1]) / (2 * step)


@cache
def products() -> tuple[list[float], list[float]]:
    """Relative error of the mean product after 1, 2, ... chunks: with plus, and with the released minus."""
    policy = linear(-0.3, 0.2)
    source = optex.TrajectorySource(policy, SYSTEM, CHUNK, DISCOUNT, baseline=True)
    goal, plus, held = differences(policy), [], []
    for chunk in range(CHUNKS):
        torch.manual_seed(chunk)
        plus.append(flat(source.hessian_vector(VECTOR)))
        torch.manual_seed(chunk)
        held.append(flat(held_term(source)))
    means = [torch.stack(rows).cumsum(0) / torch.arange(1, CHUNKS + 1)[:, None] for rows in (plus, held)]

    def errors(rows: Tensor) -> list[float]:
        return ((rows - goal).norm(dim=1) / goal.norm()).tolist()

    # product = held + other; with a minus, held - other = 2 held - product
    return errors(means[0]), errors(2 * means[1] - means[0])


def held_term(source: optex.TrajectorySource) -> list[Tensor]:
    """∇⟨g(τ, θ), v⟩ with τ held, of the same trajectories: the derivative of the estimate along v."""
    found, weights = source._sampled()
    losses = -(weights * source._log_probabilities(found)).sum(0)
    gradients = torch.autograd.grad(losses.mean(), source.parameters, create_graph=True)
    inner = sum(((g * v).sum() for g, v in zip(gradients, VECTOR, strict=True)), torch.zeros(()))
    return list(torch.autograd.grad(inner, source.parameters, materialize_grads=True))


def _products_checked() -> tuple[str, bool]:
    plus, minus = products()
    count = CHUNK * CHUNKS / 1e6
    figure = f"{plus[-1]:.1%} with plus, {minus[-1]:.0%} with minus, {count:g} million trajectories"
    return figure, plus[-1] <= 0.03


# ------------------------------------------------------------------ gaps


@cache
def gaps(name: str, lr: float, seed: int) -> list[float]:
    """J* - J along 4,000 trajectories from k = c = 0, every tenth of them; infinite from where it ended."""
    arguments: dict[str, Any] = {"method": "n-pg-igt"} if name == "N-PG-IGT" else RIVALS[name][0]
    policy, found = linear(), [best() - exact(linear())]
    steps = BUDGET // BATCH // (2 if "harpg" in arguments["method"] else 1)

    def noted(result: Any) -> None:
        if result.nit % (steps // 10) == 0:
            found.append(best() - exact(policy))

    result = optex.policy_gradient(
        policy, SYSTEM, steps=steps, trajectories=BATCH, lr=lr, seed=seed, callback=noted, **arguments
    )
    ended = not result.success
    found += [math.inf] * (11 - len(found))
    return [*found[:-1], math.inf] if ended else found


def many(name: str, lr: float, seeds: int) -> list[float]:
    """Where runs end."""
    return [gaps(name, lr, seed)[-1] for seed in range(seeds)]


@cache
def tuned(name: str) -> float:
    """The best rate of a rival, by one run."""
    return min(RIVALS[name][1], key=lambda lr: gaps(name, lr, 100)[-1])


def _gap_checked() -> tuple[str, bool]:
    ends = many("N-PG-IGT", 0.2, 10)
    return (
        f"median {np.median(ends):.3f}, worst {max(ends):.3f} (10 seeds)",
        bool(np.median(ends) <= 0.03 and max(ends) <= 0.1),
    )


def _vanilla_checked() -> tuple[str, bool]:
    ends = many("vanilla PG", 0.2, 10)
    diverged = sum(not end < best() - exact(linear()) for end in ends)
    return f"{diverged} of 10 runs end worse than they began, or not finite", diverged == 10


def compared(names: tuple[str, ...]) -> tuple[str, list[float]]:
    """Median gaps at the best of three rates, the first of them N-PG-IGT's."""
    found = [(name, tuned(name), float(np.median(many(name, tuned(name), 5)))) for name in names]
    return "; ".join(f"{name} {gap:.4f} (rate {lr:g})" for name, lr, gap in found), [gap for *_, gap in found]


def _rivals_checked() -> tuple[str, bool]:
    text, ends = compared(("N-PG-IGT, baseline", "vanilla PG", "REINFORCE, baseline, Adam"))
    return text, ends[0] <= min(ends)


def _recursion_checked() -> tuple[str, bool]:
    text, ends = compared(("N-PG-IGT, baseline", "HARPG, baseline", "N-HARPG, baseline"))
    return text, min(ends) < ends[0]


# ------------------------------------------------------------------ under OptEx


def rounds(
    make: Callable[[Any], torch.optim.Optimizer], seed: int, count: int, parallelism: int
) -> list[float]:
    """The exact gap after every round; one gradient each for parallelism 0, the plain loop."""
    problem = LinearQuadraticPolicy(seed)
    source, base = problem.source(), make(problem.policy.parameters())
    torch.manual_seed(seed)

    def gap() -> float:
        if isinstance(base, NIGT):
            with base.iterate():
                return problem.evaluate() - problem.minimum
        return problem.evaluate() - problem.minimum

    def plain() -> Iterator[None]:
        while True:
            source.gradient(None)
            base.step()
            yield

    work = plain()
    if parallelism:
        work = optex.OptEx(base, parallelism=parallelism).rounds(itertools.repeat(None), source)
    found = [gap()]
    with contextlib.suppress(optex.NonFiniteError):
        found.extend(gap() for _ in itertools.islice(work, count))
    return found + [math.nan] * (count + 1 - len(found))


def sgd(lr: float) -> Callable[[Any], torch.optim.Optimizer]:
    """Plain steps along the policy gradient, with the problem's baseline."""
    return lambda parameters: torch.optim.SGD(parameters, lr=lr)


def n_igt(lr: float) -> Callable[[Any], torch.optim.Optimizer]:
    """N-PG-IGT's rule, which rests where its gradients are needed."""
    return lambda parameters: NIGT(parameters, lr, rest="extrapolated")


BASES = {"SGD": (sgd, (3e-4, 1e-3, 2e-3, 5e-3)), "N-PG-IGT": (n_igt, (0.1, 0.2, 0.4))}


@cache
def base_rate(name: str) -> float:
    """Of the base alone: the least mean gap of the last third of its rounds, over three starts of their own."""
    make, rates = BASES[name]

    def late(lr: float) -> float:
        gap = float(np.mean([rounds(make(lr), seed, ROUNDS, 0)[-ROUNDS // 3 :] for seed in (100, 101, 102)]))
        return gap if math.isfinite(gap) else math.inf

    return min(rates, key=late)


@cache
def under_optex(name: str) -> list[dict[str, list[float]]]:
    """Of five starts: the base alone, and under OptEx with four gradients at once."""
    make = BASES[name][0](base_rate(name))
    return [
        {"alone": rounds(make, seed, ROUNDS, 0), "OptEx, N = 4": rounds(make, seed, ROUNDS * 7 // 10, 4)}
        for seed in range(5)
    ]


def _optex_checked(name: str) -> tuple[str, bool]:
    shares, words, late = [], [], []
    for run in under_optex(name):
        # A late gap is noisy: the level is what the base had on average in its last ten rounds.
        level = float(np.mean(run["alone"][-10:]))
        share = rounds_to_level(run["OptEx, N = 4"], level) / ROUNDS
        words.append(
            "the base diverged" if math.isnan(level) else "never" if math.isnan(share) else f"{share:.2f}"
        )
        shares.append(math.inf if math.isnan(share) else share)
        late.append([float(np.mean(run[kind][-10:])) for kind in ("alone", "OptEx, N = 4")])
    alone, ours = np.nanmedian(late, 0)
    middle = float(np.median(shares))
    return (
        f"median {middle:.2f} ({', '.join(words)} of {ROUNDS} rounds, rate {base_rate(name):g}); gap in the "
        f"last ten rounds {ours:.3f}, of {7 * ROUNDS // 10}, against {alone:.3f}",
        middle <= 0.7,
    )


CHECKS = [
    Check(
        "product with the Hessian, mean against finite differences of the exact gradient",
        "at most 3 % off; the released minus is further off",
        _products_checked,
    ),
    Check(
        "N-PG-IGT, γ₀ = 0.2: J* - J after 4,000 trajectories",
        "median at most 0.03, worst at most 0.1",
        _gap_checked,
    ),
    Check("vanilla policy gradient at the same rate", "diverges", _vanilla_checked),
    Check(
        "the same gap, median of 5 seeds, each at the best of three rates, against rivals",
        "N-PG-IGT's is no larger",
        _rivals_checked,
    ),
    Check(
        "the same, against the Hessian's recursion",
        "one of the two ends lower, with half the steps, of two batches each",
        _recursion_checked,
    ),
    Check(
        "OptEx, N = 4, policy gradient by SGD at its best rate: share of its rounds to its gap",
        "median at most 0.7 (5 starts)",
        lambda: _optex_checked("SGD"),
    ),
    Check(
        "the same with N-PG-IGT's rule as base",
        "median at most 0.7 (5 starts)",
        lambda: _optex_checked("N-PG-IGT"),
    ),
]


def curves() -> dict[str, Any]:
    """For the picture."""
    plus, minus = products()
    rates = {"N-PG-IGT": 0.2, **{name: tuned(name) for name in RIVALS}}
    return {
        "products": {"plus": plus, "minus": minus, "chunk": CHUNK},
        "gaps": {
            name: {"lr": lr, "runs": [gaps(name, lr, seed) for seed in range(5)]} for name, lr in rates.items()
        },
        "optex": {name: under_optex(name) for name in BASES},
    }


def draw(found: dict[str, Any]) -> Figure:
    """Products, gaps, rounds."""
    figure = Figure(figsize=(13.5, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    counts = found["products"]["chunk"] * np.arange(1, len(found["products"]["plus"]) + 1)
    left.loglog(counts, found["products"]["plus"], color="#0072b2", label="plus, as derived")
    left.loglog(counts, found["products"]["minus"], color="#d55e00", linestyle="--", label="minus, as released")
    left.axhline(0.03, color="#8a8a8a", linestyle=":", label="3 %")
    left.set(
        xlabel="trajectories", ylabel="relative error of the mean product", title="Hessian-vector products"
    )
    for name, entry in found["gaps"].items():
        runs = np.array([[math.nan if value is None else value for value in run] for run in entry["runs"]])
        x = np.linspace(0, BUDGET, runs.shape[1])
        middle.semilogy(x, np.median(runs, 0), color=COLOURS[name], label=f"{name}, rate {entry['lr']:g}")
        middle.fill_between(x, runs.min(0), runs.max(0), color=COLOURS[name], alpha=0.12, linewidth=0)
    middle.set(xlabel="trajectories", ylabel="J* - J: median, range (5 seeds)", title="The linear system")
    for name, runs in found["optex"].items():
        for kind, line in (("alone", ":"), ("OptEx, N = 4", "-")):
            rows = [[math.nan if value is None else value for value in run[kind]] for run in runs]
            right.semilogy(
                np.nanmedian(np.array(rows), 0), color=RIGHT[name], linestyle=line, label=f"{name}, {kind}"
            )
    right.set(xlabel="rounds", ylabel="J* - J: median (5 starts)", title="Under OptEx")
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure
