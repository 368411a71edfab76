"""ScaleBiO (Pan et al., ACL 2025, arXiv 2406.19976), and LISA (arXiv 2403.17919) within it.

On four sources of rows for a linear model everything is known in closed form. On text, a small transformer is
trained on four sources of Shakespeare, one with shuffled and one with random characters; costs are gradients
of a batch of 32 windows, of which a gradient of the penalty takes three.
"""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional

import optex
from optex.studies.measures import rounds_to_level
from optex.studies.problems import SourceMixture
from optex.studies.problems.data import shakespeare
from optex.studies.problems.text import Transformer
from papers import Check

ROOM = "sources"
ALPHAS = (1.0, 10.0, 100.0, 1e3, 1e4)
PROTOTYPE_BIAS = (0.555, 0.113, 0.0126, 0.00128, 0.00013)
CLEAN = ("clean-1", "clean-2")
SEEDS = range(5)
RATES = (0.02, 0.05, 0.1, 0.2)

CONTEXT = 32
WINDOWS = 2000  # of each source
BATCH = 32
STEPS = 300
TEXT_RATE = 1e-2  # of 1e-3, 3e-3, 1e-2, 2e-2 the best for uniform weights; for clean ones within 0.015 of it
TEXT_SEEDS = range(2)
TEXT_CLEAN = ("text-1", "text-2")


def words(values: Any, form: str = ".3g") -> str:
    """Numbers in a row."""
    return ", ".join(f"{value:{form}}" for value in values)


# ------------------------------------------------------------------ a linear model


@cache
def biases() -> list[float]:
    """Relative error of p's field against the true hypergradient, w and u at rest; mean of the seeds."""
    found = []
    for alpha in ALPHAS:
        errors = []
        for seed in SEEDS:
            problem = SourceMixture(seed, alpha=alpha)
            problem.settle()
            problem.source().gradient(None)
            exact = problem.hypergradient()
            gradient = problem.weights.logits.grad
            assert gradient is not None
            errors.append(float((gradient - exact).norm() / exact.norm()))
        found.append(float(np.mean(errors)))
    return found


def adam(source: optex.MinimaxPenaltySource, lr: float) -> torch.optim.Optimizer:
    """One rate for all."""
    return torch.optim.Adam(source.param_groups(lr=lr, lr_weights=lr, weight_decay=0.0))


@cache
def masses(alpha: float, seed: int) -> list[float]:
    """Weight of the two clean sources after each of 300 steps of Adam."""
    problem = SourceMixture(seed, alpha=alpha)
    source = problem.source()
    assert isinstance(source, optex.MinimaxPenaltySource)
    base, found = adam(source, 0.05), [problem.weights.mass(CLEAN)]
    for _ in range(300):
        source.gradient(None)
        base.step()
        found.append(problem.weights.mass(CLEAN))
    return found


def sgd_mass(alpha: float, scale: float | None) -> float:
    """The same after 600 steps of SGD, rate 0.1; NaN where it diverges."""
    problem = SourceMixture(0, alpha=alpha)
    source = optex.MinimaxPenaltySource(
        problem.upper, problem.lower, problem.weights, problem.model, problem.rival, alpha=alpha, scale=scale
    )
    base = torch.optim.SGD(source.param_groups(lr=0.1, lr_weights=0.3, weight_decay=0.0))
    for _ in range(600):
        loss, _ = source.gradient(None)
        if not bool(loss.isfinite()) or float(loss.abs()) > 1e8:
            return float("nan")
        base.step()
    return problem.weights.mass(CLEAN)


