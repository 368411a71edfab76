"""SCALE (arXiv 2506.16659): two languages, what its state takes, how long a step is; see benchmarks/family.py.

The toy language is a Markov chain of 512 symbols. Symbol j follows symbol i with a probability proportional
to exp(s · aᵢ·bⱼ / 4) / (j + 1), a and b Gaussian in sixteen dimensions: there are frequent symbols and rare
ones, and a structure that a network of width 64 can hold. s is such that the entropy rate, which no loss is
below, is 4 nats. Losses are expectations over the chain, worked out, not sampled. All methods see the same
1,000 batches of 512 pairs of neighbours; the rate rises over the first tenth of the steps and falls along a
cosine, as in the paper. Each method's peak rate is its best of three for one seed; figures are the means over
that seed and another one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from optex.optimizers import SCALE, scale_param_groups
from optex.studies.baselines import Setting, make_method
from optex.studies.measures import best_so_far, rounds_to_level
from optex.studies.problems import make_problem
from papers import Check, grad_of

ROOM = "optimizers"

SYMBOLS, WIDTH, RANK, ENTROPY = 512, 64, 16, 4.0
STEPS, BATCH, EVERY, SEEDS = 1000, 512, 25, (0, 1)


# ---------------------------------------------------------------------- the language


@cache
def chain() -> tuple[Tensor, Tensor, float]:  # P [512, 512], stationary [512], entropy rate; float64
    """The chain's transitions, how often each symbol comes, and its entropy rate."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, SYMBOLS, RANK, generator=generator, dtype=torch.float64)
    common = -torch.arange(1, SYMBOLS + 1, dtype=torch.float64).log()

    def at(sharpness: float) -> tuple[Tensor, Tensor, float]:
        transitions = (common + sharpness * (a @ b.T) / math.sqrt(RANK)).softmax(1)
        stationary = torch.full((SYMBOLS,), 1 / SYMBOLS, dtype=torch.float64)
        for _ in range(200):
            stationary = stationary @ transitions
        rate = -(stationary[:, None] * transitions * transitions.log()).sum()
        return transitions, stationary, float(rate)

    low, high = 0.0, 4.0  # of less and less entropy
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle)[2] > ENTROPY else (low, middle)
    return at(low)


