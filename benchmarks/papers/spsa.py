"""Forward passes alone: SPSA, MeZO (arXiv 2305.17333) and ZO2 (arXiv 2503.12668).

The model is the character transformer of the problem ``shakespeare``, four blocks. It learns the plays by
backpropagation first; what is fine-tuned is the same model on the plays in capitals, which it knows from names
and headings alone. A step of backpropagation counts as three forward passes, one of MeZO as two.
"""

from __future__ import annotations

import copy
import itertools
import math
import tempfile
import weakref
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import optex
from optex.optimizers.mezo.streaming import BlockStreamer
from optex.studies.measures import rounds_to_level
from optex.studies.problems import DigitsForward, Shakespeare
from optex.studies.problems.data import shakespeare
from optex.studies.problems.text import Transformer
from papers import Check, losses_by_round

ROOM = "sources"
STEPS = 600  # of MeZO; 1,200 forward passes
LEARNED = 400  # steps of Adam before
RATES = {"mezo": (1e-3, 3e-3, 1e-2), "sgd": (0.1, 0.3, 1.0), "adam": (1e-3, 3e-3, 1e-2)}
EVERY = 50


# ------------------------------------------------------------------ the model


class Entry(nn.Module):
    """Characters and places."""

    def __init__(self, network: Transformer) -> None:
        super().__init__()
        self.characters, self.positions = network.characters, network.positions

    def forward(self, codes: Tensor) -> Tensor:
        return self.characters(codes) + self.positions.weight[: codes.shape[-1]]


def chain(network: Transformer) -> nn.Sequential:
    """The transformer as blocks one after the other."""
    return nn.Sequential(Entry(network), *network.blocks, nn.Sequential(network.norm, network.output))


def cross_entropy(following: Tensor) -> Callable[[Tensor], Tensor]:
    """The loss of scores, given what follows."""
    return lambda scores: functional.cross_entropy(scores.flatten(0, 1), following.flatten())


@cache
def plays() -> Shakespeare:
    """The problem, and a network that has learned the plays."""
    problem = Shakespeare(seed=0, layers=4, width=48, context=32)
    optimizer = torch.optim.Adam(problem.parameters(), lr=3e-3)
    for batch in itertools.islice(problem.batches(), LEARNED):
        optimizer.zero_grad()
        problem(batch).backward()
        optimizer.step()
    return problem


@cache
def capitals() -> Tensor:  # [alphabet], the code of each character's capital
    """How to put the plays in capitals."""
    alphabet = sorted(set(shakespeare()))
    return torch.tensor([alphabet.index(c.upper()) for c in alphabet])


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    """Other windows than those of before, in capitals."""
    for codes, following in itertools.islice(plays().batches(), LEARNED, None):
        yield capitals()[codes], capitals()[following]


@torch.no_grad()
def held(blocks: nn.Module | BlockStreamer) -> float:
    """The loss in capitals on windows of the text held out."""
    problem = plays()
    _, codes, _ = problem._text()
    starts = torch.arange(0, 96 * problem.context, problem.context)
    x, y = problem._windows(capitals()[codes], starts)
    return float(cross_entropy(y)(blocks.forward(x)))


def learned(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """A copy of the network that knows the plays, as a chain."""
    return chain(copy.deepcopy(plays().network)).to(dtype)


# ------------------------------------------------------------------ fine-tuning


def tuned(method: str, rate: float, steps: int) -> list[float]:
    """Losses on the text held out, every few steps."""
    blocks, found = learned(), []
    torch.manual_seed(0)
    mezo = optex.optimizers.MeZO(blocks.parameters(), lr=rate)
    base = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}.get(method, torch.optim.SGD)
    other = base(blocks.parameters(), lr=rate)
    every = EVERY if method == "mezo" else EVERY * 2 // 3 + 1
    for number, (x, y) in enumerate(itertools.islice(batches(), steps)):
        if number % every == 0:
            found.append(held(blocks))
        if method == "mezo":
            try:
                mezo.step(lambda x=x, y=y: cross_entropy(y)(blocks(x)))
            except optex.NonFiniteError:
                return [math.inf]
            continue
        other.zero_grad()
        cross_entropy(y)(blocks(x)).backward()
        other.step()
    return [*found, held(blocks)]