class Rare:
    """Batches that lack sources: clean-2 every other, random-1 every other, random-2 nine times in ten."""

    def __init__(self, seed: int) -> None:
        self.problem = SourceMixture(seed)
        self.draws = torch.Generator().manual_seed(seed)

    def batch(self) -> tuple[Tensor, Tensor]:
        """Which sources are there, and 20 rows of each."""
        chances = torch.tensor([1.0, 0.5, 0.5, 0.1])
        there = torch.rand(4, generator=self.draws) < chances
        return there, torch.randint(200, (20,), generator=self.draws)

    def means(self, network: nn.Module, rows: Tensor) -> Tensor:  # [4, 20]
        """Losses of these rows, of every source."""
        inputs = self.problem.get_buffer("train_inputs")[:, rows]
        return (network(inputs)[..., 0] - self.problem.get_buffer("train_labels")[:, rows]).square()

    def kept(self, network: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """As losses with their sources, so that a source may be absent."""
        there, rows = batch
        losses, places = self.means(network, rows)[there], torch.arange(4)[there]
        return losses.flatten(), places.repeat_interleave(losses.shape[1])

    def dropped(self, network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """As the released code has it: the loss of an absent source is 0."""
        there, rows = batch
        return self.means(network, rows).mean(1) * there

    def mass(self, training: Any) -> float:
        """Of the clean sources, after 600 steps of Adam."""
        problem = self.problem
        source = optex.MinimaxPenaltySource(
            problem.upper, training, problem.weights, problem.model, problem.rival
        )
        base = adam(source, 0.02)
        for _ in range(600):
            source.gradient(self.batch())
            base.step()
        return problem.weights.mass(CLEAN)


@cache
def subsets() -> dict[int, tuple[float, float, float]]:
    """By seed: L1 of the best of all 15 subsets, of uniform weights, and of those found at α = 10."""
    found = {}
    for seed in SEEDS:
        problem, values = SourceMixture(seed), {}
        for members in itertools.product((0.0, 1.0), repeat=4):
            if any(members):
                with torch.no_grad():
                    problem.weights.logits.copy_(40 * torch.tensor(members, dtype=torch.float64))
                problem.settle()
                values[members] = problem.evaluate()
        source = problem.source()
        assert isinstance(source, optex.MinimaxPenaltySource)
        problem.reset()
        base = adam(source, 0.05)
        for _ in range(300):
            source.gradient(None)
            base.step()
        problem.settle()
        found[seed] = (min(values.values()), values[1.0, 1.0, 1.0, 1.0], problem.evaluate())
    return found


@cache
def linear_run(seed: int, lr: float, rounds: int, parallelism: int | None) -> list[float]:
    """L1(u) after each round of Adam, alone or under OptEx."""
    problem = SourceMixture(seed)
    source = problem.source()
    assert isinstance(source, optex.MinimaxPenaltySource)
    base, loss = adam(source, lr), [problem.evaluate()]
    if parallelism is None:
        for _ in range(rounds):
            source.gradient(None)
            base.step()
            loss.append(problem.evaluate())
        return loss
    work = optex.OptEx(base, parallelism=parallelism).rounds(itertools.repeat(None), source)
    loss.extend(problem.evaluate() for _ in itertools.islice(work, rounds))
    return loss


@cache
def best_rate() -> float:
    """At which Adam alone is lowest after 100 rounds, mean of 3 seeds."""
    ends = {lr: np.mean([linear_run(seed, lr, 100, None)[-1] for seed in range(3)]) for lr in RATES}
    return min(ends, key=lambda lr: ends[lr])


def _bias_checked() -> tuple[str, bool]:
    errors = biases()
    ratios = [a / b for a, b in itertools.pairwise(errors)]
    near = all(1 / 2 < error / known < 2 for error, known in zip(errors, PROTOTYPE_BIAS, strict=True))
    text = f"{words(errors)}; ratios {words(ratios)}"
    return text, near and all(8 <= ratio <= 12 for ratio in ratios[1:])


def _first_decade_checked() -> tuple[str, bool]:
    errors = biases()
    ratio = errors[0] / errors[1]
    return f"{ratio:.2f} (the prototype's: {PROTOTYPE_BIAS[0] / PROTOTYPE_BIAS[1]:.2f})", 8 <= ratio <= 12


def _mass_checked() -> tuple[str, bool]:
    least = {alpha: min(masses(alpha, seed)[-1] for seed in SEEDS) for alpha in ALPHAS[:3]}
    return "least: " + words(least.values(), ".4f"), all(value >= 0.95 for value in least.values())


def _scale_checked() -> tuple[str, bool]:
    scaled = [sgd_mass(alpha, None) for alpha in ALPHAS[:3]]
    plain = [sgd_mass(alpha, 1.0) for alpha in ALPHAS[:3]]
    text = f"{words(scaled, '.4f')}; without, s = 1: {words(plain, '.4f')} (nan: diverged)"
    return text, min(scaled) >= 0.95 and bool(np.isnan(plain[1:]).all())


def _absent_checked() -> tuple[str, bool]:
    pairs = []
    for seed in range(3):
        ours, released = Rare(seed), Rare(seed)
        pairs.append((ours.mass(ours.kept), released.mass(released.dropped)))
    ours, theirs = zip(*pairs, strict=True)
    text = f"{words(ours, '.3f')}; released rule {words(theirs, '.3f')} (3 seeds)"
    return text, all(one > other for one, other in pairs)


def _subsets_checked() -> tuple[str, bool]:
    best, uniform, found = np.array(list(subsets().values())).T
    text = f"{words(found / best)} of the best subset's; uniform {words(uniform / best)} (5 seeds)"
    return text, bool((found <= 1.05 * best).all())


def _optex_checked() -> tuple[str, bool]:
    lr, shares = best_rate(), []
    for seed in range(3):
        level = linear_run(seed, lr, 100, None)[-1]
        shares.append(rounds_to_level(linear_run(seed, lr, 60, 4), level) / 100)
    return f"{words(shares, '.2f')} of 100 rounds (3 seeds, Adam {lr:g})", bool(max(shares) <= 0.4)


# ------------------------------------------------------------------ text


@cache
def text() -> tuple[dict[str, Tensor], Tensor, Tensor, int]:
    """Windows of four sources, of validation and of test; the size of the alphabet."""
    points = np.frombuffer(shakespeare().encode("utf-32-le"), dtype=np.uint32)
    alphabet, places = np.unique(points, return_inverse=True)
    codes, draws = torch.from_numpy(places.astype(np.int64)), torch.Generator().manual_seed(0)
    ends = len(codes) // 10
    windows = [_windows(part) for part in (codes[:-ends], codes[-ends:])]
    training = windows[0][torch.randperm(len(windows[0]), generator=draws)]
    one, two, three, held = training[: 3 * WINDOWS + 256].split([WINDOWS, WINDOWS, WINDOWS, 256])
    order = torch.rand(three.shape, generator=draws).argsort(1)
    sources = {
        "text-1": one,
        "text-2": two,
        "shuffled": three.gather(1, order),
        "random": torch.randint(len(alphabet), one.shape, generator=draws),
    }
    return sources, held, windows[1][:512], len(alphabet)


def _windows(codes: Tensor) -> Tensor:  # [n, CONTEXT + 1]
    count = len(codes) // (CONTEXT + 1)
    return codes[: count * (CONTEXT + 1)].view(count, CONTEXT + 1)


def window_losses(network: nn.Module, rows: Tensor) -> Tensor:  # [n]
    """Nats a character, of each window."""
    scores = network(rows[:, :-1])
    return functional.cross_entropy(scores.transpose(1, 2), rows[:, 1:], reduction="none").mean(1)


def transformer(seed: int, layers: int = 2) -> nn.Module:
    """32 numbers a character, two heads."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Transformer(text()[3], layers, 2, 32, CONTEXT, 0.0)


@cache
def reweighted(seed: int, parallelism: int = 1) -> dict[str, Any]:
    """What the front door finds from a network without training, and u's validation loss after each round."""
    sources, held, test, _ = text()
    losses: list[float] = []

    def note(intermediate_result: Any) -> None:
        losses.append(intermediate_result.fun)

    result = optex.reweight_sources(
        transformer(seed),
        window_losses,
        sources,
        held,
        lr=TEXT_RATE,
        batch_size=BATCH,
        batches=STEPS,
        seed=seed,
        parallelism=parallelism,
        callback=(lambda intermediate_result: losses.append(intermediate_result.fun))
        if parallelism > 1
        else None,
    )
    assert result.success, result.message
    return {
        "weights": result.weights,
        "path": result.path,
        "fun": result.fun,
        "losses": losses,
        "rounds": result.nit,
        "u": mean_loss(result.rival, test),
    }


@torch.no_grad()
def mean_loss(network: nn.Module, rows: Tensor) -> float:
    """Of some windows."""
    return float(window_losses(network, rows).mean())


def trained(weights: dict[str, float], seed: int, steps: int = STEPS) -> nn.Module:
    """A network trained on rows drawn by these weights."""
    sources = text()[0]
    network, draws = transformer(seed), torch.Generator().manual_seed(seed + 100)
    base = torch.optim.AdamW(network.parameters(), lr=TEXT_RATE, weight_decay=5e-4)
    stacked = torch.stack([sources[name] for name in weights])  # [K, n, CONTEXT + 1]
    shares = torch.tensor(list(weights.values()))
    for _ in range(steps):
        places = torch.multinomial(shares, BATCH, replacement=True, generator=draws)
        rows = torch.randint(WINDOWS, (BATCH,), generator=draws)
        base.zero_grad()
        window_losses(network, stacked[places, rows]).mean().backward()
        base.step()
    return network


def leave_one_out(seed: int) -> dict[str, float]:
    """Equal weights for the sources without which the validation loss rises; 5 trainings of 150 steps."""
    sources, held, _, _ = text()
    whole = mean_loss(trained(dict.fromkeys(sources, 1.0), seed, 150), held)
    kept = {}
    for name in sources:
        rest = {other: 1.0 for other in sources if other != name}
        if mean_loss(trained(rest, seed, 150), held) > whole:
            kept[name] = 1.0
    return kept


def similarity(seed: int) -> dict[str, float]:
    """Weights by the cosine with the validation gradient, if positive, after 100 steps of uniform training."""
    sources, held, _, _ = text()
    network = trained(dict.fromkeys(sources, 1.0), seed, 100)

    def gradient(rows: Tensor) -> Tensor:
        found = torch.autograd.grad(window_losses(network, rows).mean(), list(network.parameters()))
        return torch.cat([part.flatten() for part in found])

    aim = gradient(held)
    cosines = {
        name: float(functional.cosine_similarity(gradient(rows[:256]), aim, dim=0))
        for name, rows in sources.items()
    }
    return {name: max(value, 0.0) for name, value in cosines.items()}


@cache
def test_losses() -> dict[str, list[float]]:
    """Of a network trained by each method's weights for as many steps, by seed."""
    test, names = text()[2], list(text()[0])
    rules: dict[str, Any] = {
        "ScaleBiO": lambda seed: reweighted(seed)["weights"],
        "uniform": lambda _: dict.fromkeys(names, 1.0),
        "clean only": lambda _: dict.fromkeys(TEXT_CLEAN, 1.0),
        "leave one out": leave_one_out,
        "gradient similarity": similarity,
    }
    return {
        name: [mean_loss(trained(rule(seed), seed), test) for seed in TEXT_SEEDS]
        for name, rule in rules.items()
    }


def _text_mass_checked() -> tuple[str, bool]:
    found = [sum(reweighted(seed)["weights"][name] for name in TEXT_CLEAN) for seed in TEXT_SEEDS]
    split = [reweighted(seed)["weights"] for seed in TEXT_SEEDS]
    parts = "; ".join(words(weights.values()) for weights in split)
    return f"{words(found, '.4f')} ({parts})", min(found) >= 0.95


def _uniform_checked() -> tuple[str, bool]:
    found = test_losses()
    text = f"{words(found['ScaleBiO'], '.3f')}; uniform {words(found['uniform'], '.3f')} (2 seeds)"
    return text, all(a < b for a, b in zip(found["ScaleBiO"], found["uniform"], strict=True))


def _clean_checked() -> tuple[str, bool]:
    found = test_losses()
    text = f"{words(found['ScaleBiO'], '.3f')}; clean only {words(found['clean only'], '.3f')}"
    return text, bool(np.mean(found["ScaleBiO"]) <= np.mean(found["clean only"]) + 0.05)


def _rivals_checked() -> tuple[str, bool]:
    found = test_losses()
    names = ("leave one out", "gradient similarity")
    text = f"{words(found['ScaleBiO'], '.3f')}; " + "; ".join(
        f"{name} {words(found[name], '.3f')}" for name in names
    )
    return text, bool(np.mean(found["ScaleBiO"]) < min(np.mean(found[name]) for name in names))


def _alongside_checked() -> tuple[str, bool]:
    found = [reweighted(seed)["u"] for seed in TEXT_SEEDS]
    uniform = test_losses()["uniform"]
    text = f"{words(found, '.3f')}; uniform {words(uniform, '.3f')}"
    return text, all(a < b for a, b in zip(found, uniform, strict=True))


def _layers_checked() -> tuple[str, bool]:
    sources, held, _, _ = text()
    found = []
    for layers in (optex.LayerSampler("blocks", frozen="none"), None):
        result = optex.reweight_sources(
            transformer(0, layers=4),
            window_losses,
            sources,
            held,
            lr=TEXT_RATE,
            batch_size=BATCH,
            batches=STEPS,
            parallelism=1,
            layers=layers,
        )
        found.append((sum(result.weights[name] for name in TEXT_CLEAN), result.fun))
    (mass, loss), (whole, without) = found
    return (
        f"{mass:.4f}, u's validation loss {loss:.3f}; with all blocks trained {whole:.4f}, {without:.3f}",
        mass >= 0.95,
    )


def _text_optex_checked() -> tuple[str, bool]:
    level = reweighted(0)["fun"]
    share = rounds_to_level([np.inf, *reweighted(0, 4)["losses"]], level) / STEPS
    return f"{share:.2f} of {STEPS} rounds (1 seed)", bool(share <= 0.7)


CHECKS = [
    Check(
        "bias of the hypergradient, α = 1, 10, 100, 1000, 10⁴",
        "0.555, 0.113, 0.0126, 0.00128, 0.00013 (a prototype's), within a factor 2; ratio 8 to 12 a decade "
        "from α = 10 on",
        _bias_checked,
    ),
    Check("the same from α = 1 to 10", "ratio 8 to 12", _first_decade_checked),
    Check("weight of the clean sources, α = 1, 10, 100", "at least 0.95 on every seed (5)", _mass_checked),
    Check(
        "SGD, one rate for α = 1, 10, 100: weight of the clean sources",
        "at least 0.95 with s = 1 / α; without, it diverges from α = 10 on",
        _scale_checked,
    ),
    Check(
        "batches that lack sources: weight of the clean ones",
        "more than when the loss of an absent source is 0, on every seed",
        _absent_checked,
    ),
    Check(
        "validation loss of the mixture found, against all 15 subsets of sources",
        "at most 1.05 of the best subset's",
        _subsets_checked,
    ),
    Check(
        "OptEx, N = 4, linear model: share of Adam's rounds to its loss",
        "at most 0.4, at Adam's best rate",
        _optex_checked,
    ),
    Check(
        "text: weight of the two clean sources after 300 batches",
        "at least 0.95 on both seeds (in brackets: text-1, text-2, shuffled, random)",
        _text_mass_checked,
    ),
    Check(
        "text: test loss of a network trained with the weights found",
        "lower than with uniform weights, on both seeds",
        _uniform_checked,
    ),
    Check("the same against the two clean sources alone", "within 0.05 nats", _clean_checked),
    Check("the same against what a user would try first", "lower than both", _rivals_checked),
    Check(
        "text: test loss of u itself, when the weights are found",
        "lower than with uniform weights, on both seeds",
        _alongside_checked,
    ),
    Check("text, LISA: 2 of 4 blocks at a time, weight of the clean sources", "at least 0.95", _layers_checked),
    Check(
        "OptEx, N = 4, text: share of AdamW's rounds to u's validation loss",
        "at most 0.7",
        _text_optex_checked,
    ),
]


# ------------------------------------------------------------------ the picture


def curves() -> dict[str, Any]:
    """What is drawn."""
    lr = best_rate()
    return {
        "alphas": list(ALPHAS),
        "bias": biases(),
        "text": {
            name: [float(weights[place]) for weights in reweighted(0)["path"]]
            for place, name in enumerate(text()[0])
        },
        "rate": lr,
        "optex": {"Adam": linear_run(0, lr, 100, None), "OptEx, N = 4": linear_run(0, lr, 60, 4)},
        "test": {name: float(np.mean(losses)) for name, losses in test_losses().items()},
    }


def draw(curves: dict[str, Any]) -> Figure:
    """Bias along α; the weights of the text's sources; what they are worth; OptEx."""
    figure = Figure(figsize=(13.5, 3.7), layout="constrained")
    FigureCanvasAgg(figure)
    left, second, third, right = figure.subplots(1, 4)
    left.loglog(curves["alphas"], curves["bias"], color="#0072b2", marker="o", label="measured")
    line = [curves["bias"][-1] * curves["alphas"][-1] / alpha for alpha in curves["alphas"]]
    left.loglog(curves["alphas"], line, color="#000000", linestyle=":", label="slope -1")
    left.set_xlabel("α")
    left.set_ylabel("relative error of the hypergradient")
    left.set_title("bias, linear model", fontsize=11)
    for (name, weights), colour, style in zip(
        curves["text"].items(),
        ("#0072b2", "#56b4e9", "#d55e00", "#e69f00"),
        ("-", "-", "--", "--"),
        strict=True,
    ):
        second.plot(weights, color=colour, linestyle=style, linewidth=1.8, label=name)
    second.set_xlabel("batches")
    second.set_ylabel("weight")
    second.set_title("sources of text", fontsize=11)
    names = list(curves["test"])
    colours = ["#0072b2", "#d55e00", "#009e73", "#8a8a8a", "#8a8a8a"]
    third.barh(names, [curves["test"][name] for name in names], color=colours, label="mean of 2 seeds")
    third.invert_yaxis()
    third.set_xlim(left=0.9 * min(curves["test"].values()))
    third.set_xlabel("test loss, nats a character")
    third.set_title("trained with the weights", fontsize=11)
    for (name, loss), colour, style in zip(
        curves["optex"].items(), ("#000000", "#d55e00"), (":", "-"), strict=True
    ):
        right.semilogy(range(len(loss)), loss, color=colour, linestyle=style, linewidth=1.8, label=name)
    right.set_xlabel("rounds (sequential gradients)")
    right.set_ylabel("validation loss of u")
    right.set_title(f"linear model, Adam {curves['rate']:g}", fontsize=11)
    for panel in (left, second, third, right):
        panel.grid(visible=True, which="major", linewidth=0.5, alpha=0.35)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(fontsize=8, frameon=False)
    return figure
