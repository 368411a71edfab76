"""Sketched gradients (Song, Wang, Yu, Zhang, ICML 2023, arXiv 2210.08371).

Moments, rates and bytes on vectors of 512 numbers with sketches of 32; an attack on single digits; ten clients
with one class of Fashion-MNIST each, beside what one would pick instead of a sketch.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import optex
from optex.studies.measures import rounds_to_level
from optex.studies.problems import LogisticSketched
from optex.studies.problems.data import fashion_mnist
from optex.studies.problems.tabular import scikit_learn_arrays
from papers import Check, losses_by_round

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.ranks import run_ranks
from tests.references.sketching import exact_epsilon

ROOM = "sources"
D, S, DRAWS = 512, 32, 4000
Kind = Literal["gaussian", "srht", "count", "ams"]
KINDS: tuple[Kind, ...] = ("gaussian", "srht", "count", "ams")
# A prototype had them without names; these are the kinds whose derived moments they are.
PROTOTYPE_MOMENTS = {"gaussian": 17.1, "count": 17.0, "srht": 15.93}


def words(values: dict[str, float], form: str = ".3f") -> str:
    """Numbers with their names."""
    return ", ".join(f"{name} {value:{form}}" for name, value in values.items())


# ------------------------------------------------------------------ the sketch


@cache
def moments() -> tuple[dict[str, float], dict[str, float]]:
    """Relative error of the mean of RᵀRg, and E‖RᵀRg‖² / ‖g‖², by kind."""
    g = torch.randn(D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    errors, seconds = {}, {}
    for kind in KINDS:
        sketch, total, squares = optex.Sketch(kind, S), torch.zeros_like(g), 0.0
        for t in range(DRAWS):
            back = sketch.desk(sketch.sk(g, t), D, t)
            total += back
            squares += float(back.square().sum())
        errors[kind] = float((total / DRAWS - g).norm() / g.norm())
        seconds[kind] = squares / DRAWS / float(g.square().sum())
    return errors, seconds


def _unbiased() -> tuple[str, bool]:
    errors = moments()[0]
    return words(errors), max(errors.values()) <= 0.08


def _second_moments() -> tuple[str, bool]:
    found = moments()[1]
    derived = {kind: optex.Sketch(kind, S).second_moment(D) for kind in KINDS}
    figure = f"{words(found, '.2f')}; derived: {words(derived, '.2f')}"
    near = all(abs(found[kind] / value - 1) <= 0.03 for kind, value in PROTOTYPE_MOMENTS.items())
    return figure, near and all(abs(found[kind] / derived[kind] - 1) <= 0.03 for kind in KINDS)


# ------------------------------------------------------------------ rounds and bytes

CURVATURES = torch.logspace(-1.5, 0, D, dtype=torch.float64)  # L = 1
LEVEL = 1e-2  # of the loss at the start


@cache
def descent(kind: Kind | None, rate: float) -> list[float]:
    """Losses of one client's descent on ½ Σ λ_i x_i², as a share of the first; to the level, or a breakdown."""
    first = 0.5 * float(CURVATURES.sum())

    def fun(x: np.ndarray, curvatures: np.ndarray) -> tuple[float, np.ndarray]:
        return float(0.5 * (curvatures * x * x).sum()), curvatures * x

    result = optex.federated_minimize(
        fun,
        np.ones(D),
        [CURVATURES.numpy()],
        jac=True,
        lr=1.0,
        server_lr=rate,
        sketch=None if kind is None else optex.Sketch(kind, S),
        maxiter=5000,
        gtol=0.0,
        callback=lambda intermediate_result: not LEVEL < intermediate_result.losses[-1] / first < 1e6,
    )
    return [value / first for value in result.losses]


def stable(kind: Kind) -> float:
    """The rate that the second moment allows."""
    return 1 / optex.Sketch(kind, S).second_moment(D)


@cache
def round_ratios() -> dict[str, float]:
    """Rounds to a hundredth of the loss, over gradient descent's at 1/L."""
    plain = rounds_to_level(descent(None, 1.0), LEVEL)
    return {kind: rounds_to_level(descent(kind, stable(kind)), LEVEL) / plain for kind in KINDS}


def _ratio() -> tuple[str, bool]:
    found = round_ratios()
    return words(found, ".1f"), all(12 <= ratio <= 22 for ratio in found.values())