class Network(nn.Module):
    """Embedding, a hidden layer beside which the input goes on, a norm, and scores."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(SYMBOLS, WIDTH)
        self.hidden = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, SYMBOLS, bias=False)

    def forward(self, codes: Tensor) -> Tensor:  # [n] -> [n, symbols]
        seen = self.embedding(codes)
        return self.head(self.norm(seen + self.hidden(seen).relu()))


@cache
def batches(seed: int) -> list[tuple[Tensor, Tensor]]:
    """Pairs of neighbours."""
    transitions, stationary, _ = chain()
    below = (stationary[:, None] * transitions).flatten().cumsum(0)
    generator = torch.Generator().manual_seed(100 + seed)
    chances = torch.rand(STEPS, BATCH, generator=generator, dtype=torch.float64)
    pairs = torch.searchsorted(below, chances).clamp_max(SYMBOLS**2 - 1)
    return [(pair // SYMBOLS, pair % SYMBOLS) for pair in pairs]


@torch.no_grad()
def expected_loss(model: Network) -> float:
    """Cross entropy of the next symbol, over the whole chain."""
    transitions, stationary, _ = chain()
    scores = model(torch.arange(SYMBOLS)).double().log_softmax(1)
    return float(-(stationary[:, None] * transitions * scores).sum())


METHODS: dict[str, tuple[Callable[[nn.Module, float], Optimizer], tuple[float, ...]]] = {
    "SCALE": (SCALE.of, (0.01, 0.03, 0.1)),
    "no momentum": (lambda model, lr: SCALE.of(model, lr, momentum=0), (0.03, 0.1, 0.3)),
    "Adam": (lambda model, lr: torch.optim.Adam(model.parameters(), lr), (0.01, 0.03, 0.1)),
    "SGD": (lambda model, lr: torch.optim.SGD(model.parameters(), lr), (2.0, 3.0, 4.0)),
    "SGD, momentum 0.9": (lambda m, lr: torch.optim.SGD(m.parameters(), lr, momentum=0.9), (1.2, 1.8, 2.4)),
}
STYLES = {
    "SCALE": ("#d55e00", "-"),
    "no momentum": ("#e69f00", (0, (4, 1))),
    "Adam": ("#0072b2", "-"),
    "SGD": ("#000000", (0, (1, 1.2))),
    "SGD, momentum 0.9": ("#009e73", (0, (5, 1, 1, 1))),
}


def schedule(step: int, steps: int) -> float:
    """Part of the peak rate."""
    warm = steps // 10
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


@cache
def language_run(method: str, rate: float, seed: int = 0) -> list[float]:
    """Expected losses at the start and every 25th step; infinite from where a run is lost."""
    model = Network(seed)
    optimizer = METHODS[method][0](model, rate)
    ticks = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, STEPS))
    losses = [expected_loss(model)]
    for step, (first, second) in enumerate(batches(seed), 1):
        optimizer.zero_grad()
        functional.cross_entropy(model(first), second).backward()
        optimizer.step()
        ticks.step()
        if step % EVERY == 0:
            losses.append(expected_loss(model))
            if not math.isfinite(losses[-1]):
                return losses[:-1] + [math.inf] * (STEPS // EVERY + 2 - len(losses))
    return losses


def best_rate(method: str) -> float:
    """The one of lowest loss for the first seed."""
    return min(METHODS[method][1], key=lambda rate: language_run(method, rate)[-1])


def tuned_loss(method: str) -> float:
    """At its best rate, over the seeds."""
    return sum(language_run(method, best_rate(method), seed)[-1] for seed in SEEDS) / len(SEEDS)


def language_loss() -> tuple[str, bool]:
    """The prototype's level, on a chain that is not the prototype's."""
    loss = tuned_loss("SCALE")
    return f"{loss:.3f}, entropy rate {chain()[2]:.3f}", loss <= 4.06


def momentum_matters() -> tuple[str, bool]:
    """Each at its best rate."""
    with_it, without = tuned_loss("SCALE"), tuned_loss("no momentum")
    return f"{without:.3f} − {with_it:.3f} = {without - with_it:.3f}", without - with_it >= 0.2


def against_adam() -> tuple[str, bool]:
    """As published: no worse."""
    own, adam = tuned_loss("SCALE"), tuned_loss("Adam")
    return f"{own:.3f} − {adam:.3f} = {own - adam:+.3f}", own <= adam


def near_adam() -> tuple[str, bool]:
    """As in the prototype: almost as good."""
    difference = tuned_loss("SCALE") - tuned_loss("Adam")
    return f"{difference:+.3f}", difference <= 0.026


def columns_alone() -> tuple[str, bool]:
    """What the paper begins with."""
    columns, sgd = tuned_loss("no momentum"), tuned_loss("SGD")
    return f"{columns:.3f} − {sgd:.3f} = {columns - sgd:+.3f}", columns <= sgd


def winners() -> tuple[str, bool]:
    """Who a user would pick."""
    found = {method: tuned_loss(method) for method in METHODS}
    order = sorted(found, key=found.__getitem__)
    figure = "; ".join(f"{method} {found[method]:.3f} (lr {best_rate(method):g})" for method in order)
    return figure, order[0] == "SCALE"


# ---------------------------------------------------------------------- plays


@cache
def plays_run(method: str, rate: float, seed: int = 0, steps: int = 200) -> float:
    """Loss on the held batches of a transformer on characters, one block."""
    problem = make_problem("shakespeare", seed=seed, layers=1)
    optimizer = METHODS[method][0](problem, rate)
    ticks = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, steps))
    source = problem.batches()
    for _ in range(steps):
        optimizer.zero_grad()
        problem(next(source)).backward()
        optimizer.step()
        ticks.step()
    return problem.evaluate()


def plays() -> tuple[str, bool]:
    """Each at its best of three rates for the first seed, over both seeds."""
    found = {}
    for method, rates in {"SCALE": (0.003, 0.01, 0.03), "Adam": (0.01, 0.03, 0.1)}.items():
        losses = {rate: plays_run(method, rate) for rate in rates}
        best = min(losses, key=losses.__getitem__)
        found[method] = (sum(plays_run(method, best, seed) for seed in SEEDS) / len(SEEDS), best)
    figure = ", ".join(f"{method} {loss:.3f} (lr {rate:g})" for method, (loss, rate) in found.items())
    return figure, found["SCALE"][0] <= found["Adam"][0]


# ---------------------------------------------------------------------- a step, and its state


def step_sizes() -> tuple[str, bool]:
    """Of every column of every matrix, in float32, after a hundred steps."""
    model, rate = Network(0), 0.01
    optimizer = SCALE.of(model, rate)
    largest = 0.0
    for first, second in batches(0)[:100]:
        before: dict[Tensor, Tensor] = {p: p.detach().clone() for p in model.parameters()}
        optimizer.zero_grad()
        functional.cross_entropy(model(first), second).backward()
        optimizer.step()
        for p, along in ((model.embedding.weight, 0), (model.hidden.weight, 1), (model.head.weight, 1)):
            sizes = (p.detach() - before[p]).square().mean(along).sqrt()
            moved = sizes[grad_of(p).abs().amax(along) > 1e-6]  # not those of units that nothing came through
            largest = max(largest, float((moved / rate - 1).abs().max()))
    return f"off by at most {largest:.1e}, relative", largest <= 1e-3


def numbers_of_state() -> tuple[str, bool]:
    """Counted, against the formula."""
    model = Network(0)
    optimizer = SCALE.of(model)
    first, second = batches(0)[0]
    functional.cross_entropy(model(first), second).backward()
    optimizer.step()
    kept = sum(value.numel() for entry in optimizer.state.values() for value in entry.values())
    vectors = [p for p in model.parameters() if p.ndim < 2]
    size = sum(p.numel() for p in vectors)
    asked = SYMBOLS * WIDTH + 2 * size + len(vectors)
    whole = sum(p.numel() for p in model.parameters())
    return (
        f"{kept:,} = {SYMBOLS} · {WIDTH} + 2 · {size} + {len(vectors)}, of {whole:,} parameters",
        kept == asked,
    )


class Llama(nn.Module):
    """The matrices and vectors of the paper's network for a billion parameters; no arithmetic."""

    def __init__(self, symbols: int = 32_000, width: int = 2048, inner: int = 5461, layers: int = 24) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, width)
        shapes = [(width, width)] * 4 + [(width, inner)] * 2 + [(inner, width)]
        self.blocks = nn.ModuleList(
            nn.ModuleList(nn.Linear(*shape, bias=False) for shape in shapes) for _ in range(layers)
        )
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2 * layers + 1))
        self.head = nn.Linear(width, symbols, bias=False)