@cache
def best(method: str) -> tuple[float, list[float]]:
    """The rate with the lowest loss at the end, and its losses; equal forward passes for all methods."""
    steps = STEPS if method == "mezo" else STEPS * 2 // 3
    runs = {rate: tuned(method, rate, steps) for rate in RATES[method]}
    return min(runs.items(), key=lambda run: run[1][-1] if math.isfinite(run[1][-1]) else math.inf)


def _fine_tuned() -> tuple[str, bool]:
    rate, losses = best("mezo")
    ended = f"{losses[0]:.3f} before, {losses[-1]:.3f} after {STEPS} steps (lr {rate:g}), no backward pass"
    return ended, losses[-1] < 0.9 * losses[0]


def _against_backpropagation() -> tuple[str, bool]:
    found = {name: best(name.lower()) for name in ("MeZO", "SGD", "Adam")}
    ends = {name: losses[-1] for name, (_, losses) in found.items()}
    winner = min(ends, key=lambda name: ends[name])
    parts = (f"{name} {ends[name]:.3f} (lr {rate:g})" for name, (rate, _) in found.items())
    return f"{', '.join(parts)}: {winner} wins", ends["MeZO"] <= min(ends.values())


# ------------------------------------------------------------------ memory


class Peak(TorchDispatchMode):
    """Counts the bytes of tensors made in here: alive now, and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.alive, self.most = 0, 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {
            t.untyped_storage().data_ptr() for t in _tensors((args, kwargs)) if t.untyped_storage().nbytes()
        }
        answer = func(*args, **(kwargs or {}))
        for tensor in _tensors(answer):
            storage = tensor.untyped_storage()
            key, size = storage.data_ptr(), storage.nbytes()
            if size and key not in given and key not in self._known:
                self._known.add(key)
                self.alive += size
                self.most = max(self.most, self.alive)
                weakref.finalize(storage, self._gone, key, size)
        return answer

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for part in tree:
            yield from _tensors(part)
    elif isinstance(tree, dict):
        yield from _tensors(list(tree.values()))


def peak(act: Callable[[], Any]) -> float:
    """MB of tensors that an act makes, at most at once."""
    with Peak() as counted:
        act()
    return counted.most / 1e6


@cache
def memory() -> dict[str, float]:
    """MB at the most: the model's, and what a pass or a step makes beside it; wide blocks, a short batch."""
    torch.manual_seed(0)
    blocks = chain(Transformer(65, layers=8, heads=4, width=256, context=64, dropout=0.0))
    x, y = torch.randint(65, (1, 16)), torch.randint(65, (1, 16))
    found = {"model": sum(p.nbytes for p in blocks.parameters()) / 1e6}

    def inference() -> None:
        with torch.no_grad():
            cross_entropy(y)(blocks(x))

    found["inference"] = peak(inference)
    mezo = optex.optimizers.MeZO(blocks.parameters())
    found["mezo"] = peak(lambda: mezo.step(lambda: cross_entropy(y)(blocks(x))))
    adam = torch.optim.Adam(blocks.parameters())

    def trained() -> None:
        cross_entropy(y)(blocks(x)).backward()
        adam.step()

    found["adam"] = peak(trained)
    found["largest"] = max(p.nbytes for p in blocks.parameters()) / 1e6
    found["block"] = max(sum(p.nbytes for p in block.parameters()) for block in blocks) / 1e6
    with tempfile.TemporaryDirectory() as folder:
        streamer = optex.optimizers.BlockStreamer(blocks, store=Path(folder) / "blocks")
        for name in ("streamed once", "streamed"):  # the second step has an update to take
            found[name] = peak(lambda: streamer.step(x, cross_entropy(y)))
        streamer.flush()
    return found


def _memory_of_inference() -> tuple[str, bool]:
    found = memory()
    whole = {name: found["model"] + found[name] for name in ("inference", "mezo", "adam")}
    figure = ", ".join(f"{name} {size:.1f} MB" for name, size in whole.items())
    return figure, whole["mezo"] <= whole["inference"] + found["largest"] + 0.1