def _diverges() -> tuple[str, bool]:
    found = {kind: rounds_to_level([-x for x in descent(kind, 1.0)], -1e6) for kind in KINDS}
    figure = f"a million times the loss after {words(found, '.0f')} rounds"
    return figure, all(math.isfinite(rounds) for rounds in found.values())


def _total_bytes() -> tuple[str, bool]:
    totals = {kind: ratio * S / D for kind, ratio in round_ratios().items()}
    figure = f"a round {D / S:g} times fewer; in all {words(totals, '.2f')} times those without a sketch"
    return figure, all(total >= 0.8 for total in totals.values())


def _bytes_of_process() -> int:
    """What this process has written so far, sockets with it; 0 where the system does not say."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0
    return int(dict(line.split(": ") for line in lines)["wchar"])


def trained_on_a_rank(rank: int, size: int | None) -> tuple[int, int, int]:
    """Bytes written by 50 steps of data parallelism, those handed to all-reduce, and those without a sketch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 10))
    parallel = DistributedDataParallel(model)
    state = optex.SketchState(optex.Sketch("srht", 1 << 20 if size is None else size))
    parallel.register_comm_hook(state, optex.sketched_hook)
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(rank))
    started = sent = plain = 0
    for step in range(55):
        if step == 5:  # DDP has settled
            started, sent, plain = _bytes_of_process(), state.bytes_sent, state.bytes_plain
        model.zero_grad()
        parallel(x).square().mean().backward()
    return _bytes_of_process() - started, state.bytes_sent - sent, state.bytes_plain - plain


def _hook_bytes() -> tuple[str, bool]:
    (wire, sent, plain), _ = run_ranks(trained_on_a_rank, 2, 1024)
    (wire_plain, _, _), _ = run_ranks(trained_on_a_rank, 2, None)
    figure = f"to all-reduce {sent / 50:,.0f} bytes a step of {plain / 50:,.0f}: {plain / sent:.1f} times fewer"
    if wire_plain > plain / 2:  # the system counts sockets
        figure += f"; written by the process {wire / 50:,.0f} of {wire_plain / 50:,.0f}"
        return figure, plain / sent > 15 and wire_plain / wire > 10
    return f"{figure}; this system does not count what goes through sockets", plain / sent > 15


# ------------------------------------------------------------------ privacy, and what leaks


def _accounting() -> tuple[str, bool]:
    found = {}
    for releases, multiplier in ((1, 10.0), (100, 20.0), (100, 50.0), (1000, 40.0)):
        mechanism = optex.GaussianMechanism(1.0, multiplier)
        told, least = mechanism.epsilon(releases, 1e-5), exact_epsilon(mechanism, releases, 1e-5)
        found[f"k = {releases}, z = {multiplier:g}:"] = (told, least)
    figure = "; ".join(f"{name} {told:.2f} (least {least:.2f})" for name, (told, least) in found.items())
    return figure, all(least <= told <= 1.2 * least for told, least in found.values())


PIXELS, CLASSES, SECRETS = 64, 10, 5
SIZES = (16, 32, 64, 96, 128, 256)


@cache
def classifier() -> tuple[Tensor, Tensor, Tensor]:  # [10, 65], [n, 64], [n]
    """A softmax classifier after a few steps, and digits."""
    inputs, labels = scikit_learn_arrays("load_digits", "sketching")
    pixels, digits = torch.from_numpy(inputs / 16.0), torch.from_numpy(labels).long()
    design = torch.cat([pixels, torch.ones_like(pixels[:, :1])], 1)
    weights = torch.zeros(CLASSES, PIXELS + 1, dtype=torch.float64)
    for _ in range(20):
        error = torch.softmax(design @ weights.T, 1) - functional.one_hot(digits, CLASSES)
        weights -= 0.5 * error.T @ design / len(design)
    return weights, pixels, digits


def gradient_at(label: Tensor) -> Callable[[Tensor], Tensor]:
    """A client's gradient [650] as a function of its one digit."""
    weights = classifier()[0]

    def gradient(x: Tensor) -> Tensor:
        extended = torch.cat([x, torch.ones_like(x[:1])])
        error = torch.softmax(weights @ extended, 0) - functional.one_hot(label, CLASSES)
        return torch.outer(error, extended).flatten()

    return gradient