def memory() -> tuple[str, bool]:
    """Parameters and state at two bytes a number; 10⁹ bytes are a G."""
    with torch.device("meta"):
        model = Llama()
    groups = scale_param_groups(model)
    counts = {group["role"]: sum(p.numel() for _, p in group["params"]) for group in groups}
    whole = sum(counts.values())
    own = 2 * (whole + counts["last"] + 2 * counts["vector"]) / 1e9
    adam = 2 * 3 * whole / 1e9
    size, last, vector = (count / 1e6 for count in (whole, counts["last"], counts["vector"]))
    figure = (
        f"2 B · ({size:.2f}M + {last:.2f}M + 2 · {vector:.2f}M) = {own:.3f}G; "
        f"Adam: 2 B · 3 · {size:.2f}M = {adam:.3f}G"
    )
    return figure, abs(own - 2.81) <= 0.01 and abs(adam - 8.04) <= 0.01


# ---------------------------------------------------------------------- under OptEx


ROUNDS, RATES = 40, (0.001, 0.003, 0.01, 0.03)


@cache
def digits(method: str, rate: float, seed: int, rounds: int = ROUNDS) -> list[float]:
    """Lowest losses so far."""
    problem = make_problem("digits-mlp", seed=seed, batch_size=512)
    setting = Setting(lambda model: SCALE.of(model, rate), 4, None, rounds, of_module=True)
    return best_so_far(make_method(method).run(problem, setting).loss).tolist()