def _memory_of_a_block() -> tuple[str, bool]:
    found = memory()
    figure = (
        f"{found['streamed']:.1f} MB at most, the model {found['model']:.1f} MB, its largest block "
        f"{found['block']:.1f} MB"
    )
    return figure, found["streamed"] <= 3 * found["block"] + found["inference"]


# ------------------------------------------------------------------ the same iterates


def _delayed() -> tuple[str, bool]:
    streamed, plain = learned(torch.float64), learned(torch.float64)
    streamer = optex.optimizers.BlockStreamer(streamed, lr=1e-3)
    immediate = optex.optimizers.MeZO(plain.parameters(), lr=1e-3)
    for seed, (x, y) in enumerate(itertools.islice(batches(), 50)):
        streamer.step(x, cross_entropy(y), seed=seed)
        immediate.step(lambda x=x, y=y: cross_entropy(y)(plain(x)), seed=seed)
    streamer.flush()
    away = max(
        float((a - b).detach().abs().max())
        for a, b in zip(streamed.parameters(), plain.parameters(), strict=True)
    )
    return f"{away:.1e} after 50 steps, {len(streamed)} blocks", away <= 1e-12


def _drift() -> tuple[str, bool]:
    worst = {}
    for dtype in (torch.float32, torch.bfloat16):
        blocks = learned(dtype)
        before = [p.detach().clone() for p in blocks.parameters()]
        optimizer = optex.optimizers.MeZO(blocks.parameters(), lr=0.0)
        optimizer.step(lambda blocks=blocks: sum(p.float().sum() for p in blocks.parameters()), seed=0)
        pairs = zip(blocks.parameters(), before, strict=True)
        worst[dtype] = max(float((p.detach() - b).abs().max()) for p, b in pairs)
    figure = f"{worst[torch.float32]:.1e} a step; in bfloat16 {worst[torch.bfloat16]:.1e}"
    return figure, worst[torch.float32] <= 1e-6


def _traffic() -> tuple[str, bool]:
    blocks = learned()
    streamer = optex.optimizers.BlockStreamer(blocks, lr=1e-3)
    for x, y in itertools.islice(batches(), 5):
        streamer.step(x, cross_entropy(y))
    streamer.flush()
    traffic = streamer.traffic
    figure = (
        f"{traffic.peak_resident} of {len(blocks)} blocks at most; in 5 steps and a flush "
        f"{max(traffic.uploads)} uploads and {max(traffic.offloads)} offloads of each"
    )
    return figure, traffic.peak_resident <= 3 and traffic.uploads == [6] * 6 and traffic.offloads == [5] * 6


@cache
def narrow(transfer_dtype: torch.dtype | None) -> float:
    """The loss that streamed blocks come to, 200 steps at MeZO's best rate."""
    torch.manual_seed(0)
    streamer = optex.optimizers.BlockStreamer(learned(), lr=best("mezo")[0], transfer_dtype=transfer_dtype)
    for x, y in itertools.islice(batches(), 200):
        streamer.step(x, cross_entropy(y))
    return held(streamer)


def _low_bits() -> tuple[str, bool]:
    full, low = narrow(None), narrow(torch.bfloat16)
    started = best("mezo")[1][0]
    figure = f"falls from {started:.3f} to {low:.3f}, in float32 to {full:.3f}"
    return figure, started - low >= 0.9 * (started - full)


# ------------------------------------------------------------------ the estimate


@cache
def cosines() -> dict[int, tuple[float, float]]:
    """Cosine with the gradient by number of directions, measured and as a random subspace has it."""
    problem, found = DigitsForward(), {}
    batch, parameters = next(problem.batches()), list(problem.parameters())
    problem(batch).backward()
    truth = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    for queries in (1, 4, 16, 64, 256, 1024, 4096):
        torch.manual_seed(0)
        optex.SPSASource(problem, parameters, 1e-3, queries).gradient(batch)
        estimate = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        cosine = float(estimate @ truth / estimate.norm() / truth.norm())
        found[queries] = (cosine, 1 / math.sqrt(1 + (len(truth) + 1) / queries))
    return found