@cache
def leaked(size: int, multiplier: float = 0.0) -> list[float]:
    """Relative errors of what the attack makes of five digits' messages, each clipped at its own length."""
    _, pixels, digits = classifier()
    sketch, found = optex.Sketch("gaussian", size), []
    for secret, label in zip(pixels[:SECRETS], digits[:SECRETS], strict=True):
        gradient = gradient_at(label)
        flat = gradient(secret)
        if multiplier:
            mechanism = optex.GaussianMechanism(float(flat.norm()), multiplier)
            flat = mechanism.release(flat, torch.Generator().manual_seed(1))
        start = torch.full_like(secret, 0.5)
        answer = optex.leakage_attack(gradient, sketch.sk(flat), start, sketch=sketch, steps=25)
        found.append(float((answer.data - secret).norm() / secret.norm()))
    return found


def _leaks() -> tuple[str, bool]:
    found = {str(size): float(np.median(leaked(size))) for size in SIZES}
    figure = f"median relative error by s: {words(found, '.2g')}"
    return figure, found["256"] <= 0.01 and found["16"] >= 0.3


def _noise_hides() -> tuple[str, bool]:
    found = {f"z = {z:g}:": float(np.median(leaked(256, z))) for z in (0.003, 0.03, 0.3)}
    spent = optex.GaussianMechanism(1.0, 0.3).epsilon(1, 1e-5)
    figure = f"median relative error at s = 256 with {words(found, '.2g')}; z = 0.3 is ε = {spent:,.0f}"
    return figure, found["z = 0.3:"] >= 0.3


# ------------------------------------------------------------------ ten clients, a class each

HIDDEN, ROUNDS, LOCAL, BATCH = 32, 60, 3, 32
SHAPES = ((HIDDEN, 784), (HIDDEN,), (CLASSES, HIDDEN), (CLASSES,))
LENGTHS = [math.prod(shape) for shape in SHAPES]
NUMBERS = sum(LENGTHS)  # 25,450
SENT = NUMBERS // 16
RATES = {
    "FedAvg": (0.05, 0.1, 0.2),
    "sketch": (0.5, 1.0, 2.0),
    "top-k": (0.05, 0.1, 0.2),
    "8 bits": (0.05, 0.1, 0.2),
}
Data = tuple[Tensor, Tensor]


@cache
def clothes(split: str) -> Data:  # [n, 784], [n]
    """Fashion-MNIST, scaled."""
    images, labels = fashion_mnist("train" if split == "train" else "test")
    return (torch.from_numpy(images).flatten(1) / 255 - 0.286) / 0.353, torch.from_numpy(labels).long()


@cache
def clients() -> list[Data]:
    """Client c has the images of class c, and no others."""
    images, labels = clothes("train")
    return [(images[labels == c], labels[labels == c]) for c in range(CLASSES)]


def scores(
    x: Tensor,  # [25450]
    images: Tensor,  # [n, 784]
) -> Tensor:  # [n, 10]
    """A network with one hidden layer."""
    first, bias, second, other = (p.view(shape) for p, shape in zip(x.split(LENGTHS), SHAPES, strict=True))
    return torch.relu(images @ first.T + bias) @ second.T + other


def loss(x: Tensor, data: Data) -> Tensor:  # []
    """Cross entropy."""
    return functional.cross_entropy(scores(x, data[0]), data[1])


def sample(data: Data, generator: torch.Generator) -> Data:
    """A client's batch."""
    rows = torch.randint(len(data[1]), (BATCH,), generator=generator)
    return data[0][rows], data[1][rows]


@cache
def start() -> Tensor:  # [25450]
    """As ``torch.nn.Linear`` begins."""
    generator = torch.Generator().manual_seed(0)
    bounds = (1 / math.sqrt(784), 1 / math.sqrt(784), 1 / math.sqrt(HIDDEN), 1 / math.sqrt(HIDDEN))
    pieces = [b * (2 * torch.rand(n, generator=generator) - 1) for n, b in zip(LENGTHS, bounds, strict=True)]
    return torch.cat(pieces)


@torch.no_grad()
def accuracy(x: Tensor) -> float:
    """On the test images."""
    images, labels = clothes("test")
    return float((scores(x, images).argmax(1) == labels).double().mean())