def gain(rate: float, seed: int) -> float:
    """SCALE's rounds alone to where OptEx's led, a round."""
    level = digits("optex", rate, seed)[-1]
    return rounds_to_level(digits("vanilla", rate, seed, 16 * ROUNDS), level) / ROUNDS


def under_optex() -> tuple[str, bool]:
    """Over two seeds."""
    best = min(RATES, key=lambda rate: digits("vanilla", rate, 0)[-1])
    gains = {
        rate: sum(gain(rate, seed) for seed in SEEDS) / len(SEEDS) for rate in dict.fromkeys((best, 0.001))
    }
    figure = ", ".join(f"{value:.2f} at lr {rate:g}" for rate, value in gains.items())
    return f"{figure}; {best:g} is the best rate of SCALE alone", gains[best] > 1


CHECKS = [
    Check(
        "Markov language, 512 symbols: loss of SCALE",
        "at most 4.06 (prototype, on another chain)",
        language_loss,
    ),
    Check("the same without momentum, minus SCALE", "at least 0.2 (prototype)", momentum_matters),
    Check("SCALE minus Adam, loss", "at most 0 (published, 350M: log 16.32 − log 18.77 = −0.14)", against_adam),
    Check("SCALE minus Adam, loss", "at most 0.026 (prototype: 4.06 − 4.034)", near_adam),
    Check(
        "columns normalised, no momentum, minus SGD, loss", "at most 0 (published: boosts SGD)", columns_alone
    ),
    Check("tuned against tuned", "SCALE first", winners),
    Check("transformer on Shakespeare's characters, 200 steps, loss", "SCALE no higher than Adam", plays),
    Check("root mean square of a column's step", "the rate, to 1e-3", step_sizes),
    Check("numbers of state, toy network", "#last + 2 · #vectors + one a vector", numbers_of_state),
    Check("parameters and state, LLaMA 1B in bfloat16", "2.81G, Adam's 8.04G (published), to 0.01", memory),
    Check("acceleration by OptEx, N = 4, digits, batches of 512", "above 1 at SCALE's best rate", under_optex),
]


def curves() -> dict[str, Any]:
    """Of the toy language, seed 0: losses along the steps at the best rate, and at the end for every rate."""
    return {
        "steps": list(range(0, STEPS + 1, EVERY)),
        "entropy": chain()[2],
        "losses": {method: language_run(method, best_rate(method)) for method in METHODS},
        "best": {method: best_rate(method) for method in METHODS},
        "rates": {
            m: [[rate, language_run(m, rate)[-1]] for rate in rates] for m, (_, rates) in METHODS.items()
        },
    }


def draw(found: dict[str, Any]) -> Figure:
    """Loss above the entropy rate, along the steps and over the rates."""
    figure = Figure(figsize=(9.4, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    for method, losses in found["losses"].items():
        colour, dashes = STYLES[method]
        above = [loss - found["entropy"] for loss in losses]
        label = f"{method}, lr {found['best'][method]:g}"
        left.plot(found["steps"], above, color=colour, linestyle=dashes, label=label)
        ends = [(rate, loss - found["entropy"]) for rate, loss in found["rates"][method] if loss is not None]
        right.plot(*zip(*ends, strict=True), color=colour, linestyle=dashes, marker="o", label=method)
    left.set(
        xlabel="step", ylabel="expected loss − entropy rate (nats)", yscale="log", title="each at its best rate"
    )
    right.set(xlabel="peak learning rate", xscale="log", title="after the last step; lost runs are left out")
    # Beside the lines: there is room above the ends.
    right.legend(*left.get_legend_handles_labels(), fontsize=8, loc="upper right")
    for panel in (left, right):
        panel.grid(alpha=0.3, which="both", linewidth=0.5)
    figure.suptitle("Markov language of 512 symbols, 1,000 steps")
    return figure
