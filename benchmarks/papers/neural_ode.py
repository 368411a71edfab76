"""Regularised neural differential equations (Pal et al., ICML 2021 and ICML 2023; 2105.03918, 2303.02262).

Two rings: 2-D points and one component more, f 4 -> 32 tanh -> 3, Tsit5 at 1e-6, Adam 1e-2, 150 steps on 200
points, 1000 others to test. A pendulum with friction: eight positions of 16 swings. Fashion-MNIST: 2,000 images
of 14 x 14. Evaluations are calls of the network to predict all test points.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional
from torchdiffeq import odeint

import optex
from optex.regularisers import Flow, LocalRegularizer, Regularizer
from optex.studies.problems.data import Split, fashion_mnist
from papers import Check

ROOM = "solvers"
SEEDS, FEW = range(5), range(2)
METHODS: dict[str, tuple[str | Regularizer | None, float]] = {
    "none": (None, 0.0),
    "global": ("error", 1.0),
    "local": ("local", 1.0),
}
TOLERANCES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


class Field(nn.Module):
    """f(t, u): one hidden layer of tanh; states [n, d]."""

    def __init__(self, size: int, hidden: int = 32) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(size + 1, hidden), nn.Tanh(), nn.Linear(hidden, size))

    def forward(self, times: Tensor, states: Tensor) -> Tensor:
        return self.net(torch.cat([states, times.expand(len(states))[:, None]], 1))


@dataclass
class Trained:
    """A trained model, and what its prediction costs."""

    flow: Flow
    predict: Callable[[Flow], Tensor]
    quality: Callable[[Tensor], float]
    training: float = 0.0
    evaluations: int = 0
    score: float = 0.0
    seconds: float = 0.0

    def at(self, tolerance: float) -> tuple[int, float]:
        """Evaluations and quality with another tolerance."""
        flow = copy.copy(self.flow)
        flow.rtol = flow.atol = tolerance
        with torch.no_grad():
            score = self.quality(self.predict(flow))
        return flow.evaluations, score


@dataclass(kw_only=True)
class Rings(Trained):
    """A model of the rings, with its parts and the points of the test."""

    head: nn.Module
    field: Field
    test: Tensor


def train(
    model: Trained,
    objective: Callable[..., Tensor],
    parameters: list[nn.Parameter],
    batches: list[Any],
    kind: str | Regularizer | None,
    strength: float,
    decay: float = 0.0,
) -> Trained:
    """Adam at 1e-2, and the prediction measured: the least of three times."""
    flow = model.flow
    if kind is not None:
        objective = optex.regularise(objective, flow, kind, strength=strength)
    optimizer = torch.optim.Adam(parameters, lr=1e-2, weight_decay=decay)
    started = time.perf_counter()
    for batch in batches:
        optimizer.zero_grad()
        objective(batch).backward()
        optimizer.step()
    model.training = time.perf_counter() - started
    flow.eval()
    found, model.seconds = timed(lambda: model.predict(flow))
    model.evaluations, model.score = flow.evaluations, model.quality(found)
    return model


@torch.no_grad()
def timed(predict: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """A prediction, and the least seconds of three times."""
    runs = []
    for _ in range(3):
        started = time.perf_counter()
        found = predict()
        runs.append((time.perf_counter() - started, found))
    return runs[-1][1], min(seconds for seconds, _ in runs)


# ------------------------------------------------------------------ two rings


def ring_points(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A disc of radius ½ within a ring from 1 to 3/2, with a third component 0; labels."""
    inner, outer = torch.rand(2, count // 2, generator=generator)
    radius = torch.cat([0.5 * inner.sqrt(), (1 + 1.25 * outer).sqrt()])
    angle = 2 * torch.pi * torch.rand(count, generator=generator)
    points = torch.stack([radius * angle.cos(), radius * angle.sin(), torch.zeros(count)], 1)
    return points, (torch.arange(count) >= count // 2).float()


@cache
def rings(kind: str | Regularizer | None, strength: float, seed: int = 0, decay: float = 0.0) -> Rings:
    """One training run; quality is accuracy."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    points, labels = ring_points(200, generator)
    test, answers = ring_points(1000, generator)
    field, head = Field(3), nn.Linear(3, 1)
    flow = Flow(field)
    model = Rings(
        flow,
        lambda flow: head(flow(test))[:, 0],
        lambda scores: float(((scores > 0) == (answers > 0.5)).float().mean()),
        head=head,
        field=field,
        test=test,
    )

    def objective(_: None) -> Tensor:
        return functional.binary_cross_entropy_with_logits(head(flow(points))[:, 0], labels)

    parameters = [*field.parameters(), *head.parameters()]
    train(model, objective, parameters, [None] * 150, kind, strength, decay)
    return model


def joint_evaluations(model: Rings) -> int:
    """With the test batch as one system, one error and one step for all, as the papers solve."""
    flow = Flow(lambda times, states: model.field(times, states[0])[None])
    with torch.no_grad():
        flow(model.test[None])
    return flow.evaluations


def with_torchdiffeq(model: Rings, method: str, **options: Any) -> tuple[int, float, float]:
    """Evaluations, accuracy and seconds of torchdiffeq's solvers, for the same network."""
    calls = 0

    def field(now: Tensor, states: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return model.field(now, states)

    def predict() -> Tensor:
        nonlocal calls
        calls = 0
        states = odeint(field, model.test, torch.tensor([0.0, 1.0]), method=method, **options)[-1]
        assert isinstance(states, Tensor)  # a tuple where the start is one
        return states

    found, seconds = timed(predict)
    with torch.no_grad():
        score = model.quality(model.head(found)[:, 0])
    return calls, score, seconds


# ------------------------------------------------------------------ a pendulum, Fashion-MNIST


def swings(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Angles and speeds [n, 8, 2] of pendulums with friction, θ'' = -4 sin θ - 0.3 θ', at times up to 2."""
    times = torch.linspace(0.0, 2.0, 8)
    start = torch.stack([4 * torch.rand(count, generator=generator) - 2, torch.zeros(count)], 1)

    def field(_: Tensor, state: Tensor) -> Tensor:
        return torch.stack([state[:, 1], -4 * state[:, 0].sin() - 0.3 * state[:, 1]], 1)

    with torch.no_grad():
        return times, Flow(field)(start, times)


@cache
def pendulum(method: str, strength: float, seed: int) -> Trained:
    """Quality is the root mean square error on 100 other swings."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    times, seen = swings(16, generator)
    _, unseen = swings(100, generator)
    field = Field(2)
    flow = Flow(field)
    model = Trained(
        flow,
        lambda flow: flow(unseen[:, 0], times),
        lambda found: float((found - unseen).square().mean().sqrt()),
    )

    def objective(_: None) -> Tensor:
        return (flow(seen[:, 0], times) - seen).square().mean()

    return train(model, objective, list(field.parameters()), [None] * 150, METHODS[method][0], strength)


@cache
def clothes() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """2,000 images to train on, 1,000 to test, averaged to 14 x 14."""

    def part(split: Split, count: int) -> tuple[Tensor, Tensor]:
        images, labels = fashion_mnist(split)
        small = functional.avg_pool2d(torch.from_numpy(images[:count]).float() / 255, 2).flatten(1)
        return (small - 0.286) / 0.32, torch.from_numpy(labels[:count]).long()

    return *part("train", 2000), *part("test", 1000)


@cache
def fashion(method: str, strength: float, seed: int) -> Trained:
    """196 -> 16, a flow with f 17 -> 32 -> 16, 16 -> 10; 100 batches of 200. Quality is accuracy."""
    torch.manual_seed(seed)
    images, labels, test, answers = clothes()
    below, field, head = nn.Linear(196, 16), Field(16), nn.Linear(16, 10)
    flow = Flow(field, rtol=1e-5, atol=1e-5)
    model = Trained(
        flow,
        lambda flow: head(flow(below(test))),
        lambda scores: float((scores.argmax(1) == answers).float().mean()),
    )

    def objective(batch: Tensor) -> Tensor:
        return functional.cross_entropy(head(flow(below(images[batch]))), labels[batch])

    orders = [torch.randperm(2000) for _ in range(10)]
    batches = [batch for order in orders for batch in order.split(200)]
    parameters = [*below.parameters(), *field.parameters(), *head.parameters()]
    return train(model, objective, parameters, batches, METHODS[method][0], strength)


# ------------------------------------------------------------------ the checks


def listed(values: Any, form: str = "{}") -> str:
    """Numbers in a row."""
    return ", ".join(form.format(value) for value in values)


def of_seeds(method: str) -> list[Trained]:
    """The rings' runs of a method."""
    return [rings(*METHODS[method], seed) for seed in SEEDS]


def _ratio_checked(method: str) -> Callable[[], tuple[str, bool]]:
    def run() -> tuple[str, bool]:
        pairs = list(zip(of_seeds(method), of_seeds("none"), strict=True))
        ratios = [own.evaluations / plain.evaluations for own, plain in pairs]
        worst = min(own.score for own, _ in pairs)
        calls = listed(f"{own.evaluations}/{plain.evaluations}" for own, plain in pairs)
        words = f"{calls}: {statistics.median(ratios):.2f} (median); accuracy {worst:.3f} at least"
        return words, max(ratios) <= 0.56 and worst >= 0.99

    return run


def _joint_checked(wanted: tuple[tuple[str | None, float, int, int], ...]) -> Callable[[], tuple[str, bool]]:
    def run() -> tuple[str, bool]:
        found = [joint_evaluations(rings(kind, strength)) for kind, strength, _, _ in wanted]
        return listed(found), all(
            low <= calls <= high for calls, (_, _, low, high) in zip(found, wanted, strict=True)
        )

    return run


def _collapse_checked() -> tuple[str, bool]:
    model = rings("local", 100.0)
    return f"{model.score:.3f}, {model.evaluations} evaluations", model.score < 0.95


PUBLISHED = LocalRegularizer(published=True)


def _published_checked() -> tuple[str, bool]:
    models = [rings(PUBLISHED, 1.0, seed) for seed in FEW]
    plain = [rings(None, 0.0, seed) for seed in FEW]
    ratios = [own.evaluations / other.evaluations for own, other in zip(models, plain, strict=True)]
    scores = [model.score for model in models]
    words = f"{listed(ratios, '{:.2f}')} times the evaluations; accuracy {listed(scores, '{:.3f}')} (2 seeds)"
    return words, max(ratios) <= 0.56 and min(scores) >= 0.99


def _stiffness_checked() -> tuple[str, bool]:
    plain = rings(None, 0.0).evaluations
    models = {kind: rings(kind, 0.1) for kind in ("stiffness", "local-stiffness")}
    words = listed(f"{kind} {model.evaluations}/{plain}, {model.score:.3f}" for kind, model in models.items())
    return words, all(model.evaluations < plain and model.score >= 0.98 for model in models.values())


def _seconds_checked(method: str, least: float) -> Callable[[], tuple[str, bool]]:
    def run() -> tuple[str, bool]:
        pairs = list(zip(of_seeds(method), of_seeds("none"), strict=True))
        faster = statistics.median(plain.seconds / own.seconds for own, plain in pairs)
        training = statistics.median(own.training / plain.training for own, plain in pairs)
        milliseconds = 1e3 * statistics.median(own.seconds for own, _ in pairs)
        return (
            f"{faster:.1f} times faster, {milliseconds:.1f} ms; training takes {training:.2f} of the seconds",
            faster >= least,
        )

    return run


def _decay_checked() -> tuple[str, bool]:
    plain, local = rings(None, 0.0), rings("local", 1.0)
    models = {decay: rings(None, 0.0, 0, decay) for decay in (1e-2,)}
    words = listed(
        f"{model.evaluations} (accuracy {model.score:.3f}) at {decay:g}" for decay, model in models.items()
    )
    good = [model.evaluations for model in models.values() if model.score >= 0.99] or [plain.evaluations]
    return f"{words}; without {plain.evaluations}, local {local.evaluations}", local.evaluations < min(good)


def cheapest(model: Trained) -> tuple[int, float]:
    """The fewest evaluations at which the accuracy is still 0.99, and the tolerance."""
    found = [(*model.at(tolerance), tolerance) for tolerance in TOLERANCES]
    return min((calls, tolerance) for calls, score, tolerance in found if score >= 0.99)


def _loose_checked() -> tuple[str, bool]:
    pairs = [
        (cheapest(plain)[0], own.evaluations, cheapest(own)[0])
        for plain, own in zip(of_seeds("none"), of_seeds("local"), strict=True)
    ]
    plain, own, loose = (listed(column) for column in zip(*pairs, strict=True))
    words = f"none, loosest tolerance: {plain}; local at 1e-6: {own}; local, loosest: {loose}"
    return words, all(mine < other for other, mine, _ in pairs)


def _fixed_checked() -> tuple[str, bool]:
    plain, local = rings(None, 0.0), rings("local", 1.0)
    words, least = [], None
    for steps in (1, 2, 4, 8):
        calls, score, _ = with_torchdiffeq(plain, "rk4", options={"step_size": 1 / steps})
        words.append(f"{calls} ({score:.3f})")
        if score >= 0.99 and least is None:
            least = calls
    return (
        f"RK4 on the plain network: {listed(words)}; local at 1e-6: {local.evaluations}",
        least is None or local.evaluations < least,
    )


def _library_checked() -> tuple[str, bool]:
    model = rings(None, 0.0)
    calls, _, seconds = with_torchdiffeq(model, "dopri5", rtol=1e-6, atol=1e-6)
    return (
        f"Flow {model.evaluations} evaluations, {1e3 * model.seconds:.1f} ms; dopri5 {calls}, "
        f"{1e3 * seconds:.1f} ms: {model.seconds / seconds:.2f} of its seconds",
        model.seconds <= seconds,
    )


def _data_checked(
    run: Callable[[str, float, int], Trained],
    strength: float,
    name: str,
    good: Callable[[Trained, Trained], bool],
) -> Callable[[], tuple[str, bool]]:
    def checked() -> tuple[str, bool]:
        words, holds, plain = [], True, [run("none", 0.0, seed) for seed in SEEDS]
        for method in METHODS:
            models = plain if method == "none" else [run(method, strength, seed) for seed in SEEDS]
            score = statistics.median(model.score for model in models)
            milliseconds = 1e3 * statistics.median(model.seconds for model in models)
            calls = listed(model.evaluations for model in models)
            words.append(f"{method} {calls} ({name} {score:.3f}, {milliseconds:.1f} ms)")
            for own, other in zip(models, plain, strict=True):
                enough = own.evaluations <= 0.733 * other.evaluations and good(own, other)
                holds = holds and (method == "none" or enough)
        return "; ".join(words), holds

    return checked


def _as_close(own: Trained, other: Trained) -> bool:
    return own.score <= 1.1 * other.score


def _as_right(own: Trained, other: Trained) -> bool:
    return own.score >= other.score - 0.01


CHECKS = [
    Check(
        "rings: local term, λ = 1, 5 seeds: evaluations",
        "at most 0.56 of those without, accuracy at least 0.99",
        _ratio_checked("local"),
    ),
    Check(
        "rings: global term, λ = 1, 5 seeds: evaluations",
        "at most 0.56 of those without, accuracy at least 0.99",
        _ratio_checked("global"),
    ),
    Check(
        "rings: evaluations without a term, the batch as one system",
        "85 to 91 (prototype), and one for the first step's size",
        _joint_checked(((None, 0.0, 86, 92),)),
    ),
    Check(
        "rings: the same, global term, λ = 0.1 and 1",
        "61 to 67, and 19 (prototype), and one",
        _joint_checked((("error", 0.1, 62, 68), ("error", 1.0, 20, 20))),
    ),
    Check(
        "rings: the same, local term, λ = 1",
        "19 (prototype), and one",
        _joint_checked((("local", 1.0, 20, 20),)),
    ),
    Check(
        "rings: accuracy, local term, λ = 100",
        "collapses: below 0.95 (prototype: 0.69 to 0.91)",
        _collapse_checked,
    ),
    Check(
        "rings: the local term as published, λ = 1",
        "at most 0.56 of the evaluations, accuracy at least 0.99",
        _published_checked,
    ),
    Check(
        "rings: stiffness, λ = 0.1, one seed: evaluations, accuracy",
        "fewer than without, accuracy at least 0.98",
        _stiffness_checked,
    ),
    Check(
        "rings: seconds of a prediction, local",
        "1.3 to 2 times faster (published)",
        _seconds_checked("local", 1.3),
    ),
    Check("rings: seconds of a prediction, global", "half (published)", _seconds_checked("global", 2.0)),
    Check("rival: weight decay, one seed", "more evaluations than the local term", _decay_checked),
    Check(
        "rival: a looser tolerance to predict with, accuracy at least 0.99, 5 seeds",
        "more evaluations than the local term at 1e-6",
        _loose_checked,
    ),
    Check(
        "rival: RK4 with fixed steps, accuracies in brackets",
        "more evaluations than the local term to 0.99",
        _fixed_checked,
    ),
    Check("seconds of a prediction against torchdiffeq, at 1e-6", "no more than dopri5's", _library_checked),
    *(
        Check(
            f"pendulum, λ = {strength:g}, 5 seeds: evaluations",
            "at most 0.733 of those without (published), error at most a tenth larger, every seed",
            _data_checked(pendulum, strength, "error", _as_close),
        )
        for strength in (1.0, 0.01)
    ),
    *(
        Check(
            f"Fashion-MNIST, λ = {strength:g}, 5 seeds: evaluations",
            "at most 0.733 of those without (published), accuracy at most 0.01 less, every seed",
            _data_checked(fashion, strength, "accuracy", _as_right),
        )
        for strength in (1.0, 10.0)
    ),
]


# ------------------------------------------------------------------ the picture


def curves() -> dict[str, Any]:
    """What is drawn: evaluations along tolerances, and both against quality, by data set."""
    tolerance = {
        method: [[rings(*METHODS[method], seed).at(value) for value in TOLERANCES] for seed in SEEDS]
        for method in METHODS
    }
    return {
        "tolerances": list(TOLERANCES),
        "rings": tolerance,
        "evaluations": {
            "rings": {method: [model.evaluations for model in of_seeds(method)] for method in METHODS},
            "pendulum": {
                method: [pendulum(method, METHODS[method][1], seed).evaluations for seed in SEEDS]
                for method in METHODS
            },
            "Fashion-MNIST": {
                method: [fashion(method, METHODS[method][1], seed).evaluations for seed in SEEDS]
                for method in METHODS
            },
        },
    }


def draw(curves: dict[str, Any]) -> Figure:
    """Evaluations along the tolerance of prediction; evaluations by data set."""
    figure = Figure(figsize=(10.0, 3.9), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    styles = {"none": ("#000000", "o"), "global": ("#0072b2", "s"), "local": ("#d55e00", "^")}
    for method, (colour, marker) in styles.items():
        columns = zip(*curves["rings"][method], strict=True)
        centre = [statistics.median(calls for calls, _ in column) for column in columns]
        left.plot(curves["tolerances"], centre, color=colour, marker=marker, label=method)
    least = min(score for runs in curves["rings"].values() for run in runs for _, score in run)
    left.set_xscale("log")
    left.set_xlabel("tolerance of the prediction (training: 1e-6)")
    left.set_ylabel("evaluations")
    left.set_title(f"two rings, median of 5 seeds; accuracy at least {least:.3f}", fontsize=11)
    for index, (method, (colour, marker)) in enumerate(styles.items()):
        for place, found in enumerate(curves["evaluations"].values()):
            values = found[method]
            spots = [place + 0.22 * (index - 1)] * len(values)
            right.scatter(spots, values, color=colour, marker=marker, label=method if place == 0 else None)
    right.set_xticks(range(3), list(curves["evaluations"]))
    right.set_ylabel("evaluations, a mark a seed")
    right.set_title("at the tolerance of training, λ = 1", fontsize=11)
    for panel in (left, right):
        panel.set_ylim(bottom=0)
        panel.grid(visible=True, which="major", linewidth=0.5, alpha=0.35)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(fontsize=8, frameon=False)
    return figure