class TopK:
    """The s/2 largest entries of what is to be sent, each with its place; the rest waits (error feedback)."""

    def __init__(self) -> None:
        self.waiting: dict[int, Tensor] = {}

    def __call__(self, client: int, update: Tensor) -> Tensor:
        whole = update + self.waiting.get(client, 0.0)
        places = whole.abs().topk(SENT // 2).indices
        sent = torch.zeros_like(whole)
        sent[places] = whole[places]
        self.waiting[client] = whole - sent
        return sent

    def bytes(self, messages: list[Tensor], mean: Tensor) -> tuple[float, float]:
        """Up for one client, and down."""
        return 8 * SENT / 2, min(8 * int(mean.count_nonzero()), mean.nbytes)


class EightBits:
    """127 levels a sign, rounded at random; one scale a message."""

    def __call__(self, client: int, update: Tensor) -> Tensor:
        scale = update.abs().max() / 127
        return (update / scale + torch.rand_like(update)).floor() * scale

    def bytes(self, messages: list[Tensor], mean: Tensor) -> tuple[float, float]:
        """Up for one client, and down, where the mean goes as the messages came."""
        return len(mean) + 4, len(mean) + 4


def other_rounds(compress: TopK | EightBits, rate: float) -> dict[str, Any]:
    """The same rounds with another compression."""
    torch.manual_seed(0)
    x, found = start().clone(), {"accuracy": [], "up": 0.0, "down": 0.0}
    generators = [torch.Generator().manual_seed(c) for c in range(CLASSES)]
    for number in range(ROUNDS):
        messages = []
        for client, (data, generator) in enumerate(zip(clients(), generators, strict=True)):
            u = x.clone().requires_grad_()
            for _ in range(LOCAL):
                (slope,) = torch.autograd.grad(loss(u, sample(data, generator)), u)
                u = (u - rate * slope).detach().requires_grad_()
            messages.append(compress(client, u.detach() - x))
        mean = torch.stack(messages).mean(0)
        x = x + (mean if isinstance(compress, TopK) else compress(0, mean))
        up, down = compress.bytes(messages, mean)
        found["up"] += up
        found["down"] += down
        if number % 5 == 4:
            found["accuracy"].append(accuracy(x))
    with torch.no_grad():
        found["loss"] = float(np.mean([float(loss(x, data)) for data in clients()]))
    return found


def own_rounds(rate: float, sketch: optex.Sketch | None) -> dict[str, Any]:
    """Rounds of ``federated_minimize``."""
    found: dict[str, Any] = {"accuracy": []}

    def note(intermediate_result: Any) -> None:
        if intermediate_result.nit % 5 == 0:
            found["accuracy"].append(accuracy(intermediate_result.x))

    result = optex.federated_minimize(
        loss,
        start(),
        clients(),
        lr=rate,
        local_steps=LOCAL,
        sketch=sketch,
        sample=sample,
        maxiter=ROUNDS,
        gtol=0.0,
        callback=note,
    )
    value = result.fun if math.isfinite(result.fun) else math.inf
    return found | {"loss": value, "up": result.uploaded, "down": result.downloaded}


@cache
def federation() -> dict[str, dict[str, Any]]:
    """Each method at the rate with the least training loss after all rounds."""

    def run(method: str, rate: float) -> dict[str, Any]:
        if method in ("FedAvg", "sketch"):
            sketch = optex.Sketch("srht", SENT) if method == "sketch" else None
            return own_rounds(rate, sketch) | {"rate": rate}
        return other_rounds(TopK() if method == "top-k" else EightBits(), rate) | {"rate": rate}

    return {
        method: min((run(method, rate) for rate in rates), key=lambda found: found["loss"])
        for method, rates in RATES.items()
    }


def told(method: str) -> str:
    """Accuracy, and kilobytes of one client."""
    found = federation()[method]
    return (
        f"{method} {found['accuracy'][-1]:.3f} (lr {found['rate']:g}, "
        f"{found['up'] / 1e3:,.0f} kB up, {found['down'] / 1e3:,.0f} down)"
    )


def _clothes() -> tuple[str, bool]:
    found = federation()
    figure = f"after {ROUNDS} rounds: {told('sketch')}, {told('FedAvg')}"
    return figure, found["sketch"]["accuracy"][-1] >= found["FedAvg"]["accuracy"][-1] - 0.05


def _equal_bytes() -> tuple[str, bool]:
    found = federation()
    rounds = 5 * round(ROUNDS * SENT / NUMBERS / 5)
    plain = found["FedAvg"]["accuracy"][rounds // 5 - 1]
    sketched = found["sketch"]["accuracy"][-1]
    figure = f"sketch {sketched:.3f} after {ROUNDS} rounds, FedAvg {plain:.3f} after {rounds}"
    return figure, sketched >= plain


def _rivals() -> tuple[str, bool]:
    found = {method: run["accuracy"][-1] for method, run in federation().items() if method != "FedAvg"}
    winner = max(found, key=lambda method: found[method])
    return f"{', '.join(told(method) for method in found)}: {winner} wins", winner == "sketch"


# ------------------------------------------------------------------ under OptEx

STEPS = 100
OPTEX_RATES = (0.5, 1.0, 2.0)


def plain_logistic(rate: float, seed: int) -> list[float]:
    """SGD on sketched gradients; the loss before every step and after the last."""
    problem, losses = LogisticSketched(seed), []
    source, optimizer = problem.source(), torch.optim.SGD(problem.parameters(), lr=rate)
    torch.manual_seed(seed)
    for _ in range(STEPS):
        losses.append(problem.evaluate())
        optimizer.zero_grad()
        source.gradient(None)
        optimizer.step()
    return [*losses, problem.evaluate()]


def optex_logistic(rate: float, seed: int) -> list[float]:
    """OptEx with four gradients at once; the loss after every round."""
    problem = LogisticSketched(seed)
    torch.manual_seed(seed)
    optimizer = optex.OptEx(torch.optim.SGD(problem.parameters(), lr=rate), parallelism=4)
    return losses_by_round(optimizer, problem, STEPS)


@cache
def accelerated() -> dict[str, Any]:
    """Rates tuned on a seed of their own, and three seeds."""

    def best(run: Callable[[float, int], list[float]]) -> float:
        ends = {rate: float(np.mean(run(rate, 3)[-10:])) for rate in OPTEX_RATES}
        return min(ends, key=lambda rate: ends[rate] if math.isfinite(ends[rate]) else math.inf)

    plain, ours = best(plain_logistic), best(optex_logistic)
    return {
        "rates": [plain, ours],
        "sgd": [plain_logistic(plain, seed) for seed in range(3)],
        "optex": [optex_logistic(ours, seed) for seed in range(3)],
        "optex at sgd's rate": [optex_logistic(plain, seed) for seed in range(3)],
    }


def _under_optex() -> tuple[str, bool]:
    found = accelerated()
    ratios, alike = (
        [
            rounds_to_level(losses, plain[-1]) / STEPS
            for losses, plain in zip(found[name], found["sgd"], strict=True)
        ]
        for name in ("optex", "optex at sgd's rate")
    )
    plain, ours = found["rates"]
    figure = (
        f"{', '.join(f'{r:.2f}' for r in ratios)} of SGD's rounds, three seeds, at lr {ours:g} and SGD's "
        f"{plain:g}; both at {plain:g}: {', '.join(f'{r:.2f}' for r in alike)}"
    )
    return figure, all(ratio <= 0.7 for ratio in ratios)


BLOCKS = (2, 4)  # rounds that keep R


@cache
def held_sketches(held: int) -> list[float]:
    """Losses of rounds with one R for every few of them, and a history that begins anew with it."""
    x = nn.Parameter(torch.ones(D, dtype=torch.float64))
    exact = optex.ObjectiveSource(lambda _: 0.5 * (CURVATURES * x * x).sum(), deterministic=True)
    losses = []
    for block in range(400 // held):
        source = optex.SketchedSource(exact, optex.Sketch("srht", S, seed=block), [x], fixed=True)
        # The largest eigenvalue of RᵀR is d/s for this kind.
        optimizer = optex.OptEx(torch.optim.SGD([x], lr=S / D), parallelism=4)
        for _, report in zip(range(held), optimizer.rounds([None] * 10**6, source), strict=False):
            losses.append(float(report.loss) / (0.5 * float(CURVATURES.sum())))
        if losses[-1] <= LEVEL:
            break
    return losses


def _held() -> tuple[str, bool]:
    fresh = rounds_to_level(descent("srht", stable("srht")), LEVEL)
    found = {f"{held}:": rounds_to_level(held_sketches(held), LEVEL) for held in BLOCKS}
    figure = f"rounds with R held for {words(found, '.0f')}; a new R every round, no OptEx: {fresh:.0f}"
    return figure, any(rounds <= 0.7 * fresh for rounds in found.values())


CHECKS = [
    Check("mean of RᵀRg over 4,000 draws, d = 512, s = 32", "off by at most 0.08 of ‖g‖", _unbiased),
    Check("E‖RᵀRg‖² / ‖g‖²", "17.1 gaussian, 17.0 count, 15.93 srht (± 3 %)", _second_moments),
    Check("rounds to 10⁻² of the loss over descent's without a sketch", "12 to 22", _ratio),
    Check("the same at the step 1/L, without the dimension's factor", "diverges", _diverges),
    Check("bytes", "fewer a round; not fewer in all (at least 0.8 of them)", _total_bytes),
    Check(
        "DDP with the hook, two ranks, s = 1,024", "more than 15 times fewer bytes to all-reduce", _hook_bytes
    ),
    Check("ε told at δ = 10⁻⁵", "at least the exact one of Balle and Wang, at most 1.2 times", _accounting),
    Check("one digit out of R∇F, d = 650, 64 pixels", "error ≤ 0.01 at s = 256, ≥ 0.3 at 16", _leaks),
    Check("the same with noise before the sketch", "error ≥ 0.3 at z = 0.3", _noise_hides),
    Check("Fashion-MNIST, ten clients with a class each, s = d/16", "at most 0.05 below FedAvg", _clothes),
    Check("the same at equal bytes", "sketch at least FedAvg", _equal_bytes),
    Check("the same beside other compressions", "the sketch wins", _rivals),
    Check("OptEx, N = 4, logistic regression, d = 31, s = 8", "at most 0.7 of SGD's rounds", _under_optex),
    Check("OptEx, N = 4, on one R for a few rounds, history of s numbers", "at most 0.7 of the rounds", _held),
]


def curves() -> dict[str, Any]:
    """Losses, errors of the attack, accuracies and losses under OptEx."""
    every = 10
    return {
        "every": every,
        "plain": descent(None, 1.0),
        "descent": {kind: descent(kind, stable(kind))[::every] for kind in KINDS},
        "leaks": [[size, float(np.median(leaked(size)))] for size in SIZES],
        "federation": {
            method: {"accuracy": run["accuracy"], "up": run["up"], "rate": run["rate"]}
            for method, run in federation().items()
        },
        "optex": {name: accelerated()[name][0] for name in ("sgd", "optex")},
    }


COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000")


def draw(found: dict[str, Any]) -> Figure:
    """Rounds of descent, the attack, the federation by bytes, and OptEx."""
    figure = Figure(figsize=(16, 4), layout="constrained")
    FigureCanvasAgg(figure)
    rounds, attack, clothes_, under = figure.subplots(1, 4)
    rounds.semilogy(found["plain"], color=COLOURS[-1], label="no sketch")
    for colour, (kind, losses) in zip(COLOURS, found["descent"].items(), strict=False):
        places = [found["every"] * i for i in range(len(losses))]
        rounds.semilogy(places, losses, color=colour, label=kind)
    rounds.set(
        title="quadratic, d = 512, s = 32", xlabel="rounds", ylabel="share of the loss", ylim=(LEVEL / 2, 1.2)
    )
    sizes, errors = zip(*found["leaks"], strict=True)
    attack.loglog(sizes, errors, "o-", color=COLOURS[0], label="median of five digits")
    attack.axvline(PIXELS, color=COLOURS[-1], linestyle=":", label="pixels of a digit")
    attack.set_xticks(sizes, [str(size) for size in sizes])
    attack.minorticks_off()
    attack.set(title="the attack", xlabel="numbers sent, s", ylabel="relative error of the digit")
    for colour, (method, run) in zip(COLOURS, found["federation"].items(), strict=False):
        share = [run["up"] / 1e3 * (i + 1) / len(run["accuracy"]) for i in range(len(run["accuracy"]))]
        clothes_.semilogx(share, run["accuracy"], color=colour, label=f"{method}, lr {run['rate']:g}")
    clothes_.set(title="Fashion-MNIST, a class a client", xlabel="kB sent by a client", ylabel="test accuracy")
    for colour, (name, losses) in zip(COLOURS, found["optex"].items(), strict=False):
        under.semilogy(losses, color=colour, label={"sgd": "SGD", "optex": "OptEx over it, N = 4"}[name])
    under.set(title="logistic regression, d = 31, s = 8", xlabel="rounds", ylabel="loss")
    for place in (rounds, attack, clothes_, under):
        place.legend(frameon=False, fontsize="small")
        place.grid(alpha=0.3)
    return figure