def _cosine() -> tuple[str, bool]:
    found = cosines()
    figure = ", ".join(f"{found[n][0]:.3f} ({found[n][1]:.3f}) at {n}" for n in (16, 256, 4096))
    return figure, all(abs(found[n][0] - found[n][1]) <= 0.03 for n in (16, 256, 4096))


def _noise_told() -> tuple[str, bool]:
    problem = DigitsForward()
    batch, parameters = next(problem.batches()), list(problem.parameters())
    problem(batch).backward()
    truth = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    source, told, had = problem.source(), [], []
    for seed in range(100):
        torch.manual_seed(seed)
        _, variance = source.gradient(batch)
        estimate = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        assert variance is not None
        told.append(float(variance))
        had.append(float((estimate - truth).square().mean()))
    ratio = sum(told) / sum(had)
    return f"{ratio:.3f} times the one it has", abs(ratio - 1) <= 0.05


# ------------------------------------------------------------------ under OptEx

ROUNDS = 100
FEW_RATES = (0.05, 0.1, 0.2, 0.3)
MANY_RATES = (0.2, 0.4, 0.8)


def plain_digits(queries: int, rate: float, seed: int, rounds: int = ROUNDS) -> list[float]:
    """SGD on the estimate; the loss after every step."""
    problem = DigitsForward(seed, queries=queries)
    torch.manual_seed(seed)
    base, source, found = torch.optim.SGD(problem.parameters(), lr=rate), problem.source(), [problem.evaluate()]
    for batch in itertools.islice(problem.batches(), rounds):
        source.gradient(batch)
        base.step()
        found.append(problem.evaluate())
    return found


def under_optex(rate: float, seed: int, rounds: int = ROUNDS) -> list[float]:
    """The same under OptEx at N = 4, sixteen directions a gradient."""
    problem = DigitsForward(seed)
    torch.manual_seed(seed)
    optimizer = optex.OptEx(torch.optim.SGD(problem.parameters(), lr=rate), parallelism=4)
    return losses_by_round(optimizer, problem, rounds)


@cache
def digits() -> dict[str, list[list[float]]]:
    """Three seeds of SGD at 16 directions, of OptEx over it, of SGD at 64; each tuned on a fourth."""

    def tuned_rate(run: Callable[[float], list[float]], rates: tuple[float, ...]) -> float:
        return min(rates, key=lambda rate: min(run(rate)[-10:]))

    few = tuned_rate(lambda rate: plain_digits(16, rate, 3), FEW_RATES)
    ours = tuned_rate(lambda rate: under_optex(rate, 3), FEW_RATES)
    many = tuned_rate(lambda rate: plain_digits(64, rate, 3), MANY_RATES)
    seeds = range(3)
    return {
        "rates": [[few, ours, many]],
        "sgd": [plain_digits(16, few, seed) for seed in seeds],
        "optex": [under_optex(ours, seed) for seed in seeds],
        "optex at sgd's rate": [under_optex(few, seed) for seed in seeds],
        "many": [plain_digits(64, many, seed) for seed in seeds],
    }


def rounds_taken(method: str) -> list[float]:
    """Rounds to the loss that SGD with 16 directions ends with."""
    found = digits()
    return [rounds_to_level(found[method][i], vanilla[-1]) for i, vanilla in enumerate(found["sgd"])]


def _under_optex() -> tuple[str, bool]:
    ratios, alike = (
        [taken / ROUNDS for taken in rounds_taken(name)] for name in ("optex", "optex at sgd's rate")
    )
    few, ours, _ = digits()["rates"][0]
    figure = (
        f"{', '.join(f'{r:.2f}' for r in ratios)} of SGD's rounds, three seeds, at lr {ours:g} and "
        f"SGD's {few:g}; both at {few:g}: {', '.join(f'{r:.2f}' for r in alike)}"
    )
    return figure, all(ratio <= 0.7 for ratio in ratios)


def _instead_of_optex() -> tuple[str, bool]:
    ours, others = rounds_taken("optex"), rounds_taken("many")
    rate = digits()["rates"][0][2]
    figure = (
        f"OptEx {', '.join(f'{r:.0f}' for r in ours)} rounds, SGD with 64 directions (lr {rate:g}) "
        f"{', '.join(f'{r:.0f}' for r in others)}"
    )
    return figure, sum(ours) < sum(others)


CHECKS = [
    Check("delayed updates with a flush", "MeZO's parameters to 1e-12, float64", _delayed),
    Check("blocks on the device", "at most 3; one upload and one offload a block and step", _traffic),
    Check("drift of putting back, float32", "at most 1e-6 (a prototype's was 2.4e-7)", _drift),
    Check("fine-tuning on capitals", "the loss held out falls by a tenth", _fine_tuned),
    Check(
        "backpropagation at equal forward passes",
        "MeZO's loss is at most the best of SGD's and Adam's",
        _against_backpropagation,
    ),
    Check("memory of a MeZO step", "inference's and one direction of one parameter", _memory_of_inference),
    Check("memory of a streamed step", "three blocks and inference's activations", _memory_of_a_block),
    Check("bfloat16 waiting and travelling", "nine tenths of float32's fall in 200 steps", _low_bits),
    Check("cosine with the gradient, d = 4,810", "1/√(1 + (d + 1)/n), to 0.03 [derived]", _cosine),
    Check("noise told", "the noise there is, to 5 %", _noise_told),
    Check("OptEx, N = 4, 16 directions", "at most 0.7 of SGD's rounds to SGD's loss", _under_optex),
    Check("64 directions a step in place of OptEx", "OptEx takes fewer rounds", _instead_of_optex),
]


def curves() -> dict[str, Any]:
    """Losses along forward passes, cosines, and losses along rounds."""
    fine = {
        method: {
            "passes": [(2 if method == "mezo" else 3) * step for step in _places(method)],
            "loss": best(method)[1],
            "rate": best(method)[0],
        }
        for method in RATES
    }
    return {
        "fine": fine,
        "cosines": [[n, *pair] for n, pair in cosines().items()],
        "digits": {name: digits()[name][0] for name in ("sgd", "optex", "many")},
    }


def _places(method: str) -> list[int]:
    steps, every = (STEPS, EVERY) if method == "mezo" else (STEPS * 2 // 3, EVERY * 2 // 3 + 1)
    return [*range(0, steps, every), steps]


COLOURS = {"mezo": "#0072B2", "sgd": "#D55E00", "adam": "#009E73", "optex": "#0072B2", "many": "#E69F00"}


def draw(found: dict[str, Any]) -> Figure:
    """Fine-tuning, the estimate, and the estimate under OptEx."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    FigureCanvasAgg(figure)
    fine, estimate, rounds = figure.subplots(1, 3)
    names = {"mezo": "MeZO", "sgd": "SGD, backpropagation", "adam": "Adam, backpropagation"}
    for method, run in found["fine"].items():
        label = f"{names[method]}, lr {run['rate']:g}"
        fine.plot(run["passes"], run["loss"], color=COLOURS[method], label=label)
    fine.set(title="fine-tuning on capitals", xlabel="forward passes (backward counts two)")
    fine.set_ylabel("loss held out, nats a character")
    directions, measured, formula = zip(*found["cosines"], strict=True)
    estimate.loglog(directions, formula, color="black", label="1/√(1 + (d + 1)/n)")
    estimate.loglog(directions, [abs(c) for c in measured], "o", color=COLOURS["mezo"], label="measured")
    estimate.set(title="the estimate, d = 4,810", xlabel="directions n", ylabel="cosine with the gradient")
    names = {"sgd": "SGD, 16 directions", "optex": "OptEx over it, N = 4", "many": "SGD, 64 directions"}
    for method, losses in found["digits"].items():
        rounds.semilogy(losses, color=COLOURS[method], label=names[method])
    rounds.set(title="digits by forward passes", xlabel="rounds", ylabel="loss on all digits")
    for place in (fine, estimate, rounds):
        place.legend(frameon=False)
        place.grid(alpha=0.3)
    return figure
